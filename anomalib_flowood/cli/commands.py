# SPDX-License-Identifier: Apache-2.0
"""The subcommands of ``flowood``: anomalib's, with our benchmark, and what anomalib lacks."""

from __future__ import annotations

import os
import secrets
import sys
import time
from contextlib import nullcontext
from dataclasses import fields
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from anomalib.cli.cli import AnomalibCLI
from anomalib.cli.pipelines import PIPELINE_REGISTRY
from anomalib.data import AnomalibDataModule
from anomalib.deploy import CompressionType, ExportType
from anomalib.engine import Engine
from anomalib.models import AnomalibModule
from jsonargparse import ActionConfigFile, ActionYesNo, ArgumentParser
from jsonargparse.typing import PositiveFloat, PositiveInt, register_type
from lightning import seed_everything
from lightning.fabric import Fabric
from lightning.fabric.utilities.seed import max_seed_value

# Their classes are found by name only once they exist.
import anomalib_flowood.data
import anomalib_flowood.models  # noqa: F401
from anomalib_flowood import __version__
from anomalib_flowood.benchmark import Benchmark, ScoreRecorder, built_at_once, check_seed, find_class
from anomalib_flowood.checks import check_workers
from anomalib_flowood.cli.detector import TRAINING, DetectorCLI
from anomalib_flowood.cli.folders import FolderParser
from anomalib_flowood.cli.results import ConfigurationKeeper, ResultsCLI
from anomalib_flowood.cli.subcommands import SUBCOMMANDS
from anomalib_flowood.data.prediction import ReadAsTrained, read_as_trained
from anomalib_flowood.data.skipping import skipping_arguments
from anomalib_flowood.engine import RunEngine
from anomalib_flowood.files import at_home, check_writable
from anomalib_flowood.models.components import FlowModule, root_beside
from anomalib_flowood.names import check_known
from anomalib_flowood.parsing import FlowoodParser
from anomalib_flowood.report.predictions import PredictionKeeper
from anomalib_flowood.serving import Limits, check_installed

_PATHS = ("ckpt_path", "default_root_dir", "export_root", "output")
_UNREADABLE = 3
"""Exit status of a prediction that left out files which it could not read."""


