# SPDX-License-Identifier: Apache-2.0
"""The command in a process of its own: under load, with senders that dawdle, and stopped in the midst."""

import http.client
import io
import os
import re
import signal
import socket
import sys
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

from anomalib_flowood.cli import main
from anomalib_flowood.inference import Detector
from anomalib_flowood.models.components.export_check import Runtime
from anomalib_flowood.serving import run

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks, so that nothing is imported anew")


def slow_mean(images: np.ndarray) -> dict[str, np.ndarray]:
    time.sleep(0.02)
    return {"pred_score": images.mean((1, 2, 3))}


def until(condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@contextmanager
def served(folder, monkeypatch, *arguments: str):
    """A server of a slow detector; its address, process and what it says."""
    detector = Detector(Runtime(slow_mean), (8, 8), list(np.linspace(0.1, 0.4, 20)), 1 / 21)
    said = folder / "said.txt"
    monkeypatch.setattr(run, "load", lambda path, device: {("model.ckpt", "cpu"): detector}[str(path), device])
    child = os.fork()
    if not child:
        status = 99
        try:
            sys.stdout = sys.stderr = said.open("a", buffering=1)  # pytest's own are the parent's
            signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever an earlier test made of it
            main(["serve", "model.ckpt", "--port", "0", *arguments])
        except SystemExit as end:
            status = end.code
        except BaseException:
            traceback.print_exc()  # into what it says: os._exit leaves it out
        finally:
            os._exit(status)
    try:
        until(lambda: said.exists() and "Serving" in said.read_text())
        yield int(re.search(r"on http://127\.0\.0\.1:(\d+)\.", said.read_text())[1]), child, said
    finally:
        try:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        except (ChildProcessError, ProcessLookupError):
            pass  # it has ended


def test_a_port_that_does_not_exist_is_refused_before_the_detector_is_loaded(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["serve", "model.ckpt", "--port", "80000"])
    assert ended.value.code == 1
    assert "flowood: There is no port 80000: --port takes 0 to 65535." in capsys.readouterr().err


def png() -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (12, 10), (250, 20, 20)).save(content, "PNG")
    return content.getvalue()


def send_until_it_is_gone(port: int, answers: Counter) -> Counter:
    """Send one image after the other; count how many were answered with which status."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    while True:
        try:
            connection.request("POST", "/score", png())
            answer = connection.getresponse()
        except (ConnectionError, http.client.RemoteDisconnected):
            if answers["gone"]:
                return answers
            answers["gone"] += 1  # an idle connection that was closed; nobody has accepted this one
            connection.close()
            continue
        assert b'"label"' in answer.read()  # the whole of it
        answers[answer.status] += 1


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_nothing_is_lost_when_it_is_stopped_under_load(number, status, tmp_path, monkeypatch):
    with served(tmp_path, monkeypatch) as (port, child, said), ThreadPoolExecutor(6) as pool:
        counts = [Counter() for _ in range(6)]
        senders = [pool.submit(send_until_it_is_gone, port, count) for count in counts]
        until(lambda: all(count[200] >= 2 for count in counts))
        os.kill(child, number)
        answers = sum((sender.result(timeout=60) for sender in senders), Counter())
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == status, said.read_text()
        assert set(answers) == {200, "gone"}
        text = said.read_text()
        assert f"Stopped: {answers[200]} requests were answered, {answers[200]} images scored." in text
        assert "Traceback" not in text


def test_who_dawdles_or_sends_too_much_is_answered(tmp_path, monkeypatch):
    limits = ["--upload_timeout", "0.3", "--max_mib", "1"]
    with served(tmp_path, monkeypatch, *limits) as (port, child, said):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as slow:
            slow.sendall(b"POST /score HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\nabc")
            assert slow.recv(100).startswith(b"HTTP/1.1 408 ")
        with socket.create_connection(("127.0.0.1", port), timeout=10) as large:  # refused before it is sent
            large.sendall(
                b"POST /score HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999\r\nExpect: 100-continue\r\n\r\n"
            )
            assert large.recv(100).startswith(b"HTTP/1.1 413 ")
        with socket.create_connection(("127.0.0.1", port), timeout=10) as endless:  # and says nothing of its length
            endless.sendall(b"POST /score HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
            for _ in range(20):
                endless.sendall(b"10000\r\n" + bytes(0x10000) + b"\r\n")
            assert endless.recv(100).startswith(b"HTTP/1.1 413 ")
        with socket.create_connection(("127.0.0.1", port), timeout=10) as gone:
            gone.sendall(b"POST /score HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\nabc")
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request("POST", "/score", png())
        assert connection.getresponse().status == 200
        os.kill(child, signal.SIGTERM)
        os.waitpid(child, 0)
        assert "Traceback" not in said.read_text()


def test_a_port_that_is_taken_is_an_error_before_anything_is_loaded(monkeypatch, capsys):
    monkeypatch.setattr(run, "load", lambda path, device: pytest.fail(f"{path} was loaded"))
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(SystemExit) as end:
            main(["serve", "model.ckpt", "--port", str(port)])
    assert end.value.code == 1
    assert f"Cannot listen on 127.0.0.1, port {port}" in capsys.readouterr().err


@pytest.mark.parametrize(("platform", "shared"), [("linux", True), ("win32", False)])
def test_no_two_servers_get_one_port(platform, shared, monkeypatch):
    """On Windows a socket that may use an address again may do so while another one listens there."""
    options = []
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(socket.socket, "setsockopt", lambda self, *given: options.append(given), raising=False)
    monkeypatch.setattr(run, "load", lambda path, device: pytest.fail("loaded"))
    with pytest.raises(pytest.fail.Exception):
        run.serve("model.ckpt", "127.0.0.1", 0, run.Limits(), 100)
    assert ((socket.SOL_SOCKET, socket.SO_REUSEADDR, 1) in options) is shared


def test_it_computes_on_the_device_that_is_named(monkeypatch):
    monkeypatch.setattr(run, "load", lambda path, device: pytest.fail(f"loaded on {device}"))
    with pytest.raises(pytest.fail.Exception, match="loaded on cuda:1"):
        main(["serve", "model.ckpt", "--port", "0", "--device", "cuda:1"])


def test_an_answer_waits_for_no_acknowledgement(tmp_path, monkeypatch):
    """An answer's head and body are two packets; with Nagle's algorithm the second waits some 40 ms."""
    with served(tmp_path, monkeypatch) as (port, _, _):
        connection, took = http.client.HTTPConnection("127.0.0.1", port, timeout=30), []
        for _ in range(60):  # at first Linux acknowledges at once
            start = time.perf_counter()
            connection.request("GET", "/health/live")
            connection.getresponse().read()
            took.append(time.perf_counter() - start)
        assert min(took[30:]) < 0.03
