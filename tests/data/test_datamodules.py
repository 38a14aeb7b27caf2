# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import logging
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib import LearningType
from anomalib.data import AnomalibDataModule, InferenceBatch
from anomalib.data.utils import LabelName
from anomalib.engine import Engine
from anomalib.models import AnomalibModule
from anomalib.pre_processing import PreProcessor
from data_helpers import write_idx, write_images, write_parts
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torchvision.transforms.v2 import Compose, RandomHorizontalFlip, Resize

from anomalib_flowood.data import CrossDataset, OneClass
from anomalib_flowood.data.datamodules.splits import held_out
from anomalib_flowood.data.sources import DATA_SETS

CONFIGS = Path(__file__).parents[2] / "configs" / "data"

needs_fashion_mnist = pytest.mark.skipif(
    not (DATA_SETS["fashion_mnist"].installed or Path("?")).is_dir(),
    reason="needs the Debian package dataset-fashion-mnist",
)


@pytest.fixture
def clothes(tmp_path: Path) -> Path:
    return write_idx(tmp_path / "clothes", train=100, test=30)


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    return write_idx(tmp_path / "digits", train=20, test=60, size=6)


def paths(data) -> list[str]:
    return data.samples["image_path"].tolist()


# --- splits


def test_cross_dataset(clothes: Path, digits: Path) -> None:
    data = CrossDataset(clothes, digits)
    data.setup()
    assert (len(data.train_data), len(data.val_data), len(data.test_data)) == (80, 20, 90)
    assert not set(paths(data.train_data)) & set(paths(data.val_data))
    assert set(data.train_data.samples.label_index) == set(data.val_data.samples.label_index) == {0}
    assert data.test_data.samples.groupby("source").label_index.agg(["min", "max", "size"]).to_dict("index") == {
        "clothes": {"min": 0, "max": 0, "size": 30},
        "digits": {"min": 1, "max": 1, "size": 60},
    }
    assert (data.name, data.category, data.task) == ("CrossDataset", "clothes-digits", "classification")
    assert data.test_data.category == "clothes-digits"
    assert AnomalibDataModule in CrossDataset.__bases__


def test_folders_of_results_have_names_that_file_systems_take(clothes: Path, tmp_path: Path) -> None:
    outside = [
        write_idx(tmp_path / f"returns of the supplier, week {n}, {'ü' * 9}", train=2, test=2, size=6) for n in range(9)
    ]
    categories = [CrossDataset(clothes, sets).category for sets in (outside, outside[:8], outside[:2])]
    assert categories[2] == f"clothes-returns_of_the_supplier_week_0_{'ü' * 9}+returns_of_the_supplier_week_1_{'ü' * 9}"
    assert len(set(categories)) == 3
    for category in categories:
        assert category.startswith("clothes-returns_of_the_supplier_week_0")
        (tmp_path / category).mkdir()


def test_any_few_test_batches_hold_both_labels(clothes: Path, digits: Path) -> None:
    data = CrossDataset(clothes, [digits], eval_batch_size=6, augmentations=Resize([6, 6]))
    data.setup()
    for batch in data.test_dataloader():
        assert batch.gt_label.sum() == 4
        assert batch.source.count("digits") == 4


def test_one_class(clothes: Path) -> None:
    data = OneClass(clothes, normal_class=1)
    data.setup()
    assert (len(data.train_data), len(data.val_data), len(data.test_data)) == (38, 12, 30)
    assert set(data.train_data.samples.source) == set(data.val_data.samples.source) == {"1"}
    assert set(zip(data.test_data.samples.source, data.test_data.samples.label_index, strict=True)) == {
        ("1", 0),
        ("0", 1),
    }
    assert (data.name, data.category) == ("OneClass", "clothes-1")
    assert AnomalibDataModule in OneClass.__bases__


@pytest.mark.parametrize("normal_class", ["good", 1, "1"])
def test_one_class_of_a_folder(tmp_path: Path, normal_class: int | str) -> None:
    folder = write_parts(tmp_path / "parts")
    write_images(folder / "test" / "worse", 3)
    data = OneClass(folder, normal_class)
    data.setup()
    assert (len(data.train_data), len(data.val_data)) == (5, 1)
    assert data.test_data.samples.groupby("source").label_index.agg(["max", "size"]).to_dict("split")["data"] == [
        [LabelName.ABNORMAL, 4],
        [LabelName.NORMAL, 4],
        [LabelName.ABNORMAL, 3],
    ]
    assert Path(data.test_data[0].image_path).is_file()


