"""What is wrong with a real server: the same in /health, in the snapshots of the page and in `realtime top`."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest

from tests.system.serving import HERE, Server, ServerStarter, wait_until


@pytest.fixture
def failing(start_server: ServerStarter) -> Server:
    server = start_server(
        app={"module": "failing:app", "path": str(HERE / "apps")}, workers={"count": 1}, loop={"stuck": "60s"}
    )
    server.expect_traceback()
    return server


def top(server: Server) -> str:
    command = [sys.executable, "-m", "realtime", "top", "--once", "--url", f"http://127.0.0.1:{server.operator_port}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout


def wait_for_problem(server: Server, pattern: str) -> None:
    """Wait until all three show a problem."""

    def is_in(text: str) -> bool:
        return re.search(pattern, text) is not None

    wait_until(lambda: is_in(json.dumps(server.health()["problems"])), f"{pattern} in /health")
    wait_until(lambda: is_in(server.operate("/snapshot")[1]), f"{pattern} in a snapshot")
    wait_until(lambda: is_in(top(server)), f"{pattern} in `realtime top`")


def test_errors_of_handlers_and_handler_processes_that_do_not_start(failing: Server) -> None:
    wait_for_problem(failing, r"handler processes that did not start in the last minute: \d+; see the log")
    for _ in range(2):
        with pytest.raises(HTTPError) as refused:
            urlopen(f"{failing.http}/fail", timeout=20)
        refused.value.close()
    wait_for_problem(failing, r"errors of handlers in the last minute: 2; the latest: KeyError in http GET /fail")
    errors = failing.health()["handler_errors"]
    assert (errors["count"], errors["handler"], errors["exception"]) == (2, "http GET /fail", "KeyError")
    assert failing.operate("/health")[0] == 200, "the server does its work"


def test_a_stopped_and_a_dead_broker(failing: Server) -> None:
    broker = failing.broker()
    os.kill(broker, signal.SIGSTOP)
    wait_for_problem(failing, r"the broker is not turning its loop for \d+ s: stopped or blocked")
    assert failing.operate("/health")[0] == 503
    os.kill(broker, signal.SIGCONT)
    wait_until(lambda: failing.health()["broker"]["condition"] == "healthy", "the broker's recovery")
    wait_until(lambda: failing.operate("/health")[0] == 200, "a server that does its work")
    for deaths in range(1, 4):
        os.kill(wait_until(lambda: failing.health()["broker"]["pid"], "a broker"), signal.SIGKILL)
        wait_until(lambda: failing.health()["broker"]["restarts"] == deaths, "a death")  # noqa: B023
    wait_for_problem(failing, r"the broker is crashing: 3 deaths in a row; see its errors in the log")
