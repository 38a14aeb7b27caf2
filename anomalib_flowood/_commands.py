# SPDX-License-Identifier: Apache-2.0
"""The subcommands of ``flowood``: anomalib's, with our benchmark, and what anomalib lacks."""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
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
from anomalib_flowood.benchmark import Benchmark, Results, ScoreRecorder, build, check_seed, measure
from anomalib_flowood.data.prediction import ReadAsTrained, read_as_trained
from anomalib_flowood.data.skipping import skipping_arguments
from anomalib_flowood.engine import RunEngine, new_folder, run_folder, used_folder
from anomalib_flowood.metrics import DETECTION_METRICS, NOT_DEFINED
from anomalib_flowood.models.components import (
    CheckpointError,
    FlowModule,
    known_flows,
    read_checkpoint,
    root_beside,
)
from anomalib_flowood.models.components.capabilities import takes_scores
from anomalib_flowood.models.components.checkpoint_files import CLASS
from anomalib_flowood.models.components.checkpoints import check_version, imported_class, saved_arguments
from anomalib_flowood.report.predictions import keep_predictions
from anomalib_flowood.report.run import write_record
from anomalib_flowood.subcommands import SUBCOMMANDS

_UNREADABLE = 3
"""Exit status of a prediction that left out files which it could not read."""


