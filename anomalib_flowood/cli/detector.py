# SPDX-License-Identifier: Apache-2.0
"""The detector that a subcommand works on: opened from the checkpoint that the command line names, or built."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from anomalib.cli.cli import AnomalibCLI
from anomalib.models import AnomalibModule
from jsonargparse import ArgumentParser

from anomalib_flowood import models
from anomalib_flowood.benchmark import find_class
from anomalib_flowood.cli.folders import with_data_modules, without_comments
from anomalib_flowood.cli.subcommands import SUBCOMMANDS
from anomalib_flowood.configuration import read_configuration
from anomalib_flowood.data import CrossDataset
from anomalib_flowood.data.datamodules import LAYOUTS_OF_PARTS
from anomalib_flowood.models.components import CheckpointError, FlowModule, known_flows, read_checkpoint
from anomalib_flowood.models.components.capabilities import takes_scores
from anomalib_flowood.models.components.checkpoint_files import CLASS
from anomalib_flowood.models.components.checkpoints import check_version, imported_class, saved_arguments
from anomalib_flowood.models.components.restoring import scored_anew
from anomalib_flowood.parsing import said_by_another, whole_numbers_first

TRAINING = ("fit", "train")
"""Subcommands that train."""


class DetectorCLI(AnomalibCLI):
    """anomalib's command line, where a checkpoint is enough.

    Where a subcommand works on a checkpoint of this package, or a training goes on from one, that names the detector's
    class and settings: they are the defaults of ``--model``, so that whatever else is given is known to differ, and is
    refused or applied by :meth:`FlowModule.load_from_checkpoint`. Where nothing names a detector to train, it is the
    default one.

    Args:
        args: Arguments after the command's name; the process's own if not given.
        run: Whether to run the subcommand.
    """

    def __init__(self, args: Sequence[str] | None = None, run: bool = True) -> None:
        given = without_comments(sys.argv[1:] if args is None else args)
        self._arguments = _with_detector(with_data_modules(given))
        super().__init__(self._arguments, run)

    def add_subcommands(self, **kwargs: Any) -> None:
        """Add anomalib's subcommands, to which a checkpoint says what the detector is."""
        super().add_subcommands(**kwargs)
        for name, parser in self.subcommand_parsers.items():
            if not SUBCOMMANDS[name].on_checkpoint:
                continue
            parser.required_args.discard("model")
            builder: Any = self._build_detector
            parser.add_instantiator(builder, AnomalibModule)  # type: ignore[type-abstract]
        self._take_settings()

    @staticmethod
    def _add_trainer_arguments_to_parser(
        parser: ArgumentParser, add_optimizer: bool = False, add_scheduler: bool = False
    ) -> None:
        """Add the trainer's arguments, of which those that count batches take whole numbers for such."""
        AnomalibCLI._add_trainer_arguments_to_parser(parser, add_optimizer, add_scheduler)
        whole_numbers_first(parser)

    def before_instantiate_classes(self) -> None:
        """Refuse to go on without a detector, or without images."""
        config = self.config[self.subcommand]
        if SUBCOMMANDS[self.subcommand].on_checkpoint and config["model"] is None:  # which the parser lets pass
            raise _no_detector(self.subcommand, config["ckpt_path"])
        if self.subcommand in {*TRAINING, "validate", "test"} and config["data"] is None:
            msg = f"There are no images to {self.subcommand} on: name their folder (--data FOLDER). {LAYOUTS_OF_PARTS}"
            raise ValueError(msg)
        self._check_trainer()
        super().before_instantiate_classes()

    def _check_trainer(self) -> None:
        """Refuse what is asked of the trainer, and is decided elsewhere."""
        config = self.config[self.subcommand]
        if config.get("lr_scheduler") and not config.get("optimizer"):  # which anomalib would pass over
            msg = "A learning rate scheduler (lr_scheduler) needs an optimizer: name one, too (--optimizer Adam)."
            raise ValueError(msg)
        trainer = config.get("trainer") or {}
        if trainer.get("enable_checkpointing") is False and not trainer.get("barebones"):
            msg = "A checkpoint is always kept, in the run's folder: leave enable_checkpointing of the trainer out."
            raise ValueError(msg)
        for given in _given(self._arguments, "trainer"):
            root = given.get("default_root_dir") if isinstance(given, dict) else None
            if root is not None and str(root) != str(config["default_root_dir"]):  # which the parser would pass over
                raise ValueError(said_by_another("trainer.default_root_dir", "default_root_dir", root))

    def _take_settings(self) -> None:
        """Make class and settings of the checkpoint, if one is named, the defaults of ``--model``."""
        subcommand = next((argument for argument in self._arguments if argument in self.subcommand_parsers), "")
        path = _named_checkpoint(self._arguments)
        takes_it = subcommand in SUBCOMMANDS and SUBCOMMANDS[subcommand].on_checkpoint
        if path is None or not (takes_it or subcommand in TRAINING):
            return
        _import_named(self._arguments)
        checkpoint = read_checkpoint(path)
        if CLASS in checkpoint:
            self.subcommand_parsers[subcommand].set_defaults({"model": saved_arguments(path, checkpoint)})
        else:
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
            with scored_anew() if self.subcommand == "score" else nullcontext():
                return detector.load_from_checkpoint(path, map_location="cpu", **kwargs)
        writer = read_checkpoint(path).get(CLASS)
        if writer is not None:
            raise CheckpointError(path, f"was written by {writer}, so {detector.__name__} cannot load it.")
        return detector(*args, **kwargs)


