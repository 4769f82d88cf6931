"""The `realtime` command's way to a running server."""

from __future__ import annotations

import argparse
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from realtime.cli import running
from realtime.operators.commands import HEADER

ANSWERS = {
    "/good": (200, b'{"line":"worker 0 has been replaced"}\n\n{"failure":""}\n'),
    "/bad": (200, b'{"failure":"app.py:3: \\u001b[31m"}\n'),
    "/cut": (200, b'{"line":"one"}\n'),
    "/other": (200, b"<html>"),
    "/refused": (403, b"refused: no\n"),
}


class Answer(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        status, body = ANSWERS[self.path]
        self.send_response(status if self.headers[HEADER] else 400)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("path", "status", "output", "errors"),
    [
        ("/good", 0, "worker 0 has been replaced\ndone\n", ""),
        ("/bad", 1, "", "failed: app.py:3: \\x1b[31m\n"),
        ("/cut", 1, "one\n", "failed: the server ended before the command was carried out\n"),
        ("/other", 1, "", "unreadable answer"),
        ("/refused", 1, "", "/refused: refused: no\n"),
    ],
)
def test_a_command_prints_its_progress_and_its_outcome(
    url: str, capsys: pytest.CaptureFixture[str], path: str, status: int, output: str, errors: str
) -> None:
    assert running.command(url + path) == status
    printed = capsys.readouterr()
    assert printed.out == output
    assert errors in printed.err
    assert printed.err.count("\n") == bool(errors)


@pytest.mark.parametrize(
    ("path", "join", "status", "output"),
    [
        ("/good", "/refused", 0, "worker 0 has been replaced\ndone\n"),
        ("/cut", "/good", 0, "one\nworker 0 has been replaced\ndone\n"),
        ("/cut", "/bad", 1, "one\n"),
    ],
)
def test_a_command_goes_on_at_another_place_if_its_answer_breaks_off(
    url: str, capsys: pytest.CaptureFixture[str], path: str, join: str, status: int, output: str
) -> None:
    assert running.command(url + path, url + join) == status
    assert capsys.readouterr().out == output


def test_a_server_that_does_not_run_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        port = server.server_port
    assert running.command(f"http://127.0.0.1:{port}/good") == 1
    assert "is the server running?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "port", "expected"),
    [
        ("", 0, "http://127.0.0.1:8001/x"),
        ("internal_port = 9001", 0, "http://127.0.0.1:9001/x"),
        ("internal_port = 9001", 7, "http://127.0.0.1:7/x"),
        ('internal_address = "::1"', 0, "http://[::1]:8001/x"),
    ],
)
def test_the_address_is_that_of_the_configuration(
    tmp_path_factory: pytest.TempPathFactory, config: str, port: int, expected: str
) -> None:
    file = tmp_path_factory.mktemp("config") / "realtime.toml"
    file.write_text(f"[http_server]\n{config}\n")
    assert running.url(argparse.Namespace(config=str(file), port=port), "/x") == expected
