"""Processes that handlers fork, as a ProcessPoolExecutor does: they hold on to nothing of the server."""

from __future__ import annotations

import os
import signal
import socket
from typing import Any

import psutil
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from tests.system.serving import HERE, Server, ServerStarter, wait_until
from tests.system.test_careless_handlers import ask, connected

APP = {"module": "forking:app", "path": str(HERE / "apps")}


def start(start_server: ServerStarter) -> Server:
    return start_server(app=APP, workers={"count": 1, "processes": 1}, client={"insecure": True})


def result(client: ClientConnection, method: str, data: Any = None) -> Any:
    return ask(client, method, data)["rpc"]["data"]


def forks(worker: int) -> list[psutil.Process]:
    """The forks of the worker and of its handler process, by the command line that they share with their parent."""
    found = psutil.Process(worker).children(recursive=True)
    return [process for process in found if process.cmdline() == process.parent().cmdline()]


def test_forked_processes_work_and_can_be_terminated(start_server: ServerStarter) -> None:
    server = start(start_server)
    with connected(server, "ada") as client:
        for method in ("squares", "squares in a thread", "squares in a process"):
            assert result(client, method, [1, 2, 3]) == [1, 4, 9], method
        for method in ("terminate", "terminate in a process"):
            assert result(client, method) == {"status": -signal.SIGTERM}, method
        assert "only the latter can call the methods of the App" in result(client, "publish in a fork")
        assert "and no longer" in result(client, "publish in a fork of a process")
        assert result(client, "keep busy") is None
    server.stop()
    assert "did not finish in time" not in server.log


@pytest.mark.parametrize("method", ["squares", "squares in a thread", "squares in a process"])
def test_forked_processes_die_with_the_worker_and_its_clients_are_told(
    start_server: ServerStarter, method: str
) -> None:
    server = start(start_server)
    (worker,) = server.workers()
    with connect(server.endpoint) as client, socket.create_connection(("127.0.0.1", server.port)) as bare:
        client.send('{"id":1,"connect":{}}')
        client.recv(timeout=20)
        assert result(client, method, [1, 2, 3]) == [1, 4, 9]
        left = forks(worker)
        assert left
        for process in left:
            process.suspend()  # even in this state they hold nothing
        os.kill(worker, signal.SIGKILL)
        with pytest.raises(ConnectionClosed):
            client.recv(timeout=20)
        bare.settimeout(20)
        assert bare.recv(1) == b""
    _, alive = psutil.wait_procs(left, timeout=20)
    assert alive == []
    wait_until(lambda: server.operate("/ready")[0] == 200, "a new worker")
    server.stop()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.port), timeout=5)