def test_class_names_that_are_numbers(tmp_path: Path) -> None:
    for label in ("10", "2", "3"):
        write_images(tmp_path / "parts" / label, 10)
    data = OneClass(tmp_path / "parts", 3)
    data.setup()
    assert set(data.train_data.samples.source) == {"3"}


def test_out_of_distribution_folder_is_used_whole(tmp_path: Path, clothes: Path) -> None:
    data = CrossDataset(clothes, write_images(tmp_path / "odd", 7), augmentations=Resize([8, 8]))
    data.setup()
    assert data.test_data.samples.source.tolist().count("odd") == 7
    batch = next(iter(data.test_dataloader()))
    assert batch.image.shape == (37, 3, 8, 8)


def test_limits_are_nested_and_seeded(clothes: Path, digits: Path) -> None:
    def build(train: int | None, test: int | None, seed: int = 0) -> CrossDataset:
        data = CrossDataset(clothes, digits, train_limit=train, test_limit=test, seed=seed)
        data.setup()
        return data

    small, again, large, everything, other = (
        build(20, 5), build(20, 5), build(50, 20), build(None, None), build(20, 5, seed=1),
    )  # fmt: skip
    assert (len(small.train_data), len(small.val_data), len(small.test_data)) == (15, 5, 10)
    for part in ("train_data", "val_data", "test_data"):
        chosen = [set(paths(getattr(data, part))) for data in (small, large, everything)]
        assert chosen[0] < chosen[1] < chosen[2]
        assert paths(getattr(small, part)) == paths(getattr(again, part))
        assert set(paths(getattr(other, part))) != chosen[0]
    # What one limit validates on, no other limit trains on.
    assert not set(paths(small.val_data)) & set(paths(everything.train_data))
    # The pixels are those of the path, which is what write_idx fills the images with.
    batch = small.train_data.__getitems__(range(15))
    numbers = [int(Path(path).stem[-5:]) for path in batch.image_path]
    assert (batch.image[:, 0, 0, 0] * 255).round().int().tolist() == numbers


def test_one_class_limits(clothes: Path) -> None:
    data = OneClass(clothes, 0, train_limit=10, test_limit=4)
    data.setup()
    assert (len(data.train_data), len(data.val_data), len(data.test_data)) == (8, 2, 8)
    assert data.test_data.samples.source.tolist() == ["0", "1"] * 4


@pytest.mark.parametrize(
    ("images", "validation"),
    [(2, 1), (3, 1), (5, 1), (10, 2), (12, 3), (20, 5), (40, 10), (60, 15), (79, 19), (80, 20), (120, 20), (199, 20),
     (200, 20), (300, 30), (5000, 500)],
)  # fmt: skip
def test_as_many_are_held_out_as_labels_take_but_a_quarter_at_most(images: int, validation: int) -> None:
    assert held_out(images, None) == validation


@given(st.integers(2, 3000), st.none() | st.floats(0.001, 0.999))
def test_more_images_are_held_out_of_more(images: int, ratio: float | None) -> None:
    assert 1 <= held_out(images, ratio) <= images - 1
    assert held_out(images, ratio) <= held_out(images + 1, ratio) <= held_out(images, ratio) + 1


