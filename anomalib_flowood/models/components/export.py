# SPDX-License-Identifier: Apache-2.0
"""Exports that say what they are, do not replace each other, and are compared with PyTorch before anybody uses them."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from anomalib.deploy.export import CompressionType, ExportType
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional

from anomalib_flowood.exported import description_path, read_description

from . import export_check
from .post_processor import ConformalPostProcessor
from .single_precision import keep_single_precision

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from anomalib.models.components import AnomalibModule
    from lightning.pytorch import Trainer

    from .flow_model import FlowModel

    _Base = AnomalibModule
else:
    _Base = object

_CHECK_IMAGES = 5
_CHECK_KEY = "anomalib_flowood_check_images"
_VERSIONED = ("anomalib-flowood", "anomalib", "torch", "timm", "onnx", "onnxruntime", "openvino")


class RawInferenceBatch(NamedTuple):
    """anomalib's :class:`~anomalib.data.InferenceBatch`, whose fields are fixed, and the raw score; for export only."""

    pred_score: Tensor | None = None
    pred_label: Tensor | None = None
    anomaly_map: Tensor | None = None
    pred_mask: Tensor | None = None
    raw_score: Tensor | None = None


class CheckedExport(_Base):
    """Mixin for :class:`~anomalib.models.components.AnomalibModule`, to the left of it.

    Each export gets a ``model.json`` beside it (:mod:`anomalib_flowood.exported`), is never written over that of
    another model, and ends with a check: a few normal images, which fits take from their validation set and checkpoints
    keep, go through the exported model and through PyTorch.
    """

    model: FlowModel
    check_images: Tensor | None = None
    """Normal images at the detector's input size, ``(n, 3, H, W)``, uint8; ``None`` in checkpoints of old."""
    check_exports: bool = True
    """Whether an export ends with its check."""
    _checkpoint_path: Path | None = None
    _gives_raw_score: bool = False
    _within_openvino: bool = False

    # -- images for the check --------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Keep a few normal images for checks of later exports."""
        super().on_fit_start()
        trainer: Trainer = self.trainer
        images = list(_normal_images(_image_loader(trainer), _CHECK_IMAGES))
        if images:
            size = list(self.input_size or images[0].shape[-2:])
            resized = [functional.resize(image, size, antialias=True) for image in images]
            self.check_images = (torch.stack(resized).clamp(0, 1) * 255).round().to(torch.uint8).cpu()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the images for checks."""
        super().on_save_checkpoint(checkpoint)
        if self.check_images is not None:
            checkpoint[_CHECK_KEY] = self.check_images

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the images for checks."""
        super().on_load_checkpoint(checkpoint)
        self.check_images = checkpoint.get(_CHECK_KEY)

    # -- export ----------------------------------------------------------------------------------------------------

    def forward(self, batch: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Pre-process, score and post-process images, as :meth:`AnomalibModule.forward` does.

        Args:
            batch: Images in [0, 1], ``(N, 3, H, W)``.
            *args: anomalib's, not used.
            **kwargs: anomalib's, not used.

        Returns:
            anomalib's :class:`~anomalib.data.InferenceBatch`; while a graph is exported, the raw score beside it.
        """
        if not self._gives_raw_score:
            return super().forward(batch, *args, **kwargs)
        raw = self.model(self.pre_processor(batch) if self.pre_processor else batch)
        done = self.post_processor(raw) if self.post_processor else raw
        return done if done.pred_score is raw.pred_score else RawInferenceBatch(*done, raw.pred_score)  # type: ignore[call-arg]

    @torch.no_grad()
    def raw_scores(self, images: Tensor) -> Tensor:
        """Raw scores of images, ``(N,)``, of which the post-processor's ``p_values`` are; for torch exports.

        Args:
            images: In [0, 1], ``(N, 3, H, W)``.
        """
        return self.model(self.pre_processor(images) if self.pre_processor else images).pred_score

    def to_torch(self, export_root: Path | str, model_file_name: str = "model") -> Path:
        """Export as :meth:`AnomalibModule.to_torch` does, described and checked.

        Raises:
            ValueError: If the export of another model is there.
            ExportCheckError: If the exported model gives other scores.
        """
        export_root = self._export_root(export_root)
        self._refuse_to_replace(export_root, ExportType.TORCH, f"{model_file_name}.pt")
        path = super().to_torch(export_root, model_file_name)
        self._describe_and_check(path, ExportType.TORCH)
        return path

    def to_onnx(  # type: ignore[override]
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> Path:
        """Export as :meth:`AnomalibModule.to_onnx` does, described and checked; OpenVINO export passes here too.

        The graph computes a tensor ``raw_score``. It is no output of ``model.onnx``, since anomalib's inferencer hands
        all outputs to a batch with fixed fields, but of ``model_raw.onnx``, the same graph on the same file of weights.

        Raises:
            ValueError: If the export of another model is there.
            ExportCheckError: If the exported model gives other scores.
        """
        import onnx

        if not self._within_openvino:
            export_root = self._export_root(export_root)
            self._refuse_to_replace(export_root, ExportType.ONNX, f"{model_file_name}.onnx")
        with self._set("_gives_raw_score"):
            path = super().to_onnx(export_root, model_file_name, input_size, **kwargs)
        graph = onnx.load(path, load_external_data=False)
        raw = [output for output in graph.graph.output if output.name == "raw_score"]
        if raw:
            path.replace(export_check.raw_onnx_path(path))
            graph.graph.output.remove(raw[0])
            onnx.save(graph, path)
        if not self._within_openvino:
            self._describe_and_check(path, ExportType.ONNX)
        return path

    def to_openvino(self, export_root: Path | str, model_file_name: str = "model", *args: Any, **kwargs: Any) -> Path:
        """Export as :meth:`AnomalibModule.to_openvino` does, described and checked.

        The model keeps single precision on processors for which OpenVINO prefers bfloat16, unless it is compressed to
        INT8: :mod:`anomalib_flowood.models.components.single_precision`.

        The graph computes a tensor ``raw_score``: ``model.add_outputs("raw_score")`` before compiling makes it an
        output.

        Raises:
            ValueError: If the export of another model is there.
            ExportCheckError: If the exported model, in single precision and not compressed, gives other scores.
        """
        export_root = self._export_root(export_root)
        self._refuse_to_replace(export_root, ExportType.OPENVINO, f"{model_file_name}.xml")
        with self._set("_within_openvino"):
            path = super().to_openvino(export_root, model_file_name, *args, **kwargs)
        # anomalib's third argument behind these two is the compression.
        compression = kwargs.get("compression_type") or (args[1] if len(args) > 1 else None)
        if compression in {None, CompressionType.FP16}:
            keep_single_precision(path, half_weights=compression is not None)
        self._describe_and_check(path, ExportType.OPENVINO, compression and str(compression.value))
        return path

    @contextmanager
    def _set(self, name: str) -> Iterator[None]:
        setattr(self, name, True)
        try:
            yield
        finally:
            delattr(self, name)  # the class has it as False

    def _export_root(self, given: Path | str) -> Path:
        """Where to export to: beside the checkpoint, where anomalib's engine was given no ``export_root``.

        The engine then names its folder of all runs, in which every model has the same place. It is told by what
        anomalib puts there: the runs of this detector's class, one of which the checkpoint belongs to.
        """
        given = Path(given)
        if self._checkpoint_path is None:
            return given
        run = root_beside(self._checkpoint_path)
        within = run.resolve().is_relative_to(given.resolve()) and run.resolve().relative_to(given.resolve()).parts
        return run if within and within[0] == type(self).__name__ else given

    def _refuse_to_replace(self, root: Path, export_type: ExportType, name: str) -> None:
        path = root / "weights" / export_type.value / name
        described = description_path(path)
        if not path.exists() and not described.exists():
            return
        remedy = "Give another export_root or model_file_name, or remove what is there."
        if not described.exists():
            msg = f"{path} is there already, and without a {described.name} nobody can tell of what model. {remedy}"
            raise ValueError(msg)
        there = read_description(described)
        if there["identity"] != self._identity():
            msg = f"{path} is the export of another model ({there.get('class')}, by its {described.name}). {remedy}"
            raise ValueError(msg)

    def _identity(self) -> str:
        """A digest of what makes raw scores: class, arguments, pre-processing, weights."""
        digest = hashlib.sha256(json.dumps(self._settings(), sort_keys=True).encode())
        for name, value in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def _settings(self) -> dict[str, Any]:
        pre_processing: dict[str, Any] = getattr(self.pre_processor, "checkpoint_config", dict)()
        return {
            "class": f"anomalib_flowood.{type(self).__name__}",
            "arguments": _plain(dict(self.hparams)),
            "image_size": _plain(self.input_size),
            "pre_processing": _plain(pre_processing.get("transform")),
            "score": self.model.scorer.name,
        }

    def _description(self, path: Path, export_type: ExportType, compression: str | None) -> dict[str, Any]:
        post_processor = self.post_processor
        alpha, threshold, calibration = None, None, []
        if isinstance(post_processor, ConformalPostProcessor):
            alpha = post_processor.alpha
            if post_processor.calibrated:
                threshold, calibration = float(post_processor.image_threshold), post_processor.calibration.tolist()
        outputs = export_check.reference(self, torch.zeros(1, 3, 32, 32))
        raw = "raw_score" if "raw_score" in outputs else "pred_score"
        where = {
            ExportType.TORCH: {"method": "raw_scores"},
            ExportType.ONNX: {"file": export_check.raw_onnx_path(path).name, "output": raw},
            ExportType.OPENVINO: {"file": path.name, "tensor": raw},
        }[export_type]
        return {
            "format": 1,
            "file": path.name,
            "export_type": export_type.value,
            "compression": compression,
            **self._settings(),
            "max_value": getattr(self, "max_value", None),
            "identity": self._identity(),
            "outputs": [name for name in outputs if name != "raw_score"],
            "raw_score": where,
            "alpha": alpha,
            "threshold": threshold,
            "calibration_scores": calibration,
            "versions": _versions(),
        }

    def _describe_and_check(self, path: Path, export_type: ExportType, compression: str | None = None) -> None:
        """Write ``model.json``, then check, so that an export is described whatever the check finds."""
        device = self.device
        self.eval().to("cpu")  # graphics processors round differently
        try:
            description = self._description(path, export_type, compression)
            _write(path, description)
            if self.check_exports:
                description["check"] = self._check(path, export_type, compression)
                _write(path, description)
        finally:
            self.to(device)
        if description.get("check", {}).get("passed") is False:
            msg = (
                f"{path} gives other scores than PyTorch on normal images: see the line above, and "
                f"{description_path(path).name}. Do not use it. Report it with the versions that this file lists; "
                "`--no-check` exports without the check."
            )
            raise export_check.ExportCheckError(msg)

    def _check(self, path: Path, export_type: ExportType, compression: str | None) -> dict[str, Any]:
        """Compare the export with PyTorch; print what was found, and return it for ``model.json``."""
        if self.check_images is None:
            print(
                f"Check of {path}: nothing could be checked, for the detector keeps no normal images: it was fitted by "
                "an earlier version."
            )
            return {"images": 0}
        raw = "raw_score" in export_check.reference(self, self.check_images[:1] / 255)
        load: Any = {
            ExportType.TORCH: export_check.torch_runtime,
            ExportType.ONNX: export_check.onnx_runtime,
            ExportType.OPENVINO: partial(export_check.openvino_runtime, raw=raw),
        }[export_type]
        try:
            found, images, passed = self._compare(load(path))
        except ModuleNotFoundError as error:
            print(f"Check of {path}: nothing could be checked, for {error.name} is not installed.")
            return {"images": 0}
        print(
            f"Check of {path}: largest differences from PyTorch on {images} normal images: "
            f"{export_check.readable(found, images)}."
        )
        result: dict[str, Any] = {"images": images, "bound": export_check.BOUND, "largest_differences": found}
        if compression is not None:
            logger.warning("Compression (%s) changes scores: no bound is asked of it.", compression)
            return result
        if export_type == ExportType.OPENVINO and (default := export_check.openvino_default_precision()) != "f32":
            found, images, kept = self._compare(export_check.openvino_runtime(path, raw=raw, precision=None))
            if not kept:
                logger.warning(
                    "OpenVINO computes in %s on this machine unless it is told otherwise, and some layers of this "
                    "model do not keep single precision: the differences are then %s. Compile it with "
                    '{"INFERENCE_PRECISION_HINT": "f32"}.',
                    default,
                    export_check.readable(found, images),
                )
            result["default_precision"] = {"name": default, "largest_differences": found}
        return {**result, "passed": passed}

    def _compare(self, runtime: export_check.Runtime) -> tuple[dict[str, float], int, bool]:
        """Largest differences of an export from PyTorch, the number of images, and whether the bound is kept."""
        assert self.check_images is not None
        own, found, images, kept = self.check_images.shape[-2:], [], 0, True
        for batch in export_check.batches(self.check_images, runtime.shape):
            got, expected = runtime.run(batch.numpy()), export_check.reference(self, batch)
            found.append(export_check.compare(got, expected))
            images += len(batch)
            pixels = self.model.reads_pixels and batch.shape[-2:] != own
            slack = export_check.rounding(self, batch, expected, pixels=pixels)
            kept &= export_check.agree(export_check.compare(got, expected, slack))
        return export_check.worst(found), images, kept


def root_beside(checkpoint: Path | str) -> Path:
    """Return the ``export_root`` whose ``weights/`` lies beside a checkpoint: that of its run, or its own folder."""
    checkpoint = Path(checkpoint)
    parts = checkpoint.parts[-3:-1]
    return checkpoint.parents[2] if parts == ("weights", "lightning") else checkpoint.parent


def _write(path: Path, description: dict[str, Any]) -> None:
    text = json.dumps(_plain(description), indent=1, allow_nan=False)
    description_path(path).write_text(f"{text}\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    """A value as JSON has it, which knows neither infinities nor tuples."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def _versions() -> dict[str, str]:
    versions = {}
    for name in _VERSIONED:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def _image_loader(trainer: Trainer) -> DataLoader | None:
    """The loader of the validation images, or of the training images where there is no validation."""
    loop = trainer.fit_loop
    for source, limit in (
        (loop.epoch_loop.val_loop._data_source, trainer.limit_val_batches),
        (loop._data_source, trainer.limit_train_batches),
    ):
        loader = source.dataloader() if limit and source.is_defined() else None
        if isinstance(loader, list | tuple):
            loader = loader[0] if loader else None
        if isinstance(loader, DataLoader):
            return loader
    return None


def _normal_images(loader: DataLoader | None, count: int) -> Iterator[Tensor]:
    """Yield so many normal images of a loader, ``(3, H, W)``, without a worker or a random number of the training's."""
    if loader is None:
        return
    # One at a time, since images may differ in size. A loader that takes whole batches out of its data set goes as is.
    single = loader
    if loader.batch_size is not None:
        single = DataLoader(loader.dataset, batch_size=1, collate_fn=loader.collate_fn)
    with torch.random.fork_rng(devices=[]):
        for batch in islice(single, 20 * count):
            labels = batch.gt_label
            normal = torch.ones(len(batch.image), dtype=torch.bool) if labels is None else ~labels.bool()
            for image in batch.image[normal.cpu()][:count]:
                yield image
                count -= 1
            if count <= 0:
                return
