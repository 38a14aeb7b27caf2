# SPDX-License-Identifier: Apache-2.0
"""Where the pre-processing crops, pads or turns, maps lie over the image as the detector sees it."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from anomalib.data import ImageBatch
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import ImageVisualizer
from PIL import Image
from torch.utils.data import Subset
from torchvision.transforms.v2 import CenterCrop, Compose, Normalize, Pad, RandomHorizontalFlip, Resize, Transform

from anomalib_flowood.benchmark.recording import ScoreRecorder
from anomalib_flowood.data.datasets import SourcedDataset
from anomalib_flowood.data.images import Images
from anomalib_flowood.data.pictures import save_pictures
from anomalib_flowood.data.seen import as_seen, moves_places
from anomalib_flowood.explain.images import image_sets
from anomalib_flowood.report.gallery import make_gallery
from anomalib_flowood.report.maps import read_maps, write_maps

NORMALISED = Normalize([0.4, 0.5, 0.6], [0.1, 0.2, 0.3])
CROP = Compose([Resize((32, 48)), Compose([CenterCrop(16)]), NORMALISED])
"""What is left and right of a third of the image is cropped away."""


def detector(transform: Transform | None) -> SimpleNamespace:
    return SimpleNamespace(pre_processor=PreProcessor(transform), post_processor=None)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    pixels = np.zeros((32, 48, 3), np.uint8)
    pixels[:, :12] = 255
    (tmp_path / "images").mkdir()
    Image.fromarray(pixels).save(tmp_path / "images" / "a.png")
    return tmp_path / "images" / "a.png"


@pytest.fixture
def batch(path: Path) -> ImageBatch:
    image = torch.from_numpy(np.asarray(Image.open(path)).copy()).permute(2, 0, 1)[None] / 255
    return ImageBatch(
        image=CROP(image),
        image_path=[str(path)],
        anomaly_map=torch.rand(1, 16, 16),
        gt_label=torch.tensor([True]),
        pred_score=torch.rand(1),
        pred_label=torch.ones(1).bool(),
    )


def test_what_moves_the_places_of_a_map(path: Path) -> None:
    assert not moves_places(None)
    assert not moves_places(detector(None))
    assert not moves_places(detector(Compose([Resize(32), NORMALISED])))
    assert moves_places(detector(CROP))
    assert moves_places(detector(Pad(3)))
    augmented = SourcedDataset(Images("x", [str(path)]), 0, "test", augmentations=RandomHorizontalFlip(1.0))
    assert moves_places(detector(Resize((32, 32))), augmented)
    assert moves_places(detector(Resize((32, 32))), Subset(augmented, [0]))


def test_the_normalisation_is_undone() -> None:
    images = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(as_seen(Compose([NORMALISED, Pad(0)])(images), NORMALISED), images)
    torch.testing.assert_close(as_seen((images * 255).byte(), None), (images * 255).byte() / 255)


@pytest.mark.parametrize(("transform", "white"), [(CROP, False), (Resize((16, 16)), True)])
def test_pictures_show_what_the_map_covers(
    batch: ImageBatch, tmp_path: Path, transform: Transform, white: bool
) -> None:
    """The map was drawn over the whole file, where it marked other places."""
    trainer = SimpleNamespace(predicting=True, predict_dataloaders=None, default_root_dir=str(tmp_path))
    drawer = ImageVisualizer(
        fields=["image"],
        overlay_fields=None,
        field_size=(24, 24),
        text_config={"enable": False},
        output_dir=tmp_path / "drawn",
    )
    save_pictures(drawer, trainer, detector(transform), None, batch, 0)  # type: ignore[arg-type]
    (picture,) = (tmp_path / "drawn").rglob("a.png")
    pixels = np.asarray(Image.open(picture))
    assert (pixels[:, :4] > 250).all() == white
    assert (pixels[:, 12:20] < 5).all()


def test_reports_show_what_the_map_covers(batch: ImageBatch, path: Path, tmp_path: Path) -> None:
    recorder = ScoreRecorder()
    recorder.on_test_start()
    recorder.on_test_batch_end(None, detector(CROP), batch, batch, 0)  # type: ignore[arg-type]
    recorder.on_test_epoch_end(None, detector(CROP))  # type: ignore[arg-type]
    write_maps(tmp_path, {"detector": "d", "data": "x", "seed": 0}, recorder.shown_maps)
    (maps,) = read_maps(tmp_path).values()
    gallery = make_gallery({"d": recorder.scores}, {"d": maps}, {}, None, "p")
    (tile,) = (tile for tiles in gallery.strips["d"].values() for tile in tiles)
    assert tile.picture is not None
    assert (tile.picture.width, tile.picture.height) == (16, 16)
    whole = gallery.pictures[str(path)]
    assert (whole.width, whole.height) == (48, 32)
    assert tile.picture.name != whole.name


def test_explanations_show_what_the_map_covers() -> None:
    images = torch.zeros(1, 3, 32, 48)
    images[..., :12] = 1
    sets = image_sets(detector(CROP), {"inside": images, "outside": images}, 1)  # type: ignore[arg-type]
    assert sets[0].images.shape == (1, 3, 16, 16)
    assert sets[0].images.max() < 0.01
