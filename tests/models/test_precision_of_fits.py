# SPDX-License-Identifier: Apache-2.0
"""What is fitted in closed form does not depend on the precision in which PyTorch is asked to multiply."""

import pytest
import torch
from model_helpers import BACKBONE, products
from torch.utils._python_dispatch import TorchDispatchMode

from anomalib_flowood.flows import PositionMoments, PositionWhitening, ShrunkGaussian, Whitening
from anomalib_flowood.models.components.rotations import turns_that_fit
from anomalib_flowood.models.embedding_flow import EmbeddingFlowModel
from anomalib_flowood.models.feature_map_flow.coreset import farthest_first

PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "convolution", "_cdist_forward", "_euclidean_dist"}


class Products(TorchDispatchMode):
    """In which precision numbers of 32 bits are multiplied on the CPU, where it has others."""

    def __init__(self):
        super().__init__()
        self.precisions = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._opname in PRODUCTS and args[0].dtype == torch.float32:
            self.precisions.add(torch.backends.mkldnn.matmul.fp32_precision)
        return func(*args, **kwargs or {})


def maps(count=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 6, 4, 4, generator=generator) + torch.randn(6, 4, 4, generator=generator)


def gaussian(count=40, directions=3):
    found = ShrunkGaussian(96, directions)
    found.fit(maps(count).flatten(1))
    return found


def moments():
    found = PositionMoments(maps())
    return found.mean, found.scatter


def positions():
    layer = PositionWhitening([(6, 4, 4)])
    layer.fit(maps())
    return layer.fit_state()


def layout():
    layer = Whitening([(6, 4, 4)], 5)
    layer.fit(maps())
    return layer.fit_state()


def turned():
    found = gaussian()
    return found.turn(torch.tensor([[4.0, 1, 0], [1, 3, 0], [0, 0, 2]])), found.components


def completed():
    few, found = gaussian(20), gaussian()
    found.join([found.fit_state(), few.fit_state()])
    return found.fit_state()


FITS = {
    "moments of positions": moments,
    "whitening of positions": positions,
    "whitening of layouts": layout,
    "turned directions": turned,
    "completed directions": completed,
    "coreset": lambda: (torch.tensor(farthest_first(maps().flatten(1), 20, 0)),),
    "turns": lambda: (torch.tensor(turns_that_fit((maps(),), 4)[1]),),
}


IN_DOUBLE = {"moments of positions", "whitening of positions"}
"""Those that multiply no numbers of 32 bits at all."""


@pytest.mark.parametrize("name", FITS)
@torch.no_grad()
def test_a_fit_is_the_same_where_products_of_bfloat16_are_asked_for(name):
    expected = FITS[name]()
    try:
        torch.set_float32_matmul_precision("medium")
        with Products() as multiplied:
            found = FITS[name]()
    finally:
        torch.set_float32_matmul_precision("highest")
    assert multiplied.precisions == (set() if name in IN_DOUBLE else {"ieee"})
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@torch.no_grad()
def test_a_fit_of_embeddings_of_several_kinds_is_the_same():
    torch.manual_seed(0)
    small = {"layers": (1, 2), "image_size": (48, 48), "pre_trained": False, "map_dims": 4, "subspace_dim": 9}
    detector = EmbeddingFlowModel(BACKBONE, modes=2, kind_images=10, **small).eval()
    features = detector.extract(products(15).float()[:26])
    assert detector.fit_features(features) == [15, 11]
    expected = {name: value.clone() for name, value in detector.state_dict().items()}
    try:
        torch.set_float32_matmul_precision("medium")
        with Products() as multiplied:
            detector.fit_features(features)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert multiplied.precisions == {"ieee"}
    assert all(torch.equal(value, expected[name]) for name, value in detector.state_dict().items())
