# SPDX-License-Identifier: Apache-2.0
"""Kills at random moments, full disks and the like under every command: what is left loads or is absent.

``make test`` tries a few of them; ``make faults`` (the environment variable ``FAULTS``: kills of each command) tries
all, and writes what was tried and what was survived to the file that ``FAULTS_TABLE`` names.
"""

import ctypes
import errno
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from commands_helpers import COMMANDS, ENDLESS, FRESH, check_left, ended, said, started, world

from anomalib_flowood import files

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks, so that nothing is imported anew")

KILLS = int(os.environ.get("FAULTS", "0"))
FULL = KILLS > 0
WRITERS = [name for name in COMMANDS if name not in ENDLESS]
KILLED = [(name, number) for name in COMMANDS for number in range(KILLS)] or [
    ("export", 0),
    ("report", 1),
    ("watch", 0),
]
CLONE_NEWNS = 0x00020000

tried: Counter[tuple[str, str]] = Counter()
survived: Counter[tuple[str, str]] = Counter()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    yield world(tmp_path_factory.mktemp("world"))
    if table := os.environ.get("FAULTS_TABLE"):
        lines = ["| fault | commands | tried | survived |", "| --- | --- | ---: | ---: |"]
        for fault in dict.fromkeys(fault for fault, _ in tried):
            of = [key for key in tried if key[0] == fault]
            names = ", ".join(name if survived[key] == tried[key] else f"**{name}**" for key in of for name in key[1:])
            lines.append(f"| {fault} | {names} | {sum(tried[k] for k in of)} | {sum(survived[k] for k in of)} |")
        lines.append(f"| all | | {tried.total()} | {survived.total()} |")
        Path(table).write_text("\n".join(lines) + "\n")


@pytest.fixture
def here(prepared, tmp_path, monkeypatch):
    shutil.copytree(prepared, tmp_path / "here")
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")  # of exports that these tests have made
    return tmp_path / "here"


@pytest.fixture(scope="module")
def durations():
    """How long each command takes, measured when it is first asked for."""
    return {}


class Trial:
    """Counts a fault as tried when it begins, and as survived when nothing was wrong."""

    def __init__(self, fault: str, name: str) -> None:
        self.key = fault, name

    def __enter__(self) -> None:
        tried[self.key] += 1

    def __exit__(self, kind: object, *args: object) -> None:
        survived[self.key] += kind is None


def duration_of(name: str, folder: Path, known: dict[str, float]) -> float:
    if name not in ENDLESS and name not in known:
        copy = folder.with_name("undisturbed")
        shutil.copytree(folder, copy)
        begun = time.monotonic()
        assert ended(started(name, copy)) == 0, said(copy)
        known[name] = time.monotonic() - begun
    return known.get(name, ENDLESS.get(name, 0))


@pytest.mark.parametrize(("name", "number"), KILLED)
def test_a_kill_at_any_moment_leaves_what_loads(name, number, here, durations):
    kind = signal.SIGTERM if number % 2 else signal.SIGKILL
    moment = random.Random(f"{name} {number}").random() * (duration_of(name, here, durations) if FULL else 0.8)
    with Trial(kind.name, name):
        child = started(name, here)
        time.sleep(moment)
        os.kill(child, kind)
        status = ended(child)
        # A process that starts anew hears a signal before Python does; for a shell its status is the same.
        ends = {0, -kind} if kind == signal.SIGKILL else {0, 128 + kind, *([-kind] if name in FRESH else [])}
        assert status in ends, (status, said(here))
        assert "Traceback" not in said(here)
        check_left(here)
        if name not in ENDLESS and number == KILLS - 1:
            assert ended(started(name, here)) == 0, said(here)
            check_left(here)


def limited(kind: int, value: int):
    def prepare() -> None:
        resource.setrlimit(kind, (value, value))

    return prepare


def check_ended(status: int, here: Path) -> None:
    """A command that cannot go on says why, in a line."""
    assert status in {0, 1, 3}, (status, said(here))
    assert status != 1 or "flowood: " in said(here)
    check_left(here)


@pytest.mark.parametrize("size", [1_000, 30_000, 200_000] if FULL else [1_000])
@pytest.mark.parametrize("name", WRITERS if FULL else ["predict"])
def test_files_that_cannot_grow(name, size, here):
    with Trial(f"no file above {size:,} bytes", name):
        child = started(name, here, limited(resource.RLIMIT_FSIZE, size))
        check_ended(ended(child), here)


