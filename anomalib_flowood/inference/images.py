# SPDX-License-Identifier: Apache-2.0
"""Images in any form: files, folders, arrays, Pillow images, and iterables of these."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION
from torch import Tensor
from torchvision.transforms.v2 import functional

from anomalib_flowood.data import image_files, read_image
from anomalib_flowood.data.decoding import as_bytes
from anomalib_flowood.data.masks import without_masks
from anomalib_flowood.data.resizing import resize_bytes
from anomalib_flowood.files import at_home

CHANNELS = (1, 3, 4)
PATHS = "UTO"
"""Kinds of NumPy arrays that hold paths."""
_WHITE = {"uint8": 255, "uint16": 65535}

SingleImage: TypeAlias = str | Path | bytes | Image.Image | np.ndarray
"""A file, the content of a file, a Pillow image, or an array ``(C, H, W)``."""


def each_image(
    given: Any, max_value: int | None = None, *, keep_bytes: bool = False
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield images one by one, read as the detectors' own data sets read them.

    Args:
        given: A file or a folder, without the masks in its ``ground_truth``; the content of a file, as bytes; a Pillow
            image; an array or a tensor, one image or several: ``(H, W)``, ``(H, W, C)``, ``(C, H, W)``, ``(N, H, W)``,
            ``(N, H, W, C)`` or ``(N, C, H, W)``, where C is 1, 3 or 4, and a fourth channel is dropped; or an iterable
            of these. Arrays are ``uint8``, ``uint16``, or floats in [0, 1]. ``(3, H, W)`` is one colour image, not
            three grey ones.
        max_value: The value of white in 16 bits: see :func:`~anomalib_flowood.data.read_image`.
        keep_bytes: Leave 8-bit images as ``uint8``.

    Yields:
        The path, empty where there is none, and the image, ``(1 or 3, H, W)``: float32 in [0, 1], or uint8.

    Raises:
        FileNotFoundError: If a folder holds no image.
        UnreadableImageError: If a file cannot be read.
        ValueError: If an array has another shape, or values that are NaN or out of range.
        TypeError: If something is no image.
    """
    for image in single_images(given):
        name, pixels = of_single(image, max_value)
        yield name, pixels if keep_bytes else _scaled(pixels)


def of_single(image: SingleImage, max_value: int | None) -> tuple[str, np.ndarray]:
    """Read one of :func:`single_images`: its path, and its pixels as :func:`each_image` yields them, bytes kept."""
    if isinstance(image, np.ndarray):
        return "", _of_array(image, max_value)
    if isinstance(image, Image.Image):
        return str(getattr(image, "filename", "")), _of_pillow(image, max_value)
    return "" if isinstance(image, bytes) else str(image), read_image(image, max_value).numpy()


def single_images(given: Any) -> Iterator[SingleImage]:
    """Yield single images without reading files: paths, bytes, Pillow images, and arrays ``(C, H, W)``.

    Arguments and errors as for :func:`each_image`, but for those of files and values.
    """
    if isinstance(given, str | Path):
        if given == "":  # as a path it would be the current folder, and all below it
            msg = "The name of the images is empty: give a file or a folder."
            raise FileNotFoundError(msg)
        path = at_home(given)
        files = without_masks(image_files(path), path) if path.is_dir() else [path]
        if not files:
            msg = f"There are no images in {path}."
            raise FileNotFoundError(msg)
        yield from files
    elif isinstance(given, bytes | bytearray | memoryview | Image.Image):
        yield given if isinstance(given, Image.Image) else bytes(given)
    elif isinstance(given, np.ndarray) and given.dtype.kind in PATHS:  # of paths, as scikit-learn splits them
        for item in given.ravel():
            yield from single_images(item)
    elif isinstance(given, np.ndarray | Tensor):
        yield from _split(given.detach().cpu().numpy() if isinstance(given, Tensor) else given)
    elif isinstance(given, Iterable):
        for item in given:
            yield from single_images(item)
    else:
        kind = type(given).__name__
        msg = f"{kind} is no image: give a file, a folder, an array, a Pillow image, or a list of these."
        raise TypeError(msg)


