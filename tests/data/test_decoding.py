# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
from anomalib.data import Folder
from anomalib.data import utils as anomalib_utils
from data_helpers import write_images
from PIL import EpsImagePlugin, Image, ImageOps

from anomalib_flowood.data import PathDataset, UnreadableImageError, decoding, read_image
from anomalib_flowood.data.decoding import plain_max_value, read_header, read_mask, read_picture
from anomalib_flowood.data.images import Images

RAMP = np.arange(0, 4096, 30, dtype=np.uint16)[None].repeat(5, 0)  # 137 grey levels of 12 bits, 5 × 137
COLOURS = np.stack([RAMP, RAMP[:, ::-1], RAMP // 2], -1)


def save(array: np.ndarray, path: Path, mode: str | None = None, **kwargs) -> str:
    image = Image.fromarray(array)
    (image if mode is None else image.convert(mode)).save(path, **kwargs)
    return str(path)


def write_all(folder: Path) -> dict[str, str]:
    """The same 12 bits in every kind of file that holds them."""
    folder.mkdir(exist_ok=True)
    (folder / "rgb.png").write_bytes(imagecodecs.png_encode(COLOURS))
    for name, options in {"rgb.tif": {}, "planar.tif": {"planarconfig": "separate"}, "lzw.tiff": {}}.items():
        pixels = COLOURS.transpose(2, 0, 1) if name == "planar.tif" else COLOURS
        compression = "lzw" if name == "lzw.tiff" else None
        tifffile.imwrite(folder / name, pixels, photometric="rgb", compression=compression, **options)
    (folder / "raw.pgm").write_bytes(b"P5 137 5 65535\n" + RAMP.astype(">u2").tobytes())
    return {
        "grey.png": save(RAMP, folder / "grey.png"),
        "grey.tif": save(RAMP, folder / "grey.tif"),
        "int32.tif": save(RAMP.astype(np.int32), folder / "int32.tif"),
        **{name: str(folder / name) for name in ("rgb.png", "rgb.tif", "planar.tif", "lzw.tiff", "raw.pgm")},
    }


# --- 16 bits


def test_twelve_bits_keep_their_grey_levels(tmp_path: Path) -> None:
    expected = torch.from_numpy(np.rint(COLOURS / 4095 * 255).astype(np.uint8)).permute(2, 0, 1)
    files = write_all(tmp_path)
    for name, path in files.items():
        assert plain_max_value([path]) == 4095, name
        image = read_image(path, 4095)
        grey = len(image) == 1
        assert torch.equal(image, expected[:1] if grey else expected), name
        assert len(image[0].unique()) == 137
        assert read_header(path) == (5, 137, len(image)), name
        assert len(read_image(path)[0].unique()) == 17  # of 16 bits, these are the darkest sixteenth
        assert torch.equal(read_picture(path), image)
    assert plain_max_value(files.values()) == 4095


@pytest.mark.parametrize(("highest", "white"), [(0, 255), (255, 255), (256, 1023), (4095, 4095), (5000, 16383)])
def test_plain_is_the_next_number_of_bits(tmp_path: Path, highest: int, white: int) -> None:
    paths = [save(np.array([[0, value]], np.uint16), tmp_path / f"{value}.png") for value in {0, highest}]
    assert plain_max_value(paths) == white
    # Files that say what white is are not asked.
    others = [
        save(np.zeros((2, 2), np.uint8), tmp_path / "a.png"),
        save(np.eye(2, dtype=np.float32), tmp_path / "a.tif"),
    ]
    assert plain_max_value([*paths, *others]) == white
    assert plain_max_value(others) is None
    assert plain_max_value([]) is None


def test_files_that_say_what_white_is(tmp_path: Path) -> None:
    (tmp_path / "12.pgm").write_bytes(b"P5 2 1 4095\n" + np.array([0, 4095], ">u2").tobytes())
    assert read_image(tmp_path / "12.pgm", 255).tolist() == [[[0, 255]]]
    packed = np.array([0x00, 0x0F, 0xFF], np.uint8)  # 0 and 4095, 12 bits each
    header = {256: 2, 257: 1, 258: 12, 259: 1, 262: 1, 273: 200, 277: 1, 278: 1, 279: 3}
    entries = b"".join(
        np.array([tag, 4], "<u2").tobytes() + np.array([1, value], "<u4").tobytes() for tag, value in header.items()
    )
    content = b"II*\0" + np.array([8], "<u4").tobytes() + np.array([len(header)], "<u2").tobytes() + entries + b"\0" * 4
    (tmp_path / "12.tif").write_bytes(content.ljust(200, b"\0") + packed.tobytes())
    assert read_image(tmp_path / "12.tif", 255).tolist() == [[[0, 255]]]
    assert plain_max_value([tmp_path / "12.pgm", tmp_path / "12.tif"]) is None


def test_more_than_white(tmp_path: Path) -> None:
    path = save(RAMP, tmp_path / "a.png")
    message = f"{path}: its values run from 0 to 4080, where 0 to 1023 is expected. Set max_value .* now 1023"
    with pytest.raises(UnreadableImageError, match=message):
        read_image(path, 1023)
    path = save(np.array([[0, 70000]], np.int32), tmp_path / "b.tif")
    with pytest.raises(UnreadableImageError, match=f"{path}: its values run to 70000; up to 65535"):
        plain_max_value([path])
    path = save(np.array([[-1, 7]], np.int32), tmp_path / "c.tif")
    with pytest.raises(UnreadableImageError, match=f"{path}: its values run from -1 to 7"):
        read_image(path)


def test_signed_values_are_taken_for_what_they_are(tmp_path: Path) -> None:
    for kind in (np.int8, np.int16):
        path = tmp_path / f"{np.dtype(kind).name}.tif"
        tifffile.imwrite(path, np.array([[-128, -1, 0, 127]], kind), photometric="minisblack")
        for given in (path, path.read_bytes()):
            with pytest.raises(UnreadableImageError, match=r"run from -128 to 127, .* Save such files without a sign"):
                read_image(given)
        assert read_mask(path).tolist() == [[1, 1, 0, 1]]
    tifffile.imwrite(path, np.array([[0, 1, 127]], np.int8), photometric="minisblack")
    assert read_image(path).tolist() == [[[0, 1, 127]]]


def test_thirty_two_bits_without_a_sign_have_none(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.array([[0, 3_000_000_000]], np.uint32), photometric="minisblack")
    with pytest.raises(UnreadableImageError, match="its values run to 3000000000; up to 65535"):
        plain_max_value([path])
    with pytest.raises(UnreadableImageError, match="its values run from 0 to 3000000000"):
        read_image(path)


def test_min_is_white(tmp_path: Path) -> None:
    values = np.array([[0, 20, 255]], np.uint8)
    for name, array in {"8": values, "16": values * np.uint16(257), "float": (values / 255).astype(np.float32)}.items():
        path = tmp_path / f"{name}.tif"
        tifffile.imwrite(path, array, photometric="miniswhite")
        assert read_image(path).tolist() == [[[255, 235, 0]]], name


# --- values that make no image


@pytest.mark.parametrize("values", [[0, 1.5], [-0.5, 1], [0, np.nan], [np.nan, np.nan], [0, np.inf]])
def test_floats_that_make_no_image(tmp_path: Path, values: list[float]) -> None:
    path = save(np.array([values], np.float32), tmp_path / "b.tif")
    folder = Folder("a", tmp_path, val_split_mode="none", test_split_mode="none")
    folder._setup()
    readers = [read_image, anomalib_utils.read_image, lambda path: PathDataset(path)[0], lambda _: folder.train_data[0]]
    said = "some of its values are NaN, where 0 to 1" if np.isnan(values).any() else "its values run from"
    for reader in readers:
        with pytest.raises(UnreadableImageError, match=f"Cannot read the image {path}: {said}") as info:
            reader(path)
        assert info.value.path == path


# --- EXIF and pages


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(tmp_path: Path, orientation: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 10, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("a.png", "a.tif", "a.webp", "a.jpg"):
        options = {"lossless": True} if name == "a.webp" else {}
        path = save(pixels, tmp_path / name, exif=exif, **options)
        with Image.open(path) as image:
            expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        read = read_image(path)
        assert np.array_equal(read.permute(1, 2, 0), expected), name
        assert read_header(path)[:2] == read.shape[1:], name
    # Upright, and not the numbers of the file as they lie there.
    upright = read_image(tmp_path / "a.png").permute(1, 2, 0).numpy()
    assert upright.shape[:2] == ((10, 6) if orientation > 4 else (6, 10))
    assert (orientation == 1) == (upright.shape == pixels.shape and np.array_equal(upright, pixels))
    grey = np.ascontiguousarray(pixels[..., 0])
    for array in (grey, grey * np.uint16(257)):  # which Pillow may map into memory
        tifffile.imwrite(tmp_path / "grey.tif", array, extratags=[(274, 3, 1, orientation, True)])
        assert np.array_equal(read_image(tmp_path / "grey.tif")[0], upright[..., 0])
        assert read_header(tmp_path / "grey.tif")[:2] == upright.shape[:2]
    for array in (COLOURS, RAMP):
        tifffile.imwrite(tmp_path / "deep.tif", array, extratags=[(274, 3, 1, orientation, True)])
        eight = np.rint(array / 4095 * 255).astype(np.uint8)
        tifffile.imwrite(tmp_path / "eight.tif", eight, extratags=[(274, 3, 1, orientation, True)])
        assert torch.equal(read_image(tmp_path / "deep.tif", 4095), read_image(tmp_path / "eight.tif"))


def test_broken_exif_is_no_reason_to_refuse(tmp_path: Path) -> None:
    path = save(np.zeros((4, 4, 3), np.uint8), tmp_path / "a.jpg", exif=b"Exif\0\0nonsense")
    assert read_image(path).shape == (3, 4, 4)


def test_first_page_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "_told", set())
    first, second = (Image.new("L", (4, 3), value) for value in (10, 20))
    for name in ("a.tif", "b.tif"):
        first.save(tmp_path / name, save_all=True, append_images=[second])
        assert read_image(tmp_path / name).unique().tolist() == [10]
    assert [record.message for record in caplog.records] == [
        f"The image {tmp_path}/a.tif has several pages: only the first is read, of this file and of others like it."
    ]


def test_of_files_with_few_of_their_16_bits_one_is_named_where_nobody_says_what_white_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "_told", set())
    twelve = save(np.array([[0, 4095]], dtype=np.uint16), tmp_path / "a.png")
    bright = save(np.array([[0, 4096]], dtype=np.uint16), tmp_path / "b.png")
    for path, max_value in ((twelve, 4095), (twelve, 65535), (bright, None)):
        read_image(path, max_value)
    assert not caplog.records
    for _ in range(2):
        read_image(twelve)
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        f"The image {twelve} has 16 bits, and no value above 4095 of 65535, which is taken for white"
    ]


