# SPDX-License-Identifier: Apache-2.0
"""Where anomalib has no hook: each replacement fits what it replaces, does what it is for, and is still needed.

A failure after an update of anomalib names the version: adapt the replacement, or take it out if anomalib does by
itself what it is for.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import pickle
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from anomalib import data as anomalib_data
from anomalib import metrics as anomalib_metrics
from anomalib.data import Folder, ImageBatch, NumpyImageItem
from anomalib.data import utils as anomalib_utils
from anomalib.deploy.inferencers import openvino_inferencer, torch_inferencer
from anomalib.engine import engine
from anomalib.visualization import ImageVisualizer
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms.v2.functional import to_dtype, to_image

import anomalib_flowood.data
from anomalib_flowood.data import Images, PathDataset, SourcedDataset, replacements
from anomalib_flowood.data.items import SourcedImageBatch
from anomalib_flowood.data.replacements import REPLACEMENTS, Replacement
from anomalib_flowood.metrics import AUROC

ANOMALIB = f"anomalib {version('anomalib')}"
BY_NAME = {replacement.name: replacement for replacement in REPLACEMENTS}
NEEDLESS = f"{ANOMALIB} needs no replacement any more"


def in_place(replacement: Replacement) -> Any:
    return getattr(replacement.owner, replacement.name)


def save(array: np.ndarray, path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return str(path)


@pytest.mark.parametrize("replacement", REPLACEMENTS, ids=BY_NAME)
def test_what_is_replaced_takes_the_same_arguments(replacement: Replacement) -> None:
    original, ours = (
        list(inspect.signature(function).parameters) for function in (replacement.original, in_place(replacement))
    )
    assert ours[: len(original)] == original, f"{ANOMALIB} calls {replacement.name} with other arguments"


def test_all_places_are_known() -> None:
    """Each replacement is where anomalib looks for it."""
    base = sys.modules["anomalib.data.datasets.base.image"]
    for module in (torch_inferencer, openvino_inferencer, anomalib_utils, base):
        assert module.read_image is in_place(BY_NAME["read_image"]), f"{ANOMALIB} reads images elsewhere"
    assert "PredictDataset(" in inspect.getsource(engine.Engine.predict), f"{ANOMALIB} predicts by another class"
    assert engine.PredictDataset is anomalib_data.PredictDataset is PathDataset
    assert issubclass(PathDataset, BY_NAME["PredictDataset"].original)
    assert "self.on_test_batch_end(" in inspect.getsource(ImageVisualizer.on_predict_batch_end), (
        f"{ANOMALIB} saves the pictures of predictions elsewhere"
    )
    assert "visualize_image_item(" in inspect.getsource(ImageVisualizer.visualize), f"{ANOMALIB} draws elsewhere"


def test_importing_again_changes_nothing() -> None:
    originals = [replacement.original for replacement in REPLACEMENTS]
    for _ in range(2):
        importlib.reload(replacements)
        importlib.reload(anomalib_flowood.data)
    for before, replacement in zip(originals, replacements.REPLACEMENTS, strict=True):
        assert replacement.original is before
        assert in_place(replacement) is not before
    drawn = in_place(replacements.REPLACEMENTS[2])
    assert drawn.__wrapped__ is originals[2]  # and not one around another
    assert torch_inferencer.read_image is anomalib_utils.read_image


def test_a_version_without_it_is_named() -> None:
    gone = Replacement(SimpleNamespace(__name__="anomalib.data"), "read", lambda _: None, "it reads otherwise")
    with pytest.raises(ImportError, match=r"anomalib [\d.]+ has no anomalib\.data\.read, which is replaced since"):
        gone.replace()


def test_reading(tmp_path: Path) -> None:
    deep = save(np.array([[0, 257 * 20]], np.uint16), tmp_path / "deep.png")
    pixels = np.random.default_rng(0).integers(0, 256, (6, 10, 3), dtype=np.uint8)
    shallow = save(pixels, tmp_path / "a.png")
    assert BY_NAME["read_image"].original(deep)[0, 1, 0] == 1, NEEDLESS  # clipped to white
    assert np.array_equal(BY_NAME["read_image"].original(shallow), pixels / 255.0)
    assert torch.equal(anomalib_utils.read_image(deep, as_tensor=True)[:, 0, 1], torch.full((3,), 20.0) / 255)
    assert np.array_equal(anomalib_utils.read_image(shallow), pixels / 255.0)
    folder = Folder("a", tmp_path, val_split_mode="none", test_split_mode="none")
    folder._setup()
    eight_bits = to_dtype(to_image(Image.open(shallow)), torch.float32, scale=True)  # as anomalib reads it
    assert torch.equal(folder.train_data[0].image, eight_bits)
    data = PathDataset(tmp_path)
    torch.testing.assert_close(data[0].image, eight_bits.as_subclass(torch.Tensor), atol=1e-7, rtol=0)
    for item in (folder.train_data[1], data[1]):
        assert item.image_path == deep
        assert torch.equal(item.image[:, 0, 1], torch.full((3,), 20.0) / 255)


def test_reading_in_other_processes(tmp_path: Path) -> None:
    """What a worker that is spawned gets names this package, whose import replaces the reader there, too."""
    deep = save(np.array([[0, 257 * 20]], np.uint16), tmp_path / "deep.png")
    folder = Folder("a", tmp_path, val_split_mode="none", test_split_mode="none")
    folder._setup()
    make, arguments, *_ = BY_NAME["__reduce_ex__"].original(folder.train_data, pickle.DEFAULT_PROTOCOL)
    assert replacements.__name__.encode() not in pickle.dumps((make, arguments)), NEEDLESS
    sent = pickle.dumps(folder.train_data)
    assert replacements.__name__.encode() in sent
    for data in (pickle.loads(sent), copy.copy(folder.train_data), copy.deepcopy(folder.train_data)):
        assert type(data) is type(folder.train_data)
        assert data[0].image_path == deep


def test_predicting_by_path(tmp_path: Path) -> None:
    save(np.zeros((4, 4), np.uint8), tmp_path / "a.png")
    save(np.zeros((4, 4), np.uint8), tmp_path / ".hidden" / "b.png")
    theirs = BY_NAME["PredictDataset"].original(tmp_path)
    assert not hasattr(theirs, "read_for"), NEEDLESS
    assert len(theirs) == 2, NEEDLESS  # what is hidden, too
    assert len(engine.PredictDataset(tmp_path)) == 1


def drawing(item: Any, draw: Any) -> np.ndarray:
    picture = draw(item, fields=["image"], overlay_fields=None, field_size=(8, 8), text_config={"enable": False})
    return np.asarray(picture)[..., 0]


def test_drawing(tmp_path: Path) -> None:
    deep = save(np.full((8, 8), 257 * 20, np.uint16), tmp_path / "deep.png")
    ours, theirs = in_place(BY_NAME["visualize_image_item"]), BY_NAME["visualize_image_item"].original
    batch = ImageBatch(image=torch.rand(1, 3, 8, 8), image_path=[deep])
    assert drawing(next(iter(batch)), theirs).max() == 255, NEEDLESS
    assert drawing(next(iter(batch)), ours).max() == 80
    numpy = NumpyImageItem(image=np.random.default_rng(0).random((8, 8, 3)), image_path=deep)
    assert drawing(numpy, ours).max() == 80
    sourced = SourcedDataset(Images.from_array("a", "test", torch.full((2, 8, 8), 30, dtype=torch.uint8)), 0, "test")
    with pytest.raises(FileNotFoundError):  # no file: if this draws, anomalib needs no replacement any more
        drawing(sourced[0], theirs)
    assert drawing(sourced[0], ours).max() == 30
    assert len(ImageVisualizer()(sourced.__getitems__([0, 1]))) == 2


def test_saving(tmp_path: Path) -> None:
    paths = [save(np.full((8, 8), 9, np.uint8), tmp_path / "parts" / lot / "good" / "000.png") for lot in ("a", "b")]
    batch = ImageBatch(image=torch.rand(2, 3, 8, 8), image_path=paths)
    trainer = SimpleNamespace(
        predicting=True, predict_dataloaders=DataLoader(PathDataset(tmp_path / "parts")), default_root_dir=tmp_path
    )
    saved = {}
    saving = BY_NAME["on_test_batch_end"]
    for name, save_all in (("ours", in_place(saving)), ("theirs", saving.original)):
        visualizer = ImageVisualizer(fields=["image"], overlay_fields=None, output_dir=tmp_path / name)
        save_all(visualizer, trainer, None, None, batch, 0)
        saved[name] = sorted(path.relative_to(tmp_path / name).as_posix() for path in (tmp_path / name).rglob("*.png"))
    assert saved["ours"] == ["a/good/000.png", "b/good/000.png"]
    assert len(saved["theirs"]) == 1, NEEDLESS


def test_judging_pixels() -> None:
    masks = torch.zeros(3, 4, 4, dtype=torch.bool)
    masks[0, :2] = True
    known = {"gt_label": torch.tensor([1, 1, 0]), "gt_mask": masks, "anomaly_map": masks[:, None].float() + 0.1}
    known["anomaly_map"][1] = 2.0  # a defect that nobody has marked
    values = []
    for kind in (SourcedImageBatch, ImageBatch):
        for cls in (anomalib_metrics.AUROC, AUROC):
            metric = cls(fields=["anomaly_map", "gt_mask"], prefix="pixel_", strict=False)
            metric.update(kind(image=torch.rand(3, 3, 4, 4), **known))
            values.append(float(metric.compute()))
    assert values[:2] == [1, 1]
    assert max(values[2:]) < 1, NEEDLESS  # of others' data anomalib's rule holds
    metric = anomalib_metrics.AUROC(fields=["anomaly_map", "gt_mask"], strict=False)
    metric.update(
        SourcedImageBatch(image=torch.rand(1, 3, 4, 4), **{name: value[1:2] for name, value in known.items()})
    )
    assert not metric.update_called
