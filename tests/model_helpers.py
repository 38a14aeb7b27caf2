# SPDX-License-Identifier: Apache-2.0
"""Small images in memory, small detectors, one way to fit them."""

import io
import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from anomalib.data import AnomalibDataModule
from anomalib.engine import Engine
from filelock import FileLock
from PIL import Image
from torch import nn

from anomalib_flowood import CrossDataset, EmbeddingFlow, FeatureMapFlow, PixelFlow, load

BACKBONE = "test_efficientnet"
"""timm's network for tests; without weights it needs no network."""


def write_idx(path: Path, values: np.ndarray) -> None:
    header = bytes([0, 0, 8, values.ndim]) + b"".join(int(n).to_bytes(4, "big") for n in values.shape)
    path.write_bytes(header + values.astype(np.uint8).tobytes())


def idx_folder(folder: Path, texture: str, train: int = 120, test: int = 40, size: int = 12, seed: int = 0) -> Path:
    """A folder of idx files: smooth ramps with noise, or the same with a bright square."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for name, count in (("train", train), ("t10k", test)):
        slope = rng.uniform(0.5, 1, (count, 1, 1))
        images = 100 * slope * np.linspace(0, 1, size)[None, None] + rng.normal(60, 6, (count, size, size))
        if texture == "square":
            images[:, 2:8, 2:8] += 110
        write_idx(folder / f"{name}-images-idx3-ubyte", images.clip(0, 255))
    return folder


def data(tmp_path: Path, **kwargs) -> CrossDataset:
    inside, outside = tmp_path / "ramps", tmp_path / "squares"
    if not inside.exists():
        idx_folder(inside, "plain")
        idx_folder(outside, "square", seed=1)
    sizes = {"train_batch_size": 32, "eval_batch_size": 16, "val_split_ratio": 0.2}  # 24 images calibrate
    return CrossDataset(inside, [outside], **{**sizes, **kwargs})


def pixel_flow(**kwargs) -> PixelFlow:
    small = {"image_size": (12, 12), "channels": 1, "coupling_layers": 4, "hidden_channels": 16, "bottleneck_dim": 3}
    return PixelFlow(**{**small, "max_epochs": 2, **kwargs})


def embedding_flow(**kwargs) -> EmbeddingFlow:
    small = {"backbone": BACKBONE, "pre_trained": False, "image_size": (32, 32), "subspace_dim": 8, "rotations": False}
    return EmbeddingFlow(**{**small, "coupling_layers": 2, "hidden_channels": 16, "max_epochs": 2, **kwargs})


def feature_map_flow(**kwargs) -> FeatureMapFlow:
    small = {"backbone": BACKBONE, "pre_trained": False, "map_layers": (1, 2), "score_layers": (2,)}
    small |= {"image_size": (48, 48), "subspace_dim": 4, "coupling_layers": 2, "hidden_channels": 16}
    small |= {"bottleneck_dim": 3, "bank_size": 100, "rotations": False, "visualizer": False}
    return FeatureMapFlow(**{**small, "max_epochs": 2, **kwargs})


DETECTORS = {"pixel_flow": pixel_flow, "embedding_flow": embedding_flow, "feature_map_flow": feature_map_flow}


TRAINER = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "enable_model_summary": False}


def engine(tmp_path: Path, **kwargs) -> Engine:
    return Engine(default_root_dir=tmp_path / "results", **{**TRAINER, **kwargs})


def products(count: int, seed: int = 0) -> torch.Tensor:
    """Images of two products: bright on the left, and dark with a bar; the second varies more."""
    generator = torch.Generator().manual_seed(seed)
    images = 0.05 * torch.randn(2 * count, 3, 48, 48, generator=generator, dtype=torch.float64) + 0.5
    images[:count, :, :, :24] += 0.4
    images[count:, 0] -= 0.4
    images[count:, :, 20:28] += 0.3 * torch.rand(count, 1, 1, 1, generator=generator, dtype=torch.float64)
    return images.clamp(0, 1)


def products_folder(folder: Path) -> Path:
    """A folder with 40 training images of each of two products, and 12 to test, all normal."""
    for split, count, seed in (("train", 40, 0), ("test", 12, 1)):
        (folder / split / "good").mkdir(parents=True)
        for number, image in enumerate(products(count, seed)):
            pixels = (255 * image.permute(1, 2, 0)).byte().numpy()
            Image.fromarray(pixels).save(folder / split / "good" / f"{number:03}.png")
    return folder


class Case:
    """A fitted detector, its checkpoint, and its exports, each made once.

    Args:
        folder: Of the checkpoint.
        detector: Fitted here.
        module: What to fit it to.
        exports: Folder of the exports, where it is another; processes that fit the same detector share them.
    """

    def __init__(
        self,
        folder: Path,
        detector: nn.Module,
        module: AnomalibDataModule | None = None,
        exports: Path | None = None,
    ) -> None:
        self.folder, self.detector, self.exports = folder, detector, exports or folder
        run = engine(folder)
        run.fit(detector, datamodule=module or data(folder))
        self.checkpoint = Path(run.trainer.checkpoint_callback.best_model_path)
        detector.eval()

    def export(self, export_type: str) -> Path:
        suffix = {"onnx": ".onnx", "openvino": ".xml", "torch": ".pt"}[export_type]
        path = self.exports / "weights" / export_type / f"model{suffix}"
        with FileLock(self.exports / "lock"):
            if not path.exists():
                with _traced_once(self.exports / "traced"), redirect_stdout(io.StringIO()) as said:
                    engine(self.folder).export(self.detector, export_type, self.exports)
                self._said(export_type).write_text(said.getvalue(), encoding="utf-8")
        return path

    def said(self, export_type: str) -> str:
        """What was printed while it was exported."""
        return self._said(export_type).read_text(encoding="utf-8")

    def _said(self, export_type: str) -> Path:
        return self.exports / f"{export_type}.txt"


def check_exports(case: Case, images: np.ndarray) -> None:
    """Compare what ONNX Runtime and OpenVINO say of images, ``(N, 3, H, W)``, with what the checkpoint says."""
    expected = load(case.checkpoint).score(images)
    for kind in ("onnx", "openvino"):
        found = load(case.export(kind)).score(images)
        np.testing.assert_allclose(found.raw_score, expected.raw_score, rtol=1e-3, atol=1e-4)
        assert (found.anomaly_map is None) == (expected.anomaly_map is None)
        if expected.anomaly_map is not None:
            np.testing.assert_allclose(found.anomaly_map, expected.anomaly_map, atol=1e-3)


def in_a_fork(run: Callable[[], object], out: str | Path = os.devnull, errors: str | Path = os.devnull) -> int:
    """Run something in a process that has imported everything already; return the process's number.

    Its status is that of a ``SystemExit``, and 99 after another error.

    Args:
        run: What to run.
        out: File for its output.
        errors: File for its errors.
    """
    child = os.fork()
    if child:
        return child
    status = 99
    try:
        for number, name, file in ((1, "stdout", out), (2, "stderr", errors)):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            setattr(sys, name, open(number, "w", closefd=False))  # noqa: SIM115  # not pytest's
        run()
        status = 0
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:  # whatever is wrong, this process must not go on as a second pytest
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


@contextmanager
def forked_ranks(count: int) -> Iterator[None]:
    """Go on in several processes, in the environment in which Lightning starts them, with everything imported once.

    The first of them waits for the others at the end, and fails if one of them has failed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    os.environ.update(address, WORLD_SIZE=str(count), NODE_RANK="0", LOCAL_RANK="0")
    others: list[int] = []
    for rank in range(1, count):
        others.append(os.fork())
        if not others[-1]:
            others.clear()
            os.environ["LOCAL_RANK"] = str(rank)
            break
    yield
    failed = [other for other in others if os.waitpid(other, 0)[1]]
    assert not failed


