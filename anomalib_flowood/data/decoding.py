# SPDX-License-Identifier: Apache-2.0
"""The one reader of images: how a file becomes 8 bits a channel.

Training, test, prediction, explanations and reports read through it, anomalib's data modules too: see docs/images.md.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import tifffile
import torch
from PIL import ExifTags, Image, UnidentifiedImageError

logger = logging.getLogger(__name__)

PLAIN_MAX_VALUES = (255, 1023, 4095, 16383, 65535)
"""What white is in files of 8, 10, 12, 14 and 16 bits: :func:`plain_max_value` chooses among them."""

FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""What content that was sent may be, as Pillow names it. Files may be of its other formats, too, but for EPS."""

_GREY_MODES = ("1", "L", "LA")
_COLOUR_MODES = ("RGB", "RGBA", "RGBX")
_MOST_LOOKED_AT = 1000
_FEW_LEVELS = 4095
"""What white is in a camera of 12 bits; with 16 it is nearly black."""
_FEW_LEVELS_TOLD = (
    "The image %s has 16 bits, and no value above %d of 65535, which is taken for white: if a camera of fewer bits "
    "wrote it, it looks nearly black. Train on such files with OneClass or CrossDataset, which take white from the "
    "training images, or set their max_value (4095 for 12 bits); anomalib's own data modules cannot."
)
_AT_ONCE = 2**20
"""Values that are scaled, and pixels that are fetched, at once."""
_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # TIFF tags
_MIN_IS_WHITE, _UNSIGNED, _SIGNED = 0, 1, 2  # values of the second and of the third


class UnreadableImageError(ValueError):
    """A file is missing, damaged, no image, or has values that make no image. The message names it.

    Args:
        message: What is wrong.
        path: The file.
    """

    def __init__(self, message: str, path: str | Path = "") -> None:
        super().__init__(message)
        self.path = str(path)


@dataclass(frozen=True)
class _Kind:
    """What a file's header says.

    Attributes:
        height: In pixels, after its EXIF orientation.
        width: Likewise.
        channels: 1 (grey) or 3.
        white: What white is in its values: 1 for floats, 255 for 8 bits, what the header says of other depths, or
            ``None``: 16 bits by container, of which nobody says how many are used.
    """

    height: int
    width: int
    channels: int
    white: float | None


def read_header(path: str | Path | bytes) -> tuple[int, int, int]:
    """Height, width and channels of an image file, or of its content, without decoding it.

    Raises:
        UnreadableImageError: If the file is missing, no regular file or no image, with its path.
    """
    with _opened(path) as image:
        kind = _kind(image)
        return kind.height, kind.width, kind.channels


def read_image(path: str | Path | bytes, max_value: int | None = None) -> torch.Tensor:
    """Read an image file as 8 bits a channel, as the camera was held.

    Transparency is dropped, as anomalib drops it. EXIF orientation is applied. Files of more than 8 bits are scaled,
    not clipped, from their whole range of values; of a file with several pages or frames the first is read.

    Args:
        path: Path of the file, or its content.
        max_value: What white is in files of 16 bits that do not say so themselves: 4095 if a camera of 12 bits wrote
            them. By default all 16 bits are used, 65535.

    Returns:
        Tensor of shape ``(1, H, W)`` for a grey image and ``(3, H, W)`` for any other, ``uint8``.

    Raises:
        UnreadableImageError: If the file is missing, no regular file, damaged or no image, or has values that are NaN
            or lie outside of 0 to white, with its path.
    """
    values, white, inverted = _read_values(path)
    if values.dtype == np.uint8:
        return torch.from_numpy(values)
    low, high, remedy = values.min(), values.max(), ""
    if white is None:
        white = max_value or 65535
        if max_value is None and low >= 0 and 0 < high <= _FEW_LEVELS:
            _tell_once("few levels", _FEW_LEVELS_TOLD, _named(path), high)
        remedy = f" Set max_value of the data module to what white is in such files, now {white}, and train again."
    if low < 0 and values.dtype.kind == "i":
        remedy = " Save such files without a sign, with the same number added to all values of all of them."
    if low < 0 or high > white or np.isnan(high):
        held = "some of its values are NaN" if np.isnan(high) else f"its values run from {low} to {high}"
        msg = f"Cannot read the image {_named(path)}: {held}, where 0 to {white:.0f} is expected.{remedy}"
        raise UnreadableImageError(msg, _named(path))
    scaled = as_bytes(values, white)
    return torch.from_numpy(255 - scaled if inverted else scaled)


