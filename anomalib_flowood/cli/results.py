# SPDX-License-Identifier: Apache-2.0
"""What a subcommand leaves behind: where it goes, and the record beside it."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from anomalib.cli.cli import AnomalibCLI
from anomalib.data import AnomalibDataModule
from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console

from anomalib_flowood import processes
from anomalib_flowood.benchmark import Results, ScoreRecorder, another_process_ended, measure
from anomalib_flowood.engine import RunEngine, new_folder, run_folder, used_folder
from anomalib_flowood.files import check_writable
from anomalib_flowood.look import from_here, typed
from anomalib_flowood.metrics import DETECTION_METRICS, NOT_DEFINED
from anomalib_flowood.models.components import ConformalPostProcessor
from anomalib_flowood.names import counted
from anomalib_flowood.report.decisions import decide
from anomalib_flowood.report.predictions import keep_predictions
from anomalib_flowood.report.run import write_record
from anomalib_flowood.started import was_started
from anomalib_flowood.trainers import is_trial


class ConfigurationKeeper(Callback):
    """Keeps the configuration in the run's folder, too, where a logger has a folder of its own for it."""

    def __init__(self, save: Callable[[Path], None]) -> None:
        self._save = save

    def setup(self, trainer: Trainer, _: LightningModule, stage: str) -> None:
        """Write it before anything is trained."""
        folder, of_logger = Path(trainer.default_root_dir), trainer.log_dir  # a broadcast: all processes take part
        elsewhere = of_logger is not None and Path(of_logger).resolve() != folder.resolve()
        if stage == TrainerFn.FITTING and elsewhere and trainer.is_global_zero:
            self._save(folder / "config.yaml")