@contextmanager
def _traced_once(folder: Path) -> Iterator[None]:
    """Trace a model for ONNX once, which takes seconds: an ONNX export optimises what OpenVINO converts as it is."""
    import onnx_ir
    from onnxscript.optimizer import optimize_ir

    export = torch.onnx.export

    def traced(model: nn.Module, args: tuple, f: str, optimize: bool = True, **kwargs: object) -> None:
        name = Path(f).name
        asked = repr((name, type(model), [(arg.shape, arg.dtype) for arg in args], sorted(kwargs.items())))
        if not (folder / "asked").exists():
            folder.mkdir(exist_ok=True)
            export(model, args, folder / name, optimize=False, **kwargs)
            (folder / "asked").write_text(asked)
        elif (folder / "asked").read_text() != asked:
            export(model, args, f, optimize=optimize, **kwargs)
            return
        graph = onnx_ir.load(folder / name)
        if optimize:
            optimize_ir(graph)
        onnx_ir.save(graph, f, external_data=f"{name}.data")

    with patch.object(torch.onnx, "export", traced):
        yield


def randomise_flow(model: nn.Module, scale: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.flow.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


def compile_model(path: Path, precision: str | None):
    """Compile an OpenVINO model as a user does on a CPU that computes in this precision; `None` for this CPU's own."""
    import openvino

    hint = {} if precision is None else {"INFERENCE_PRECISION_HINT": precision}
    try:
        return openvino.Core().compile_model(str(path), "CPU", hint)
    except RuntimeError:
        if precision != "bf16":
            raise
        return openvino.Core().compile_model(str(path), "CPU")  # this CPU has no bfloat16


def lowered_layers(compiled) -> list[str]:
    """Names of the layers that run in bfloat16."""
    about = [node.get_rt_info() for node in compiled.get_runtime_model().get_ordered_ops()]
    return [str(of["originalLayersNames"].astype(str)) for of in about if of["runtimePrecision"].astype(str) == "bf16"]
