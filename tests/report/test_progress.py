# SPDX-License-Identifier: Apache-2.0
import io
import time

from rich.console import Console

from anomalib_flowood.report.progress import JobProgress


def test_a_log_is_never_silent_for_long() -> None:
    stream = io.StringIO()
    with JobProgress(Console(file=stream), heartbeat=0.05) as progress:
        progress.start_job(1, 3, "Dfm on tiny")
        time.sleep(0.4)
    assert "[1/3] Dfm on tiny" in stream.getvalue()
    assert stream.getvalue().count("preparing, 0:00") >= 2


def test_a_terminal_shows_names_as_they_are() -> None:
    stream = io.StringIO()
    with JobProgress(Console(file=stream, force_terminal=True, width=100)) as progress:
        progress.stage("checking PixelFlow [cpu] on tiny")
    assert "checking PixelFlow [cpu] on tiny" in stream.getvalue()
