# SPDX-License-Identifier: Apache-2.0
"""Watch a folder into which images arrive: each is scored exactly once, even if the process is killed."""

from __future__ import annotations

import csv
import filecmp
import io
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

from filelock import FileLock, Timeout

from anomalib_flowood.data.listing import find, tell_of_closed, tell_of_unread
from anomalib_flowood.files import NAMES, escaped, quoting, unescaped, whole_file
from anomalib_flowood.inference.detector import Detector
from anomalib_flowood.look import shorten

logger = logging.getLogger(__name__)

COLUMNS = ("path", "size", "modified_ns", "time", "score", "raw_score", "p_value", "label", "error")

Key = tuple[str, int, int]
"""What identifies an image: its path relative to the folder, its size in bytes, and its modification time in ns."""


@contextmanager
def only_writer(table: Path) -> Iterator[None]:
    """Hold a lock on a table: a second process would score every image again.

    Raises:
        ValueError: If another process holds it.
    """
    table.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(table.with_name(f".{table.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        msg = f"Another `flowood watch` writes {table}: stop it, or name another table."
        raise ValueError(msg) from None
    # Some network drives have no locks; which of the two errors says so depends on filelock's version. Any other
    # problem with the folder will show when the table is written.
    except (NotImplementedError, OSError) as error:
        logger.warning("%s cannot be locked (%s): see that no other `flowood watch` writes it.", table, error)
    try:
        yield
    finally:
        lock.release()


class Watcher:
    """Scores the images that arrive in a folder, and appends a row for each to a table.

    The row is on the disk before an anomalous image is set aside, so that nothing is lost when the process is killed:
    the next one cuts off a row that was only partly written, and sets aside the images that have a row which calls them
    anomalous, but are still in the folder. A file of a known name, but another size or time, is a new image.

    Args:
        detector: The detector.
        folder: The folder, searched by the rule of :func:`~anomalib_flowood.data.image_files`.
        table: The table, a CSV file; images that have a row are not scored again.
        aside: Folder to which anomalous images are moved, below the same subfolders; ``None`` leaves them where they
            are.
        link: Whether to create links to anomalous images in ``aside`` instead of moving them.
        patience: Seconds without a change after which an unreadable file counts as broken; until then it may still be
            being written.

    Raises:
        NotADirectoryError: If there is no such folder, or ``aside`` is a file.
        ValueError: If the table is another file, or damaged; if ``aside`` is the folder itself or contains it, so that
            all images would already count as set aside; if ``aside`` is given, but the detector has no calibration and
            therefore calls nothing anomalous.
    """

    def __init__(
        self,
        detector: Detector,
        folder: str | Path,
        table: str | Path,
        aside: str | Path | None = None,
        *,
        link: bool = False,
        patience: float = 60,
    ) -> None:
        self.detector = detector
        self.folder = Path(folder)
        self.table = Path(table)
        self.aside = None if aside is None else Path(aside)
        self.link = link
        self.patience = patience
        if not self.folder.is_dir():
            msg = f"There is no folder {self.folder} (looked for it from {Path.cwd()})."
            raise NotADirectoryError(msg)
        if self.aside is not None and self.aside.exists() and not self.aside.is_dir():
            msg = f"{self.aside}, where anomalous images are to go, is no folder."
            raise NotADirectoryError(msg)
        if self.aside is not None and not len(detector.calibration):
            msg = (
                f"Nothing would ever be set aside to {self.aside}: the detector has no calibration, and calls no image "
                "anomalous. `flowood validate` calibrates a checkpoint; export that, or name no folder."
            )
            raise ValueError(msg)
        if self.aside is not None and self.folder.resolve().is_relative_to(self.aside.resolve()):
            msg = f"Anomalous images are to go to {self.aside}, in which {self.folder} itself lies: name another."
            raise ValueError(msg)
        self._anomalous = self._restore()
        self._seen: dict[Path, tuple[Key, float]] = {}
        """Files without a row, each with its key and when that was first seen (``time.monotonic``)."""
        self._reported: set[Path] = set()

    def look(self) -> list[Path]:
        """Score the images that have not changed since the last look.

        Returns:
            The images that were given a row.
        """
        seen, done = {}, []
        for path in self._images():
            key = self._key(path)
            if key is None:  # deleted or moved meanwhile
                continue
            if key in self._anomalous:
                if self._anomalous[key]:  # an earlier process was killed before it set it aside
                    self._set_aside(path, key)
                continue
            before, since = self._seen.get(path, (None, 0.0))
            if before == key and self._score(path, key, since):
                done.append(path)
            else:
                seen[path] = key, since if before == key else time.monotonic()
        self._seen = seen
        return done

    def _images(self) -> list[Path]:
        found = find(self.folder, self.aside)
        tell_of_unread([path for path in found.unread if path not in self._reported])  # once, not every second
        tell_of_closed({path: reason for path, reason in found.closed.items() if path not in self._reported})
        self._reported = {*found.unread, *found.closed}
        return found.images

    def _key(self, path: Path) -> Key | None:
        try:
            status = path.stat()
        except FileNotFoundError:
            return None
        return path.relative_to(self.folder).as_posix(), status.st_size, status.st_mtime_ns

    def _score(self, path: Path, key: Key, since: float) -> bool:
        """Score an image and write its row; return whether there is one, which there is not while it is being written.

        Args:
            path: The image.
            key: What identifies it.
            since: When it was first seen with this key (``time.monotonic``).
        """
        stamp = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        try:
            found = self.detector.score(path, maps=False)
        except ValueError as error:  # a broken file, or an image that has no score
            unchanged = max(time.time() - key[2] / 1e9, time.monotonic() - since)  # a camera's clock may be ahead
            if self._key(path) != key or unchanged < self.patience:
                return False
            self._append((*key, stamp, "", "", "", "", " ".join(str(error).split())))
            self._anomalous[key] = False
            return True
        if self._key(path) != key:  # changed while it was read
            return False
        p_value = "" if found.p_value is None else float(found.p_value[0])
        anomalous = found.label is not None and bool(found.label[0])
        label = "" if found.label is None else int(anomalous)
        self._append((*key, stamp, float(found.score[0]), float(found.raw_score[0]), p_value, label, ""))
        self._anomalous[key] = anomalous
        if anomalous:
            self._set_aside(path, key)
        return True

    def _set_aside(self, path: Path, key: Key) -> None:
        if self.aside is None:
            return
        target = self.aside / path.relative_to(self.folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._move(path, target)
        except FileNotFoundError:
            if path.exists():
                raise
            # Somebody has moved the image meanwhile; it has its row.
        except PermissionError as error:
            if self.link or os.access(path.parent, os.W_OK):
                raise
            msg = f"{path} may not be taken out of its folder: --link true leaves it there, and links to it."
            raise PermissionError(msg) from error
        self._anomalous[key] = False  # done: if somebody moves the image back, it stays there

    def _move(self, path: Path, target: Path) -> None:
        """Move an image, or link to it, without overwriting another one."""
        stem, number = target.stem, 2
        while os.path.lexists(target):  # an earlier image of this name
            if target.is_symlink() and target.resolve() == path.resolve():
                if self.link:
                    return
                target.unlink()  # the image itself replaces the link
                break
            if not self.link and _is_copy(target, path):  # an earlier process was killed before it removed the image
                path.unlink()
                return
            target = target.with_stem(f"{stem}-{number}")
            number += 1
        if self.link or path.is_symlink():  # a relative link, if moved, would lead elsewhere
            target.symlink_to(path.resolve())
            if not self.link:
                path.unlink()
        else:
            shutil.move(path, target, copy_function=_copy_whole)

    def _append(self, row: tuple) -> None:
        """Append a row, which is on the disk when this returns."""
        text = io.StringIO(newline="")
        csv.writer(text, quoting=quoting(row), lineterminator="\n").writerow(map(escaped, row))
        with self.table.open("ab") as file:
            file.write(text.getvalue().encode("utf-8", NAMES))
            file.flush()
            os.fsync(file.fileno())

    def _restore(self) -> dict[Key, bool]:
        """Return which images have a row, and whether it calls them anomalous; cut off an incomplete row."""
        content = self.table.read_bytes() if self.table.exists() else b""
        self._check_header(content)  # before anything is cut off, since it may be another file
        whole = content[: _end_of_rows(content)]
        if whole != content:
            self._check_cut(whole, content[len(whole) :])
            os.truncate(self.table, len(whole))
        if not whole:
            self.table.parent.mkdir(parents=True, exist_ok=True)
            self._append(COLUMNS)
            return {}
        text = io.StringIO(whole.decode("utf-8", NAMES), newline="")
        rows = csv.reader(text)
        known = {}
        try:
            next(rows)
            for row in filter(None, rows):  # skips empty lines
                known[(unescaped(row[0]), int(row[1]), int(row[2]))] = row[7] == "1"
        except (ValueError, IndexError, csv.Error) as error:
            raise self._damaged(rows.line_num) from error
        return known

    def _check_cut(self, whole: bytes, cut: bytes) -> None:
        """Refuse to cut off more than one row: an unclosed quote makes one row of all the lines after it."""
        _, *lines = cut.decode("utf-8", NAMES).splitlines()
        if any(len(next(csv.reader([line]), ())) == len(COLUMNS) for line in lines):
            raise self._damaged(whole.count(b"\n") + 1)

    def _damaged(self, line: int) -> ValueError:
        return ValueError(
            f"{self.table}, line {line}, is no row of `flowood watch`: has a spreadsheet saved the table? "
            "Mend it, or delete the line, whose image is then scored again; or name another file."
        )

    def _check_header(self, content: bytes) -> None:
        """Refuse a file that has other columns; an incomplete first line of a table of ours is accepted."""
        line, ended, _ = content.partition(b"\n")
        given = line.decode("utf-8", "backslashreplace").rstrip("\r").replace('"', "")
        known = ",".join(COLUMNS)
        if given == known or (not ended and known.startswith(given)):
            return
        columns = shorten(given.replace(",", ", "), 200)
        msg = f"{self.table} is no table of `flowood watch`: its columns are {columns}. Name another file."
        raise ValueError(msg)


def _end_of_rows(content: bytes) -> int:
    """Return the end of the last complete row: of the last line break outside of quotes, where names may have one."""
    last = end = content.rfind(b"\n") + 1
    while content.count(b'"', 0, end) % 2:
        end = content.rfind(b"\n", 0, end - 1) + 1
    return end if content.startswith(b'"', end) else last


def _copy_whole(source: str | Path, target: str | Path) -> None:
    """Copy a file to another disk so that it appears there complete or not at all."""
    with whole_file(target) as file:
        shutil.copy2(source, file)


def _is_copy(target: Path, source: Path) -> bool:
    """Whether a file is a copy that :func:`_copy_whole` made of another one; some disks store times to 2 seconds."""
    if target.is_symlink() or not target.is_file() or abs(target.stat().st_mtime - source.stat().st_mtime) > 2:
        return False
    return filecmp.cmp(source, target, shallow=False)