class FlowoodCLI(AnomalibCLI):
    """anomalib's command line with our benchmark, ``backbone``, and predictions that are kept.

    Where a subcommand works on a checkpoint of this package, that names the detector's class and settings: they are the
    defaults of ``--model``, so that whatever else is given is known to differ, and is refused or applied by
    :meth:`FlowModule.load_from_checkpoint`.

    Args:
        args: Arguments after the command's name; the process's own if not given.
        run: Whether to run the subcommand.
    """

    def __init__(self, args: Sequence[str] | None = None, run: bool = True) -> None:
        self._arguments = list(sys.argv[1:] if args is None else args)
        super().__init__(self._arguments, run)

    @staticmethod
    def init_parser(**kwargs: Any) -> ArgumentParser:
        """Build a parser that calls itself ``flowood`` however it was started."""
        kwargs.setdefault("prog", "flowood")
        return AnomalibCLI.init_parser(**kwargs)

    @staticmethod
    def anomalib_subcommands() -> dict[str, dict[str, str]]:
        """anomalib's subcommands and ours."""  # noqa: D403
        ours = {name: known.description for name, known in SUBCOMMANDS.items() if known.ours}
        return AnomalibCLI.anomalib_subcommands() | {name: {"description": text} for name, text in ours.items()}

    def add_subcommands(self, **kwargs: Any) -> None:
        """Add all subcommands, ``benchmark`` being ours."""
        # anomalib's own dictionary, because its parser and its dispatch both read it there.
        if PIPELINE_REGISTRY is not None:
            PIPELINE_REGISTRY["benchmark"] = Benchmark
        super().add_subcommands(**kwargs)
        for name, parser in self.subcommand_parsers.items():
            if not SUBCOMMANDS[name].on_checkpoint:
                continue
            parser.required_args.discard("model")
            builder: Any = self._build_detector
            parser.add_instantiator(builder, AnomalibModule)  # type: ignore[type-abstract]
        self._take_settings()

    def _take_settings(self) -> None:
        """Make class and settings of the checkpoint, if one is named, the defaults of ``--model``."""
        subcommand = next((argument for argument in self._arguments if argument in self.subcommand_parsers), "")
        path = _named_checkpoint(self._arguments)
        takes_it = subcommand in SUBCOMMANDS and SUBCOMMANDS[subcommand].on_checkpoint
        if path is None or not (takes_it or subcommand in {"fit", "train"}):
            return
        checkpoint = read_checkpoint(path)
        if takes_it and CLASS in checkpoint:
            self.subcommand_parsers[subcommand].set_defaults({"model": saved_arguments(path, checkpoint)})
        else:  # a resumed training reads it only when everything is built
            check_version(path, checkpoint, imported_class(checkpoint))

    def _build_detector(self, detector: type, *args: Any, **kwargs: Any) -> Any:
        """Open the checkpoint where one is named; else build a new detector."""
        config = self.config[self.subcommand]
        path = config.get("ckpt_path")
        if self.subcommand == "explain":
            from anomalib_flowood.explain.explanation import check_explainable

            check_explainable(detector)
        elif self.subcommand == "score":
            if not issubclass(detector, FlowModule) or not takes_scores(detector):
                able = ", ".join(known_flows(takes_scores))
                msg = f"{detector.__name__} takes no other score. Detectors that do: {able}."
                raise ValueError(msg)
            kwargs["score"] = config["score"]
        if path is None:
            return detector(*args, **kwargs)
        if issubclass(detector, FlowModule):
            return detector.load_from_checkpoint(path, map_location="cpu", **kwargs)
        writer = read_checkpoint(path).get(CLASS)
        if writer is not None:
            raise CheckpointError(path, f"was written by {writer}, so {detector.__name__} cannot load it.")
        return detector(*args, **kwargs)

    def _add_checkpoint_arguments(self, parser: ArgumentParser) -> None:
        """Describe the arguments of ``test``, so that the same files serve, for what works on a checkpoint."""
        self._add_default_arguments_to_parser(parser)
        self._add_trainer_arguments_to_parser(parser, add_optimizer=True, add_scheduler=True)
        parser.add_subclass_arguments(AnomalibModule, "model", fail_untyped=False)
        parser.add_subclass_arguments(AnomalibDataModule, "data", required=True)
        self.add_arguments_to_parser(parser)
        parser.add_argument("--ckpt_path", type=Path, required=True, help="Checkpoint of the trained detector.")

    def add_explain_arguments(self, parser: ArgumentParser) -> None:
        """Describe the arguments of ``explain``."""
        self._add_checkpoint_arguments(parser)
        parser.add_argument(
            "--output",
            type=Path,
            default=None,
            help="Folder to write to; made if missing. By default a new one in the run's folder.",
        )
        parser.add_argument("--max_images", type=int, default=64, help="The most images of each set.")

    def explain(self) -> None:
        """Load a detector, explain it and say where the page is."""
        from anomalib_flowood.explain.explanation import explain

        arguments = self.config_init["explain"]
        device = Fabric(accelerator=arguments["trainer"]["accelerator"], devices=1).device
        with self._output_folder() as folder:
            page = explain(self.model.to(device), arguments["data"], folder, max_images=arguments["max_images"])
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
            arguments["ckpt_path"] = None  # it is open: the engine would load it anew, without what was changed
            self.model.check_exports = self.config["export"]["check"]
            self.model._checkpoint_path = None  # the place is chosen here
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
        detector, data = self.model, arguments["data"]
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
        page = write_report(arguments["folder"], partial(build, "data"), arguments["output"])
        Console().print(f"Page: {page}", markup=False, highlight=False, soft_wrap=True)

    def add_backbone_arguments(self, parser: ArgumentParser) -> None:
        """Describe the arguments of ``backbone``."""
        parser.add_argument("name", type=str, help="Name of the backbone, as timm knows it.")
        parser.add_argument("folder", type=Path, help="Folder to write it to; made if missing.")

    def backbone(self) -> None:
        """Save a backbone and say how to use it."""
        from anomalib_flowood.features import LOCAL_DIR, save_local

        arguments = self.config["backbone"]
        folder = save_local(arguments["name"], Path(str(arguments["folder"])))
        print(f"Saved {arguments['name']}. Use it with\n  backbone: {LOCAL_DIR}{folder}")

    def before_instantiate_classes(self) -> None:
        """Seed everything: a detector draws its weights when it is built. The seed joins the configuration."""
        config = self.config[self.subcommand]
        if SUBCOMMANDS[self.subcommand].on_checkpoint and config["model"] is None:  # which the parser lets pass
            raise _no_detector(self.subcommand, config["ckpt_path"])
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
            batch_size = getattr(self.model, "images_at_once", 1)
            arguments = self._prepare_subcommand_kwargs("predict")
            arguments, errors = skipping_arguments(batch_size=batch_size, **arguments)
            self.keep_predictions(self.engine.predict(**arguments), errors)
            if errors:
                sys.exit(_UNREADABLE)
        elif self.subcommand == "benchmark":
            Benchmark().run(self.config["benchmark"])
        elif self.subcommand == "export":
            self.export_detector()
        elif SUBCOMMANDS[self.subcommand].ours:  # anomalib would build the data module a second time
            getattr(self, self.subcommand)()
        else:
            super()._run_subcommand()
            if self.subcommand in {"test", "train"} and not self.recorder.scores.empty:
                self.keep_results()

    @contextlib.contextmanager
    def _output_folder(self) -> Iterator[Path]:
        """Where results go: where the user says, or into a new folder of the run that the checkpoint is from."""
        config = self.config[self.subcommand]
        output = config.get("output")
        if output is None:
            run = run_folder(self._checkpoint(), Path(str(config["default_root_dir"])), self.model.name)
            with used_folder(new_folder(run / self.subcommand)) as folder:
                yield folder
        elif output.is_file() or output.suffix in {".csv", ".html"}:
            msg = f"--output {output} has to be a folder: several files are written into it."
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


def _no_detector(subcommand: str, path: str | Path | None) -> ValueError:
    if path is None:
        return ValueError(f"There is no detector to {subcommand}: name its checkpoint (--ckpt_path).")
    what = "was not written by a detector of anomalib_flowood: name the class that wrote it, too (--model)."
    return CheckpointError(path, what)


def _named_checkpoint(arguments: Sequence[str]) -> str | None:
    """Return the checkpoint that a command line or a configuration file in it names; the last one counts."""
    path = None
    for number, argument in enumerate(arguments):
        option, given, value = argument.partition("=")
        if not given and number + 1 < len(arguments):
            value = arguments[number + 1]
        if option == "--ckpt_path":
            path = value
        elif option in {"-c", "--config"} and Path(value).is_file():
            try:
                config = yaml.safe_load(Path(value).read_text(encoding="utf-8"))
            except (yaml.YAMLError, UnicodeDecodeError):  # the parser says what is wrong
                continue
            if isinstance(config, dict):
                path = config.get("ckpt_path") or path
    return path
