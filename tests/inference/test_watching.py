# SPDX-License-Identifier: Apache-2.0
"""A folder that is watched: each image has one row, whenever the process was killed."""

import csv
import errno
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from model_helpers import in_a_fork
from PIL import Image

from anomalib_flowood import inference
from anomalib_flowood.cli import main
from anomalib_flowood.inference import Detector
from anomalib_flowood.inference.watching import COLUMNS, Watcher, only_writer
from anomalib_flowood.models.components.export_check import Runtime


class KilledError(BaseException):
    """What no handler of errors stops."""


def killed(*_: object, **__: object) -> None:
    raise KilledError


@pytest.fixture
def detector() -> Detector:
    """The mean is the score, and more than that of all of 20 normal images is anomalous."""
    runtime = Runtime(lambda images: {"pred_score": images.mean((1, 2, 3))})
    return Detector(runtime, (8, 8), list(np.linspace(0.1, 0.4, 20)), 1 / 21)


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "arriving"
    folder.mkdir()
    for number, grey in enumerate((30, 250, 60, 240)):
        save(folder / f"{number}.png", grey)
    return folder


def save(path: Path, grey: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((10, 12, 3), grey, np.uint8)).save(path)


def rows(table: Path) -> list[dict[str, str]]:
    with table.open(newline="") as file:
        return list(csv.DictReader(file))


def looks(watcher: Watcher, times: int = 3) -> None:
    for _ in range(times):
        watcher.look()


def test_what_arrives_is_scored_and_set_aside(detector, folder, tmp_path):
    table, aside = tmp_path / "table.csv", folder / "anomalous"  # below the folder itself
    watcher = Watcher(detector, folder, table, aside)
    assert watcher.look() == []  # whoever writes them may not be done
    assert watcher.look() == [folder / f"{number}.png" for number in range(4)]
    save(folder / "lot" / "4.png", 255)
    looks(watcher)
    found = rows(table)
    assert [row["path"] for row in found] == ["0.png", "1.png", "2.png", "3.png", "lot/4.png"]
    assert [row["label"] for row in found] == ["0", "1", "0", "1", "1"]
    assert float(found[1]["p_value"]) == 1 / 21
    assert float(found[0]["score"]) == pytest.approx(30 / 255)
    assert sorted(path.name for path in folder.glob("*.png")) == ["0.png", "2.png"]
    assert sorted(str(path.relative_to(aside)) for path in aside.rglob("*.png")) == ["1.png", "3.png", "lot/4.png"]
    save(folder / "1.png", 251)  # a name that is used again is another image
    looks(watcher)
    assert len(rows(table)) == 6
    assert (aside / "1-2.png").exists()


def test_links_stay_links_and_nobody_hears_of_them(detector, folder, tmp_path, caplog):
    caplog.set_level("INFO")
    aside = folder / "aside"
    for _ in range(2):
        looks(Watcher(detector, folder, tmp_path / "table.csv", aside, link=True))
    assert [path.name for path in sorted(aside.iterdir())] == ["1.png", "3.png"]
    assert (aside / "1.png").resolve() == (folder / "1.png").resolve()
    assert len(rows(tmp_path / "table.csv")) == 4
    assert "Left out" not in caplog.text