# --- modes, depths and damage


def test_modes(tmp_path: Path) -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert np.array_equal(read_image(save(rgb, tmp_path / "rgb.png")), rgb.transpose(2, 0, 1))
    assert np.array_equal(read_image(save(rgb[..., 0], tmp_path / "grey.png"))[0], rgb[..., 0])
    rgba = np.dstack([rgb, rgb[..., :1]])
    assert np.array_equal(read_image(save(rgba, tmp_path / "rgba.png")), rgb.transpose(2, 0, 1))
    assert read_image(save(rgb, tmp_path / "la.png", "LA")).shape == (1, 5, 7)
    assert read_image(save(rgb, tmp_path / "palette.png", "P")).shape == (3, 5, 7)
    assert read_image(save(rgb, tmp_path / "cmyk.jpg", "CMYK")).shape == (3, 5, 7)
    assert set(read_image(save(rgb[..., 0] > 99, tmp_path / "bit.png")).unique().tolist()) == {0, 255}


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bits_are_scaled(tmp_path: Path, suffix: str) -> None:
    values = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    image = read_image(save(values, tmp_path / f"deep{suffix}"))
    assert image.tolist() == [[[0, 1, 128, 255]]]


def test_float_images(tmp_path: Path) -> None:
    assert read_image(save(np.array([[0, 0.5, 1]], np.float32), tmp_path / "a.tif")).tolist() == [[[0, 128, 255]]]
    path = save(np.array([[0, 700]], np.float32), tmp_path / "b.tif")
    with pytest.raises(ValueError, match=rf"{path}: its values run from 0.0 to 700.0, where 0 to 1 is expected"):
        read_image(path)


