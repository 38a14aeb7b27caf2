# SPDX-License-Identifier: Apache-2.0
"""Senders that keep a server busy, and a server to be kept busy."""

from __future__ import annotations

import http.client
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path

STOPPED = 128 + signal.SIGTERM


class Server:
    """A process of ``flowood serve``, and how many of its answers have arrived."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process = process
        self.port = port
        self.received = 0

    def keep_busy(self, files: Sequence[bytes], senders: int, seconds: float) -> list[float]:
        """Send files for a while, each sender one after the other; return the seconds that each answer took.

        A sender whose connection is closed ends.

        Raises:
            RuntimeError: If an answer is no score.
        """
        until = time.perf_counter() + seconds
        with ThreadPoolExecutor(senders) as pool:
            found = [
                pool.submit(_send, self.port, [*files[sender:], *files[:sender]], until) for sender in range(senders)
            ]
            took = [one for each in found for one in each.result()]
        self.received += len(took)
        return took

    def stop_under_load(self, files: Sequence[bytes], senders: int) -> int:
        """Stop it in the midst; return how many answers it gave, by its own words, that did not arrive.

        Raises:
            RuntimeError: If it ends otherwise.
        """
        with ThreadPoolExecutor(1) as pool:
            busy = pool.submit(self.keep_busy, files, senders, 60)
            time.sleep(2)
            self.process.send_signal(signal.SIGTERM)
            said, _ = self.process.communicate(timeout=60)
            busy.result()
        answered = re.search(r"Stopped: (\d+) requests", said)
        if self.process.returncode != STOPPED or answered is None:
            msg = f"The server ended with status {self.process.returncode}: {said}"
            raise RuntimeError(msg)
        return int(answered[1]) - self.received


def _send(port: int, files: Sequence[bytes], until: float) -> list[float]:
    connection, took = http.client.HTTPConnection("127.0.0.1", port, timeout=60), []
    for content in cycle(files):
        start = time.perf_counter()
        if start > until:
            break
        try:
            connection.request("POST", "/score", content)
            answer = connection.getresponse()
        except ConnectionError:  # it is stopped, and has not accepted this one
            break
        said = answer.read()
        if answer.status != http.HTTPStatus.OK:
            raise RuntimeError(said.decode())
        took.append(time.perf_counter() - start)
    connection.close()
    return took


@contextmanager
def served(model: Path, errors: Path) -> Iterator[Server]:
    """Serve a model on a free port.

    Raises:
        RuntimeError: If it does not start.
    """
    command = [sys.executable, "-m", "anomalib_flowood", "serve", str(model), "--port", "0"]
    with errors.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, text=True)  # noqa: S603 - this package
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        found = re.search(r":(\d+)\. Stop it", said)
        if found is None:
            msg = f"The server did not start: {said}{errors.read_text(encoding='utf-8')[-2000:]}"
            raise RuntimeError(msg)
        yield Server(process, int(found[1]))
    finally:
        process.kill()
        process.communicate()
