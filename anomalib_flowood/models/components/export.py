# SPDX-License-Identifier: Apache-2.0
"""Exports that describe themselves, do not overwrite those of other models, and are checked against PyTorch."""

from __future__ import annotations

import errno
import logging
import shutil
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from anomalib.deploy.export import CompressionType, ExportType
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from anomalib_flowood.data.prediction import read_as_trained
from anomalib_flowood.exported import description_path, read_description
from anomalib_flowood.files import whole_files
from anomalib_flowood.scores import SCORES

from .export_check import ExportCheckError, check_export, openvino_runtime, raw_onnx_path
from .export_description import describe, identity, write_description
from .export_images import KeepsImages
from .post_processor import ConformalPostProcessor
from .quantisation import backbone_nodes, check_quantisable, normal_images, quantised, raw_scores, with_small_weights
from .single_precision import keep_single_precision
from .weights import CheckedWeights

logger = logging.getLogger(__name__)


_INT8 = (CompressionType.INT8, CompressionType.INT8_PTQ)
"""Kinds of INT8 that anomalib does not try on test images."""


class RawInferenceBatch(NamedTuple):
    """anomalib's :class:`~anomalib.data.InferenceBatch`, whose fields are fixed, and the raw score; for export only."""

    pred_score: Tensor | None = None
    pred_label: Tensor | None = None
    anomaly_map: Tensor | None = None
    pred_mask: Tensor | None = None
    raw_score: Tensor | None = None


