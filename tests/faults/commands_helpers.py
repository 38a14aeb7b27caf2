# SPDX-License-Identifier: Apache-2.0
"""Every command on small data in a process of its own, and what has to be true of the files that it leaves."""

import contextlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from model_helpers import idx_folder
from PIL import Image

import anomalib_flowood.cli.commands  # so that no child imports it
import anomalib_flowood.explain.explanation
import anomalib_flowood.inference.watching
import anomalib_flowood.report.page  # noqa: F401
from anomalib_flowood.cli import main
from anomalib_flowood.exported import description_path
from anomalib_flowood.inference import load
from anomalib_flowood.models.components.checkpoint_files import read_checkpoint

DATA = """--data CrossDataset --data.in_distribution=ramps --data.out_of_distribution=[squares]
    --data.val_split_ratio=0.2 --trainer.accelerator=cpu --trainer.enable_progress_bar=false --seed_everything=0"""
MODEL = """--model PixelFlow --model.image_size=[12,12] --model.channels=1 --model.coupling_layers=4
    --model.hidden_channels=16 --model.bottleneck_dim=3"""
BENCHMARK = {
    "accelerator": "cpu",
    "benchmark": {
        "seed": {"grid": [0, 1]},
        "trainer": {"max_epochs": 1},
        "model": {
            "class_path": "PixelFlow",
            "init_args": {"image_size": [12, 12], "channels": 1, "coupling_layers": 4, "hidden_channels": 16},
        },
        "data": {
            "class_path": "CrossDataset",
            "init_args": {"in_distribution": "ramps", "out_of_distribution": ["squares"], "val_split_ratio": 0.2},
        },
    },
}
COMMANDS = {
    "train": f"train {MODEL} {DATA} --trainer.max_epochs=2",
    "test": f"test --ckpt_path model.ckpt {DATA}",
    "predict": "predict --ckpt_path model.ckpt --data arriving --output predicted --trainer.accelerator=cpu",
    "validate": f"validate --ckpt_path model.ckpt {DATA}",
    "score": f"score --ckpt_path model.ckpt --score typicality {DATA}",
    "export": "export --ckpt_path model.ckpt --export_type torch --export_root exported",
    "explain": f"explain --ckpt_path model.ckpt --output explained --max_images=8 {DATA}",
    "benchmark": "benchmark --config benchmark.yaml",
    "report": "report run --output page",
    "watch": "watch model.ckpt arriving --output watched.csv --aside anomalous --link=true --interval=0.05",
}
FRESH = {"report"}
"""Commands whose process starts anew: what draws charts does not outlive a fork of a process that has drawn some."""
ENDLESS = {"watch": 5.0}
"""Commands that run until they are stopped, and for how many seconds to watch them."""

_running: dict[int, tuple[int, Path]] = {}
_said: dict[Path, str] = {}


def world(folder: Path) -> Path:
    """Make a folder with all that the commands need: images, a checkpoint, a benchmark's run, an export."""
    idx_folder(folder / "ramps", "plain")
    idx_folder(folder / "squares", "square", seed=1)
    (folder / "arriving").mkdir()
    for number in range(8):
        pixels = np.random.default_rng(number).integers(0, 256, (12, 12), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "arriving" / f"{number}.png")
        os.utime(folder / "arriving" / f"{number}.png", (0, 0))
    (folder / "benchmark.yaml").write_text(yaml.safe_dump(BENCHMARK))
    for name in ("train", "benchmark"):
        assert ended(started(name, folder)) == 0, name
    (checkpoint,) = (folder / "results").rglob("model.ckpt")
    shutil.copy(checkpoint, folder / "model.ckpt")
    (run,) = (folder / "runs" / "benchmark").iterdir()
    shutil.move(run, folder / "run")
    assert ended(started("export", folder)) == 0
    shutil.rmtree(folder / "results")
    shutil.rmtree(folder / "runs")
    return folder


def started(
    name: str, folder: Path, prepare: Callable[[], None] = lambda: None, more: str = "", out: int | None = None
) -> int:
    """Run a command in a process of its own, which has imported everything; return its number.

    Args:
        name: Of :data:`COMMANDS`.
        folder: Where to run it.
        prepare: What the process does before.
        more: More of its arguments.
        out: What its output goes to.
    """
    reader, writer = os.pipe()  # and no file, which a full disk would cut off
    child = os.fork()
    if child:
        os.close(writer)
        os.set_blocking(reader, False)
        _running[child] = reader, folder
        return child
    status = 99
    try:
        os.chdir(folder)
        os.dup2(os.open(os.devnull, os.O_WRONLY) if out is None else out, 1)
        os.dup2(writer, 2)
        os.close(writer)
        os.close(reader)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115  # not pytest's
        prepare()
        if name in FRESH:
            os.execv(sys.executable, [sys.executable, "-m", "anomalib_flowood", *COMMANDS[name].split(), *more.split()])
        main([*COMMANDS[name].split(), *more.split()])
        status = 0
    except SystemExit as end:
        status = end.code
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:  # whatever is wrong, this process must not go on as a second pytest
        sys.stderr.flush()
        os._exit(status)


def ended(child: int, seconds: float = 300) -> int:
    """Wait for a process; its status, or the negative number of the signal that ended it."""
    end = time.monotonic() + seconds
    reader, folder = _running.pop(child)
    text = b""
    try:
        while time.monotonic() < end:
            found, status = os.waitpid(child, os.WNOHANG)
            text += _waiting(reader)
            if found:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        msg = f"hangs for {seconds} s"
        raise AssertionError(msg)
    finally:
        os.close(reader)
        _said[folder] = text.decode()


def said(folder: Path) -> str:
    """What the last process that has ended wrote to stderr, of those that ran in a folder."""
    return _said.get(folder, "")


def _waiting(reader: int) -> bytes:
    """All that can be read without waiting."""
    text = b""
    with contextlib.suppress(BlockingIOError):
        while more := os.read(reader, 65_536):
            text += more
    return text


def check_left(folder: Path) -> int:
    """Load every file with a name that a reader would open; return how many there are."""
    files = [path for path in folder.rglob("*") if path.is_file() and not _hidden(path.relative_to(folder))]
    for path in files:
        _check(path)
    return len(files)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _check(path: Path) -> None:
    kind = path.suffix
    if kind == ".ckpt":
        read_checkpoint(path)
    elif kind == ".csv" and path.name != "watched.csv":  # whose last row the next watch cuts off, where it is not whole
        assert path.read_text().endswith("\n"), path
        pd.read_csv(path)
    elif kind == ".json":
        json.loads(path.read_text())
    elif kind == ".yaml":
        assert yaml.safe_load(path.read_text()), path
    elif kind == ".html":
        assert path.read_text().rstrip().endswith("</html>"), path
    elif kind == ".svg":
        assert path.read_text().rstrip().endswith("</svg>"), path
    elif kind == ".png":
        with Image.open(path) as image:
            image.load()
    elif kind == ".npz":
        with np.load(path) as arrays:
            assert [arrays[name] for name in arrays.files], path
    elif kind == ".pt" and description_path(path).exists():  # without it nothing loads it
        load(path)
