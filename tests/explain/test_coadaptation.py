# SPDX-License-Identifier: Apache-2.0
"""Co-adaptation of flows built by hand, whose value is known."""

import math

import pytest
import torch
from FrEIA.framework import SequenceINN
from torch import nn

from anomalib_flowood import flows
from anomalib_flowood.explain import coadaptation, record_couplings, squared_correlation
from anomalib_flowood.explain.coadaptation import _others, _transformed_pixels
from anomalib_flowood.models.pixel_flow import PixelFlowModel

SHAPE = (1, 6, 6)


class Given(nn.Module):
    """An s,t-network that computes what it is told: ``t = shift(fed)`` and a constant raw scale."""

    def __init__(self, shift, raw_scale=0.0):
        super().__init__()
        self.shift, self.raw_scale = shift, raw_scale

    def forward(self, fed):
        shift = self.shift(fed)
        return torch.cat([torch.full_like(shift, self.raw_scale), shift], dim=1)


def by_layer(flow, x):
    with record_couplings(flow) as records:
        flow(x)
    return [squared_correlation(record.x[:, record.changed], record.t[:, record.changed]) for record in records]


def horizontal(*shifts, raw_scale=0.0):
    """Couplings with the horizontal mask: an even layer changes the lower half, an odd one the upper half."""
    flow = SequenceINN(*SHAPE)
    for layer, shift in enumerate(shifts):
        mask = flows.coupling_mask("horizontal", SHAPE, layer)
        flow.append(flows.MaskedCoupling, mask=mask, subnet_constructor=lambda *_, f=shift: Given(f, raw_scale))
    return flow


def swapped(fed):
    """The other half's values, each where its mirror row is."""
    return fed.flip(2)


def test_a_layer_that_knows_what_it_changes_has_1():
    upper = torch.randn(50, 1, 3, 6)
    x = torch.cat([upper, upper.flip(2)], dim=2)  # the lower half mirrors the upper one
    for raw_scale in (0.0, 0.7):
        (value,) = by_layer(horizontal(lambda fed: -swapped(fed), raw_scale=raw_scale), x)
        assert value == pytest.approx(1, abs=1e-6)


def test_two_layers_co_adapt():
    # The first layer writes the upper half into the lower one, y = x2 + x1. The second sees y alone, and subtracting
    # it predicts x1 as well as y does: with equal variances the squared correlation is 1/2.
    x = torch.randn(4000, *SHAPE)
    first, second = by_layer(horizontal(swapped, lambda fed: -swapped(fed)), x)
    assert first == pytest.approx(0, abs=1e-3)
    assert second == pytest.approx(0.5, abs=0.02)


def model_of(flow, shape=SHAPE):
    """A model of images whose flow is given, without the logit in front of it."""
    model = PixelFlowModel(shape[1:], shape[0], subnet="mlp", coupling_layers=1, hidden_channels=1)
    model.flow = flow
    return model.eval()


def test_what_the_image_shows_elsewhere_is_no_coadaptation():
    # One layer, which knows that the halves mirror each other. No layer before has told it anything.
    upper = torch.rand(400, 1, 3, 6)
    numbers = coadaptation(model_of(horizontal(lambda fed: -swapped(fed))), torch.cat([upper, upper.flip(2)], dim=2))
    assert numbers.prediction == pytest.approx([1], abs=1e-5)
    assert numbers.coadaptation == pytest.approx([0], abs=0.01)


