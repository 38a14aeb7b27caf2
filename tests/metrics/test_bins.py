# SPDX-License-Identifier: Apache-2.0
"""Pixels of large maps are counted in bins; what comes of it is what comes of all pixels."""

import logging
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from anomalib.data import ImageBatch
from anomalib.metrics import AUPRO as AnomalibAUPRO
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.integrate import trapezoid

from anomalib_flowood.metrics import AUPRO, AUROC, auroc, bins

TOLERANCE = 1e-4
"""What docs/metrics.md says."""


def maps_and_masks(count, scale, shift, seed=0, size=(140, 120)):
    generator = torch.Generator().manual_seed(seed)
    maps, masks = torch.randn(count, 1, *size, generator=generator), torch.zeros(count, *size, dtype=torch.bool)
    for number in range(1, count):
        for top, left in torch.randint(0, 100, (3, 2), generator=generator).tolist():
            masks[number, top : top + 9 + number, left : left + 20] = True
    maps[:, 0][masks] += 1.5
    return maps * scale + shift, masks


def fill(metric, maps, masks, at_once=2):
    for some, of_some in zip(maps.split(at_once), masks.split(at_once), strict=True):
        metric.update(
            ImageBatch(image=torch.zeros(len(some), 3, 2, 2), anomaly_map=some, gt_mask=of_some, gt_label=None)
        )
    return metric


def counted(maps, masks):
    counts = bins.no_counts(maps, torch.int64)
    bins.count(counts, maps, masks)
    return bins.occupied(counts)


def counted_overlap(maps, masks):
    counts = bins.no_counts(maps, torch.float64)
    regions = bins.count_overlap(counts, maps, masks)
    return bins.occupied(counts), regions


def of_pixels(cls):
    return cls(fields=["anomaly_map", "gt_mask"], prefix="pixel_", strict=False)


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=2, max_size=50))
def test_bins_ascend_as_values_do(values):
    ordered = torch.tensor(sorted(values))
    found = bins.bins_of(ordered)
    assert (found.diff() >= 0).all()
    assert found.min() >= 0
    assert found.max() < bins.BINS
    assert bins.bins_of(torch.tensor([-0.0])) == bins.bins_of(torch.tensor([0.0]))


