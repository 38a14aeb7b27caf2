# SPDX-License-Identifier: Apache-2.0
"""The subcommands of ``flowood``: anomalib's, with our benchmark, and what anomalib lacks."""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from anomalib.cli.cli import AnomalibCLI
from anomalib.cli.pipelines import PIPELINE_REGISTRY
from anomalib.data import AnomalibDataModule
from anomalib.engine import Engine
from anomalib.models import AnomalibModule
from jsonargparse import ActionYesNo, ArgumentParser, Namespace
from lightning import seed_everything
from lightning.fabric import Fabric
from lightning.fabric.utilities.seed import max_seed_value
from rich.console import Console

# Their classes are found by name only once they exist.
import anomalib_flowood.data
import anomalib_flowood.models  # noqa: F401
from anomalib_flowood.benchmark import Benchmark, Results, ScoreRecorder, check_seed, find_class, measure
from anomalib_flowood.cli import UNREADABLE
from anomalib_flowood.data.prediction import ReadAsTrained, read_as_trained, skipping_arguments
from anomalib_flowood.engine import RunEngine, new_folder, run_folder, used_folder
from anomalib_flowood.metrics import DETECTION_METRICS, NOT_DEFINED
from anomalib_flowood.models import FeatureMapFlow
from anomalib_flowood.models.components import FlowModule, root_beside
from anomalib_flowood.predictions import keep_predictions
from anomalib_flowood.report.run import write_record

_PREDICTED_AT_ONCE = 32
"""Images that our detectors predict on at once."""


