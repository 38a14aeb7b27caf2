# SPDX-License-Identifier: Apache-2.0
"""The subcommands of ``flowood``, for its help, its completion, its parser and its dispatch.

Nothing here is imported from anomalib or PyTorch, which take seconds: ``flowood SUBCOMMAND --help`` is written from
this page alone. ``tests/test_help.py`` holds it to the parsers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

FILE, FOLDER, NUMBER, TEXT = "FILE", "FOLDER", "N", "TEXT"
"""What an argument is, as help writes it; shells complete files and folders."""

WRITTEN = ("--output", "--export_root", "--default_root_dir")
"""Options that say where results go; where a subcommand has several, the first of them does."""


@dataclass(frozen=True)
class Argument:
    """An argument that most users need.

    Attributes:
        name: ``--option``, or the name of a positional argument.
        value: What is given: one of the words above, or a word of its own; ``""`` for a switch.
        text: What it does.
        choices: What is offered for it. Other values may be possible, too.
    """

    name: str
    value: str
    text: str
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Subcommand:
    """What is known of a subcommand without importing anomalib.

    Attributes:
        description: What it does.
        arguments: What most users need of its arguments.
        examples: Command lines without ``flowood`` and the subcommand's name, and what they do.
        ours: Whether anomalib's parser lacks it: :class:`~anomalib_flowood.cli.commands.FlowoodCLI` has a method of its
            name, and ``add_…_arguments``.
        module: The module that runs it, and starts without anomalib: it has ``add_arguments(parser)`` and
            ``run(arguments)``.
        on_checkpoint: Whether it takes the detector from a checkpoint, if one is named.
        more: The rest of its arguments, but for those of detectors, data modules and the trainer: shells complete them.
    """

    description: str
    arguments: tuple[Argument, ...] = ()
    examples: tuple[tuple[str, str], ...] = ()
    ours: bool = False
    module: str = ""
    on_checkpoint: bool = False
    more: tuple[Argument, ...] = ()

    @property
    def names(self) -> set[str]:
        """The names of its arguments."""
        return {argument.name for argument in (*self.arguments, *self.more)}

    @property
    def runs_detectors(self) -> bool:
        """Whether it has the arguments of detectors, data modules and the trainer."""
        return self.on_checkpoint or _EPOCHS in self.arguments


def detectors() -> tuple[str, ...]:
    """The names of our detectors, read from the folders that they are in."""
    files = sorted(Path(__file__).parents[1].glob("models/*/lightning_model.py"))
    return tuple("".join(word.title() for word in file.parent.name.split("_")) for file in files)


_CONFIG = Argument("--config", FILE, "Configuration file in YAML. What follows it on the command line wins.")
_MODEL = Argument("--model", "CLASS", f"Detector: {', '.join(detectors())}, or one of anomalib's.", choices=detectors())
_DATA = Argument(
    "--data",
    "FOLDER|CLASS",
    "Folder of images, or a data module: OneClass, CrossDataset, or one of anomalib's.",
)
_SETTINGS = (
    Argument("--model.ARGUMENT", "VALUE", "Argument of the detector; --model.help CLASS lists them."),
    Argument("--data.ARGUMENT", "VALUE", "Argument of the data module; --data.help CLASS lists them."),
)
_SEED = Argument("--seed_everything", NUMBER, "Seed. One is drawn if none is given; the results name it.")
_EPOCHS = Argument("--trainer.max_epochs", NUMBER, "Epochs of the training; the detector's own number by default.")
_ACCELERATOR = Argument(
    "--trainer.accelerator", "NAME", "Where to compute: auto, cpu, gpu. Default: auto.", choices=("auto", "cpu", "gpu")
)
_ROOT = Argument("--default_root_dir", FOLDER, "Folder of all results. Default: results.")
_CHECKPOINT = Argument("--ckpt_path", FILE, "Checkpoint. It holds the detector's class, settings and weights.")
_RESUMED = Argument("--ckpt_path", FILE, "Checkpoint of an interrupted training, which goes on.")
_ALPHA = Argument(
    "--model.post_processor.alpha",
    "P",
    "Which part of normal images may raise an alarm; the checkpoint's own by default.",
)
_OUTPUT = Argument("--output", FOLDER, "Folder to write to. By default a new one in the run's folder.")
_TRAINED = Argument("detector", f"{FILE}|{FOLDER}", "Checkpoint, or exported model.")
_DEVICE = Argument("--device", "NAME", "Where a checkpoint computes: cuda, say. Default: cpu.")

_PRINTED = Argument("--print_config", "", "Print the configuration, and do nothing.")
_DESCRIBED = (
    Argument("--model.help", "CLASS", "Show the arguments of a detector.", choices=detectors()),
    Argument("--data.help", "CLASS", "Show the arguments of a data module."),
    _PRINTED,
)
_QUIET = Argument("--verbose", "true|false", "Print the results. Default: True.", ("true", "false"))

_TRAINING = (_DATA, _MODEL, *_SETTINGS, _CONFIG, _EPOCHS, _SEED, _ACCELERATOR, _ROOT, _RESUMED)
_TESTING = (_CHECKPOINT, _DATA, *_SETTINGS, _ALPHA, _CONFIG, _SEED, _ACCELERATOR, _ROOT)
_FROM_FOLDER = ("--data ./parts", "FeatureMapFlow, the default, on a folder of images")
_FROM_FILE = ("--config detector.yaml", "as a file says; flowood configs writes examples")
_OF_RUN = "results/…/latest/weights/lightning/model.ckpt"

_OPENVINO = ("output_model", "compress_to_fp16", "version", "input", "output", "extension", "verbose", "dynamo")

SUBCOMMANDS = {
    "train": Subcommand(
        "Fit a detector, then test it.",
        _TRAINING,
        (_FROM_FOLDER, _FROM_FILE, ("--data ./parts --trainer.accelerator cpu --seed_everything 0", "repeatable")),
        more=_DESCRIBED,
    ),
    "fit": Subcommand("Fit a detector.", _TRAINING, (_FROM_FOLDER, _FROM_FILE), more=_DESCRIBED),
    "validate": Subcommand(
        "Run a fitted detector on the validation set.",
        _TESTING,
        ((f"--data ./parts --ckpt_path {_OF_RUN}", "the images that its threshold is from"),),
        on_checkpoint=True,
        more=(_MODEL, *_DESCRIBED, _QUIET),
    ),
    "test": Subcommand(
        "Run a fitted detector on the test set and print its metrics.",
        _TESTING,
        (
            (f"--data ./parts --ckpt_path {_OF_RUN}", "metrics, and results for flowood report"),
            (f"--data ./parts --ckpt_path {_OF_RUN} --model.post_processor.alpha 0.01", "with fewer false alarms"),
        ),
        on_checkpoint=True,
        more=(_MODEL, *_DESCRIBED, _QUIET),
    ),
    "predict": Subcommand(
        "Score images, keep the scores as predictions.csv and show the most anomalous.",
        (
            _CHECKPOINT,
            Argument("--data", "FOLDER|FILE", "Folder of images, an image, or a data module."),
            _OUTPUT,
            _ALPHA,
            _CONFIG,
            _ACCELERATOR,
            _ROOT,
        ),
        ((f"--data ./new_images --ckpt_path {_OF_RUN}", "a table with score, p-value and label of each image"),),
        on_checkpoint=True,
        more=(
            _MODEL,
            *_DESCRIBED,
            _SEED,
            Argument("--return_predictions", "true|false", "Keep what is predicted. Default: True.", ("true", "false")),
        ),
    ),
    "export": Subcommand(
        "Export a fitted detector (torch, ONNX, OpenVINO).",
        (
            _CHECKPOINT,
            Argument("--export_type", "TYPE", "torch, onnx or openvino.", choices=("torch", "onnx", "openvino")),
            Argument("--export_root", FOLDER, "Folder to write to. By default that of the checkpoint's run."),
            Argument("--no-check", "", "Do not compare the exported model with PyTorch."),
        ),
        ((f"--export_type openvino --ckpt_path {_OF_RUN}", "for flowood watch, or OpenVINO itself"),),
        on_checkpoint=True,
        more=(
            *(_CONFIG, _MODEL, _DATA, *_DESCRIBED, _SEED, _ROOT),
            Argument("--check", "", "Compare the exported model with PyTorch; done by default."),
            Argument("--model_file_name", "NAME", "Name of the exported file. By default that of the checkpoint."),
            Argument("--input_size", "[H,W]", "Size of the images that the exported model takes."),
            Argument("--compression_type", "TYPE", "Of OpenVINO.", ("fp16", "int8", "int8_ptq", "int8_acq")),
            Argument("--metric", "CLASS", "What int8_acq holds to."),
            Argument("--metric.help", "CLASS", "Show the arguments of a metric."),
            Argument("--max_drop", "X", "By how much that may fall."),
            Argument("--ov_args", "JSON", "Arguments of OpenVINO's converter."),
            Argument("--onnx_kwargs", "JSON", "Arguments of PyTorch's ONNX exporter."),
            *(Argument(f"--ov_kwargs.{name}", "VALUE", "Argument of OpenVINO's converter.") for name in _OPENVINO),
        ),
    ),
    "benchmark": Subcommand(
        "Compare detectors, ours and anomalib's, on data sets: a table, scores and histograms.",
        (
            Argument("--config", FILE, "Configuration file in YAML: detectors, data and seeds, each with its grid."),
            Argument("--resume", FOLDER, "Folder of an interrupted benchmark, which goes on there."),
        ),
        (
            ("--config configs/benchmark/one_class.yaml", "flowood configs writes this file"),
            ("--resume runs/benchmark/…", "what is finished is not run again"),
        ),
        more=(Argument("--images", NUMBER, "Number of images to list on which each detector is most wrong."),),
    ),
    "explain": Subcommand(
        "Draw what a fitted flow does to images from inside and outside, on one page.",
        (
            _CHECKPOINT,
            _DATA,
            *_SETTINGS,
            _OUTPUT,
            Argument("--max_images", NUMBER, "The most images of each set. Default: 64."),
            _CONFIG,
            _ACCELERATOR,
        ),
        ((f"--data configs/data/cross_dataset.yaml --ckpt_path {_OF_RUN}", "a page, and its pictures"),),
        ours=True,
        on_checkpoint=True,
        more=(_MODEL, *_DESCRIBED, _SEED, _ROOT),
    ),
    "score": Subcommand(
        "Give a trained checkpoint another anomaly score, without training it again.",
        (
            _CHECKPOINT,
            _DATA,
            *_SETTINGS,
            Argument("--score", "NAME", "Name of the score; docs/scores.md has them."),
            Argument("--output", FILE, "Checkpoint to write. By default one beside the given one."),
            _CONFIG,
            _ACCELERATOR,
        ),
        ((f"--score complexity --data configs/data/cross_dataset.yaml --ckpt_path {_OF_RUN}", "a new checkpoint"),),
        ours=True,
        on_checkpoint=True,
        more=(_MODEL, *_DESCRIBED, _SEED, _ROOT),
    ),
    "watch": Subcommand(
        "Score images as they arrive in a folder; set aside what is anomalous.",
        (
            _TRAINED,
            Argument("folder", FOLDER, "Folder that images arrive in."),
            Argument("--output", FILE, "Table to append to. By default watch.csv in the folder."),
            Argument("--aside", FOLDER, "Folder that anomalous images are moved to."),
            Argument("--link", "true|false", "Link to them from there instead. Default: False.", ("true", "false")),
            Argument("--interval", "SECONDS", "Time between two looks. Default: 1.0."),
            _DEVICE,
        ),
        (("weights/openvino ./arriving --aside ./anomalous", "until Ctrl-C; it goes on from there"),),
        ours=True,
        more=(_CONFIG, _PRINTED),
    ),
    "serve": Subcommand(
        "Score images that are sent over HTTP, with a page to drop them on and metrics.",
        (
            _TRAINED,
            Argument("--host", "ADDRESS", "Address to listen on; 0.0.0.0 for all. Default: 127.0.0.1."),
            Argument("--port", NUMBER, "Port to listen on; 0 for one that is free. Default: 8000."),
            Argument("--drift_images", NUMBER, "Of how many of the last images drift is tested. Default: 100."),
            _DEVICE,
        ),
        (("weights/openvino", "then http://127.0.0.1:8000 in a browser"),),
        ours=True,
        more=(
            *(_CONFIG, _PRINTED),
            Argument("--max_mib", "MIB", "The largest request."),
            Argument("--max_megapixels", "MP", "The largest image."),
            Argument("--max_files", NUMBER, "The most images of a request."),
            Argument("--queue", NUMBER, "The most images that wait."),
            Argument("--upload_timeout", "SECONDS", "How long a request may take to arrive."),
            Argument("--answer_timeout", "SECONDS", "How long an answer may take."),
        ),
    ),
    "report": Subcommand(
        "Show the results of a benchmark or a test on one page.",
        (
            Argument("folder", FOLDER, "Folder that flowood benchmark or flowood test named."),
            Argument("--output", FOLDER, "Folder to write to. By default report/ in the folder."),
        ),
        (("runs/benchmark/2026-11-25-15_54_51", "one page that needs no network"),),
        module="anomalib_flowood.cli.reporting",
    ),
    "backbone": Subcommand(
        "Save a timm backbone with its weights into a folder, for use offline.",
        (
            Argument("name", "NAME", "Name of the backbone, as timm knows it."),
            Argument("folder", FOLDER, "Folder to write it to; made if missing."),
        ),
        (("resnet18 backbones/resnet18", "then --model.backbone local-dir:backbones/resnet18"),),
        ours=True,
        more=(_CONFIG, _PRINTED),
    ),
    "configs": Subcommand(
        "Copy the configuration files that come with the package.",
        (
            Argument("folder", FOLDER, "Folder to write them to; made if missing."),
            Argument("--overwrite", "", "Overwrite files that differ."),
        ),
        (("./configs", "for each detector, each kind of data, and benchmarks"),),
        module="anomalib_flowood.cli.configs",
    ),
    "doctor": Subcommand(
        "Show versions, devices and weights at hand, what is missing and how to get it.",
        (Argument("--json", "", "Write what was found as JSON."),),
        (("--json", "for programs; exit status 1 if something that is required is missing"),),
        module="anomalib_flowood.cli.doctor",
    ),
    "install": Subcommand(
        "Install anomalib's optional dependencies.",
        (
            Argument(
                "--option",
                "NAME",
                "Which: full, core, dev, loggers, notebooks or openvino. Default: full.",
                ("full", "core", "dev", "loggers", "notebooks", "openvino"),
            ),
        ),
        (("--option loggers", "TensorBoard and others"),),
        more=(Argument("--verbose", "", "Show what is being done."),),
    ),
}
