"""Handlers in processes of a whole server: they end with their worker, however it ends."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from tests.system.serving import HERE, Server, ServerStarter, wait_until

APP = {"module": "offloading:app", "path": str(HERE / "apps")}
MODULE = "realtime.handlers.compute_process"


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    start = ServerStarter(tmp_path_factory.mktemp("offload"))
    yield start(workers={"count": 1, "processes": 2}, app=APP, shutdown={"timeout": "3s"})
    start.finish()


def ask(server: Server, path: str) -> Any:
    """Return the decoded response; a worker that is under pressure because it has just started is asked again."""
    for _ in range(50):
        try:
            with urllib.request.urlopen(f"{server.http}{path}", timeout=30) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            if error.code != 503:
                raise
            error.close()
            time.sleep(0.2)
    raise AssertionError("the worker stays under pressure")


def spin(server: Server) -> None:
    """Have a process at work that will not end by itself."""

    def asking() -> None:
        with suppress(OSError, ValueError):
            ask(server, "/spin")

    threading.Thread(target=asking, daemon=True).start()
    wait_until(lambda: busy(server) == 1, "a busy process")


def busy(server: Server) -> float:
    lines = server.operate("/metrics")[1].splitlines()
    values = [float(line.split()[-1]) for line in lines if line.startswith("realtime_handler_processes_busy")]
    return sum(values)


def test_a_process_that_spins_leaves_the_loop_and_the_other_process_free(server: Server) -> None:
    spin(server)
    [worker] = server.workers()
    assert ask(server, "/loop") == worker
    assert ask(server, "/pid") in server.processes(MODULE)


def test_a_handler_in_a_process_publishes_and_asks(server: Server) -> None:
    for _ in range(2):
        said = ask(server, "/publish")
        assert said["pid"] in server.processes(MODULE)
        assert (said["offset"], said["refused"], said["channels"], said["nodes"]) == (1, 102, {}, 1)
        assert len(said["history"]) == 1


def test_a_process_that_exits_is_answered_with_an_error_and_replaced(server: Server) -> None:
    server.expect_traceback()
    wait_until(lambda: len(server.processes(MODULE)) == 2, "both processes")
    before = server.processes(MODULE)
    with pytest.raises(urllib.error.HTTPError) as caught:
        ask(server, "/quit")
    with caught.value as refused:
        assert refused.code == 500
    server.wait_for_log("has ended and is replaced: exit status 3")
    wait_until(lambda: len(server.processes(MODULE)) == 2, "a replacement")
    assert len({*before, *server.processes(MODULE)}) == 3


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGABRT])
def test_no_process_outlives_its_worker(server: Server, number: int) -> None:
    spin(server)
    [worker], processes = server.workers(), server.processes(MODULE)
    os.kill(worker, number)
    wait_until(lambda: not {*processes} & {*server.processes(MODULE)}, "their end", 40.0)


@pytest.mark.parametrize("stopped", [False, True])
def test_no_process_outlives_the_supervisor(tmp_path_factory: pytest.TempPathFactory, stopped: bool) -> None:
    server = ServerStarter(tmp_path_factory.mktemp("orphans"))(workers={"count": 1, "processes": 2}, app=APP)
    try:
        spin(server)
        if stopped:
            os.kill(server.processes(MODULE)[0], signal.SIGSTOP)
        server.process.kill()
        wait_until(lambda: server.family() == [], "an end of all", 40.0)
    finally:
        server.kill()


def test_a_signal_to_the_whole_group_ends_all(server: Server) -> None:
    wait_until(lambda: len(server.processes(MODULE)) == 2, "both processes")
    os.killpg(server.pid, signal.SIGINT)
    assert server.process.wait(30) == 0
    assert server.family() == []
