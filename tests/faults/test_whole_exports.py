# SPDX-License-Identifier: Apache-2.0
"""Exports that fail or are killed: the earlier one is as it was, and there is no half of one."""

import errno
import os
import shutil
from unittest.mock import Mock

import pytest
from torchvision.transforms.v2 import Resize

from anomalib_flowood import PixelFlow, load
from anomalib_flowood.files import whole_files
from anomalib_flowood.models.components import ExportCheckError, export


@pytest.fixture
def again(cases):
    """A detector, the folder in which an export of it is, and what is in its files."""

    def start(export_type):
        folder = cases("pixel_flow").export(export_type).parent
        for left in folder.glob(".flowood-*"):  # by the killed export, if its test came before
            shutil.rmtree(left)
        return PixelFlow.load_from_checkpoint(cases("pixel_flow").checkpoint), folder, contents(folder)

    return start


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_export_that_fails_leaves_the_earlier_one(again, monkeypatch):
    detector, folder, before = again("torch")
    assert {"model.json"} < set(before)

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export, "write_description", full)
    with pytest.raises(OSError, match="No space left"):
        detector.to_torch(folder.parents[1])
    assert contents(folder) == before


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 320 vs 214"),
        RuntimeError("basic_ios::clear: iostream error"),
        OSError("1536 requested and 0 written"),
        OSError(errno.ENOSPC, "No space left on device"),
    ],
)
def test_a_disk_without_room_is_named_whatever_a_writer_says_of_it(error, cases, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "write_description", Mock(side_effect=error))
    with pytest.raises(OSError, match=r"torch.model\.pt could not be written whole: is there room on the disk\?"):
        PixelFlow.load_from_checkpoint(cases("pixel_flow").checkpoint).to_torch(tmp_path)


def test_a_first_export_that_fails_leaves_nothing(cases, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "write_description", None)
    with pytest.raises(TypeError):
        PixelFlow.load_from_checkpoint(cases("pixel_flow").checkpoint).to_torch(tmp_path)
    assert not list((tmp_path / "weights" / "torch").iterdir())


def test_an_export_that_scores_otherwise_does_not_replace_one_that_does_not(again, capsys):
    pytest.importorskip("onnxruntime", reason="ONNX export is the extra anomalib-flowood[export]")
    detector, folder, before = again("onnx")
    detector.pre_processor.export_transform = Resize((12, 12), antialias=False)
    with pytest.raises(ExportCheckError, match=r"model.onnx gives other scores .* The earlier export stays as it was"):
        detector.to_onnx(folder.parents[1])
    assert contents(folder) == before
    assert f"Check of {folder / 'model.onnx'}: largest" in capsys.readouterr().out


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks, so that nothing is imported anew")
def test_a_killed_export_leaves_the_earlier_one(again, monkeypatch):
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    detector, folder, before = again("torch")
    child = os.fork()
    if not child:
        try:
            export.write_description = lambda *args: os._exit(9)
            detector.to_torch(folder.parents[1])
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert load(folder).size == (12, 12)


def test_files_that_belong_together_have_none_that_names_them_while_they_take_their_places(tmp_path, monkeypatch):
    for name in ("model.bin", "model.xml", "model.json"):
        (tmp_path / name).write_text("before")
    moved, replace = [], type(tmp_path).replace

    def watched(path, target):
        moved.append(path.name)
        assert not (tmp_path / "model.json").exists()
        return replace(path, target)

    monkeypatch.setattr(type(tmp_path), "replace", watched)
    with whole_files(tmp_path, last="model.json") as folder:
        for name in ("model.xml", "model.json", "model.bin"):
            (folder / name).write_text("after")
    assert moved == ["model.bin", "model.xml", "model.json"]
    assert set(contents(tmp_path).values()) == {b"after"}
    assert len(contents(tmp_path)) == 3
