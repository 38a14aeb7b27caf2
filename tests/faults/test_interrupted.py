# SPDX-License-Identifier: Apache-2.0
"""Commands that are killed, stopped or out of room: what is left loads or is absent, and the status says what was."""

import errno
import inspect
import io
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from unittest.mock import patch

import pandas as pd
import pytest
import torch
from jsonargparse import ArgumentParser
from model_helpers import data, engine, in_a_fork, pixel_flow

from anomalib_flowood.benchmark import ScoreRecorder
from anomalib_flowood.cli import main
from anomalib_flowood.cli.output import unheard
from anomalib_flowood.files import (
    NAMES,
    escaped,
    files_below,
    unescaped,
    whole_file,
    whole_files,
    write_table,
    write_text,
)
from anomalib_flowood.models.components.checkpoint_files import read_checkpoint
from anomalib_flowood.parsing import FlowoodParser
from anomalib_flowood.saving import save_checkpoint

PIXELS = "--model.image_size=[12,12] --model.channels=1 --model.coupling_layers=4 --model.hidden_channels=16"
TRAIN = f"""train --model PixelFlow {PIXELS} --model.bottleneck_dim=3 --data CrossDataset --data.in_distribution=ramps
    --data.out_of_distribution=[squares] --data.val_split_ratio=0.2 --trainer.accelerator=cpu
    --trainer.enable_progress_bar=false""".split()

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks, so that nothing is imported anew")


@pytest.fixture
def here(tmp_path, monkeypatch):
    data(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def started():
    """Run commands in processes of their own, and end them with the test, which may have failed before it would."""
    children = []

    def start(arguments: list[str], errors: str | Path = os.devnull) -> int:
        children.append(in_a_fork(lambda: main(arguments), errors=errors))
        return children[-1]

    yield start
    for child in children:
        with suppress(ChildProcessError):  # it has ended, and was waited for
            if os.waitpid(child, os.WNOHANG) == (0, 0):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)


def checkpoints(folder: Path) -> list[Path]:
    """Those that are whole: what is being written lies in a hidden folder."""
    return [path for path in files_below(folder) if path.suffix == ".ckpt"]