class FlowoodCLI(AnomalibCLI):
    """anomalib's command line with our benchmark, ``backbone``, and predictions that are kept."""

    @staticmethod
    def init_parser(**kwargs: Any) -> ArgumentParser:
        """Build a parser that calls itself ``flowood`` however it was started."""
        kwargs.setdefault("prog", "flowood")
        return AnomalibCLI.init_parser(**kwargs)

    @staticmethod
    def anomalib_subcommands() -> dict[str, dict[str, str]]:
        """anomalib's subcommands and ours."""  # noqa: D403
        return {
            **AnomalibCLI.anomalib_subcommands(),
            "explain": {"description": "Draw what a fitted flow does to images from inside and outside, on one page."},
            "score": {"description": "Give a trained checkpoint another anomaly score, without training it again."},
            "report": {"description": "Show the results of a benchmark or a test on one page."},
            "backbone": {"description": "Save a timm backbone with its weights into a folder, for use offline."},
        }

    def add_subcommands(self, **kwargs: Any) -> None:
        """Add all subcommands, ``benchmark`` being ours."""
        # anomalib's own dictionary, because its parser and its dispatch both read it there.
        if PIPELINE_REGISTRY is not None:
            PIPELINE_REGISTRY["benchmark"] = Benchmark
        super().add_subcommands(**kwargs)

    def _add_checkpoint_arguments(self, parser: ArgumentParser) -> None:
        """Describe the arguments of ``test``, so that the same files serve, for what works on a checkpoint."""
        self._add_default_arguments_to_parser(parser)
        self._add_trainer_arguments_to_parser(parser, add_optimizer=True, add_scheduler=True)
        # Its class is enough: the checkpoint holds its configuration, and building it might ask for weights.
        parser.add_subclass_arguments(AnomalibModule, "model", fail_untyped=False, required=True, instantiate=False)
        parser.add_subclass_arguments(AnomalibDataModule, "data", required=True)
        self.add_arguments_to_parser(parser)
        parser.add_argument("--ckpt_path", type=Path, required=True, help="Checkpoint of the trained detector.")

    def add_explain_arguments(self, parser: ArgumentParser) -> None:
        """Describe the arguments of ``explain``."""
        self._add_checkpoint_arguments(parser)
        parser.add_argument(
            "--output", type=Path, default=Path("results/explain"), help="Folder to write to; made if missing."
        )
        parser.add_argument("--max_images", type=int, default=64, help="The most images of each set.")

    def explain(self) -> None:
        """Load a detector, explain it and say where the page is."""
        from anomalib_flowood.explain.explanation import check_explainable, explain

        arguments = self.config_init["explain"]
        detector_class = find_class("model", arguments["model"]["class_path"])
        check_explainable(detector_class)
        detector = _load(detector_class, arguments["ckpt_path"])
        device = Fabric(accelerator=arguments["trainer"]["accelerator"], devices=1).device
        page = explain(
            detector.to(device),
            arguments["data"],
            arguments["output"],
            max_images=arguments["max_images"],
        )
        Console().print(f"Page: {page}", markup=False, highlight=False, soft_wrap=True)

    def add_export_arguments(self, parser: ArgumentParser) -> None:
        """Describe anomalib's arguments of ``export``, and whether the export is checked."""
        super().add_export_arguments(parser)
        parser.add_argument(
            "--check",
            action=ActionYesNo(yes_prefix="", no_prefix="no-"),
            default=True,
            help="Compare the exported model with PyTorch on a few normal images.",
        )

    def export_detector(self) -> None:
        """Export beside the checkpoint, unless told where to; check what was exported."""
        arguments = self._prepare_subcommand_kwargs("export")
        checkpoint = arguments["ckpt_path"]
        if isinstance(self.model, FlowModule):
            if checkpoint is not None:
                arguments |= {"model": _load(type(self.model), Path(checkpoint)), "ckpt_path": None}
            arguments["model"].check_exports = self.config["export"]["check"]
            arguments["model"]._checkpoint_path = None  # the place is chosen here
        if checkpoint is not None and arguments["export_root"] is None:
            arguments["export_root"] = root_beside(checkpoint)
            if arguments["model_file_name"] == "model":  # there may be several checkpoints in a folder
                arguments["model_file_name"] = Path(checkpoint).stem
        self.engine.export(**arguments)

    def add_score_arguments(self, parser: ArgumentParser) -> None:
        """Describe the arguments of ``score``."""
        self._add_checkpoint_arguments(parser)
        # Those that train flows of their own need another training.
        parser.add_argument("--score", type=str, required=True, help="Name of the score; see docs/scores.md.")
        parser.add_argument(
            "--output", type=Path, default=None, help="Checkpoint to write; beside the given one if not named."
        )

    def score(self) -> None:
        """Fit a score to a detector's training images, calibrate it on the validation images, save both."""
        arguments = self.config_init["score"]
        name, given = arguments["score"], arguments["ckpt_path"]
        output = arguments["output"] or given.with_name(f"{given.stem}-{name}.ckpt")
        detector_class = find_class("model", arguments["model"]["class_path"])
        if not issubclass(detector_class, FlowModule) or detector_class is FeatureMapFlow:
            msg = f"{detector_class.__name__} takes no other score: PixelFlow and EmbeddingFlow do."
            raise ValueError(msg)
        detector = _load(detector_class, given, score=name)
        data = arguments["data"]
        data.prepare_data()
        data.setup("fit")
        read_as_trained(detector, data)
        device = Fabric(accelerator=arguments["trainer"]["accelerator"], devices=1).device
        detector.to(device).fit_score(data.train_dataloader())
        with TemporaryDirectory() as folder:  # anomalib's engine makes a results folder
            engine = Engine(
                accelerator=arguments["trainer"]["accelerator"], devices=1, default_root_dir=folder, logger=False
            )
            engine.validate(detector, datamodule=data)
            output.parent.mkdir(parents=True, exist_ok=True)
            engine.trainer.save_checkpoint(output, weights_only=True)
        Console().print(f"Checkpoint: {output}", markup=False, highlight=False, soft_wrap=True)

    def add_predict_arguments(self, parser: ArgumentParser) -> None:
        """Describe the arguments of ``predict``."""
        super().add_predict_arguments(parser)
        parser.add_argument(
            "--output",
            type=Path,
            default=None,
            help="Folder for predictions.csv and pictures; made if missing. By default a new one in the run's folder.",
        )

    def add_report_arguments(self, parser: ArgumentParser) -> None:
        """Describe the arguments of ``report``."""
        parser.add_argument("folder", type=Path, help="Folder that `flowood benchmark` or `flowood test` named.")
        parser.add_argument("--output", type=Path, default=None, help="Folder to write to; FOLDER/report if not given.")

    def report(self) -> None:
        """Write the page of a run and say where it is."""
        from anomalib_flowood.report.page import write_report

        arguments = self.config["report"]
        page = write_report(arguments["folder"], arguments["output"])
        Console().print(f"Page: {page}", markup=False, highlight=False, soft_wrap=True)

    def add_backbone_arguments(self, parser: ArgumentParser) -> None:
        """Describe the arguments of ``backbone``."""
        parser.add_argument("name", type=str, help="Name of the backbone, as timm knows it.")
        parser.add_argument("folder", type=Path, help="Folder to write it to; made if missing.")

    def backbone(self) -> None:
        """Save a backbone and say how to use it."""
        from anomalib_flowood.backbones import save_local

        arguments = self.config["backbone"]
        folder = save_local(arguments["name"], Path(str(arguments["folder"])))
        print(f"Saved {arguments['name']}. Use it with\n  backbone: local-dir:{folder}")

    def before_instantiate_classes(self) -> None:
        """Seed everything: a detector draws its weights when it is built. The seed joins the configuration."""
        config = self.config[self.subcommand]
        if "seed_everything" in config:  # anomalib declares the argument, and does nothing with it
            config["seed_everything"] = seed_everything(_seed(config["seed_everything"]), workers=True)
        super().before_instantiate_classes()

    def instantiate_engine(self) -> None:
        """Build anomalib's engine; where it tests, the raw scores are kept for a report."""
        if self.subcommand in {"test", "train", "predict"}:
            self.recorder = ScoreRecorder()
            trainer = self._get(self.config_init, "trainer")
            given = trainer["callbacks"] or []
            ours = ReadAsTrained() if self.subcommand == "predict" else self.recorder
            trainer["callbacks"] = [*(given if isinstance(given, list) else [given]), ours]
        super().instantiate_engine()
        self.engine: RunEngine = RunEngine(**self.engine._cache.args)  # anomalib's names its class itself

    def _run_subcommand(self) -> None:
        if self.subcommand in {"test", "predict"} and self.engine.folder is None:
            with self._output_folder() as self.engine.folder:
                self._run_subcommand()
        elif self.subcommand == "predict":
            # Of anomalib's detectors, some score an image by what else is in its batch.
            batch_size = _PREDICTED_AT_ONCE if isinstance(self.model, FlowModule) else 1
            arguments = self._prepare_subcommand_kwargs("predict")
            arguments, errors = skipping_arguments(batch_size=batch_size, **arguments)
            self.keep_predictions(self.engine.predict(**arguments), errors)
            if errors:
                sys.exit(UNREADABLE)
        elif self.subcommand == "benchmark":
            Benchmark().run(self.config["benchmark"])
        elif self.subcommand == "export":
            self.export_detector()
        elif self.subcommand in {"explain", "score"}:  # anomalib would build the data module a second time
            getattr(self, self.subcommand)()
        else:
            super()._run_subcommand()
            if self.subcommand in {"test", "train"} and not self.recorder.scores.empty:
                self.keep_results()

    @contextlib.contextmanager
    def _output_folder(self) -> Iterator[Path]:
        """Where a test or a prediction writes: where the user says, or to a new folder of the checkpoint's run."""
        config = self.config[self.subcommand]
        output = config.get("output")
        if output is None:
            run = run_folder(self._checkpoint(), Path(str(config["default_root_dir"])), self.model.name)
            with used_folder(new_folder(run / self.subcommand)) as folder:
                yield folder
        elif output.is_file() or output.suffix == ".csv":
            msg = f"--output {output} has to be a folder: predictions.csv is written into it, and pictures if any."
            raise ValueError(msg)
        else:
            yield output

    def keep_predictions(self, predictions: Any, errors: dict[str, str]) -> None:
        """Keep what was predicted, and with which settings, by which checkpoint, of which data."""
        folder = Path(self.engine.trainer.default_root_dir)
        if keep_predictions(predictions, folder, self.model.post_processor, errors) is None:
            return
        data = self._data_label()
        record = self._write_record(folder, data)
        print(f"Data: {data}. Checkpoint: {self._checkpoint()}. {record.name} beside them has all settings.")

    def keep_results(self) -> None:
        """Keep the results of a test as a benchmark keeps its own, for ``report``."""
        folder = Path(self.engine.trainer.default_root_dir)
        data = self._data_label()
        seed = self.config[self.subcommand]["seed_everything"]
        labels: dict[str, Any] = {"detector": type(self.model).__name__, "data": data, "seed": seed}
        try:
            row = labels | measure(self.recorder)
        except ValueError as error:  # the test itself has succeeded
            print(f"There is nothing to report: {error}")
            return
        missing = [name for name in DETECTION_METRICS if math.isnan(row[name])]
        if missing:
            print(f"{', '.join(missing)} are {NOT_DEFINED}: all test images are normal, or all are anomalous.")
        self._write_record(folder, data)
        Results(folder).add(row, self.recorder.scores.assign(**labels))
        print(f"As a page: flowood report {folder}")

    def _checkpoint(self) -> Path | None:
        """The checkpoint by its own name, since ``latest`` may point to another one tomorrow."""
        given = self.config[self.subcommand]["ckpt_path"]
        return None if given is None else Path(str(given)).resolve()

    def _data_label(self) -> str:
        data = self.datamodule
        if isinstance(data, AnomalibDataModule):
            return f"{data.name} {data.category}".strip()
        return str(data) if isinstance(data, str | Path) else type(data).__name__

    def _write_record(self, folder: Path, data: str) -> Path:
        config = self.config[self.subcommand]
        return write_record(
            folder,
            "predict" if self.subcommand == "predict" else "test",
            detectors={type(self.model).__name__: _plain(config["model"])},
            data={data: _plain(config["data"])},
            settings={"checkpoint": self._checkpoint(), "seed": config["seed_everything"]},
        )


def _plain(entry: Any) -> Any:
    """An entry of the configuration as plain data: a class with its arguments, or a path."""
    return entry.as_dict() if isinstance(entry, Namespace) else entry


def _seed(given: bool | int) -> int:
    """The seed that was given, or one that is drawn where none was."""
    if isinstance(given, bool):
        if "LOCAL_RANK" in os.environ and "PL_GLOBAL_SEED" in os.environ:  # a rank that Lightning started: rank 0's
            return int(os.environ["PL_GLOBAL_SEED"])
        return secrets.randbelow(max_seed_value + 1)
    check_seed("seed_everything", given)
    return given


def _load(detector_class: Any, checkpoint: Path, **arguments: Any) -> Any:
    if not checkpoint.is_file():
        msg = f"There is no checkpoint {checkpoint}. `flowood train` writes one, below its results folder."
        raise FileNotFoundError(msg)
    return detector_class.load_from_checkpoint(checkpoint, map_location="cpu", **arguments)