class CheckedExport(CheckedWeights, KeepsImages):
    """Mixin for :class:`~anomalib.models.components.AnomalibModule`, to the left of it.

    Each export gets a ``model.json`` beside it (:mod:`anomalib_flowood.exported`), never overwrites that of another
    model, and ends with a check: a few normal images, which a fit takes from the validation set and checkpoints keep,
    go through the exported model and through PyTorch. All files are made in a temporary folder and moved when they are
    complete: an export that fails or is killed leaves an earlier one as it was.
    """

    check_exports: bool = True
    """Whether an export ends with its check."""
    _checkpoint_path: Path | None = None
    _gives_raw_score: bool = False
    _within_openvino: bool = False
    _within_calibration: bool = False
    _backbone_nodes: Set[str] = frozenset()

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
        """Return raw scores, ``(N,)``, for the post-processor's ``p_values``; torch exports are called by it.

        Args:
            images: In [0, 1], ``(N, 3, H, W)``.
        """
        return self.model(self.pre_processor(images) if self.pre_processor else images).pred_score

    def to_torch(self, export_root: Path | str, model_file_name: str = "model") -> Path:
        """Export as :meth:`AnomalibModule.to_torch` does, described and checked, with weights that need no gradients.

        Otherwise the outputs of anomalib's inferencer would need gradients, and could not be converted to NumPy.

        Raises:
            NotFittedError: If the detector was never fitted.
            ValueError: If the export of another model is there, or a weight is NaN.
            ExportCheckError: If the exported model gives other scores.
        """
        self.check_fitted("export")
        self.check_weights()
        target = self._target(export_root, ExportType.TORCH, f"{model_file_name}.pt")
        with self._whole_export(target) as root:
            with _frozen(self):
                path = super().to_torch(root, model_file_name)
            self._describe_and_check(path, target, ExportType.TORCH)
        return target

    def to_onnx(  # type: ignore[override]
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> Path:
        """Export as :meth:`AnomalibModule.to_onnx` does, described and checked; OpenVINO exports call it, too.

        The graph computes a tensor ``raw_score``. It is an output not of ``model.onnx``, since anomalib's inferencer
        passes all outputs to a batch with fixed fields, but of ``model_raw.onnx``, the same graph and the same weights.

        Raises:
            NotFittedError: If the detector was never fitted.
            ValueError: If the export of another model is there, a weight is NaN or has 64 bits, or the score cannot be
                exported.
            ExportCheckError: If the exported model gives other scores.
        """
        self.check_fitted("export")
        self.check_weights()
        self._check_exportable()
        kwargs.setdefault("opset_version", 18)  # What torch writes; converting it down fails on Pad.
        post_processor = self.post_processor
        raw_only = isinstance(post_processor, ConformalPostProcessor) and not post_processor.calibrated
        if raw_only and not self._within_calibration:
            logger.warning("No validation images were scored, so the exported model gives raw scores and no labels.")
        if self._within_openvino:
            kwargs.setdefault("optimize", False)  # OpenVINO does so itself
            return self._graph(export_root, model_file_name, input_size, **kwargs)
        target = self._target(export_root, ExportType.ONNX, f"{model_file_name}.onnx")
        with self._whole_export(target) as root:
            path = self._graph(root, model_file_name, input_size, **kwargs)
            self._describe_and_check(path, target, ExportType.ONNX)
        return target

    def _graph(self, export_root: Path | str, model_file_name: str, input_size: Any, **kwargs: Any) -> Path:
        """Export to ONNX, with a second graph that also returns the raw score."""
        import onnx

        with self._set("_gives_raw_score"), _out_of_place(self):
            path = super().to_onnx(export_root, model_file_name, input_size, **kwargs)
        graph = onnx.load(path, load_external_data=False)
        self._backbone_nodes = backbone_nodes(graph, self.model)
        raw = [output for output in graph.graph.output if output.name == "raw_score"]
        if raw:
            path.replace(raw_onnx_path(path))
            graph.graph.output.remove(raw[0])
            onnx.save(graph, path)
        return path

    def to_openvino(self, export_root: Path | str, model_file_name: str = "model", *args: Any, **kwargs: Any) -> Path:
        """Export as :meth:`AnomalibModule.to_openvino` does, described and checked.

        The model keeps single precision on processors for which OpenVINO prefers bfloat16, unless it is compressed to
        INT8: :mod:`anomalib_flowood.models.components.single_precision`. INT8 is for the backbone alone
        (:mod:`anomalib_flowood.models.components.quantisation`); with a ``datamodule`` the compressed model has a
        calibration of its own.

        The graph computes a tensor ``raw_score``: ``model.add_outputs("raw_score")`` before compiling makes it an
        output.

        Raises:
            ValueError: If the export of another model is there, or INT8 is wanted without a backbone, or without the
                images that a kind of it is fitted to.
            ModuleNotFoundError: If INT8 is wanted, and NNCF is not installed.
            ExportCheckError: If the exported model, in single precision and not compressed, gives other scores.
        """
        # Of anomalib's further arguments, the second is the compression, and the third its data.
        compression = CompressionType(given) if (given := _argument("compression_type", 1, args, kwargs)) else None
        if compression in _INT8:
            check_quantisable(self.model)
        data = _argument("datamodule", 2, args, kwargs)
        if compression in {CompressionType.INT8_PTQ, CompressionType.INT8_ACQ} and data is None:
            msg = (
                f"Compression {compression.value} is fitted to training images: name their folder (flowood export "
                "--data FOLDER), or give a datamodule."
            )
            raise ValueError(msg)
        target = self._target(export_root, ExportType.OPENVINO, f"{model_file_name}.xml")
        recalibrated = compression in _INT8 and data is not None
        with (
            self._set("_within_openvino"),
            self._calibrated_by_export(data, args, kwargs, recalibrated),
            self._whole_export(target) as root,
        ):
            path = super().to_openvino(root, model_file_name, *args, **kwargs)
            if compression in {None, CompressionType.FP16}:
                keep_single_precision(path, half_weights=compression is not None)
            self._describe_and_check(path, target, ExportType.OPENVINO, compression and str(compression.value))
        return target

    @contextmanager
    def _calibrated_by_export(self, data: Any, args: Any, kwargs: Any, wanted: bool) -> Iterator[None]:
        """Within the context, hold a calibration of an export's own scores of validation images, if wanted."""
        post_processor = self.post_processor
        if not wanted or not isinstance(post_processor, ConformalPostProcessor) or not post_processor.calibrated:
            yield
            return
        names = ("calibration", "pixel_calibration", "calibrated_for")
        before = {name: getattr(post_processor, name) for name in names}
        post_processor.forget()  # so that the graph returns raw scores and maps
        try:
            with TemporaryDirectory() as folder, self._set("_within_calibration"):
                runtime = openvino_runtime(super().to_openvino(folder, "model", *args, **kwargs), raw=False)
            if not hasattr(data, "val_data"):  # not set up yet: INT8 weights need no images
                _set_up(self, data)
            post_processor.calibrate(*raw_scores(runtime, normal_images(data.val_dataloader(), runtime.shape)))
            yield
        finally:
            for name, value in before.items():
                setattr(post_processor, name, value)

    def _compress_ov_model(self, model: Any, compression_type: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Compress an OpenVINO model as anomalib does, but only the backbone to INT8."""
        compression = CompressionType(compression_type)
        if compression == CompressionType.INT8:
            return with_small_weights(model, self._backbone_nodes)
        if compression == CompressionType.INT8_PTQ and (data := _argument("datamodule", 0, args, kwargs)) is not None:
            _set_up(self, data)
            shape = [size.get_length() if size.is_static else None for size in model.input(0).partial_shape]
            return quantised(model, self._backbone_nodes, normal_images(data.train_dataloader(), shape))
        return super()._compress_ov_model(model, compression, *args, **kwargs)

    @contextmanager
    def _set(self, name: str) -> Iterator[None]:
        setattr(self, name, True)
        try:
            yield
        finally:
            delattr(self, name)  # the class has it as False

    def _export_root(self, given: Path | str) -> Path:
        """Return where to export to: beside the checkpoint, if anomalib's engine was given no ``export_root``.

        The engine then passes its folder of all runs, where all models would share one place. That folder is recognised
        by the checkpoint, which belongs to one of the runs of this detector's class in it.
        """
        given = Path(given)
        if self._checkpoint_path is None:
            return given
        run = root_beside(self._checkpoint_path)
        within = run.resolve().is_relative_to(given.resolve()) and run.resolve().relative_to(given.resolve()).parts
        return run if within and within[0] == type(self).__name__ else given

    def _target(self, given: Path | str, export_type: ExportType, name: str) -> Path:
        """Return the path of an export; ``ValueError`` if that of another model is there."""
        path = self._export_root(given) / "weights" / export_type.value / name
        described = description_path(path)
        if not path.exists() and not described.exists():
            return path
        remedy = "Give another export_root or model_file_name, or remove what is there."
        if not described.exists():
            msg = f"{path} is there already, and without a {described.name} nobody can tell of what model. {remedy}"
            raise ValueError(msg)
        there = read_description(described)
        if there["identity"] != identity(self):
            msg = f"{path} is the export of another model ({there.get('class')}, by its {described.name}). {remedy}"
            raise ValueError(msg)
        return path

    @contextmanager
    def _whole_export(self, target: Path) -> Iterator[Path]:
        """Let anomalib export to a temporary root, from which all files are moved beside the target at once."""
        with whole_files(target.parent, last=description_path(target).name) as folder, _told_of_room(target):
            yield folder
            made = folder / "weights"
            for file in (made / target.parent.name).iterdir():
                file.replace(folder / file.name)
            shutil.rmtree(made)
            failed = read_description(folder / target.name).get("check", {}).get("passed") is False
            msg = f"{target} gives other scores than PyTorch on normal images: see the line above"
            if failed and target.exists():
                msg += ". The earlier export stays as it was; `--no-check` exports without the check."
                raise ExportCheckError(msg)
        if failed:
            msg += (
                f", and {description_path(target).name}. Do not use it. Report it with the versions that this file "
                "lists; `--no-check` exports without the check."
            )
            raise ExportCheckError(msg)

    def _describe_and_check(
        self, path: Path, target: Path, export_type: ExportType, compression: str | None = None
    ) -> None:
        """Check an export, and write its ``model.json``, whatever the check finds; ``target`` is its final path."""
        device = self.device
        self.eval().to("cpu")  # graphics processors round differently
        try:
            description = describe(self, path, export_type, compression)
            if self.check_exports:
                description["check"] = check_export(self, path, export_type, compression, target)
            write_description(path, description)
        finally:
            self.to(device)

    def _check_exportable(self) -> None:
        if self.dtype == torch.float64:
            msg = (
                "ONNX Runtime and OpenVINO do not convolve in 64 bits, which these weights have (precision 64-true): "
                "call detector.float() first, or export the checkpoint (`--ckpt_path`), which is loaded in 32 bits."
            )
            raise ValueError(msg)
        model = self.model
        if not model.scorer.exportable(model):
            able = [name for name, score in SCORES.items() if score.suits(model) and score.exportable(model)]
            msg = (
                f"The score {model.scorer.name!r} cannot be exported to ONNX or OpenVINO, which know neither "
                f"compressors nor Jacobians. Scores that can: {', '.join(able)}. `flowood score` gives a trained "
                "checkpoint another score; export type torch takes any."
            )
            raise ValueError(msg)


_NO_ROOM = ("unexpected pos", "iostream error", "requested and")
"""What PyTorch, OpenVINO and NumPy say when the disk is full."""


@contextmanager
def _told_of_room(target: Path) -> Iterator[None]:
    """Explain an export that could not be written because the disk is full."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        full = isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
        if not full and not any(said in str(error) for said in _NO_ROOM):
            raise
        msg = f"{target} could not be written whole: is there room on the disk? ({error})"
        raise OSError(msg) from error


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Within the context, no weight of a module needs gradients."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def _out_of_place(module: nn.Module) -> Iterator[None]:
    """Within the context, no activation works in place: PyTorch then traces the same graph in two thirds of the time.

    With a dynamic batch size, each in-place ReLU6 would be decomposed step by step.
    """
    in_place = [part for part in module.modules() if getattr(part, "inplace", False) is True]
    for part in in_place:
        part.inplace = False  # type: ignore[assignment]  # to mypy attributes of any module are tensors or modules
    try:
        yield
    finally:
        for part in in_place:
            part.inplace = True  # type: ignore[assignment]


def root_beside(checkpoint: Path | str) -> Path:
    """Return the ``export_root`` beside a checkpoint: the folder of its run, or its own folder."""
    checkpoint = Path(checkpoint)
    if checkpoint.absolute().parts[-3:-1] != ("weights", "lightning"):
        return checkpoint.parent
    return (checkpoint if len(checkpoint.parts) > 2 else checkpoint.absolute()).parents[2]


def _set_up(detector: CheckedExport, data: Any) -> None:
    """Let a data module read its images as the detector's training images were read."""
    data.setup(TrainerFn.FITTING)  # as trainers call it: anomalib's data modules split anew at any other call
    read_as_trained(detector, data)  # no trainer has it


def _argument(name: str, place: int, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Return an argument that may be given by position or by name."""
    return kwargs.get(name, args[place] if len(args) > place else None)