def test_a_folder_may_be_a_link(detector, folder, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(folder)
    looks(Watcher(detector, link, tmp_path / "table.csv", link / "aside"), times=6)
    assert [path.name for path in sorted((folder / "aside").iterdir())] == ["1.png", "3.png"]
    assert len(rows(tmp_path / "table.csv")) == 4


@pytest.mark.parametrize("moment", ["before the row", "within the row", "after the row", "before the move"])
def test_whenever_it_is_killed_each_image_has_one_row(moment, detector, folder, tmp_path, monkeypatch):
    table, aside = tmp_path / "table.csv", tmp_path / "aside"
    watcher = Watcher(detector, folder, table, aside)
    watcher.look()
    append = watcher._append

    def killed(row: tuple) -> None:
        if row[0] == "1.png" and moment != "before the move":
            if moment == "after the row":
                append(row)
            elif moment == "within the row":
                with table.open("ab") as file:
                    file.write(b"1.png,123,4")
            raise KilledError
        append(row)

    def no_move(*_: object, **__: object) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(watcher, "_append", killed)
        if moment == "before the move":
            patch.setattr(shutil, "move", no_move)
        with pytest.raises(KilledError):
            watcher.look()
    looks(Watcher(detector, folder, table, aside))
    assert [(row["path"], row["label"]) for row in rows(table)] == [(f"{n}.png", str(n % 2)) for n in range(4)]
    assert sorted(path.name for path in folder.iterdir()) == ["0.png", "2.png"]
    assert sorted(path.name for path in aside.iterdir()) == ["1.png", "3.png"]


def test_a_file_on_its_way_is_waited_for_and_a_broken_one_is_named(detector, folder, tmp_path):
    table, whole = tmp_path / "table.csv", (folder / "0.png").read_bytes()
    late, broken = folder / "late.png", folder / "broken.png"
    late.write_bytes(whole[:40])
    broken.write_bytes(whole[:40])
    os.utime(broken, (1, 1))  # long unchanged
    watcher = Watcher(detector, folder, table)
    looks(watcher)
    found = {row["path"]: row for row in rows(table)}
    assert "late.png" not in found
    assert "Cannot read the image" in found["broken.png"]["error"]
    assert found["broken.png"]["label"] == ""
    late.write_bytes(whole)
    looks(watcher)
    assert [row["label"] for row in rows(table) if row["path"] == "late.png"] == ["0"]


def test_the_command_watches_until_it_is_stopped(detector, folder, tmp_path, monkeypatch):
    def nap(seconds: float) -> None:
        assert seconds == 0.5
        if (aside / "3.png").exists():
            raise KeyboardInterrupt

    aside = tmp_path / "aside"
    monkeypatch.setattr(inference, "load", lambda path, device: {("model.ckpt", "cpu"): detector}[path, device])
    monkeypatch.setattr(time, "sleep", nap)
    with pytest.raises(SystemExit, match="130"):
        main(["watch", "model.ckpt", str(folder), "--aside", str(aside), "--interval", "0.5"])
    assert len(rows(folder / "watch.csv")) == 4


def test_another_table_is_refused(detector, folder, tmp_path):
    table = tmp_path / "predictions.csv"
    table.write_text("image_path,pred_score\na.png,1\n")
    with pytest.raises(ValueError, match="is no table of `flowood watch`: its columns are image_path, pred_score"):
        Watcher(detector, folder, table)
    with pytest.raises(NotADirectoryError, match="no folder"):
        Watcher(detector, tmp_path / "nowhere", table)
    assert len(COLUMNS) == len(set(COLUMNS))


@pytest.mark.parametrize("content", [b"a line\nanother, without an end", b"no line has an end", b"\x89PNG\r\n\0"])
def test_a_file_that_is_no_table_loses_nothing(content, detector, folder, tmp_path):
    table = tmp_path / "notes.txt"
    table.write_bytes(content)
    with pytest.raises(ValueError, match="notes.txt is no table of `flowood watch`"):
        Watcher(detector, folder, table)
    assert table.read_bytes() == content


def test_a_table_that_was_killed_in_its_first_line_begins_anew(detector, folder, tmp_path):
    table = tmp_path / "table.csv"
    table.write_bytes(b"path,size,modi")
    looks(Watcher(detector, folder, table))
    assert len(rows(table)) == 4


def test_the_files_of_a_large_folder_are_not_asked_for_one_by_one(detector, tmp_path, monkeypatch):
    folder, aside = tmp_path / "arriving", tmp_path / "arriving" / "aside"
    for number in range(30):
        image = (aside if number % 3 else folder) / f"{number}.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        image.touch()
    watcher = Watcher(detector, folder, tmp_path / "table.csv", aside)
    asked = []
    for name in ("stat", "lstat"):
        own = getattr(os, name)
        monkeypatch.setattr(os, name, lambda path, *a, own=own, **k: (asked.append(Path(path)), own(path, *a, **k))[1])
    assert len(watcher._images()) == 10
    assert not [path for path in asked if path.suffix == ".png"]


def test_a_detector_that_calls_nothing_anomalous_has_nothing_to_set_aside(detector, folder, tmp_path):
    raw = Detector(detector.runtime, (8, 8))
    with pytest.raises(ValueError, match="Nothing would ever be set aside to .*aside: the detector has no calibration"):
        Watcher(raw, folder, tmp_path / "table.csv", tmp_path / "aside")
    looks(Watcher(raw, folder, tmp_path / "table.csv"))
    assert [row["label"] for row in rows(tmp_path / "table.csv")] == [""] * 4


def test_what_is_taken_out_or_put_back_stays_so(detector, folder, tmp_path):
    aside = tmp_path / "aside"
    watcher = Watcher(detector, folder, tmp_path / "table.csv", aside)
    looks(watcher)
    (aside / "1.png").rename(folder / "1.png")  # no defect, after all
    looks(watcher)
    assert [path.name for path in aside.iterdir()] == ["3.png"]
    links = tmp_path / "links"
    watcher = Watcher(detector, folder, tmp_path / "other.csv", links, link=True)
    looks(watcher)
    (links / "1.png").unlink()  # which somebody has looked at
    looks(watcher)
    assert not list(links.iterdir())


def test_a_link_that_is_moved_leads_where_it_led(detector, folder, tmp_path, monkeypatch):
    save(tmp_path / "store" / "far.png", 250)
    (folder / "near.png").symlink_to("../store/far.png")
    table, aside = tmp_path / "table.csv", tmp_path / "another" / "place" / "aside"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)  # after the link aside, before that which arrived is gone
        watcher = Watcher(detector, folder, table, aside)
        watcher.look()
        with pytest.raises(KilledError):
            watcher.look()
    looks(Watcher(detector, folder, table, aside))
    assert sorted(path.name for path in aside.iterdir()) == ["1.png", "3.png", "near.png"]
    assert (aside / "near.png").resolve() == tmp_path / "store" / "far.png"
    assert sorted(path.name for path in folder.iterdir()) == ["0.png", "2.png"]