def _split(array: np.ndarray) -> Iterator[np.ndarray]:
    """Yield images ``(C, H, W)`` of an array in any layout."""
    shape = array.shape
    if array.ndim == 2:
        yield array[None]
    elif array.ndim == 3 and shape[2] in CHANNELS and shape[0] not in CHANNELS:
        yield array.transpose(2, 0, 1)
    elif array.ndim == 3 and shape[0] in CHANNELS and shape[2] not in CHANNELS:
        yield array
    elif array.ndim == 3 and shape[0] not in CHANNELS:
        yield from array[:, None]
    elif array.ndim == 4 and shape[3] in CHANNELS and shape[1] not in CHANNELS:
        yield from array.transpose(0, 3, 1, 2)
    elif array.ndim == 4 and shape[1] in CHANNELS and shape[3] not in CHANNELS:
        yield from array
    else:
        msg = (
            f"An array of shape {shape} is no image and no batch of images, or leaves open where its channels are: "
            "give (H, W), (H, W, C), (C, H, W), (N, H, W), (N, H, W, C) or (N, C, H, W), with 1, 3 or 4 channels C."
        )
        raise ValueError(msg)


def _of_array(image: np.ndarray, max_value: int | None) -> np.ndarray:
    image = image[:3] if len(image) == 4 else image
    if not image.size:
        msg = f"An image of shape {image.shape} has no pixels."
        raise ValueError(msg)
    if np.issubdtype(image.dtype, np.floating):
        low, high = float(image.min()), float(image.max())
        if np.isnan(low):  # as both are then
            msg = f"An image of shape {image.shape} has pixels that are NaN: repair it, or leave it out."
            raise ValueError(msg)
        if not (low >= 0 and high <= 1):
            msg = f"Floats of images lie in [0, 1]; these run from {low:g} to {high:g}. Divide them by what white is."
            raise ValueError(msg)
        return np.ascontiguousarray(image, dtype=np.float32)
    if image.dtype.name not in _WHITE:
        msg = f"Images are arrays of uint8, uint16, or floats in [0, 1], not of {image.dtype}."
        raise ValueError(msg)
    white = _WHITE[image.dtype.name]
    if white == 255:
        return image
    white = max_value or white
    if int(image.max()) > white:
        msg = f"Values of an array of 16 bits run to {image.max()}, and white was {white} in training."
        raise ValueError(msg)
    return as_bytes(image, white)  # as a file of 16 bits is read


def _of_pillow(image: Image.Image, max_value: int | None) -> np.ndarray:
    """Return the pixels of a Pillow image, turned as its EXIF data say, without transparency, as for files.

    Of 16-bit colours Pillow has kept the upper 8 bits; files are read with all.
    """
    tags: Any = getattr(image, "tag_v2", {})  # of a TIFF; lost in the copy below
    bits, inverted = max(tags.get(BITSPERSAMPLE, (16,))), tags.get(PHOTOMETRIC_INTERPRETATION) == 0  # white is
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        white = max_value if bits >= 16 else 2**bits - 1
        pixels = _of_array(np.asarray(image).astype(np.uint16)[None], white)
        return 255 - pixels if inverted else pixels
    if image.mode == "F":
        return _of_array(np.asarray(image)[None], max_value)
    if image.mode == "I":
        msg = "Of a Pillow image of mode I nobody knows what white is: give its file, or an array of uint16."
        raise ValueError(msg)
    pixels = np.asarray(image.convert("L" if image.mode in {"1", "L", "LA"} else "RGB"))
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _scaled(image: np.ndarray) -> np.ndarray:
    """Scale bytes to [0, 1]; leave floats as they are."""
    if image.dtype != np.uint8:
        return image
    scaled = np.array(image, dtype=np.float32, order="C")  # a copy, to be divided in place: images may be large
    scaled /= np.float32(255)
    return scaled


def resized(image: np.ndarray, size: tuple[int, ...] | None, *, keep_bytes: bool = False) -> np.ndarray:
    """Resize an image as training did, and repeat a single channel three times.

    Args:
        image: What :func:`each_image` yields.
        size: Height and width, or the shorter side alone, which keeps the aspect; ``None`` for those that it has.
        keep_bytes: Leave one of bytes so that is not resized.

    Returns:
        The image, ``(3, H, W)``: float32 in [0, 1], or uint8.
    """
    if size is not None and len(size) == 1:
        height, width = image.shape[1:]  # as torchvision rounds
        size = (size[0], int(size[0] * width / height)) if height <= width else (int(size[0] * height / width), size[0])
    if size is not None and image.shape[1:] != size:
        pixels = torch.from_numpy(np.require(image, requirements=["C", "W"]))
        if image.dtype == np.uint8:
            image = resize_bytes(pixels[None], (size[0], size[1]))[0].numpy()
        else:
            image = functional.resize(pixels, list(size), antialias=True).numpy()
    image = np.ascontiguousarray(image if keep_bytes else _scaled(image))
    return image if len(image) == 3 else np.broadcast_to(image, (3, *image.shape[1:]))
