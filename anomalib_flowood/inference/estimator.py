# SPDX-License-Identifier: Apache-2.0
"""The detectors as scikit-learn estimators."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import torch
from anomalib.data import ImageBatch, ImageItem
from anomalib.engine import Engine
from lightning import LightningDataModule, seed_everything
from lightning.fabric.utilities.seed import max_seed_value, min_seed_value
from lightning.pytorch.utilities.seed import isolate_rng
from sklearn.base import BaseEstimator, OutlierMixin
from sklearn.utils.validation import check_is_fitted
from torch.utils.data import DataLoader, Dataset

from anomalib_flowood import models
from anomalib_flowood.conformal import DEFAULT_ALPHA
from anomalib_flowood.data.datamodules.normal_class import NORMAL_NAMES
from anomalib_flowood.data.datamodules.splits import needed_for, train_and_val
from anomalib_flowood.data.decoding import plain_max_value
from anomalib_flowood.data.listing import image_files
from anomalib_flowood.data.path_dataset import size_read
from anomalib_flowood.files import at_home
from anomalib_flowood.inference.images import CHANNELS, PATHS, each_image, resized, single_images
from anomalib_flowood.inference.loading import of_module
from anomalib_flowood.models.components import ConformalPostProcessor
from anomalib_flowood.names import check_known
from anomalib_flowood.noise import quiet_training

_SEEDS = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")
"""Variables of the environment that Lightning sets with a seed."""


class FlowOutlierDetector(OutlierMixin, BaseEstimator):
    """A detector of this package as a scikit-learn outlier detector.

    Signs are scikit-learn's: normal images have higher scores and the label 1, anomalous ones -1.

    Args:
        detector: ``"EmbeddingFlow"``, ``"FeatureMapFlow"`` or ``"PixelFlow"``.
        arguments: Those of the detector, by name.
        alpha: The level of :meth:`predict`: the largest expected share of normal images that are called anomalous,
            among images that ``fit`` has not seen. Other estimators have ``contamination`` instead.
        random_state: Seed of the training, and of the split into images to fit to and images to calibrate on. A
            ``RandomState`` gives another seed in each fit, and ``None`` leaves both to chance.

    Attributes:
        module_: The fitted detector.
        offset_: ``decision_function`` is ``score_samples - offset_``; the threshold that the held-out images set.
    """

    def __init__(
        self,
        detector: str = models.DEFAULT_OF_WHOLE_IMAGES,
        *,
        arguments: dict[str, Any] | None = None,
        alpha: float = DEFAULT_ALPHA,
        random_state: int | np.random.RandomState | None = 0,
    ) -> None:
        self.detector = detector
        self.arguments = arguments
        self.alpha = alpha
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> FlowOutlierDetector:  # noqa: N803  (scikit-learn's name)
        """Fit to normal images, some of which are held out to calibrate on.

        Args:
            X: A folder, an array, or other images: see :func:`~anomalib_flowood.inference.images.each_image`. The first
                axis of an array is that of the samples, so that ``(3, H, W)`` is three grey images.
            y: Not used.

        Returns:
            The estimator.

        Raises:
            FileNotFoundError: If there is no such folder.
            ValueError: If the detector is unknown or ``random_state`` no seed, there are fewer than two images, or too
                few for ``alpha``; if an array has two axes, or several columns of paths; or if the folder holds normal
                images beside others, of defects or masks: all of it would be fitted to.
        """
        del y
        check_known("detector", [self.detector], models.__all__)
        seed = _seed(self.random_state)
        if isinstance(X, str | Path):
            path = at_home(X)
            if not path.exists():
                msg = f"There is no {path} (looked for it from {Path.cwd()})."
                raise FileNotFoundError(msg)
            _check_normal_alone(path)
        images = list(single_images(_samples(X)))
        if len(images) < 2:
            msg = f"A detector is fitted to two normal images at least, and got {len(images)}."
            raise ValueError(msg)
        train, val = train_and_val(np.arange(len(images)), None, None, seed)
        with _left_alone(), quiet_training(), TemporaryDirectory() as folder:
            if seed is not None:
                seed_everything(seed, verbose=False)
            arguments = {"visualizer": False, "post_processor": ConformalPostProcessor(self.alpha)}
            module = getattr(models, self.detector)(**arguments | (self.arguments or {}))
            white = plain_max_value([image for image in images if isinstance(image, str | Path)])
            to_fit, to_calibrate = (_loader(module, [images[row] for row in rows], white) for rows in (train, val))
            data = _Divided(to_fit, to_calibrate, len(images))
            engine = Engine(
                default_root_dir=folder,
                devices=1,
                logger=False,
                enable_model_summary=False,
                enable_progress_bar=False,
            )
            engine.fit(module, datamodule=data)  # type: ignore[arg-type]  # not one of anomalib's
        module.trainer = None  # it holds all images and their features
        module.max_value = white  # a fit takes it from the data module, which has none
        self.module_ = module
        self.offset_ = -float(module.post_processor.image_threshold)
        return self

    def fit_predict(self, X: Any, y: Any = None, **arguments: Any) -> np.ndarray:  # noqa: N803
        """Fit to images, which a generator may give, and label the same ones, ``(N,)``."""
        return super().fit_predict(list(X) if isinstance(X, Iterator) else X, y, **arguments)

    def score_samples(self, X: Any) -> np.ndarray:  # noqa: N803
        """Return negative raw scores, ``(N,)``: higher is more normal."""
        check_is_fitted(self)
        return -of_module(self.module_).score(_samples(X), maps=False).raw_score.astype(np.float64)

    def decision_function(self, X: Any) -> np.ndarray:  # noqa: N803
        """Return distances from the threshold, ``(N,)``: positive for normal images, negative for anomalous ones."""
        return self.score_samples(X) - self.offset_

    def predict(self, X: Any) -> np.ndarray:  # noqa: N803
        """Label images, ``(N,)``: 1 if normal, -1 if anomalous."""
        return np.where(self.decision_function(X) < 0, -1, 1)

    def __sklearn_tags__(self) -> Any:
        """Tell scikit-learn that samples are images, not rows of a table."""
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        tags.input_tags.three_d_array = True
        return tags


@contextmanager
def _left_alone() -> Iterator[None]:
    """Restore the process's random state, and the seed that Lightning would use for later trainers.

    Ctrl-C raises ``KeyboardInterrupt``, where Lightning would end the process.
    """
    before = {name: os.environ.get(name) for name in _SEEDS}
    try:
        with isolate_rng():
            yield
    except SystemExit as end:
        if isinstance(end.__context__, KeyboardInterrupt):
            raise end.__context__ from None
        raise
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _seed(given: Any) -> int | None:
    """Return the seed that scikit-learn's ``random_state`` stands for.

    Raises:
        ValueError: If it is no seed.
    """
    if isinstance(given, np.random.RandomState):
        return int(given.randint(np.iinfo(np.int32).max))
    if given is None:
        return None
    if isinstance(given, Integral) and min_seed_value <= int(given) <= max_seed_value:
        return int(given)
    msg = f"random_state is None, an integer of 32 bits from 0 on, or a numpy.random.RandomState, not {given!r}."
    raise ValueError(msg)


def _samples(given: Any) -> Any:
    """Give arrays of grey images a channel axis: by scikit-learn's convention the first axis is that of samples.

    Raises:
        ValueError: If an array is a table, whose rows would be taken for those of one image, or has several columns of
            paths, which would give more labels than there are samples.
    """
    if isinstance(given, pd.DataFrame):  # iterating over it would yield column names
        given = given.to_numpy()
    if isinstance(given, np.ndarray) and given.dtype.kind in PATHS:
        if given.ndim == 2 and given.shape[1] != 1:
            msg = f"X of shape {given.shape} has {given.shape[1]} columns: give the one that holds the images' paths."
            raise ValueError(msg)
        return given
    if not isinstance(given, np.ndarray | torch.Tensor):
        return given
    if given.ndim == 2:
        msg = (
            f"X of shape {tuple(given.shape)} is a table: images are (N, H, W), (N, H, W, C) or (N, C, H, W). "
            "Give X.reshape(len(X), H, W), or X[None] if it is one grey image."
        )
        raise ValueError(msg)
    grey = given.ndim == 3 and given.shape[2] not in CHANNELS  # otherwise one image, (H, W, C)
    return given[:, None] if grey else given


def _check_normal_alone(folder: Path) -> None:
    """Refuse a folder if the names of its sub-folders say that not all images are normal."""
    images = image_files(folder, tell=False) if folder.is_dir() else []
    places = {place for image in images for place in image.parents if folder in (place, *place.parents)}
    for place in sorted(places, key=lambda path: (path.name != "train", path)):
        kinds = {path.name: path for path in place.iterdir() if path.is_dir()}
        normal = next((kinds[name] for name in kinds if name.lower() in NORMAL_NAMES), None)
        above = place.parent if place.name == "train" and place != folder else place
        others = {*kinds, *({"test", "ground_truth"} & {path.name for path in above.iterdir()} if normal else ())}
        others = {name for name in others if name.lower() not in NORMAL_NAMES and not name.startswith(".")}
        if normal is not None and others:
            msg = f"Of {folder} not all images are normal: it holds {', '.join(sorted(others))}, too. Fit to {normal}."
            raise ValueError(msg)


class _Normal(Dataset):
    """Normal images, which are read when they are asked for, as :class:`Detector` reads them."""

    def __init__(self, images: Sequence[Any], size: tuple[int, ...] | None, max_value: int | None) -> None:
        self.images, self.size, self.max_value = images, size, max_value

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> ImageItem:
        ((_, image),) = each_image(self.images[index], self.max_value, keep_bytes=True)
        return ImageItem(image=torch.tensor(resized(image, self.size)), gt_label=torch.tensor(0))


class _Divided(LightningDataModule):
    """Images that are fitted to, and held-out ones; also says how more could be held out."""

    name, category = "images", ""  # anomalib's engine names a folder by them

    def __init__(self, to_fit: DataLoader, to_calibrate: DataLoader, images: int) -> None:
        super().__init__()
        self.to_fit, self.to_calibrate, self.images = to_fit, to_calibrate, images
        self.val_data: Any = to_calibrate.dataset

    def train_dataloader(self) -> DataLoader:
        return self.to_fit

    def val_dataloader(self) -> DataLoader:
        return self.to_calibrate

    def how_to_hold_out(self, images: int) -> str:
        """Say, for messages, how to get so many validation images."""
        needed = needed_for(images, None, self.images)
        return f"fit to {needed} normal images, of which {images} are held out; there are {self.images}"


def _loader(module: Any, images: Sequence[Any], max_value: int | None) -> DataLoader:
    data = _Normal(images, size_read(module), max_value)
    return DataLoader(data, batch_size=module.images_at_once, collate_fn=ImageBatch.collate)