@pytest.mark.parametrize(("scale", "shift"), [(1, 0), (0.05, 0.4), (300, 5000)])
def test_counts_give_what_all_pixels_give(monkeypatch, caplog, scale, shift):
    """Also where an image has no region, in batches; within what is said of them."""
    maps, masks = maps_and_masks(5, scale, shift)
    exact = {
        AUROC: auroc(maps[:, 0], masks),
        AUPRO: fill(AnomalibAUPRO(fields=["anomaly_map", "gt_mask"]), maps, masks).compute().item(),
    }
    assert [fill(of_pixels(cls), maps, masks).compute().item() for cls in exact] == list(exact.values())
    monkeypatch.setattr(bins, "MOST_KEPT", 1000)
    caplog.set_level(logging.INFO)
    for cls, want in exact.items():
        caplog.clear()
        metric = fill(of_pixels(cls), maps, masks)
        assert not len(metric.preds)
        assert not len(metric.target)
        assert metric.compute().item() == pytest.approx(want, abs=TOLERANCE)
        (said,) = caplog.messages
        assert said.startswith(f"pixel_{cls.__name__}: ")
        assert "at most" in said
    area, most = bins.auroc_of(counted(maps, masks))
    overlap, most_overlap = bins.aupro_of(*counted_overlap(maps, masks), 0.3)
    assert abs(area - exact[AUROC]) <= most < 1e-3
    assert abs(overlap - exact[AUPRO]) <= most_overlap + 1e-6 < 1e-3  # anomalib's is in single precision


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.floats(0.01, 1))
def test_ties_and_limits(seed, levels, limit):
    """Values that are few, each in a bin of its own: counts lose nothing."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randint(0, levels, (2, 1, 6, 7), generator=generator).float()
    masks = torch.randint(0, 2, (2, 6, 7), generator=generator).bool()
    masks[0, 0, :2] = torch.tensor([True, False])
    assert bins.auroc_of(counted(maps, masks))[0] == pytest.approx(auroc(maps[:, 0], masks), abs=1e-12)
    metric = AnomalibAUPRO(fields=["anomaly_map", "gt_mask"], fpr_limit=limit)
    want = fill(metric, maps, masks).compute().item()
    assert bins.aupro_of(*counted_overlap(maps, masks), limit)[0] == pytest.approx(want, abs=1e-5)


def overlap_of(maps, masks, limit=0.3):
    """By its definition: one threshold after the other."""
    regions = [
        one[labels == number]
        for one, (labels, count) in zip(maps, (ndimage.label(mask, np.ones((3, 3))) for mask in masks), strict=True)
        for number in range(1, count + 1)
    ]
    thresholds = np.unique(maps)[::-1]
    rates = np.array([0, *((maps[~masks] >= least).mean() for least in thresholds)])
    overlap = np.array([0, *(np.mean([(region >= least).mean() for region in regions]) for least in thresholds)])
    inside = rates <= limit
    at_limit = np.interp(limit, [rates[inside][-1], rates[~inside][0]], [overlap[inside][-1], overlap[~inside][0]])
    return trapezoid([*overlap[inside], at_limit], [*rates[inside], limit]) / limit


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.2, 0.5, 0.8]), st.integers(0, 3))
def test_overlap_is_what_it_is_by_definition(seed, share, whole):
    """Also where some images are anomalous all over."""
    numbers = np.random.default_rng(seed)
    masks = numbers.random((4, 5, 6)) < share
    masks[:whole], masks[3, 0, :2] = True, [True, False]
    maps = numbers.normal(size=masks.shape).round(1).astype(np.float32)
    want = overlap_of(maps, masks)
    tensors = torch.from_numpy(maps)[:, None], torch.from_numpy(masks)
    assert fill(of_pixels(AUPRO), *tensors).compute().item() == pytest.approx(want, abs=1e-5)
    assert bins.aupro_of(*counted_overlap(*tensors), 0.3)[0] == pytest.approx(want, abs=1e-9)


@pytest.mark.parametrize("cls", [AUROC, AUPRO])
def test_no_pixel_is_nan(cls):
    maps = torch.rand(2, 1, 8, 8)
    maps[1, 0, 2, 3] = torch.nan
    with pytest.raises(ValueError, match="1 of 128 scores are NaN"):
        fill(of_pixels(cls), maps, torch.zeros(2, 8, 8, dtype=torch.bool))


@pytest.mark.parametrize("cls", [AUROC, AUPRO])
@pytest.mark.parametrize(("anomalous", "missing"), [(False, "no out-of-distribution"), (True, "no in-distribution")])
def test_of_one_kind_only_nothing_is_defined(monkeypatch, cls, anomalous, missing):
    monkeypatch.setattr(bins, "MOST_KEPT", 10)
    metric = fill(of_pixels(cls), torch.rand(2, 1, 8, 8), torch.full((2, 8, 8), anomalous))
    with pytest.warns(UserWarning, match=missing):
        assert math.isnan(metric.compute())
    metric.reset()
    assert not len(metric.counts)


@pytest.mark.parametrize("cls", [AUROC, AUPRO])
def test_processes_bring_counts_together(monkeypatch, cls):
    """As torchmetrics does: what is listed is joined, what is a number is summed."""
    monkeypatch.setattr(bins, "MOST_KEPT", 1000)
    maps, masks = maps_and_masks(6, 1, 0)
    want = fill(of_pixels(cls), maps, masks).compute().item()
    first, second = (fill(of_pixels(cls), maps[part], masks[part]) for part in (slice(0, 2), slice(2, 6)))
    first.counts = torch.cat([*first.counts, *second.counts])
    if cls is AUPRO:
        first.regions = first.regions + second.regions
    assert first.compute().item() == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("cls", [AUROC, AUPRO])
def test_small_maps_among_large_ones_count_too(monkeypatch, cls):
    monkeypatch.setattr(bins, "MOST_KEPT", 1000)
    maps, masks = maps_and_masks(2, 1, 0)
    small, of_small = torch.rand(1, 1, 20, 20), torch.zeros(1, 20, 20, dtype=torch.bool)
    metric = fill(fill(of_pixels(cls), maps, masks), small, of_small)
    found = metric.compute().item()
    monkeypatch.setattr(bins, "MOST_KEPT", 10)
    assert found == fill(fill(of_pixels(cls), maps, masks), small, of_small).compute().item()
    metric._computed = None
    assert metric.compute().item() == found


@pytest.mark.parametrize("cls", [AUROC, AUPRO])
def test_nan_is_refused(monkeypatch, cls):
    monkeypatch.setattr(bins, "MOST_KEPT", 10)
    with pytest.raises(ValueError, match="NaN"):
        fill(of_pixels(cls), torch.full((2, 1, 8, 8), math.nan), torch.zeros(2, 8, 8, dtype=torch.bool))


def test_a_batch_of_no_images_counts_nothing(monkeypatch):
    """As one of several processes may have it."""
    monkeypatch.setattr(bins, "MOST_KEPT", 10)
    for cls in (AUROC, AUPRO):
        metric = of_pixels(cls)
        metric.update(SimpleNamespace(anomaly_map=torch.zeros(0, 8, 8), gt_mask=torch.zeros(0, 8, 8).bool()))
        assert len(metric.counts[0]) == 2 * bins.BINS
        assert not metric.counts[0].any()
