# SPDX-License-Identifier: Apache-2.0
"""Ground truth of pixels: masks beside the images of a folder."""

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib import TaskType
from anomalib.data import ImageBatch, MVTecAD
from model_helpers import engine, feature_map_flow, pixel_flow
from PIL import Image
from sklearn.metrics import roc_auc_score
from torchvision.transforms.v2 import Compose, RandomHorizontalFlip, RandomRotation, Resize

from anomalib_flowood import OneClass, processes
from anomalib_flowood.data import PathDataset, read_image
from anomalib_flowood.data.decoding import read_mask
from anomalib_flowood.metrics import AUPRO


def photographs(folder: Path, count: int, seed: int, masks: Path | None = None, one_size: bool = False) -> None:
    """Noise in two sizes, or one; anomalous ones have a bright square, which their masks show."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for number in range(count):
        size = (30, 40) if number % 2 and not one_size else (48, 36)
        pixels = rng.normal(90, 10, size)
        mask = np.zeros(size, np.uint8)
        top, left = rng.integers(2, 18, 2)
        mask[top : top + 10, left : left + 10] = 255
        if masks is not None:
            pixels[mask > 0] += 120
            masks.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(masks / (f"{number:02}.png" if number == 3 else f"{number:02}_mask.png"))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number:02}.png")


def parts(folder: Path, one_size: bool = False) -> Path:
    photographs(folder / "train/good", 24, 0, one_size=one_size)
    photographs(folder / "test/good", 5, 1, one_size=one_size)
    for seed, kind in enumerate(("dent", "scratch"), start=2):
        photographs(folder / f"test/{kind}", 4, seed, folder / f"ground_truth/{kind}", one_size)
    return folder


@pytest.fixture
def folder(tmp_path):
    return parts(tmp_path / "parts")


def masks_of(data) -> dict[str, torch.Tensor]:
    batch = data.__getitems__(range(len(data)))
    return dict(
        zip([str(Path(path)) for path in batch.image_path], batch.gt_mask.as_subclass(torch.Tensor), strict=True)
    )


@pytest.mark.parametrize("memory", [0, 512])
@pytest.mark.parametrize("one_size", [True, False])
def test_masks_follow_their_images_and_are_anomalibs(tmp_path, memory, one_size):
    folder = parts(tmp_path / "parts", one_size)
    resize = Resize((20, 24))
    module = OneClass(folder, test_limit=3, memory_limit_mib=memory, augmentations=resize)
    module.setup()
    data = module.test_data
    assert data.task == TaskType.SEGMENTATION
    assert module.train_data.task == module.val_data.task == TaskType.CLASSIFICATION
    assert module.train_data[0].gt_mask is None
    shutil.move(folder / "ground_truth/dent/03.png", folder / "ground_truth/dent/03_mask.png")
    shutil.move(folder / "ground_truth/scratch/03.png", folder / "ground_truth/scratch/03_mask.png")
    theirs = MVTecAD(folder.parent, folder.name, num_workers=0, augmentations=resize)
    theirs.setup()
    expected = {item.image_path: item.gt_mask for item in theirs.test_data}
    again = OneClass(folder, test_limit=3, memory_limit_mib=memory, augmentations=resize)
    again.setup()
    found = masks_of(again.test_data)
    assert len(found) == 9
    for path, mask in found.items():
        torch.testing.assert_close(mask, expected[path].as_subclass(torch.Tensor), rtol=0, atol=0)
        assert bool(mask.any()) is ("good" not in path)
    single = again.test_data[2]
    torch.testing.assert_close(single.gt_mask.as_subclass(torch.Tensor), found[single.image_path], rtol=0, atol=0)


def test_random_augmentations_turn_both(folder):
    turned = Compose([RandomHorizontalFlip(p=1), RandomRotation((90, 90), expand=True), Resize((30, 30))])
    module = OneClass(folder, test_augmentations=turned)
    module.setup()
    for item in module.test_data:
        image, truth = item.image.mean(0), item.gt_mask.as_subclass(torch.Tensor)
        if bool(truth.any()):
            assert image[truth].mean() > image[~truth].mean() + 0.3
        else:
            assert image.max() < 0.6


@pytest.mark.parametrize("kind", ["L", "1", "I;16", "RGBA", "P", "F"])
def test_a_mask_is_of_any_kind(tmp_path, kind):
    expected = np.zeros((6, 5), bool)
    expected[1:3, 2:4] = True
    path = tmp_path / f"mask{'.tif' if kind == 'F' else '.png'}"
    if kind == "I;16":
        image = Image.fromarray(expected.astype(np.uint16))  # 1 is no black, whatever white is
    elif kind == "RGBA":
        rgba = np.zeros((6, 5, 4), np.uint8)
        rgba[..., 3] = 255
        rgba[expected, 2] = 7
        image = Image.fromarray(rgba)
    elif kind == "F":
        image = Image.fromarray(expected.astype(np.float32))
    else:
        image = Image.fromarray(expected.astype(np.uint8) * 255).convert(kind)
    image.save(path)
    np.testing.assert_array_equal(read_mask(path).numpy(), expected)


def test_several_masks_of_an_image_are_one(folder, caplog):
    """As in MVTec LOCO AD: ground_truth/KIND/NAME/000.png, 001.png, …"""
    whole = OneClass(folder, augmentations=Resize((24, 20)))
    whole.setup()
    expected = masks_of(whole.test_data)
    for kind in ("dent", "scratch"):
        for number in range(4):
            (path,) = (folder / f"ground_truth/{kind}").glob(f"{number:02}*.png")
            mask = np.array(Image.open(path))
            path.unlink()
            path = path.with_name(f"{number:02}")
            path.mkdir()
            for part, value in enumerate((251, 3)):
                some = mask.copy()
                some[:, part::2] = 0
                Image.fromarray(some // 255 * value).save(path / f"{part:03}.png")
    module = OneClass(folder, augmentations=Resize((24, 20)))
    module.setup()
    assert not [text for text in caplog.messages if "mask" in text]
    for path, mask in masks_of(module.test_data).items():
        torch.testing.assert_close(mask, expected[path], rtol=0, atol=0)
    (folder / "ground_truth/dent/09").mkdir()
    Image.new("L", (36, 48), 1).save(folder / "ground_truth/dent/09/000.png")
    Image.new("L", (30, 30), 1).save(folder / "ground_truth/dent/02/001.png")
    module = OneClass(folder)
    module.setup()
    (message,) = [text for text in caplog.messages if "mask" in text]
    assert "Pixels are judged on 7 of the 8" in message
    assert "of another size: 1 (" in message
    assert "dent/02/001.png (30 x 30" in message
    assert "no image's: 1 (" in message
    assert "dent/09/000.png)" in message


def missing(folder: Path) -> None:
    (folder / "ground_truth/dent/01_mask.png").unlink()


def other_size(folder: Path) -> None:
    Image.new("L", (10, 12), 255).save(folder / "ground_truth/dent/01_mask.png")


def misspelt(folder: Path) -> None:
    path = folder / "ground_truth/dent/01_mask.png"
    path.rename(path.with_name("1_mask.png"))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (missing, ["Masks missing: 1 (", "ground_truth/dent/01.png)"]),
        (other_size, ["of another size: 1 (", "01_mask.png (12 x 10 pixels; its image has 30 x 40))"]),
        (misspelt, ["Masks missing: 1 (", "dent/01.png); that are no image's: 1 (", "dent/1_mask.png)"]),
    ],
)
def test_images_whose_masks_do_not_fit_are_named_and_have_none(folder, caplog, spoil, said):
    spoil(folder)
    module = OneClass(folder, augmentations=Resize((20, 24)))
    module.setup()
    (message,) = [text for text in caplog.messages if "mask" in text]
    assert "Pixels are judged on 7 of the 8 anomalous test images, and on the normal ones: the other" in message
    for text in said:
        assert text in message
    assert module.test_data.task == TaskType.SEGMENTATION
    empty = [path for path, mask in masks_of(module.test_data).items() if not mask.any()]
    assert sorted(path for path in empty if "good" not in path) == [str(folder / "test/dent/01.png")]


def test_masks_of_which_none_fits_are_not_used(folder, caplog):
    shutil.rmtree(folder / "ground_truth/dent")
    shutil.rmtree(folder / "ground_truth/scratch")
    module = OneClass(folder)
    module.setup()
    (message,) = [text for text in caplog.messages if "mask" in text]
    assert "Pixels are judged on no image: " in message
    assert module.test_data.task == TaskType.CLASSIFICATION
    assert module.test_data[0].gt_mask is None


def test_pixels_of_anomalous_images_without_a_mask_are_not_judged(folder, tmp_path):
    def measured(masked):
        module = OneClass(folder, eval_batch_size=2)  # of whose batches some have no mask at all
        run, detector = engine(tmp_path / str(masked)), feature_map_flow(coupling_layers=0)
        run.fit(detector, datamodule=module)
        (results,) = run.test(detector, datamodule=module, verbose=False)
        batches = run.predict(detector, datamodule=module, return_predictions=True)
        maps = torch.cat([batch.anomaly_map.flatten(1) for batch in batches])
        truth = torch.cat([batch.gt_mask.flatten(1) for batch in batches])
        label = torch.cat([batch.gt_label for batch in batches])
        assert truth.any(1).sum() == masked
        known = ~label | truth.any(1)
        expected = roc_auc_score(truth[known].flatten(), maps[known].flatten())
        assert results["pixel_AUROC"] == pytest.approx(expected, abs=1e-6)
        return results

    whole = measured(8)
    for number in range(3):
        (folder / f"ground_truth/dent/{number:02}_mask.png").unlink()
    some = measured(5)
    assert some["image_AUROC"] == whole["image_AUROC"]
    assert some["pixel_AUROC"] != whole["pixel_AUROC"]
    assert 0 < some["pixel_AUPRO"] <= 1


def test_a_mask_without_an_image_is_named_and_the_others_are_used(folder, caplog):
    for name in ("dent/99", "good/00"):  # what is good may have an empty one
        path = folder / "ground_truth" / f"{name}_mask.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("L", (36, 48)).save(path)
    module = OneClass(folder)
    module.setup()
    (message,) = [text for text in caplog.messages if "mask" in text]
    assert message == f"Left out: masks that are no image's: 1 ({folder}/ground_truth/dent/99_mask.png)."
    assert module.test_data.task == TaskType.SEGMENTATION


def test_a_folder_of_kinds_has_masks_beside_them_which_are_no_kind(folder, tmp_path, caplog):
    flat = tmp_path / "flat"
    for place in ("train/good", "test/dent", "test/scratch"):
        shutil.copytree(folder / place, flat / Path(place).name)
    shutil.copytree(folder / "ground_truth", flat / "ground_truth")
    module = OneClass(flat, augmentations=Resize((20, 20)))
    module.setup()
    assert set(module.test_data.samples["source"]) == {"good", "dent", "scratch"}
    assert sum(bool(mask.any()) for mask in masks_of(module.test_data).values()) == 8
    with caplog.at_level(logging.INFO):
        images = PathDataset(flat)
    assert len(images) == 32
    assert f"Left out: 8 masks below {flat} (in ground_truth)." in caplog.messages
    assert len(PathDataset(flat / "ground_truth")) == 8


def test_a_test_judges_pixels_where_there_is_a_map(folder, tmp_path):
    module = OneClass(folder)
    run, detector = engine(tmp_path), feature_map_flow(coupling_layers=0)
    run.fit(detector, datamodule=module)
    (results,) = run.test(detector, datamodule=module, verbose=False)
    batches = run.predict(detector, datamodule=module, return_predictions=True)
    maps = torch.cat([batch.anomaly_map.flatten(1) for batch in batches])
    truth = torch.cat([batch.gt_mask.flatten(1) for batch in batches])
    assert truth.any(1).sum() == 8
    assert results["pixel_AUROC"] == pytest.approx(roc_auc_score(truth.flatten(), maps.flatten()), abs=1e-6)
    assert 0 < results["pixel_AUPRO"] <= 1

    plain, run = pixel_flow(), engine(tmp_path / "plain")
    run.fit(plain, datamodule=OneClass(folder))
    (results,) = run.test(plain, datamodule=OneClass(folder), verbose=False)
    assert "image_AUROC" in results
    assert not [name for name in results if name.startswith("pixel")]


def test_a_process_keeps_the_masks_of_its_own_images(folder):
    module = OneClass(folder, augmentations=Resize((20, 20)))
    module.setup()
    batch = module.test_data.__getitems__(range(6))
    whole = batch.gt_mask.clone()
    batch.pred_score = torch.zeros(6)
    processes.cut(batch, 4)
    torch.testing.assert_close(batch.gt_mask, whole[:4])


def test_pixels_of_one_kind_alone_have_no_overlap():
    metric = AUPRO(fields=["anomaly_map", "gt_mask"], prefix="pixel_")
    for value in (0, 1):
        metric.reset()
        masks = torch.full((2, 8, 8), value, dtype=torch.bool)
        metric.update(ImageBatch(image=torch.rand(2, 3, 8, 8), anomaly_map=torch.rand(2, 1, 8, 8), gt_mask=masks))
        with pytest.warns(UserWarning, match="pixel_AUPRO is not defined"):
            assert metric.compute().isnan()


def test_a_mask_that_an_image_was_turned_against_is_refused_when_it_is_read(folder):
    path = folder / "test/dent/01.png"
    image = Image.open(path).rotate(90, expand=True)
    image.save(path)
    module = OneClass(folder, augmentations=Resize((20, 20)))
    module.setup()
    assert read_image(path).shape[-2:] == (40, 30)
    with pytest.raises(ValueError, match=r"01_mask.png has 30 x 40 pixels .*, and its image .* 40 x 30"):
        masks_of(module.test_data)
