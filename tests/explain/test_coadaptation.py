# SPDX-License-Identifier: Apache-2.0
"""Co-adaptation of flows built by hand, whose value is known."""

import math

import pytest
import torch
from FrEIA.framework import SequenceINN
from torch import nn

from anomalib_flowood import flows
from anomalib_flowood.explain import coadaptation, record_couplings

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
    return [coadaptation(record.x[:, record.changed], record.t[:, record.changed]) for record in records]


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
    assert coadaptation(x, t) == pytest.approx(0.5, abs=0.02)
    assert coadaptation(x, -x * 1e6) == pytest.approx(1)
    expected = torch.corrcoef(torch.stack([(x - x.mean(0)).flatten(), (t - t.mean(0)).flatten()]))[0, 1] ** 2
    assert coadaptation(x, t) == pytest.approx(float(expected))


def test_without_a_difference_between_images_there_is_nothing_to_predict():
    assert math.isnan(coadaptation(torch.randn(1, 4), torch.randn(1, 4)))
    assert coadaptation(torch.randn(1, 4).expand(5, 4), torch.randn(5, 4)) == 0
    assert math.isnan(coadaptation(torch.full((3, 4), float("inf")), torch.randn(3, 4)))


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