@pytest.mark.parametrize("kinds", [2, 5, 64])
def test_images_that_are_sorted_by_what_they_show_are_no_coadaptation(kinds):
    # As files in a folder are: kinds one after the other, or all of them a little brighter than the one before.
    brightness = (torch.arange(64) * kinds // 64 / (kinds - 1)).reshape(64, 1, 1, 1)
    x = (0.2 + 0.6 * brightness + 0.02 * torch.randn(64, *SHAPE)).clamp(0, 1)
    numbers = coadaptation(model_of(horizontal(lambda fed: -swapped(fed))), x)
    assert numbers.prediction[0] > 0.9
    assert numbers.coadaptation[0] < 0.1  # 1 / 64 in expectation


def test_every_image_lends_its_pixels_to_another_one_and_always_to_the_same():
    for count in (2, 3, 64):
        images = torch.arange(count)
        others = _others(images)
        assert torch.equal(others.sort().values, images)
        assert not bool((others == images).any())
        assert torch.equal(others, _others(images))


def test_what_a_layer_before_has_written_is_coadaptation():
    # As above: y = x2 + x1 predicts x1 with a squared correlation of 1/2, whichever image x1 comes from.
    flow = horizontal(swapped, lambda fed: -swapped(fed))
    first, second = coadaptation(model_of(flow), torch.rand(4000, *SHAPE)).coadaptation
    assert first == pytest.approx(0, abs=1e-3)
    assert second == pytest.approx(0.5, abs=0.02)

    # Images whose halves are the same: y = 2 x1 predicts x1 exactly, but half of it is not from the layer before.
    upper = torch.rand(4000, 1, 3, 6)
    numbers = coadaptation(model_of(flow), torch.cat([upper, upper.flip(2)], dim=2))
    assert numbers.prediction[1] == pytest.approx(1, abs=1e-5)
    assert numbers.coadaptation[1] == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(("native", "shape"), [(True, (1, 8, 8)), (False, (1, 7, 9))])
def test_a_cycle_mask_passes_nothing_on_before_the_fourth_layer(native, shape):
    model = PixelFlowModel(shape[1:], 1, native=native, subnet="mlp", coupling_layers=6, hidden_channels=64)
    torch.manual_seed(0)
    for parameter in model.flow.parameters():
        nn.init.normal_(parameter, std=0.2)
    model.eval()
    x = torch.rand(3, *shape)
    other = torch.rand(3, *shape)
    for layer, region in enumerate(_transformed_pixels(model, x[:1])):
        with record_couplings(model.flow) as records:
            model.log_prob(x)
            model.log_prob(torch.where(region, other, x))
        seen, mixed = records[layer], records[6 + layer]
        assert torch.equal(seen.t, mixed.t) == (layer < 3)
        assert not torch.equal(seen.x, mixed.x)
    numbers = coadaptation(model, torch.rand(500, *shape)).coadaptation
    assert max(numbers[:3]) < 0.02


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8)])
@pytest.mark.parametrize(
    "settings",
    [
        {"mask": "cycle", "subnet": "mlp"},
        {"mask": "horizontal", "subnet": "mlp"},
        {"mask": "channel", "subnet": "mlp"},
        {"architecture": "realnvp", "coupling_layers": 2},
    ],
)
def test_pixels_that_a_layer_transforms_are_found_through_squeezes(shape, settings):
    # Couplings are the identity at first: what they transform are the pixels' logits.
    settings = {"coupling_layers": 4, "hidden_channels": 4, **settings}
    model = PixelFlowModel(shape[1:], shape[0], **settings).double().eval()
    x = torch.rand(1, *shape, dtype=torch.float64)
    with record_couplings(model.flow) as records:
        model.log_prob(x)
    (logits,), _ = flows.Logit([shape])([flows.dequantize(x)])
    regions = _transformed_pixels(model, x)
    assert len(regions) == len(records)
    for record, region in zip(records, regions, strict=True):
        expected = logits[0][region].sort().values
        torch.testing.assert_close(record.x[0][record.changed].sort().values, expected)
    # Numbered pixels have left no trace.
    assert model.log_prob(x).isfinite().all()


def test_behind_a_mixing_convolution_there_is_a_prediction_alone():
    model = PixelFlowModel((8, 8), 1, architecture="glow", scales=1, coupling_layers=2, hidden_channels=4).eval()
    numbers = coadaptation(model, torch.rand(4, 1, 8, 8))
    assert all(math.isnan(value) for value in numbers.coadaptation)
    assert numbers.prediction == [0.0, 0.0]  # untrained


