# SPDX-License-Identifier: Apache-2.0
import itertools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest
import torch
from torch import nn

from anomalib_flowood.flows import full_precision
from anomalib_flowood.flows.precision import _exactly


class Product(nn.Linear):
    @full_precision
    def exact(self, x):
        return self(x)

    def within(self, x):
        return self.exact(x), self(x)


def multiplies_in(kind="cuda"):
    backends = torch.backends
    of_device = {
        "cuda": (backends.cudnn.conv, backends.cuda.matmul),
        "cpu": (backends.mkldnn.conv, backends.mkldnn.matmul),
    }
    return tuple(backend.fp32_precision for backend in of_device[kind])


def test_autocast_leaves_a_decorated_method_alone_and_goes_on_behind_it():
    product, x = Product(5, 3), torch.rand(2, 5)
    with torch.autocast("cpu", torch.bfloat16):
        exact, rounded = product.within(x)
    assert (exact.dtype, rounded.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(exact, product(x))
    assert Product.exact.__name__ == "exact"


def test_tf32_is_off_within_and_as_it_was_behind_it():
    before = multiplies_in()
    try:
        torch.set_float32_matmul_precision("high")
        asked = multiplies_in()
        assert asked[1] == "tf32"
        with _exactly("cuda"), _exactly("cuda"):
            assert multiplies_in() == ("ieee", "ieee")
        assert multiplies_in() == asked
        with pytest.raises(KeyError), _exactly("cuda"):
            raise KeyError
        assert multiplies_in() == asked
        with _exactly("cpu"):
            assert multiplies_in() == asked
    finally:
        torch.set_float32_matmul_precision("highest")
    assert multiplies_in()[0] == before[0]


def test_bfloat16_is_off_on_the_cpu_within_and_as_it_was_behind_it():
    product, x = Product(5, 3), torch.rand(2, 5)
    before = multiplies_in("cpu")
    seen = []
    product.register_forward_pre_hook(lambda *_: seen.append(multiplies_in("cpu")))
    expected = product.exact(x)
    try:
        torch.set_float32_matmul_precision("medium")  # what Lightning advises on GPUs
        assert multiplies_in("cpu")[1] == "bf16"
        assert torch.equal(product.exact(x), expected)
        assert seen == [("ieee", "ieee")] * 2
        assert multiplies_in("cpu")[1] == "bf16"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert multiplies_in("cpu")[0] == before[0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks, so that nothing is imported anew")
def test_what_is_set_for_all_devices_behind_it_holds():
    """What it found was inherited, and is not set for good; in a process in which nobody has set any precision."""
    subprocess.run([sys.executable, __file__], check=True)


def set_for_all_devices(kind, asked):
    torch.backends.fp32_precision = asked
    before = multiplies_in(kind)[0]
    with _exactly(kind), _exactly(kind):
        assert multiplies_in(kind) == ("ieee", "ieee")
    assert multiplies_in(kind)[0] == before
    torch.backends.fp32_precision = "ieee"
    assert multiplies_in(kind) == ("ieee", "ieee")
    torch.backends.fp32_precision = "none"
    if asked == "none":
        assert multiplies_in(kind)[0] == before


@pytest.mark.parametrize(("kind", "reduced"), [("cpu", "bf16"), ("cuda", "tf32")])
def test_of_several_threads_the_last_one_puts_it_back(kind, reduced):
    left, seen = Event(), []

    def outlasts(entered):
        with _exactly(kind):
            entered.set()
            left.wait(10)
            seen.append(multiplies_in(kind))

    try:
        torch.set_float32_matmul_precision("medium")
        with ThreadPoolExecutor(1) as threads:
            with _exactly(kind):
                entered = Event()
                other = threads.submit(outlasts, entered)
                assert entered.wait(10)
            left.set()
            other.result()
        assert seen == [("ieee", "ieee")]
        assert multiplies_in(kind)[1] == reduced
    finally:
        torch.set_float32_matmul_precision("highest")


def test_an_exported_graph_knows_nothing_of_it():
    exported = torch.export.export(Exported(), (torch.rand(2, 5),))
    assert not any("autocast" in str(node.target) for node in exported.graph.nodes)


class Exported(nn.Module):
    def __init__(self):
        super().__init__()
        self.product = Product(5, 3)

    def forward(self, x):
        return self.product.exact(x)


if __name__ == "__main__":
    for arguments in itertools.product(["cpu", "cuda"], ["none", "tf32"]):
        child = os.fork()
        if not child:
            set_for_all_devices(*arguments)
            sys.exit()
        assert os.waitpid(child, 0)[1] == 0, arguments