@pytest.mark.skipif(not FULL, reason="takes minutes: make faults")
@pytest.mark.parametrize("spare", [20, 100, 500] if FULL else [20])
@pytest.mark.parametrize("name", WRITERS if FULL else ["train"])
def test_a_disk_of_a_few_mebibytes(name, spare, here, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    used = sum(path.stat().st_size // 4096 + 1 for path in here.rglob("*")) * 4
    mount = ["mount", "-t", "tmpfs", "-o", f"size={used + spare}k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk takes root")
    try:
        shutil.copytree(here, disk / "here")
        with Trial(f"{spare} KiB left on the disk", name):
            check_ended(ended(started(name, disk / "here")), disk / "here")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize("more", [2, 6, 12, 30] if FULL else [6])
@pytest.mark.parametrize("name", WRITERS if FULL else ["predict"])
def test_few_file_descriptors(name, more, here):
    with Trial(f"{more} more open files", name):

        def prepare() -> None:
            used = max(int(path.name) for path in Path("/proc/self/fd").iterdir())
            resource.setrlimit(resource.RLIMIT_NOFILE, (used + more, used + more))

        if not Path("/proc/self/fd").exists():
            pytest.skip("open files are counted in Linux's way")
        check_ended(ended(started(name, here, prepare)), here)


@pytest.mark.skipif(not FULL, reason="takes minutes: make faults")
@pytest.mark.parametrize("name", ["train", "test", "validate", "score"] if FULL else ["train"])
def test_no_shared_memory(name, here):
    def prepare() -> None:
        if ctypes.CDLL(None).unshare(CLONE_NEWNS):
            os._exit(77)
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,size=4k", "tmpfs", "/dev/shm"], check=True)

    status = ended(started(name, here, prepare, "--data.num_workers=2"))
    if status == 77:
        pytest.skip("hiding /dev/shm takes root")
    with Trial("no /dev/shm, two workers", name):
        check_ended(status, here)
        check_told_of_workers(status, here)


def check_told_of_workers(status: int, here: Path) -> None:
    assert status == 1, (status, said(here))
    (line,) = [line for line in said(here).splitlines() if line.startswith("flowood: ")]
    assert "got no shared memory: " in line
    assert "--data.num_workers 0" in line
    assert "/dev/shm" in line
    assert "Traceback" not in said(here)


def no_locks() -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    multiprocessing.Lock = refuse


@pytest.mark.parametrize("name", ["train", "score"])
def test_workers_without_shared_memory_are_refused(name, here):
    check_told_of_workers(ended(started(name, here, no_locks, "--data.num_workers=2"), 60), here)
    assert ended(started("explain", here, no_locks, "--data.num_workers=2")) == 0, said(here)


def nothing_may_be_written() -> None:
    files.os = SimpleNamespace(**{**vars(os), "access": lambda *_args: False})


def test_a_calibration_that_cannot_be_kept_says_what_to_validate(here):
    assert ended(started("validate", here, nothing_may_be_written)) == 0  # it is the checkpoint's own
    assert ended(started("validate", here, nothing_may_be_written, "--data.val_split_ratio=0.4")) == 1
    assert "where nothing may be written: validate a copy elsewhere." in said(here)


@pytest.mark.parametrize(("name", "output"), [("score", "model-typicality.ckpt"), ("explain", "explained")])
def test_a_place_that_may_not_be_written_is_refused_before_the_work(name, output, here):
    assert ended(started(name, here, nothing_may_be_written)) == 1
    assert "may not be read or written (Permission denied). To write elsewhere, name --output." in said(here)
    assert not (here / output).exists()


@pytest.mark.parametrize("name", ["train", "test", "score"] if FULL else ["train"])
def test_workers_whose_batches_find_no_shared_memory(name, here):
    with Trial("no shared memory above 100,000 bytes, a worker", name):
        child = started(name, here, limited(resource.RLIMIT_FSIZE, 100_000), "--data.num_workers=1")
        check_told_of_workers(ended(child, 60), here)


@pytest.mark.parametrize("name", WRITERS if FULL else ["predict", "report"])
def test_output_that_nobody_reads_to_its_end(name, here):
    with Trial("closed pipe (`| head -c 1`)", name):
        reader, writer = os.pipe()
        child = started(name, here, lambda: os.close(reader), out=writer)
        os.close(writer)
        os.read(reader, 1)
        os.close(reader)
        assert ended(child) == 0, said(here)
        assert "Traceback" not in said(here)
        assert "Broken pipe" not in said(here)
        check_left(here)
        expected = {
            "predict": "predicted/run.json",
            "report": "page/index.html",
            "export": "exported/weights/torch/model.pt",
        }
        assert (here / expected.get(name, "")).exists()


@pytest.mark.skipif(not FULL, reason="takes minutes: make faults")
@pytest.mark.parametrize("name", WRITERS if FULL else ["train"])
def test_two_runs_into_one_folder(name, here):
    with Trial("two runs into one folder", name):
        children = [started(name, here) for _ in range(2)]
        for child in children:
            check_ended(ended(child), here)
        assert ended(started(name, here)) == 0, said(here)