class FlowoodCLI(DetectorCLI, ResultsCLI):
    """anomalib's command line with our benchmark, and what anomalib lacks.

    Args:
        args: Arguments after the command's name; the process's own if not given.
        run: Whether to run the subcommand.
    """

    @staticmethod
    def init_parser(**kwargs: Any) -> ArgumentParser:
        """Build a parser that takes configuration files, and says in them what wrote them."""
        header = [f"flowood {__version__}, anomalib {version('anomalib')}"]
        parser = FolderParser(dump_header=header, **kwargs)
        parser.add_argument("-c", "--config", action=ActionConfigFile, help="Configuration file, in YAML or JSON.")
        return parser

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

    def _set_install_subcommand(self, action_subcommand: Any) -> None:
        """Add anomalib's ``install`` with a parser of ours, and the subcommands that need no anomalib."""
        parser = FlowoodParser()
        options = ("full", "core", "dev", "loggers", "notebooks", "openvino")
        parser.add_argument("--option", default="full", type=str, choices=options, help="What to install.")
        parser.add_argument("-v", "--verbose", action="store_true", help="Show what is being done.")
        added = {"install": parser}
        for name, known in SUBCOMMANDS.items():
            if known.module:
                added[name] = FlowoodParser()
                import_module(known.module).add_arguments(added[name])
        for name, parser in added.items():
            self.subcommand_parsers[name] = parser
            action_subcommand.add_subcommand(name, parser, help=SUBCOMMANDS[name].description)

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
        print(f"Page: {page}")

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
        check_writable(output.parent)
        detector, data = self.model, arguments["data"]
        check_workers(data)
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
        print(f"Checkpoint: {output}")

    def add_predict_arguments(self, parser: ArgumentParser) -> None:
        """Describe the arguments of ``predict``."""
        super().add_predict_arguments(parser)
        parser.add_argument(
            "--output",
            type=Path,
            default=None,
            help="Folder for predictions.csv and pictures; made if missing. By default a new one in the run's folder.",
        )

    @staticmethod
    def _add_device_argument(parser: ArgumentParser) -> None:
        parser.add_argument(
            "--device",
            type=str,
            default="cpu",
            help="Device of a checkpoint or a torch export, such as cuda.",
        )

    def add_watch_arguments(self, parser: ArgumentParser) -> None:
        """Describe the arguments of ``watch``."""
        parser.add_argument("detector", type=Path, help="Checkpoint, or file or folder of an exported model.")
        parser.add_argument("folder", type=Path, help="Folder that images arrive in.")
        parser.add_argument(
            "--output", type=Path, default=None, help="Table to append to; FOLDER/watch.csv if not given."
        )
        parser.add_argument("--aside", type=Path, default=None, help="Folder that anomalous images are moved to.")
        parser.add_argument("--link", type=bool, default=False, help="Link to them from there instead of moving them.")
        parser.add_argument("--interval", type=PositiveFloat, default=1.0, help="Seconds between two looks.")
        self._add_device_argument(parser)

    def watch(self) -> None:
        """Score what arrives in a folder, until the process is stopped."""
        from anomalib_flowood.inference import load
        from anomalib_flowood.inference.watching import Watcher, only_writer

        arguments = self.config["watch"]
        folder = Path(str(arguments["folder"]))
        table = Path(str(arguments["output"] or folder / "watch.csv"))
        aside = arguments["aside"] and Path(str(arguments["aside"]))
        detector = load(str(arguments["detector"]), arguments["device"])
        with only_writer(table) if folder.is_dir() else nullcontext():  # else the watcher says what is missing
            watcher = Watcher(detector, folder, table, aside, link=arguments["link"])
            print(f"Watching {folder}. Rows: {table}. Stop it with Ctrl-C: it will go on from there.", flush=True)
            while True:
                watcher.look()
                time.sleep(arguments["interval"])

    def add_serve_arguments(self, parser: ArgumentParser) -> None:
        """Describe the arguments of ``serve``."""
        parser.add_argument("detector", type=Path, help="Checkpoint, or file or folder of an exported model.")
        parser.add_argument("--host", type=str, default="127.0.0.1", help="Address to listen on; 0.0.0.0 for all.")
        parser.add_argument("--port", type=int, default=8000, help="Port to listen on; 0 for one that is free.")
        parser.add_argument(
            "--drift_images", type=PositiveInt, default=100, help="Of how many of the last images drift is tested."
        )
        self._add_device_argument(parser)
        parser.add_class_arguments(Limits)

    def serve(self) -> None:
        """Score what is sent over HTTP, until the process is stopped."""
        check_installed()
        from anomalib_flowood.serving.run import serve

        given = self.config["serve"]
        limits = Limits(**{field.name: given[field.name] for field in fields(Limits)})
        model = Path(str(given["detector"]))
        serve(model, given["host"], given["port"], limits, given["drift_images"], given["device"])

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
        super().before_instantiate_classes()
        config = self.config[self.subcommand]
        for name in _PATHS:  # as a configuration file has them; shells expand others
            if str(config.get(name)).startswith("~"):
                config[name] = type(config[name])(at_home(str(config[name])))
        if "export_type" in config:  # which anomalib takes as any text, and looks at when the detector is open
            kind = str(getattr(config["export_type"], "value", config["export_type"])).lower()
            check_known("export type", [kind], [known.value for known in ExportType])
            config["export_type"] = kind
        if "seed_everything" in config:  # anomalib declares the argument, and does nothing with it
            config["seed_everything"] = seed_everything(_seed(config["seed_everything"]), workers=True)

    def instantiate_classes(self) -> None:
        """Build detector and data; no detector waits for a model hub that is away."""
        model = self.config[self.subcommand].get("model")
        with nullcontext() if model is None else built_at_once(find_class("model", model["class_path"])):
            super().instantiate_classes()
        if self.subcommand == "train":  # anomalib heeds an optimizer in `fit` alone
            self._configure_optimizers_method_to_model()

    def instantiate_engine(self) -> None:
        """Build anomalib's engine; where it tests, the raw scores are kept for a report."""
        if self.subcommand in {"test", "fit", "train", "predict"}:
            self.recorder, self.predicted = ScoreRecorder(), PredictionKeeper()
            trainer = self._get(self.config_init, "trainer")
            given = trainer["callbacks"] or []
            ours: list[Any] = [ReadAsTrained(), self.predicted] if self.subcommand == "predict" else [self.recorder]
            if self.subcommand in TRAINING and not trainer["fast_dev_run"]:
                ours.append(ConfigurationKeeper(self._save_configuration))
            trainer["callbacks"] = [*(given if isinstance(given, list) else [given]), *ours]
        super().instantiate_engine()
        self.engine = RunEngine(**self.engine._cache.args)  # anomalib's names its class itself

    def _save_configuration(self, path: Path) -> None:
        """Write what the subcommand was given, as Lightning does."""
        self._parser(self.subcommand).save(
            self.config[self.subcommand], path, skip_none=False, overwrite=True, multifile=False
        )

    def _run_subcommand(self) -> None:
        if self.subcommand in {"test", "predict"} and self.engine.folder is None:
            with self._output_folder() as self.engine.folder:
                self._run_subcommand()
        elif self.subcommand == "predict":
            # Of anomalib's detectors, some score an image by what else is in its batch.
            batch_size = getattr(self.model, "images_at_once", 1)
            arguments = self._prepare_subcommand_kwargs("predict")
            arguments, errors = skipping_arguments(batch_size=batch_size, **arguments)
            wanted = arguments.pop("return_predictions", None) is not False
            self.engine.predict(**arguments, return_predictions=False)
            if self.keep_predictions(self.predicted.batches if wanted else None, errors):
                sys.exit(_UNREADABLE)
        elif self.subcommand == "benchmark":
            Benchmark().run(self.config["benchmark"])
        elif SUBCOMMANDS[self.subcommand].module:
            import_module(SUBCOMMANDS[self.subcommand].module).run(self.config[self.subcommand])
        elif self.subcommand == "export":
            self.export_detector()
        elif SUBCOMMANDS[self.subcommand].ours:  # anomalib would build the data module a second time
            getattr(self, self.subcommand)()
        else:
            around = self.keeping_calibration() if self.subcommand == "validate" else nullcontext()
            with self.told_how_to_go_on() if self.subcommand in TRAINING else around:
                super()._run_subcommand()
            if self.subcommand in {"test", "train"} and not self.recorder.scores.empty:
                self.keep_results()
            if self.subcommand in TRAINING:
                self.say_what_is_next()


def _compression(given: str) -> CompressionType:
    """A kind of compression by its value, or, in capitals, by the name that the enumeration has for it."""
    check_known("compression type", [given.lower()], [kind.value for kind in CompressionType])
    return CompressionType(given.lower())


# jsonargparse knows an enumeration by the names of its members alone, and anomalib documents the values.
register_type(CompressionType, lambda kind: kind.value, _compression)


def _seed(given: bool | int) -> int:
    """The seed that was given, or one that is drawn where none was."""
    if isinstance(given, bool):
        if "LOCAL_RANK" in os.environ and "PL_GLOBAL_SEED" in os.environ:  # a rank that Lightning started: rank 0's
            return int(os.environ["PL_GLOBAL_SEED"])
        return secrets.randbelow(max_seed_value + 1)
    check_seed("seed_everything", given)
    return given
