# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import logging
import os
import re
from pathlib import Path

import pytest
from data_helpers import write_images

from anomalib_flowood.data import UnreadableImageError, image_files, read_image
from anomalib_flowood.data.decoding import read_header


def names(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in image_files(folder)]


def test_hidden_and_irregular_files_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_images(tmp_path / "b", 1)
    write_images(tmp_path / "b" / "deep" / "er", 1, suffix=".JPG")
    write_images(tmp_path / ".ipynb_checkpoints", 1)
    write_images(tmp_path / "b" / ".cache" / "c", 1)
    (tmp_path / "b" / "._000.png").write_bytes(b"")
    (tmp_path / "b" / "notes.txt").write_text("")
    (tmp_path / "b" / "folder.png").mkdir()
    assert names(tmp_path) == ["b/000.png", "b/deep/er/000.JPG"]
    assert not caplog.records
    os.mkfifo(tmp_path / "b" / "pipe.png")
    (tmp_path / "b" / "gone.png").symlink_to(tmp_path / "nothing")
    (tmp_path / "b" / "round.png").symlink_to("round.png")
    (tmp_path / "b" / "round").symlink_to("round")
    assert names(tmp_path) == ["b/000.png", "b/deep/er/000.JPG"]
    assert "3 entries that are no regular files" in caplog.text
    assert "pipe.png" in caplog.text
    # Not opened where it is named, either.
    with pytest.raises(UnreadableImageError, match="pipe.png: it is not a regular file"):
        read_image(tmp_path / "b" / "pipe.png")
    with pytest.raises(UnreadableImageError, match="pipe.png: it is not a regular file"):
        read_header(tmp_path / "b" / "pipe.png")


def test_images_of_other_endings_are_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_images(tmp_path, 2)
    for name in ("a.HEIC", "b.jfif", "c.avif", "notes.txt", "model.onnx"):
        (tmp_path / name).write_bytes(b"")
    assert names(tmp_path) == ["000.png", "001.png"]
    (said,) = caplog.messages
    assert "Left out: 3 entries whose endings are not read" in said
    assert f"({tmp_path}/a.HEIC, {tmp_path}/b.jfif, {tmp_path}/c.avif). Convert to one of .jpg .jpeg .png" in said
    caplog.clear()
    assert image_files(tmp_path, tell=False)
    assert not caplog.records


def test_links_are_followed_and_each_file_counts_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    top = tmp_path / "top"
    write_images(top / "real", 2)
    write_images(tmp_path / "elsewhere" / "more", 2)
    (top / "a_link").symlink_to(tmp_path / "elsewhere")
    (top / "b_link").symlink_to(tmp_path / "elsewhere" / "more")
    (top / "again").symlink_to(top / "real")
    (top / "real" / "loop").symlink_to(top)
    (top / "000.png").symlink_to(top / "real" / "000.png")
    (tmp_path / "elsewhere" / "more" / "back").symlink_to(tmp_path / "elsewhere")
    with caplog.at_level(logging.INFO):
        assert names(top) == ["a_link/more/000.png", "a_link/more/001.png", "real/000.png", "real/001.png"]
    assert "1 links to images that are there already" in caplog.text
    (tmp_path / "linked").symlink_to(top)
    assert names(tmp_path / "linked") == names(top)


def test_folders_that_link_to_each_other_do_not_multiply(tmp_path: Path) -> None:
    for i in range(12):
        write_images(tmp_path / str(i), 1)
    for i in range(12):
        for j in range(12):
            (tmp_path / str(i) / f"to{j}").symlink_to(tmp_path / str(j))
    assert len(image_files(tmp_path)) == 12


def test_folders_without_numbers_are_all_entered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one/two").mkdir(parents=True)
    write_images(tmp_path / "one", 1)
    write_images(tmp_path / "one/two", 2)
    (tmp_path / "one/again").symlink_to(tmp_path)
    of_path = Path.stat

    def without_number(path: Path, **kwargs: bool) -> os.stat_result:
        return os.stat_result((of_path(path, **kwargs)[0], 0, 0, *of_path(path, **kwargs)[3:]))

    monkeypatch.setattr(Path, "stat", without_number)
    assert len(image_files(tmp_path)) == 3


def test_what_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(NotADirectoryError, match=re.escape(f"There is no folder {tmp_path / 'x'}")):
        image_files(tmp_path / "x")