def test_the_data_module_says_how_many_are_held_out(clothes: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        OneClass(clothes, 0).setup()
    assert "class '0' of clothes: 38 images to fit to, 12 held out to calibrate on." in caplog.messages


def test_the_data_module_says_what_makes_more_validation_images(tmp_path: Path, clothes: Path) -> None:
    def advice(**kwargs) -> tuple[str, OneClass]:
        data = OneClass(clothes, 0, **kwargs)  # 50 images
        data.setup()
        return data.how_to_hold_out(20), data

    text, data = advice()
    assert text == (
        "give 30 more normal images to the 50 that there are (fitted to: 38), or set val_split_ratio to 0.4, which "
        "leaves 30 to fit to"
    )
    assert held_out(50 + 30, data.val_split_ratio) == 20
    assert held_out(50, 0.4) == 20
    text, _ = advice(val_split_ratio=0.1)
    assert "give 145 more normal images to the 50 that there are (fitted to: 45)" in text
    assert held_out(50 + 145, 0.1) == 20
    assert held_out(50 + 144, 0.1) < 20
    text, _ = advice(val_split_ratio=1e-9)  # found without trying number after number
    assert text.startswith("give 19499999950 more normal images")
    text, _ = advice(train_limit=15)
    assert text == "raise train_limit to 80, if there are so many normal images"


@pytest.mark.parametrize("images", [8, 44, 84])
def test_advice_counts_the_images_that_are_taken_out_for_a_test(images: int, tmp_path: Path) -> None:
    def folder(number: int) -> OneClass:
        write_images(tmp_path / str(number), number)
        data = OneClass(tmp_path / str(number))
        data.setup()
        return data

    said = folder(images).how_to_hold_out(20)
    more = re.match(rf"give (\d+) more normal images to the {images} that there are", said)
    assert more, said
    total = images + int(more[1])
    assert len(folder(total).val_data) == 20
    assert len(folder(total - 1).val_data) < 20


def test_training_and_validation_share_memory(tmp_path: Path, clothes: Path, digits: Path) -> None:
    for data in (
        CrossDataset(clothes, digits, train_limit=30),
        OneClass(write_parts(tmp_path / "parts"), "good"),
    ):
        data.setup()
        assert data.train_data._stores[0] is data.val_data._stores[0]
        assert data.train_data._stores[0].pixels is not None


def test_setup_reads_once(clothes: Path, digits: Path) -> None:
    data = CrossDataset(clothes, digits)
    data.setup()
    train = data.train_data
    for file in clothes.iterdir():
        file.unlink()
    for stage in ("fit", "validate", "test", "predict", None):
        data.prepare_data()
        data.setup(stage)
    assert data.train_data is train


def test_augmentations_reach_their_stage(clothes: Path, digits: Path) -> None:
    flip = RandomHorizontalFlip()
    data = CrossDataset(clothes, digits, train_augmentations=flip, augmentations=Resize([4, 4]))
    data.setup()
    assert data.train_data.augmentations is flip
    assert isinstance(data.test_data.augmentations, Resize)


def test_memory_limit(tmp_path: Path) -> None:
    data = OneClass(write_parts(tmp_path / "parts"), "good", memory_limit_mib=0)
    data.setup()
    assert data.train_data._stores[0].pixels is None
    assert next(iter(data.train_dataloader())).image.shape == (5, 3, 8, 8)


@needs_fashion_mnist
def test_fashion_mnist_class_by_name(tmp_path: Path) -> None:
    data = OneClass("fashion_mnist", "T-shirt/top", root=tmp_path, train_limit=100, test_limit=10)
    data.setup()
    assert (len(data.train_data), len(data.val_data), len(data.test_data)) == (80, 20, 100)
    assert data.category == "fashion_mnist-T-shirt_top"
    assert set(data.train_data.samples.source) == {"T-shirt/top"}
    with pytest.raises(ValueError, match=r"Unknown class of 'fashion_mnist' 'Sneakers'. Did you mean 'Sneaker'"):
        OneClass("fashion_mnist", "Sneakers", root=tmp_path).setup()


# --- errors


def test_unknown_data_set(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Unknown data set 'fashion_mnst'. Did you mean 'fashion_mnist'"):
        CrossDataset("fashion_mnst", "mnist", root=tmp_path)
    with pytest.raises(ValueError, match="Unknown data set 'mnits'"):
        OneClass("mnits", 1, root=tmp_path)


@pytest.mark.parametrize("others", ["mnist", ["kmnist", "mnist"]])
def test_identical_data_sets(others: str | list[str]) -> None:
    with pytest.raises(ValueError, match="in_distribution and out_of_distribution name mnist twice"):
        CrossDataset("mnist", others)


def test_identical_folders(clothes: Path, digits: Path) -> None:
    with pytest.raises(ValueError, match=f"name {clothes} twice: the data sets have to differ"):
        CrossDataset(clothes, f"{clothes}/../clothes")
    with pytest.raises(ValueError, match=f"^out_of_distribution name {digits} twice"):
        CrossDataset(clothes, [digits, digits])


def test_no_other_data_set() -> None:
    with pytest.raises(ValueError, match="out_of_distribution names no data set"):
        CrossDataset("mnist", [])


@pytest.mark.parametrize("name", ["train_limit", "test_limit"])
@pytest.mark.parametrize("value", [0, -5])
def test_limits_below_one(name: str, value: int) -> None:
    for build in (
        lambda **kwargs: CrossDataset("mnist", "kmnist", **kwargs),
        lambda **kwargs: OneClass("mnist", 1, **kwargs),
    ):
        with pytest.raises(ValueError, match=rf"{name} has to be at least 1 .*, got {value}"):
            build(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [("val_split_ratio", 0.0), ("val_split_ratio", 1.0), ("test_split_ratio", -0.1), ("memory_limit_mib", -1)],
)
def test_numbers_out_of_range(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} .*got {value}"):
        CrossDataset("mnist", "kmnist", **{name: value})


def test_folders_without_images(tmp_path: Path, clothes: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"There is no folder .*/nowhere"):
        CrossDataset(clothes, tmp_path / "nowhere").setup()
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"There are no images in .*/empty"):
        CrossDataset(clothes, tmp_path / "empty").setup()


def test_one_training_image(tmp_path: Path, clothes: Path, digits: Path) -> None:
    with pytest.raises(ValueError, match=r"clothes needs at least 2 training images, .*, but train_limit=1"):
        CrossDataset(clothes, digits, train_limit=1).setup()
    write_images(tmp_path / "one" / "train", 1)
    write_images(tmp_path / "one" / "test", 3)
    with pytest.raises(ValueError, match=r"one needs at least 2 training images, .* the training split has 1"):
        CrossDataset(tmp_path / "one", digits).setup()
    folder = write_parts(tmp_path / "parts", train=1)
    with pytest.raises(ValueError, match="class 'good' of parts needs at least 2 training images"):
        OneClass(folder, "good").setup()


def test_unknown_class(tmp_path: Path) -> None:
    folder = write_parts(tmp_path / "parts")
    with pytest.raises(ValueError, match="Unknown class of 'parts' 'goood'. Did you mean 'good'.*0 to 1 work too"):
        OneClass(folder, "goood").setup()
    for label in (2, -1):
        with pytest.raises(ValueError, match=f"Unknown class of 'parts' {label}. Known: bad, good"):
            OneClass(folder, label).setup()


def test_class_without_training_images(tmp_path: Path) -> None:
    folder = write_parts(tmp_path / "parts")
    write_images(folder / "test" / "worse", 3)
    with pytest.raises(ValueError, match=r"The class 'worse' has no training images in 'parts'. .* have: bad, good"):
        OneClass(folder, "worse").setup()


def test_no_classes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="The data set 'flat' has no classes"):
        OneClass(write_images(tmp_path / "flat", 10), "good").setup()