@pytest.mark.parametrize("raw_scale", [0.0, 0.7])
def test_shifts_that_do_not_depend_on_the_image_have_0(raw_scale):
    # The mean image alone correlates strongly with x over positions, but tells no image from another.
    mean = torch.linspace(-5, 5, 36).reshape(SHAPE)
    x = torch.randn(30, *SHAPE) + mean
    for bias in (torch.zeros(SHAPE), torch.full(SHAPE, 3.0), -mean):
        (value,) = by_layer(horizontal(lambda fed, bias=bias: bias.expand_as(fed), raw_scale=raw_scale), x)
        assert value == 0


def test_known_correlation_scale_and_bias_do_not_matter():
    x, noise = torch.randn(2, 500, 40, dtype=torch.float64)
    t = -3 * (x + noise) + torch.randn(40)  # squared correlation 1/2
    assert squared_correlation(x, t) == pytest.approx(0.5, abs=0.02)
    assert squared_correlation(x, -x * 1e6) == pytest.approx(1)
    expected = torch.corrcoef(torch.stack([(x - x.mean(0)).flatten(), (t - t.mean(0)).flatten()]))[0, 1] ** 2
    assert squared_correlation(x, t) == pytest.approx(float(expected))


def test_without_a_difference_between_images_there_is_nothing_to_predict():
    assert math.isnan(squared_correlation(torch.randn(1, 4), torch.randn(1, 4)))
    assert squared_correlation(torch.randn(1, 4).expand(5, 4), torch.randn(5, 4)) == 0
    assert math.isnan(squared_correlation(torch.full((3, 4), float("inf")), torch.randn(3, 4)))


@pytest.mark.parametrize(
    ("mask", "native", "shape"),
    [
        ("checkerboard", False, (3, 8, 8)),
        ("cycle", False, (1, 7, 9)),
        ("cycle", True, (1, 7, 9)),
        ("channel", False, (3, 8, 8)),
        ("channel", True, (3, 8, 8)),
    ],
)
def test_records_are_what_the_layers_compute(mask, native, shape):
    flow = flows.pixel_flow(shape, mask=mask, native=native, subnet="mlp", coupling_layers=4, hidden_channels=8)
    for parameter in flow.parameters():
        nn.init.normal_(parameter, std=0.3)
    flow.double()
    x = torch.rand(5, *shape, dtype=torch.float64)
    with record_couplings(flow) as records:
        _, log_det = flow(x)
    total, y = 0, records[0].x
    for layer, record in enumerate(records):
        torch.testing.assert_close(record.x, y)
        torch.testing.assert_close(record.changed, flows.coupling_mask(mask, shape, layer).change)
        for part in (record.s, record.t):
            assert part.shape == x.shape
            assert bool((part[:, ~record.changed] == 0).all())
            assert bool((part[:, record.changed] != 0).all())
        y = (record.x + record.t) * record.s.exp()
        total = total + record.s.flatten(1).sum(1)
    torch.testing.assert_close(flow(x)[0], y)
    _, log_det_logit = flows.Logit([shape])([x])
    torch.testing.assert_close(total + log_det_logit, log_det)
    # Nothing is left behind.
    flow(x)
    assert len(records) == 4


def test_nested_layers_are_found_in_order_of_application():
    inner = SequenceINN(*SHAPE)
    inner.append(flows.QuadrantCoupling, layer=1, subnet_constructor=lambda *_: Given(lambda fed: fed))
    outer = SequenceINN(*SHAPE)
    outer.append(flows.QuadrantCoupling, layer=0, subnet_constructor=lambda *_: Given(lambda fed: fed))
    outer.append(Nested, inner=inner)
    with record_couplings(outer) as records:
        outer(torch.randn(2, *SHAPE))
    corners = [tuple(record.changed[0].nonzero()[0].tolist()) for record in records]
    assert corners == [(0, 3), (3, 3)]


class Nested(nn.Module):
    def __init__(self, dims_in, inner):
        super().__init__()
        self.inner = inner

    def output_dims(self, dims):
        return dims

    def forward(self, x, jac=True, rev=False):
        y, log_det = self.inner(x[0], rev=rev)
        return (y,), log_det