def _no_detector(subcommand: str, path: str | Path | None) -> ValueError:
    if path is None:
        return ValueError(f"There is no detector to {subcommand}: name its checkpoint (--ckpt_path).")
    what = "was not written by a detector of anomalib_flowood: name the class that wrote it, too (--model)."
    return CheckpointError(path, what)


def _with_detector(arguments: list[str]) -> list[str]:
    """Name the default detector in a command line that trains, and names none, nor a checkpoint that says which."""
    subcommand = next((argument for argument in arguments if argument in SUBCOMMANDS), "")
    if subcommand not in TRAINING or any(_given(arguments, "model")):
        return arguments
    path = _named_checkpoint(arguments)
    if path is not None and CLASS in read_checkpoint(path):
        return arguments
    *_, data = None, *_given(arguments, "data")
    if isinstance(data, str) and Path(data).is_file():  # the configuration of a data module
        data = read_configuration(data)
    name = data.get("class_path") if isinstance(data, dict) else data
    of_sets = str(name).rpartition(".")[2] == CrossDataset.__name__
    detector = models.DEFAULT_OF_WHOLE_IMAGES if of_sets else models.DEFAULT_DETECTOR
    # Not a default of the parser's, whose arguments another class would inherit.
    after = arguments.index(subcommand) + 1
    return [*arguments[:after], "--model", f"{models.__name__}.{detector}", *arguments[after:]]


def _named_checkpoint(arguments: Sequence[str]) -> str | None:
    """Return the checkpoint that a command line names; the last one counts."""
    return next((str(path) for path in reversed([*_given(arguments, "ckpt_path")]) if path), None)


def _import_named(arguments: Sequence[str]) -> None:
    """Import the class that a command line names with its module, which may have written the checkpoint."""
    for given in _given(arguments, "model"):
        model = read_configuration(given) if isinstance(given, str) and Path(given).is_file() else given
        name = str(model.get("class_path") if isinstance(model, dict) else model)
        if "." in name and all(part.isidentifier() for part in name.split(".")):
            with suppress(ValueError):  # of a class that is not there, as the parser will say
                find_class("model", name)


def _given(arguments: Sequence[str], name: str) -> Iterator[Any]:
    """What a command line, and configuration files in it, give an option."""
    for number, argument in enumerate(arguments):
        option, given, value = argument.partition("=")
        if not given and number + 1 < len(arguments):
            value = arguments[number + 1]
        if option == f"--{name}":
            yield value
        elif option in {"-c", "--config"} and Path(value).is_file():
            config = read_configuration(value)
            if isinstance(config, dict):
                yield config.get(name)