def test_only_one_label_to_test(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_images(tmp_path / "parts" / "train" / "good", 4)
    write_images(tmp_path / "parts" / "test" / "bad", 4)
    with caplog.at_level(logging.WARNING):
        OneClass(tmp_path / "parts", "good").setup()
    assert "The test split of parts has no normal images" in caplog.text


def test_damaged_image_in_memory(tmp_path: Path) -> None:
    folder = write_parts(tmp_path / "parts", size=(64, 64), suffix=".jpg")
    path = folder / "train" / "good" / "003.jpg"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"Cannot read the image {path}"):
        OneClass(folder, "good").setup()


# --- anomalib's config files


@pytest.mark.parametrize(
    ("file", "cls", "category"),
    [
        ("cross_dataset.yaml", CrossDataset, "fashion_mnist-mnist"),
        ("one_class.yaml", OneClass, "fashion_mnist-3"),
        ("image_folder.yaml", OneClass, "parts-good"),
    ],
)
def test_config_files(file: str, cls: type, category: str) -> None:
    data = AnomalibDataModule.from_config(CONFIGS / file)
    assert type(data) is cls
    assert data.category == category


def test_config_values(tmp_path: Path) -> None:
    config = tmp_path / "data.yaml"
    config.write_text(
        "class_path: anomalib_flowood.data.CrossDataset\n"
        "init_args:\n"
        "  in_distribution: cifar10\n"
        "  out_of_distribution: [svhn, cifar100]\n"
        "  train_limit: 500\n"
        "  train_augmentations:\n"
        "    class_path: torchvision.transforms.v2.Compose\n"
        "    init_args:\n"
        "      transforms:\n"
        "        - class_path: torchvision.transforms.v2.RandomHorizontalFlip\n"
    )
    data = AnomalibDataModule.from_config(config)
    assert (data.category, data.train_limit) == ("cifar10-svhn+cifar100", 500)
    assert isinstance(data.train_augmentations, Compose)
    overridden = AnomalibDataModule.from_config(config, **{"data.out_of_distribution": "mnist"})
    assert overridden.category == "cifar10-mnist"
    overridden = AnomalibDataModule.from_config(config, **{"data.out_of_distribution": "[mnist, svhn]"})
    assert overridden.category == "cifar10-mnist+svhn"