def as_bytes(values: np.ndarray, white: float) -> np.ndarray:
    """Scale values, ``(C, H, W)``, from 0 to white to 8 bits, row by row: of a large image floats take gigabytes."""
    scaled = np.empty(values.shape, dtype=np.uint8)
    rows = max(1, _AT_ONCE // max(1, values[:, :1].size))
    for start in range(0, values.shape[1], rows):
        part = values[:, start : start + rows]
        scaled[:, start : start + rows] = np.rint(part * np.float32(255 / white))
    return scaled


def read_mask(path: str | Path) -> torch.Tensor:
    """Read the mask of an image, as the camera was held.

    Args:
        path: Path of the file, of any kind, bits and channels; transparency is dropped.

    Returns:
        1 where it is not black, else 0: ``(H, W)``, ``uint8``.

    Raises:
        UnreadableImageError: If the file is missing, no regular file, damaged or no image, with its path.
    """
    return torch.from_numpy((_read_values(path)[0] != 0).any(axis=0).astype(np.uint8))


def read_picture(path: str | Path) -> torch.Tensor:
    """Read an image file for the eye: as :func:`read_image`, 16 bits scaled from what the file itself uses of them.

    Raises:
        UnreadableImageError: As for :func:`read_image`.
    """
    return read_image(path, plain_max_value([path]))


def plain_max_value(paths: Iterable[str | Path]) -> int | None:
    """What white is in files of 16 bits, told by the files.

    It is the largest value of all of them, rounded up to the next of :data:`PLAIN_MAX_VALUES`.

    Args:
        paths: Image files; of more than a thousand, a thousand spread evenly are looked at.

    Returns:
        White, or ``None`` if no file has 16 bits by container, so that there is nothing to ask.

    Raises:
        UnreadableImageError: As for :func:`read_image`; also if a value is above 65535.
    """
    # Of these alone, so that a folder of photographs need not be opened to know it.
    deep = [path for path in map(str, paths) if path.lower().endswith((".png", ".tif", ".tiff", ".pgm", ".ppm"))]
    if len(deep) > _MOST_LOOKED_AT:
        deep = [deep[place] for place in np.linspace(0, len(deep) - 1, _MOST_LOOKED_AT).round().astype(int)]
    highest: int | None = None
    # Pillow decodes without the interpreter lock.
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for path, value in zip(deep, pool.map(_largest_value, deep), strict=True):
            if value is None:
                continue
            if value > PLAIN_MAX_VALUES[-1]:
                msg = f"Cannot read the image {path}: its values run to {value}; up to 65535 can be read."
                raise UnreadableImageError(msg, path)
            highest = value if highest is None else max(value, highest)
    return None if highest is None else next(white for white in PLAIN_MAX_VALUES if highest <= white)


def _largest_value(path: str) -> int | None:
    """The largest value of a file whose white is not known, else nothing."""
    with _opened(path) as image:
        if _kind(image).white is not None:
            return None
    return int(_read_values(path)[0].max())


def _read_values(path: str | Path | bytes) -> tuple[np.ndarray, float | None, bool]:
    """Upright values, ``(C, H, W)``, as they are in the file; what white is in them; whether that is black instead."""
    with _opened(path) as image:
        kind = _kind(image)
        if getattr(image, "is_animated", False) and image.format != "MPO":  # a photograph with its preview
            _tell_once(
                "pages",
                "The image %s has several pages: only the first is read, of this file and of others like it.",
                _named(path),
            )
        # Before the pixels are decoded, when Pillow forgets both.
        inverted = image.format == "TIFF" and image.tag_v2.get(_PHOTOMETRIC) == _MIN_IS_WHITE
        orientation, sample = _orientation(image), _sample_type(image)
        if kind.white is None and image.mode in _COLOUR_MODES:
            return _upright(_deep_values(path, image.format), orientation), None, False
        if image.format == "TIFF" and orientation >= 5:
            image.filename = ""  # or Pillow (13) maps the file in rows as long as those of the upright image
        image.load()
        if image.format in {"TIFF", "PNG"}:  # a PNG may tell behind its pixels; Pillow turns a TIFF itself
            orientation = _orientation(image)
        if kind.white == 255:
            mode = "L" if kind.channels == 1 else "RGB"
            values = _pixels(image if image.mode == mode else image.convert(mode), kind.channels)
            return _upright(values.view(sample or values.dtype), orientation), 255, False  # Pillow has inverted them
        values = np.asarray(image)[None]
        return _upright(values.view(sample or values.dtype), orientation), kind.white, inverted


def _sample_type(image: Any) -> type | None:
    """What the values of a TIFF are where Pillow takes them for others: signed ones of 8 bits, unsigned ones of 32."""
    if image.format != "TIFF":
        return None
    bits = image.tag_v2.get(_BITS_PER_SAMPLE, (1,))
    formats = image.tag_v2.get(_SAMPLE_FORMAT, (_UNSIGNED,))
    return {((8,), (_SIGNED,)): np.int8, ((32,), (_UNSIGNED,)): np.uint32}.get((bits, formats))


def _pixels(image: Image.Image, channels: int) -> np.ndarray:
    """Pixels of 8 bits, ``(C, H, W)``, some rows at a time: of all of them Pillow would make two copies more."""
    width, height = image.size
    rows = max(1, _AT_ONCE // max(1, width))
    if rows >= height:
        values = np.asarray(image)
        return values[None] if channels == 1 else values.transpose(2, 0, 1)
    pixels = np.empty((channels, height, width), dtype=np.uint8)
    for top in range(0, height, rows):
        part = np.asarray(image.crop((0, top, width, min(height, top + rows))))
        pixels[:, top : top + rows] = part[None] if channels == 1 else part.transpose(2, 0, 1)
    return pixels


def _kind(image: Any) -> _Kind:
    """Look at an image that Pillow has opened."""
    grey = image.mode in _GREY_MODES or image.mode == "F" or image.mode.startswith("I")
    white: float | None = 255
    if image.mode == "F":
        white = 1
    elif image.format == "TIFF" and (image.mode.startswith("I") or image.mode in _COLOUR_MODES):
        bits = max(image.tag_v2.get(_BITS_PER_SAMPLE, (1,)))
        if bits > 8:
            white = None if bits >= 16 else 2.0**bits - 1
    elif image.format == "PPM" and image.mode == "I":
        # It says what white is, and Pillow scales from there to 16 bits.
        white = None if image.tile[0][0] == "raw" else 65535
    elif image.mode.startswith("I"):
        white = None
    elif image.format == "PNG" and ";16" in str(image.tile[0][3] if image.tile else ""):
        white = None
        grey = image.tile[0][3].startswith("LA")
    width, height = image.size
    # A PNG is not decoded here to look behind its pixels. Pillow has turned the size of a TIFF.
    if image.format != "TIFF" and (image.format != "PNG" or "exif" in image.info) and _orientation(image) >= 5:
        width, height = height, width
    return _Kind(height, width, 1 if grey else 3, white)


def _orientation(image: Image.Image) -> int:
    """How the camera was held, 1 to 8 in EXIF's order; 1, upright, if nobody knows."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # broken EXIF is no reason to refuse a picture
        return 1
    return orientation if orientation in range(1, 9) else 1


def _deep_values(path: str | Path | bytes, kind: str) -> np.ndarray:
    """16 bits of a file with several channels, ``(1 or 3, H, W)``: Pillow would keep the upper 8."""
    if kind == "TIFF":
        with tifffile.TiffFile(BytesIO(path) if isinstance(path, bytes) else path) as file:
            page: Any = file.pages[0]
            values = page.asarray()
            if page.axes.endswith("S"):
                values = values.transpose(2, 0, 1)
    else:
        content = path if isinstance(path, bytes) else Path(path).read_bytes()
        values = imagecodecs.png_decode(content).transpose(2, 0, 1)
    return values[: 3 if len(values) >= 3 else 1]


def _upright(values: np.ndarray, orientation: int) -> np.ndarray:
    """Undo how the camera was held; ``(C, H, W)`` or ``(C, W, H)``, and EXIF's orientation, 1 to 8; writable."""
    if orientation in {5, 6, 7, 8}:
        values = values.swapaxes(1, 2)
    if orientation in {3, 4, 7, 8}:
        values = values[:, ::-1]
    if orientation in {2, 3, 6, 7}:
        values = values[:, :, ::-1]
    return np.require(values, requirements=["C", "W"])


def _tell_once(what: str, message: str, *values: Any) -> None:
    """Warn once in a process; of what has no name every time."""
    if not what or what not in _told:
        _told.add(what)
        logger.warning(message, *values)


_told: set[str] = set()


def _warn_of_size(image: Image.Image, path: str | Path | bytes) -> None:
    """Name an image so large that Pillow warns of it; twice the limit Pillow refuses itself."""
    pixels, limit, name = image.width * image.height, Image.MAX_IMAGE_PIXELS, _named(path)
    if limit is not None and pixels > limit:
        _tell_once(
            "" if isinstance(path, bytes) else f"size of {name}",
            "The image %s has %s pixels, above %s, where Pillow begins to suspect a file made to fill memory. "
            "It is read; with more than %s it would be refused.",
            name,
            *(f"{number:,}" for number in (pixels, limit, 2 * limit)),
        )


@contextmanager
def _opened(path: str | Path | bytes) -> Iterator[Any]:
    """Open an image file; whatever goes wrong with it is an :class:`UnreadableImageError` with its path."""
    try:
        if isinstance(path, bytes):
            with Image.open(BytesIO(path), formats=FORMATS) as image:
                _warn_of_size(image, path)
                yield image
            return
        if not stat.S_ISREG(Path(path).stat().st_mode):  # opening a pipe would wait for ever
            msg = "it is not a regular file"
            raise OSError(msg)
        with Image.open(path) as image:
            if image.format == "EPS":
                msg = f"it is none of {', '.join(FORMATS)}, but EPS, for which Pillow would start a program"
                raise OSError(msg)
            _warn_of_size(image, path)
            yield image
    except UnreadableImageError:
        raise
    except UnidentifiedImageError as error:
        msg = f"Cannot read the image {_named(path)}: {_unidentified(path)}"
        raise UnreadableImageError(msg, _named(path)) from error
    except Exception as error:  # Pillow's decoders raise nearly everything: OSError, SyntaxError, zlib.error, ...
        msg = f"Cannot read the image {_named(path)}: {error}"
        raise UnreadableImageError(msg, _named(path)) from error


def _unidentified(path: str | Path | bytes) -> str:
    """Why Pillow does not know a file: it is no image, or one that is damaged, or of a kind that Pillow cannot read."""
    try:
        with tifffile.TiffFile(BytesIO(path) if isinstance(path, bytes) else path) as file:
            page: Any = file.pages[0]
            held = f"{page.samplesperpixel} channel{'s' if page.samplesperpixel > 1 else ''} of {page.dtype}"
            if page.compression != tifffile.COMPRESSION.NONE:
                held += f", compressed by {page.compression.name}"
    except Exception:  # tifffile's errors are as many as Pillow's
        return _unidentified_by_content(path)
    return (
        f"it is a TIFF with {held}, and damaged or of a kind that is not read. Read are grey and colours of 8 or 16 "
        "bits, and grey of float32."
    )


_BEGINNINGS = {
    b"\xff\xd8\xff": "a JPEG, and damaged or of a kind that is not read. Read are those of 8 bits, with losses",
    b"\x89PNG\r\n": "a PNG, and damaged",
    b"PF": "a PPM of floats in colour. Of floats grey is read",
    b"P7": "a PAM, which is not read. PGM and PPM are",
}


def _unidentified_by_content(path: str | Path | bytes) -> str:
    with BytesIO(path) if isinstance(path, bytes) else Path(path).open("rb") as file:
        content = file.read(8)
    if not content:
        return "it is empty."
    for beginning, kind in _BEGINNINGS.items():
        if content.startswith(beginning):
            return f"it is {kind}."
    return f"it is none of {', '.join(FORMATS)}"


def _named(path: str | Path | bytes) -> str:
    return "that was given" if isinstance(path, bytes) else str(path)