def wait_for(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@forks
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_training_ends_with_the_signals_status_and_a_whole_checkpoint(number, status, here, started):
    child = started([*TRAIN, "--trainer.max_epochs=100000"])
    wait_for(lambda: checkpoints(here))
    os.kill(child, number)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == status
    for path in checkpoints(here):
        read_checkpoint(path)
    assert not list(here.rglob(".*"))


class _Cut(io.FileIO):
    """A file in the third part of which a signal arrives."""

    def __init__(self, path: Path, signalled: BaseException) -> None:
        super().__init__(path, "wb")
        self.parts, self.signalled = 0, signalled

    def write(self, content) -> int:
        self.parts += 1
        if self.parts == 3:
            raise self.signalled
        return super().write(content)


@pytest.mark.parametrize("signalled", [KeyboardInterrupt(), SystemExit(143)])
def test_a_signal_within_a_checkpoint_is_no_error_of_its_writer(signalled, tmp_path):
    """PyTorch's writer raised "unexpected pos", whose traceback was all that Ctrl-C left."""
    path = tmp_path / "model.ckpt"
    path.write_text("before")
    with pytest.raises(type(signalled)), whole_file(path) as file, _Cut(file, signalled) as opened:
        torch.save({"weight": torch.ones(300_000)}, opened)
    assert [child.name for child in tmp_path.iterdir()] == ["model.ckpt"]
    assert path.read_text() == "before"


def test_a_signal_at_any_moment_leaves_nothing_but_a_whole_file(tmp_path):
    """One that came while a checkpoint's hidden folder was made, or removed, left it there."""
    path = tmp_path / "model.ckpt"
    write_text(path, "before")  # what others have abandoned is looked for once
    for moment in range(10_000):
        path.write_text("before")
        came = _interrupted(moment, lambda: write_text(path, "after"))
        assert (list(tmp_path.iterdir()), path.read_text() in {"before", "after"}) == ([path], True), moment
        if not came:
            break
    assert moment > 100


def _interrupted(moment: int, function) -> bool:
    """Run something until a signal of a given number among the moments at which Python looks for signals.

    Those are the beginnings of functions and the ends of calls of C functions. Where a generator goes on is left out:
    what is raised there by a profile function ends it, in Python 3.10, without what it has yet to do.
    """
    left = moment

    def count(frame, event, _argument):
        nonlocal left
        left -= event == "c_return" or (event == "call" and not frame.f_code.co_flags & inspect.CO_GENERATOR)
        if left < 0:
            raise KeyboardInterrupt

    with suppress(KeyboardInterrupt):
        sys.setprofile(count)
        try:
            function()
        finally:
            sys.setprofile(None)
    return left < 0


@forks
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_training_says_how_it_goes_on(number, here, started):
    said = here / "said.txt"
    child = started([*TRAIN, "--trainer.max_epochs=100000"], said)
    wait_for(lambda: checkpoints(here))
    os.kill(child, number)
    os.waitpid(child, 0)
    (path,) = checkpoints(here)
    expected = f"Interrupted. The same command goes on from there with --ckpt_path {path.relative_to(here)}\n"
    assert said.read_text().endswith(expected)


def test_interrupted_in_its_test_a_training_has_ended(here, capsys, monkeypatch):
    def interrupted(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(ScoreRecorder, "on_test_batch_end", interrupted)
    with pytest.raises(SystemExit) as ended:
        main([*TRAIN, "--trainer.max_epochs=1"])
    assert ended.value.code == 130
    (path,) = {path.resolve() for path in checkpoints(here)}
    said = capsys.readouterr().err
    assert (
        "Interrupted. The training had ended: `flowood test` tests its detector with "
        f"--ckpt_path {path.relative_to(here)}\n" in said
    )


@forks
def test_a_checkpoint_is_enough_to_go_on_with_a_training(here, started, capsys):
    """Without ``--model`` the default detector was built, which refused it; with it, every setting had to be given."""
    arguments = [*TRAIN, "--trainer.max_epochs=100000"]
    child = started(arguments)
    wait_for(lambda: checkpoints(here))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    (path,) = checkpoints(here)
    epochs = read_checkpoint(path)["epoch"] + 2
    kept = [argument for argument in TRAIN if not argument.startswith(("--model", "PixelFlow"))]
    for model in ([], ["--model=PixelFlow"]):
        main([*kept, *model, f"--trainer.max_epochs={epochs}", f"--ckpt_path={path}"])
        written = Path("results/PixelFlow/CrossDataset/ramps-squares/latest/weights/lightning/model.ckpt")
        assert read_checkpoint(written)["epoch"] == epochs - 1
    with pytest.raises(SystemExit):
        main([*kept, "--model.coupling_layers=2", f"--ckpt_path={path}"])
    assert "coupling_layers is 4 there and 2 here" in capsys.readouterr().err


@forks
@pytest.mark.parametrize("seed", range(3))
def test_a_killed_training_leaves_checkpoints_that_load(seed, here, started):
    child = started([*TRAIN, "--trainer.max_epochs=100000"])
    wait_for(lambda: checkpoints(here))
    time.sleep(0.1 * seed + 0.03)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert checkpoints(here)
    for path in checkpoints(here):
        read_checkpoint(path)


def test_an_interrupt_while_importing_has_its_status_and_no_traceback():
    code = (
        "import sys, signal, threading, time, _thread\n"
        "from anomalib_flowood.cli import main\n"
        "threading.Timer(0.5, _thread.interrupt_main).start()\n"
        "main(['train', '--help', '-v'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert "Traceback" not in done.stderr


@forks
def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path):
    path = tmp_path / "model.ckpt"
    save_checkpoint({"a": torch.zeros(10)}, path)
    child = os.fork()
    if not child:
        status = 255
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
            save_checkpoint({"a": torch.zeros(1_000_000)}, path)
        except OSError as error:
            status = error.errno if error.filename == str(path) else 254
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == errno.EFBIG
    assert len(torch.load(path)["a"]) == 10
    assert list(tmp_path.iterdir()) == [path]


def test_detectors_save_whole_files_in_anomalibs_engine_too(tmp_path):
    run = engine(tmp_path, max_epochs=1)
    run.fit(pixel_flow(), datamodule=data(tmp_path))
    assert run.trainer.strategy.checkpoint_io.save_checkpoint is save_checkpoint
    assert checkpoints(tmp_path)


def test_a_file_that_fails_is_as_it_was(tmp_path):
    path = tmp_path / "page.html"
    write_text(path, "before")

    def fails() -> None:
        with whole_file(path) as file:
            file.write_text("half of")
            raise OSError(errno.ENOSPC, "no space")

    with pytest.raises(OSError, match="no space"):
        fails()
    with patch.object(os, "fsync", side_effect=OSError("disk gone")), pytest.raises(OSError, match="disk gone"):
        write_text(path, "after")
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def forked(function) -> int:
    """Run something in a process of its own, which ends without cleaning up."""
    child = os.fork()
    if not child:
        try:
            function()
        finally:
            os._exit(9)
    return child


@forks
@pytest.mark.parametrize("together", [False, True])
def test_what_a_killed_writer_leaves_is_removed_by_the_next_and_what_a_living_one_writes_is_not(together, tmp_path):
    path = tmp_path / "page.html"
    reader, writer = os.pipe()

    def place():
        return whole_files(tmp_path, last=path.name) if together else whole_file(path)

    def write(text, then):
        with place() as given:
            file = given / path.name if together else given
            file.write_text(text)
            then()

    def hidden():
        return {found.name for found in tmp_path.iterdir() if found.name.startswith(".")}

    def texts():
        for place, _, names in os.walk(tmp_path):  # while files and folders go
            for name in names:
                with suppress(FileNotFoundError):
                    yield Path(place, name).read_text()

    os.waitpid(forked(lambda: write("half of", lambda: os._exit(9))), 0)
    left = hidden()
    assert len(left) == 1
    living = forked(lambda: write("of the living", lambda: os.read(reader, 1)))
    wait_for(lambda: "of the living" in texts())
    os.waitpid(forked(lambda: write("of the next", lambda: None)), 0)
    assert path.read_text() == "of the next"
    assert len(hidden()) == 1
    assert not left & hidden()
    os.write(writer, b".")
    os.waitpid(living, 0)
    assert path.read_text() == "of the living"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_names_the_file_that_was_to_be_written(tmp_path):
    with pytest.raises(FileNotFoundError) as found:
        write_text(tmp_path / "nowhere" / "page.html", "text")
    assert found.value.filename == str(tmp_path / "nowhere" / "page.html")


def test_a_runs_configuration_is_whole(tmp_path):
    parser = FlowoodParser(exit_on_error=False)
    parser.add_argument("--epochs", type=int)
    path = tmp_path / "config.yaml"
    parser.save(parser.parse_args(["--epochs=1"]), path, multifile=False)
    after = parser.parse_args(["--epochs=2"])
    full = patch.object(ArgumentParser, "dump", side_effect=OSError(errno.ENOSPC, "no space"))
    with full, pytest.raises(OSError, match="no space"):
        parser.save(after, path, overwrite=True, multifile=False)
    assert path.read_text() == "epochs: 1\n"
    with pytest.raises(ValueError, match="Refusing to overwrite existing file"):
        parser.save(after, path, multifile=False)
    parser.save(after, path, overwrite=True, multifile=False)
    assert path.read_text() == "epochs: 2\n"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_text(tmp_path / "link", "text")
    assert (tmp_path / "file").read_text() == "text"
    assert (tmp_path / "link").is_symlink()


def test_tables_hold_no_formulas_and_are_read_as_they_were(tmp_path):
    texts = ["=1+1", "+1", "-1", "@a", "\tb", "'=1", "plain", "a=b", "'quoted"]
    write_table(pd.DataFrame({"name": texts, "value": [-1.5] * len(texts)}), tmp_path / "a.csv")
    read = pd.read_csv(tmp_path / "a.csv", dtype={"name": str})
    assert not read["name"].str.match(r"[=+\-@\t\r]").any()
    assert read["name"].map(unescaped).tolist() == texts
    assert (read["value"] == -1.5).all()
    assert escaped(-1.5) == -1.5


def test_names_that_are_not_in_utf8_and_carriage_returns_are_kept(tmp_path, monkeypatch):
    """As old cameras and archives have them: a prediction ended after its last image, and had no table."""
    names = [os.fsdecode(b"\xe9t\xe9.png"), "ab\rc.png", "de\nf.png", "plain.png"]
    write_table(pd.DataFrame({"name": names, "value": 1.5, "missing": None}), tmp_path / "a.csv")
    read = pd.read_csv(tmp_path / "a.csv", encoding_errors=NAMES)
    assert read["name"].tolist() == names
    assert (read["value"] == 1.5).all()
    write_text(tmp_path / "a.json", names[0])
    assert (tmp_path / "a.json").read_bytes() == b"\xe9t\xe9.png"
    given = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", given)
    with unheard():
        print(names[0])
    assert given.buffer.getvalue() == b"\\udce9t\\udce9.png\n"


@pytest.mark.parametrize(
    ("errors", "shown"), [("surrogateescape", b"\\u2022"), ("strict", b"\\u2022"), ("replace", b"?")]
)
def test_letters_that_a_locale_lacks_end_no_command(errors, shown, monkeypatch):
    given = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors=errors)
    monkeypatch.setattr(sys, "stdout", given)
    with unheard():
        print("•")
    assert given.buffer.getvalue() == shown + b"\n"


def test_output_onto_a_full_disk_is_one_message():
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    with full.open("w") as output:
        command = [sys.executable, "-m", "anomalib_flowood", "--help"]
        done = subprocess.run(command, stdout=output, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (1, "flowood: the output cannot be written: No space left on device\n")
