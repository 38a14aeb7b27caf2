# SPDX-License-Identifier: Apache-2.0
"""The load on a server: what is sent, what is measured, and the table of it."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from unittest.mock import Mock

import pytest

from benchmarks.serve.__main__ import Row, bare_rate, table
from benchmarks.serve.load import Server


@pytest.fixture
def busy():
    """A server that keeps what was sent, and answers with a status."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        status, sent = 200, []

        def do_POST(self):
            self.sent.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(self.status)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield Handler, Server(Mock(), server.server_address[1])
        server.shutdown()


def test_senders_send_all_files_and_count_answers(busy):
    handler, server = busy
    took = server.keep_busy([b"a", b"bb", b"ccc"], senders=2, seconds=0.2)
    assert len(took) == len(handler.sent) == server.received
    assert set(handler.sent) == {b"a", b"bb", b"ccc"}
    assert all(0 < seconds < 0.2 for seconds in took)
    handler.status = 422
    with pytest.raises(RuntimeError):
        server.keep_busy([b"a"], senders=1, seconds=0.2)


def test_the_table_has_medians_of_ratios_and_percentiles():
    row = Row("A", [10, 20, 30], [20, 20, 20], [0.1] * 98 + [0.5] * 2, [0.01] * 10, 0)
    assert table([row], 8).splitlines()[-1] == "| A | 20 | 20 | 1.00 | 100 | 500 | 10 | 10 | 0 |"


def test_the_bare_model_scores_images_that_were_read_before():
    detector = Mock(images_at_once=4)
    detector.read.return_value = iter(range(9))
    detector.score_read.side_effect = lambda images: [list(images)]
    assert bare_rate(detector, [b""] * 9, 0.01) > 0
    assert {len(call.args[0]) for call in detector.score_read.call_args_list} == {4}