# --- anomalib's engine


class MeanModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1)

    def forward(self, images: torch.Tensor) -> InferenceBatch:
        assert images.shape[1:] == (3, 8, 8)
        return InferenceBatch(pred_score=self.linear(images.mean((1, 2, 3))[:, None]).square()[:, 0])


class MeanDetector(AnomalibModule):
    """Scores an image by a learnt function of its mean."""

    def __init__(self) -> None:
        super().__init__(pre_processor=PreProcessor(transform=Resize([8, 8])))
        self.model = MeanModel()
        self.seen: dict[str, list[str]] = {"train": [], "test": []}

    def training_step(self, batch, batch_idx):
        self.seen["train"] += batch.source
        return self.model(batch.image).pred_score.mean()

    def validation_step(self, batch, batch_idx):
        return batch.update(**self.model(batch.image)._asdict())

    def test_step(self, batch, batch_idx):
        self.seen["test"] += batch.source
        return super().test_step(batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)

    @property
    def trainer_arguments(self) -> dict:
        return {}

    @property
    def learning_type(self) -> LearningType:
        return LearningType.ONE_CLASS


@pytest.mark.parametrize("workers", [0, 2])
def test_engine_with_images_in_memory(tmp_path: Path, clothes: Path, digits: Path, workers: int) -> None:
    data = CrossDataset(clothes, digits, train_batch_size=16, eval_batch_size=16, num_workers=workers)
    model = MeanDetector()
    engine = Engine(
        max_epochs=1,
        limit_train_batches=2,
        limit_val_batches=1,
        limit_test_batches=2,
        accelerator="cpu",
        default_root_dir=tmp_path / "results",
        logger=False,
    )
    engine.fit(model, datamodule=data)
    assert model.seen["train"] == ["clothes"] * 32
    (result,) = engine.test(model, datamodule=data)
    assert 0 <= result["image_AUROC"] <= 1
    assert set(model.seen["test"]) == {"clothes", "digits"}
    pictures = list((tmp_path / "results").rglob("*.png"))
    assert len(pictures) == 32  # anomalib's visualiser: one per test image, although none has a file
    predictions = engine.predict(model, datamodule=data)
    assert predictions is not None
    assert len(predictions[0].source) == 16


@pytest.mark.parametrize("workers", [0, 2])
def test_engine_with_files(tmp_path: Path, workers: int) -> None:
    folder = write_parts(tmp_path / "parts")
    write_images(folder / "test" / "worse", 3, (12, 9), mode="L")
    data = OneClass(
        folder,
        "good",
        train_batch_size=2,
        eval_batch_size=4,
        num_workers=workers,
        train_augmentations=RandomHorizontalFlip(),
    )
    model = MeanDetector()
    engine = Engine(max_epochs=1, limit_train_batches=2, accelerator="cpu", default_root_dir=tmp_path, logger=False)
    engine.fit(model, datamodule=data)
    assert model.seen["train"] == ["good"] * 4
    engine.test(model, datamodule=data)
    assert np.unique(model.seen["test"], return_counts=True)[1].tolist() == [4, 4, 3]