class ResultsCLI(AnomalibCLI):
    """anomalib's command line, whose predictions and tests are kept with what gave them."""

    recorder: ScoreRecorder
    engine: RunEngine

    @contextlib.contextmanager
    def _output_folder(self) -> Iterator[Path]:
        """Where results go: where the user says, or into a new folder of the run that the checkpoint is from."""
        config = self.config[self.subcommand]
        output = config.get("output")
        if output is None:
            root = str(config["default_root_dir"])
            chosen = root != str(self.subcommand_parsers[self.subcommand].get_default("default_root_dir"))
            run = run_folder(self._checkpoint(), Path(root), self.model.name, chosen=chosen)
            made = processes.agreed_folder(self.subcommand, lambda: new_folder(run / self.subcommand))
            # Rank 0 alone writes into it, and takes it away if it is empty.
            with contextlib.nullcontext(made) if was_started() else used_folder(made) as folder:
                yield folder
        elif output.is_file() or output.suffix in {".csv", ".html"}:
            msg = f"--output {output} has to be a folder: several files are written into it."
            raise ValueError(msg)
        else:
            check_writable(output)
            yield output

    def keep_predictions(self, predictions: Any, errors: dict[str, str]) -> bool:
        """Keep what was predicted, and with which settings, by which checkpoint, of which data.

        Returns:
            Whether there are files that a process could not read. Only rank 0 says so: Lightning kills it, whatever it
            is writing, when another process ends with an exit status above 0.
        """
        folder = Path(self.engine.trainer.default_root_dir)
        kept = keep_predictions(predictions, folder, self.model.post_processor, errors)
        if kept is None:
            return False
        data = self._data_label()
        record = self._write_record(folder, data, **kept.findings)
        has = "all settings, and the decision" if "decision" in kept.findings else "all settings"
        print(f"Data: {data}. Checkpoint: {self._checkpoint()}. {record.name} beside them has {has}.")
        return "unreadable" in kept.findings

    def keep_results(self) -> None:
        """Keep the results of a test as a benchmark keeps its own, for ``report``; once for all processes."""
        if processes.rank():
            return
        if is_trial(self.engine.trainer):
            print("Nothing is kept of a trial with fast_dev_run: no checkpoint, and no results.")
            return
        folder = Path(self.engine.trainer.default_root_dir)
        data = self._data_label()
        seed = self.config[self.subcommand]["seed_everything"]
        labels: dict[str, Any] = {"detector": type(self.model).__name__, "data": data, "seed": seed}
        try:
            row = labels | measure(self.recorder) | self._pixel_metrics()
        except ValueError as error:  # the test itself has succeeded
            print(f"There is nothing to report: {error}")
            return
        missing = [name for name in DETECTION_METRICS if math.isnan(row[name])]
        if missing:
            print(f"{', '.join(missing)} are {NOT_DEFINED}: all test images are normal, or all are anomalous.")
        decision = decide(row, self.recorder.scores)
        self._write_record(folder, data, **({"decision": decision.sentence()} if decision else {}))
        Results(folder).add(row, self.recorder.scores.assign(**labels), self.recorder.shown_maps)
        if decision is not None:
            decision.show(Console())
        print(f"As a page: flowood report {typed(folder)}")

    def say_what_is_next(self) -> None:
        """After a training: where its results lie, and what to type to use the detector."""
        kept = self.engine.best_model_path
        if processes.rank() or not kept:
            return
        checkpoint = typed(from_here(kept))
        model = [f"--model {self._detector_name()}"] if self._detector_name() else []
        rest = " ".join([*model, f"--ckpt_path {checkpoint}"])
        root = self.engine.trainer.default_root_dir
        # A resumed training with nothing left to do writes none.
        resumed = not Path(kept).resolve().is_relative_to(Path(root).resolve())
        print(f"{'Results' if resumed else 'Results and checkpoint'}: {from_here(root)}")
        print(f"Next: flowood predict --data NEW_IMAGES {rest}")
        print(f"      flowood export --export_type openvino {rest}")

    def _detector_name(self) -> str:
        """What a command has to be told of the detector, whose checkpoint names it if it is of this package."""
        cls = type(self.model)
        package = cls.__module__.partition(".")[0]
        if package == "anomalib":
            return cls.__name__
        return "" if package == "anomalib_flowood" else f"{cls.__module__}.{cls.__qualname__}"

    @contextlib.contextmanager
    def keeping_calibration(self) -> Iterator[None]:
        """Write a validated detector beside its checkpoint, where its calibration is another one now."""
        given, processor = self._checkpoint(), self.model.post_processor
        if given is None or not isinstance(processor, ConformalPostProcessor):
            yield
            return
        before = processor.calibration.clone()
        yield
        if not processor.calibrated:  # after a trial
            return
        if _alike(before, processor.calibration):
            return  # those of the training's own validation images
        try:
            check_writable(given.parent)
        except PermissionError as error:
            msg = f"The calibration is kept beside {given}, where nothing may be written: validate a copy elsewhere."
            raise ValueError(msg) from error
        output = given.with_name(f"{given.stem}-calibrated.ckpt")
        self.engine.trainer.save_checkpoint(output, weights_only=True)
        if not processes.rank():
            print(f"Checkpoint, with the calibration: {from_here(output)}")
            if len(before):
                images = counted(len(processor.calibration), "normal image")
                print(f"It is based on {images} instead of {len(before)}, and valid if the training had none of them.")

    @contextlib.contextmanager
    def told_how_to_go_on(self) -> Iterator[None]:
        """Where Ctrl-C, SIGTERM or the end of another process end a training, or its test, say how to go on."""
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            self._say_how_to_go_on()
            raise
        except RuntimeError as error:
            if another_process_ended(error):
                self._say_how_to_go_on()
            raise

    def _say_how_to_go_on(self) -> None:
        """Name the checkpoint to go on with, if there is one."""
        kept = self.engine.kept_checkpoint()
        if kept is None or processes.rank():
            return
        path = typed(from_here(kept))
        if self.engine.trainer.state.fn is TrainerFn.TESTING:
            rest = f"The training had ended: `flowood test` tests its detector with --ckpt_path {path}"
        else:
            rest = f"The same command goes on from there with --ckpt_path {path}"
        print(f"Interrupted. {rest}", file=sys.stderr)

    def _pixel_metrics(self) -> dict[str, float]:
        """The metrics of pixels that the detector's evaluator has logged."""
        logged = self.engine.trainer.callback_metrics.items()
        return {name: float(value) for name, value in logged if name.startswith("pixel_")}

    def _checkpoint(self) -> Path | None:
        """The checkpoint by its own name, since ``latest`` may point to another one tomorrow."""
        given = self.config[self.subcommand]["ckpt_path"]
        return None if given is None else Path(str(given)).resolve()

    def _data_label(self) -> str:
        data = self.datamodule
        if isinstance(data, AnomalibDataModule):
            return f"{data.name} {data.category}".strip()
        return str(data) if isinstance(data, str | Path) else type(data).__name__

    def _write_record(self, folder: Path, data: str, **settings: Any) -> Path:
        config = self.config[self.subcommand]
        return write_record(
            folder,
            "predict" if self.subcommand == "predict" else "test",
            detectors={type(self.model).__name__: _plain(config["model"])},
            data={data: _plain(config["data"])},
            settings={"checkpoint": self._checkpoint(), "seed": config["seed_everything"], **settings},
        )


def _alike(before: torch.Tensor, now: torch.Tensor) -> bool:
    """Whether two calibrations are the same but for rounding, which another device does otherwise."""
    if len(before) != len(now):
        return False
    return torch.allclose(before, now.to(before), atol=1e-3 * float(now.max() - now.min()))


def _plain(entry: Any) -> Any:
    """An entry of the configuration as plain data: a class with its arguments, or a path."""
    return entry.as_dict() if isinstance(entry, Namespace) else entry
