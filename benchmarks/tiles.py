# SPDX-License-Identifier: Apache-2.0
"""What memory FeatureMapFlow takes on large photographs that it sees in tiles.

    python -m benchmarks.tiles [--size 6000 8000] [--tile 224] [--images 8] [--new 2] [--backbone tf_efficientnet_lite0]
    python -m benchmarks.tiles --size 900 1200    # a short run

JPEG photographs of noise on soft shapes are written to a temporary folder. One process fits the detector to them, with
no setting of the data but their folder; others do with it what users do, on new photographs, half of which have a
scratch, and its mask. Peaks are of whole processes, libraries included: the resident set size that the kernel keeps
(``ru_maxrss``), and what processes that they started had to themselves.
"""

from __future__ import annotations

import argparse
import logging
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table

import anomalib_flowood
from benchmarks.peak import Peak, of_children

NEW = Path("photographs", "test")
"""Where the photographs are that are scored."""


def write_photographs(
    folder: Path, count: int, size: tuple[int, int], seed: int = 0, masks: Path | None = None
) -> None:
    """Write JPEG files of noise on soft shapes, each moved by chance; height and width; with masks also a scratch."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    blocks = Image.fromarray(rng.integers(30, 220, (15, 20, 3), dtype=np.uint8))
    pixels = np.asarray(blocks.resize(size[::-1], Image.Resampling.BICUBIC)).clip(20, 235)
    repeats = [-(-length // 500) for length in size]
    noise = np.tile(rng.integers(0, 20, (500, 500, 1), dtype=np.uint8), (*repeats, 1))[: size[0], : size[1]]
    pixels = pixels + noise
    for number in range(count):
        moved = Image.fromarray(np.roll(pixels, rng.integers(0, size[0], 2), (0, 1)))
        if masks is not None:
            mask = Image.new("L", size[::-1])
            start = rng.integers(0, size[0] // 2, 2)
            for image, colour in ((moved, (250, 250, 250)), (mask, 255)):
                ImageDraw.Draw(image).line([*start, *(start + size[0] // 20)], colour, 1 + size[0] // 500)
            masks.mkdir(parents=True, exist_ok=True)
            mask.save(masks / f"{number:04d}.png")
        moved.save(folder / f"{number:04d}.jpg", quality=92)


def fit(folder: Path, arguments: argparse.Namespace) -> None:
    from anomalib.engine import Engine

    data = anomalib_flowood.OneClass(folder / "photographs", val_split_ratio=0.25)
    tile = (arguments.tile, arguments.tile)
    detector = anomalib_flowood.FeatureMapFlow(arguments.backbone, image_size=arguments.size, tile_size=tile)
    Engine(accelerator="cpu", devices=1, default_root_dir=folder / "results").fit(detector, datamodule=data)


def load(folder: Path, arguments: argparse.Namespace) -> None:
    found = anomalib_flowood.load(_checkpoint(folder)).score(folder / NEW)
    assert found.anomaly_map is not None
    assert found.anomaly_map.shape == (arguments.new, *arguments.size)
    assert np.isfinite(found.score).all()


def predict(folder: Path, arguments: argparse.Namespace) -> None:
    batches = _run(folder).predict(_detector(folder), data_path=folder / NEW)
    assert len(batches) == arguments.new
    assert all(batch.anomaly_map.shape[-2:] == arguments.size for batch in batches)


def lean(folder: Path, arguments: argparse.Namespace) -> None:
    del arguments
    _run(folder).predict(_detector(folder), data_path=folder / NEW, return_predictions=False)


def test(folder: Path, arguments: argparse.Namespace) -> None:
    data = anomalib_flowood.OneClass(folder / "photographs")
    _run(folder).test(_detector(folder), datamodule=data)
    assert len(data.test_data) == arguments.new


def train(folder: Path, arguments: argparse.Namespace) -> None:
    sizes = [f"--model.image_size={[*arguments.size]}", f"--model.tile_size={[arguments.tile] * 2}"]
    data = ["--data", str(folder / "photographs"), "--data.val_split_ratio", "0.25"]
    model = ["--model", "FeatureMapFlow", "--model.backbone", arguments.backbone, *sizes]
    root = ["--default_root_dir", str(folder / "trained"), "--trainer.accelerator", "cpu"]
    flowood(["train", *model, *data, *root])


def report(folder: Path, arguments: argparse.Namespace) -> None:
    del arguments
    (scores,) = folder.glob("trained/**/scores.csv")
    flowood(["report", str(scores.parent)])
    assert (scores.parent / "report" / "index.html").is_file()


def command(folder: Path, arguments: argparse.Namespace) -> None:
    del arguments
    given = ["--data", str(folder / NEW), "--ckpt_path", str(_checkpoint(folder)), "--output", str(folder / "out")]
    flowood(["predict", *given])
    assert (folder / "out" / "predictions.csv").is_file()


def explain(folder: Path, arguments: argparse.Namespace) -> None:
    del arguments
    given = ["--data", str(folder / "photographs"), "--ckpt_path", str(_checkpoint(folder))]
    flowood(["explain", *given, "--output", str(folder / "explained")])
    assert (folder / "explained" / "index.html").is_file()


def serve(folder: Path, arguments: argparse.Namespace) -> None:
    from fastapi.testclient import TestClient

    from anomalib_flowood.serving import Limits
    from anomalib_flowood.serving.app import create_app

    app = create_app(anomalib_flowood.load(_checkpoint(folder)), Limits(answer_timeout=600))
    photographs = sorted((folder / NEW).rglob("*.jpg"))[: arguments.new]
    with TestClient(app) as client, ThreadPoolExecutor(len(photographs)) as pool:
        answers = list(pool.map(lambda path: client.post("/score?maps=true", content=path.read_bytes()), photographs))
    assert [answer.status_code for answer in answers] == [200] * arguments.new


def imports(folder: Path, arguments: argparse.Namespace) -> None:
    del arguments
    from anomalib.engine import Engine

    assert Engine
    _detector(folder)


TASKS: dict[str, tuple[Callable[[Path, argparse.Namespace], None], str]] = {
    "fit": (fit, "Engine.fit to {images} photographs"),
    "load": (load, "anomalib_flowood.load(…).score of {new}"),
    "predict": (predict, "Engine.predict of {new}"),
    "lean": (lean, "Engine.predict of {new}, return_predictions=False"),
    "test": (test, "Engine.test of {new}, with masks"),
    "train": (train, "flowood train: fit to {images}, test of {new}, pictures"),
    "report": (report, "flowood report of that"),
    "command": (command, "flowood predict of {new}, pictures"),
    "explain": (explain, "flowood explain of {new}"),
    "serve": (serve, "flowood serve: {new} requests at once"),
    "imports": (imports, "the imports and the detector alone"),
}


def flowood(arguments: list[str]) -> None:
    """Run a command in this process."""
    from anomalib_flowood.__main__ import main as run

    run(arguments)


def _run(folder: Path) -> Any:
    from anomalib.engine import Engine

    return Engine(accelerator="cpu", devices=1, default_root_dir=folder / "results_of_others", logger=False)


def _detector(folder: Path) -> Any:
    detector = anomalib_flowood.open_checkpoint(_checkpoint(folder))
    detector.visualizer = None
    return detector


def _checkpoint(folder: Path) -> Path:
    return next(folder.glob("results/**/model.ckpt"))


def measured(arguments: argparse.Namespace) -> None:
    """Run a task, and print its peak in GiB and its seconds."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    start = time.perf_counter()
    with Peak(of_children, 0.5) as peak:
        TASKS[arguments.task][0](arguments.folder, arguments)
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(own + (peak.most or 0) / 2**30, time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", type=int, nargs=2, default=(6000, 8000), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--tile", type=int, default=224)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--new", type=int, default=2, help="How many are scored; half of them have a scratch.")
    parser.add_argument("--backbone", default="tf_efficientnet_lite0")
    parser.add_argument("--task", choices=TASKS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.size = tuple(arguments.size)
    if arguments.task:
        measured(arguments)
        return
    table = Table("", "peak, GiB", "seconds")
    with TemporaryDirectory() as folder:
        photographs, scratched = Path(folder) / "photographs", arguments.new // 2
        write_photographs(photographs / "train" / "good", arguments.images, arguments.size)
        write_photographs(photographs / "test" / "good", arguments.new - scratched, arguments.size, 1)
        masks = photographs / "ground_truth" / "scratch"
        write_photographs(photographs / "test" / "scratch", scratched, arguments.size, 2, masks)
        for task, (_, what) in TASKS.items():
            given = [sys.executable, "-m", "benchmarks.tiles", "--task", task, "--folder", folder]
            given += ["--size", *map(str, arguments.size), "--tile", str(arguments.tile)]
            given += ["--new", str(arguments.new), "--backbone", arguments.backbone]
            output = subprocess.run(given, check=True, stdout=subprocess.PIPE, text=True).stdout  # noqa: S603
            peak, seconds = map(float, output.split()[-2:])
            table.add_row(what.format(images=arguments.images, new=arguments.new), f"{peak:.2f}", f"{seconds:.0f}")
            print(f"{task}: {peak:.2f} GiB, {seconds:.0f} s", file=sys.stderr)  # it takes a while
    Console().print(table)


if __name__ == "__main__":
    main()