def test_an_image_takes_the_place_of_a_link_to_it(detector, folder, tmp_path):
    table, aside = tmp_path / "table.csv", tmp_path / "aside"
    looks(Watcher(detector, folder, table, aside, link=True))
    looks(Watcher(detector, folder, table, aside))
    assert sorted((path.name, path.is_symlink()) for path in aside.iterdir()) == [("1.png", False), ("3.png", False)]


def test_an_image_that_somebody_else_has_taken_ends_nothing(detector, folder, tmp_path, monkeypatch):
    watcher = Watcher(detector, folder, tmp_path / "table.csv", tmp_path / "aside")
    append = watcher._append

    def taken(row: tuple) -> None:
        append(row)
        (folder / row[0]).unlink()

    monkeypatch.setattr(watcher, "_append", taken)
    looks(watcher)
    assert len(rows(tmp_path / "table.csv")) == 4


def test_whom_somebody_moves_to_the_same_place_ends_nothing(detector, folder, tmp_path, monkeypatch):
    aside = tmp_path / "aside"
    watcher = Watcher(detector, folder, tmp_path / "table.csv", aside)
    append = watcher._append

    def moved(row: tuple) -> None:
        append(row)
        aside.mkdir(exist_ok=True)
        (folder / row[0]).rename(aside / row[0])

    monkeypatch.setattr(watcher, "_append", moved)
    looks(watcher)
    assert len(rows(tmp_path / "table.csv")) == 4