def test_no_image_starts_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "0.eps")
    path = (tmp_path / "0.eps").rename(tmp_path / "0.png")
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **_: started.append(args))
    for read in (read_image, read_header):
        with pytest.raises(UnreadableImageError, match=r"0.png: it is none of .*EPS, for which Pillow would start"):
            read(path)
    assert not started


@pytest.mark.parametrize(
    ("pixels", "held"),
    [
        (np.ones((4, 6)), "1 channel of float64"),
        (np.ones((4, 6, 3), np.float32), "3 channels of float32"),
        (np.ones((4, 6, 5), np.uint8), "5 channels of uint8"),
    ],
)
def test_a_tiff_of_another_kind_is_said_to_be_one(tmp_path: Path, pixels: np.ndarray, held: str) -> None:
    path = tmp_path / "a.tif"
    options = {"photometric": "rgb"} if pixels.shape[2:] == (3,) else {"photometric": "minisblack"}
    tifffile.imwrite(path, pixels, planarconfig="contig" if pixels.ndim == 3 else None, **options)
    for given in (path, path.read_bytes()):
        with pytest.raises(UnreadableImageError, match=f"it is a TIFF with {held}, and damaged or of"):
            read_image(given)


def test_an_image_of_a_kind_that_is_not_read_is_not_said_to_be_none(tmp_path: Path) -> None:
    deep = np.arange(256, dtype=np.uint16).reshape(16, 16)
    contents = {
        "a JPEG, and damaged or of a kind that is not read": imagecodecs.ljpeg_encode(deep, bitspersample=16),
        "a PNG, and damaged": imagecodecs.png_encode(deep)[:12],
        "a PPM of floats in colour": b"PF\n1 1\n-1.0\n" + np.ones(3, "<f4").tobytes(),
        "a PAM": b"P7\nWIDTH 1\nHEIGHT 1\nDEPTH 1\nMAXVAL 255\nENDHDR\n\0",
    }
    for kind, content in contents.items():
        (tmp_path / "a.jpg").write_bytes(content)
        for given in (tmp_path / "a.jpg", content):
            with pytest.raises(UnreadableImageError, match=f"it is {kind}"):
                read_image(given)
    tifffile.imwrite(tmp_path / "a.tif", deep.astype(np.uint8), compression="jpegxl", photometric="minisblack")
    with pytest.raises(UnreadableImageError, match="1 channel of uint8, compressed by JPEGXL, and damaged or"):
        read_image(tmp_path / "a.tif")


def test_what_is_no_image_is_none_of_the_kinds_that_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("a letter", encoding="utf-8")
    with pytest.raises(UnreadableImageError, match=r"a\.jpg: it is none of BMP, JPEG, PNG, PPM, TIFF, WEBP"):
        read_image(tmp_path / "a.jpg")


def test_an_empty_file_is_said_to_be_empty(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    for given in (tmp_path / "a.png", b""):
        with pytest.raises(UnreadableImageError, match="it is empty"):
            read_image(given)


def test_damaged_image_is_named(tmp_path: Path) -> None:
    path = write_images(tmp_path, 1, (64, 64), suffix=".jpg") / "000.jpg"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"Cannot read the image {path}"):
        read_image(str(path))
    path.write_bytes(b"no image")
    with pytest.raises(ValueError, match=f"Cannot read the image {path}"):
        Images("parts", [str(path)]).in_memory(1)