@pytest.mark.parametrize("aside", [".", "arriving", "arriving/../arriving"])
def test_a_folder_for_anomalous_images_that_holds_the_watched_one_is_refused(
    aside, detector, folder, tmp_path, monkeypatch
):
    """All that arrived lay aside already, and was never scored."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="in which arriving itself lies: name another"):
        Watcher(detector, Path("arriving"), tmp_path / "table.csv", aside)


def test_a_second_process_is_kept_from_the_table(detector, folder, tmp_path, monkeypatch, capsys):
    def writes():
        with only_writer(folder / "watch.csv"):
            (tmp_path / "locked").touch()
            time.sleep(600)

    other = in_a_fork(writes)
    try:
        while not (tmp_path / "locked").exists():
            assert os.waitpid(other, os.WNOHANG) == (0, 0)
            time.sleep(0.01)
        monkeypatch.setattr(inference, "load", lambda path, device: detector)
        with pytest.raises(SystemExit, match="1"):
            main(["watch", "model.ckpt", str(folder)])
    finally:
        os.kill(other, signal.SIGKILL)  # which gives it back
        os.waitpid(other, 0)
    assert "Another `flowood watch` writes" in capsys.readouterr().err
    with only_writer(folder / "watch.csv"):
        pass


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError("no flock")])
def test_where_a_drive_has_no_locks_it_watches_and_says_so(error, folder, monkeypatch, caplog):
    def no_lock(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(FileLock, "acquire", no_lock)
    with only_writer(folder / "watch.csv"):
        pass
    assert "watch.csv cannot be locked" in caplog.text


def test_a_broken_file_of_a_clock_that_is_ahead_gets_its_row(detector, folder, tmp_path):
    broken = folder / "broken.png"
    broken.write_bytes((folder / "0.png").read_bytes()[:40])
    os.utime(broken, (time.time() + 10**6,) * 2)
    watcher = Watcher(detector, folder, tmp_path / "table.csv", patience=0.2)
    looks(watcher, 2)
    assert "broken.png" not in {row["path"] for row in rows(tmp_path / "table.csv")}
    time.sleep(0.25)
    watcher.look()
    found = {row["path"]: row for row in rows(tmp_path / "table.csv")}
    assert "Cannot read the image" in found["broken.png"]["error"]


def test_files_whose_endings_are_not_read_are_named_once(detector, folder, tmp_path, caplog):
    (folder / "a.heic").touch()
    watcher = Watcher(detector, folder, tmp_path / "table.csv")
    looks(watcher)
    (folder / "b.gif").touch()
    looks(watcher)
    assert [record.getMessage().split(",")[0] for record in caplog.records] == [
        f"Left out: {folder / name}" for name in ("a.heic", "b.gif")
    ]


def test_a_folder_that_cannot_be_looked_into_is_named_once(detector, folder, tmp_path, monkeypatch, caplog):
    (folder / "closed").mkdir()
    scan = os.scandir

    def denied(path: Path):
        if Path(path).name == "closed":
            raise PermissionError(errno.EACCES, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", denied)
    looks(Watcher(detector, folder, tmp_path / "table.csv"))
    said = f"Left out: the folder {folder / 'closed'} (Permission denied)."
    assert [record.getMessage() for record in caplog.records] == [said]
    assert len(rows(tmp_path / "table.csv")) == 4


def test_an_image_that_may_not_be_taken_away_is_named_with_what_helps(detector, folder, tmp_path, monkeypatch):
    """Of a folder that may only be read: the remedy was another place for the table."""

    def denied(*_args: object, **_kwargs: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "there")

    monkeypatch.setattr(shutil, "move", denied)
    monkeypatch.setattr(os, "access", lambda *_: False)
    watcher = Watcher(detector, folder, tmp_path / "table.csv", tmp_path / "aside")
    with pytest.raises(PermissionError, match="may not be taken out of its folder: --link true leaves it") as refused:
        looks(watcher)
    assert refused.value.filename is None  # of which the command would say where to write elsewhere
    looks(Watcher(detector, folder, tmp_path / "table.csv", tmp_path / "aside", link=True))
    assert any((tmp_path / "aside").iterdir())


def test_on_another_disk_an_image_set_aside_appears_whole(detector, folder, tmp_path, monkeypatch):
    aside = tmp_path / "aside"

    def other_disk(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    def killed(source: Path, target: Path) -> None:
        Path(target).write_bytes(Path(source).read_bytes()[:40])
        raise KilledError

    monkeypatch.setattr(os, "rename", other_disk)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copy2", killed)
        watcher = Watcher(detector, folder, tmp_path / "table.csv", aside)
        watcher.look()
        with pytest.raises(KilledError):
            watcher.look()
    assert list(aside.iterdir()) == []
    looks(Watcher(detector, folder, tmp_path / "table.csv", aside))
    assert [path.name for path in sorted(aside.iterdir())] == ["1.png", "3.png"]
    assert not (folder / "1.png").exists()


def test_killed_between_copy_and_removal_an_image_is_set_aside_once(detector, folder, tmp_path, monkeypatch):
    table, aside = tmp_path / "table.csv", tmp_path / "aside"

    def copied_alone(source: Path, target: Path, **_: object) -> None:
        shutil.copy2(source, target)
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "move", copied_alone)
        watcher = Watcher(detector, folder, table, aside)
        watcher.look()
        with pytest.raises(KilledError):
            watcher.look()
    looks(Watcher(detector, folder, table, aside))
    assert [path.name for path in sorted(aside.iterdir())] == ["1.png", "3.png"]
    assert sorted(path.name for path in folder.iterdir()) == ["0.png", "2.png"]
    os.utime(aside / "1.png", (1, 1))  # of another time it is another image, with whatever content
    save(folder / "1.png", 250)
    looks(Watcher(detector, folder, table, aside))
    assert [path.name for path in sorted(aside.iterdir())] == ["1-2.png", "1.png", "3.png"]


def test_names_are_no_formulas_in_the_table(detector, folder, tmp_path):
    save(folder / "=1+1.png", 30)
    table = tmp_path / "table.csv"
    looks(Watcher(detector, folder, table))
    assert "'=1+1.png" in [row["path"] for row in rows(table)]
    looks(Watcher(detector, folder, table))  # which knows it again
    assert len(rows(table)) == 5


def test_names_that_break_lines_are_known_again(detector, folder, tmp_path):
    table, aside = tmp_path / "table.csv", tmp_path / "aside"
    for name in ("a\nb.png", "a\rb.png", 'a"b.png', os.fsdecode(b"a\xe9b.png")):
        save(folder / name, 30)
    for _ in range(2):
        looks(Watcher(detector, folder, table, aside))
    content = table.read_bytes()
    assert content.count(b"a\nb.png") == 1
    for cut in (b'"a\nb.p', b'"a\nb.png",12'):  # killed within the row, in its first or in its second line
        table.write_bytes(content + cut)
        looks(Watcher(detector, folder, table, aside))
        assert table.read_bytes() == content


@pytest.mark.parametrize("line", ["a.png,12,1.79E+18,,0.5,1,0.5,0,", "a.png;12;5;;;;;0;", "a.png,12", '"a.png,12,5'])
def test_a_table_with_a_damaged_row_is_named(line, detector, folder, tmp_path):
    table = tmp_path / "table.csv"
    looks(Watcher(detector, folder, table))
    lines = table.read_text().splitlines()
    table.write_text("\n".join([*lines[:3], line, *lines[3:], ""]))
    before = table.read_bytes()
    with pytest.raises(ValueError, match=r"table.csv, line \d, is no row of `flowood watch`.*is then scored again"):
        Watcher(detector, folder, table)
    assert table.read_bytes() == before


def test_a_file_in_the_place_of_the_folder_for_anomalies_is_refused_at_once(detector, folder, tmp_path):
    (tmp_path / "aside").write_text("")
    with pytest.raises(NotADirectoryError, match="aside, where anomalous images are to go, is no folder"):
        Watcher(detector, folder, tmp_path / "table.csv", tmp_path / "aside")


def test_empty_lines_of_a_table_are_none_of_its_rows(detector, folder, tmp_path):
    table = tmp_path / "table.csv"
    looks(Watcher(detector, folder, table))
    table.write_text(table.read_text() + "\n\n")
    looks(Watcher(detector, folder, table))
    assert len(rows(table)) == 4


def test_beside_an_earlier_image_of_its_name_one_link_is_made(detector, folder, tmp_path):
    aside = tmp_path / "aside"
    save(aside / "1.png", 255)  # moved there before
    looks(Watcher(detector, folder, tmp_path / "table.csv", aside, link=True), times=6)
    looks(Watcher(detector, folder, tmp_path / "table.csv", aside, link=True))
    assert sorted(path.name for path in aside.iterdir()) == ["1-2.png", "1.png", "3.png"]
