"""New clients of workers that are stopped, killed or out of descriptors: each of them is served, by somebody else.

A worker's clients are told from the others' by the depth of its accept queue, which /health shows.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.system.serving import Server, ServerStarter, wait_until

# Seconds for which a client waits for its answer. None of these tests is about how long it takes.
PATIENCE = 20.0
# The supervisor must not kill a worker that a test stops. (The worker goes on under pressure; /pid is never refused.)
NEVER_STUCK = {"stuck": "60s"}
REQUEST = b"GET /pid HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
HANDSHAKE = (
    b"GET /connection/websocket HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


class Client:
    """A TCP client that has asked who serves it."""

    def __init__(self, server: Server, request: bytes = REQUEST) -> None:
        self._socket = socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE)
        self._socket.sendall(request)

    def answer(self) -> tuple[int, bytes]:
        """Status and body of the whole response, up to the end of the connection."""
        with self._socket, self._socket.makefile("rb") as stream:
            head, _, body = stream.read().partition(b"\r\n\r\n")
        assert int(re.findall(rb"content-length: (\d+)", head.lower())[0]) == len(body)
        return int(head.split()[1]), body

    def pid(self) -> int:
        """Of the worker that served it."""
        status, body = self.answer()
        assert status == 200, body
        return int(json.loads(body)["pid"])

    def opened(self) -> None:
        """Wait for the answer to a WebSocket handshake."""
        assert self._socket.recv(65536).startswith(b"HTTP/1.1 101")

    def close(self) -> None:
        self._socket.close()


def pids(clients: list[Client]) -> set[int]:
    return {client.pid() for client in clients}


def worker(server: Server, slot: int) -> dict[str, Any]:
    """What /health says of it."""
    return server.health()["workers"][slot]


def pid_of(server: Server, slot: int) -> int:
    return int(worker(server, slot)["pid"])


def total(server: Server, name: str) -> float:
    """The sum of all series of a metric."""
    found = re.findall(rf"^{name}{{.*}} (\S+)$", server.operate("/metrics")[1], re.MULTILINE)
    return sum(map(float, found))


@contextmanager
def stopped(*pids: int) -> Iterator[None]:
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):  # it was killed meanwhile
                os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize("steering", [True, False])
def test_clients_that_come_while_a_worker_is_stopped_are_served_by_the_other(
    start_server: ServerStarter, steering: bool
) -> None:
    server = start_server(loop={**NEVER_STUCK, "steering": steering})
    lame, other = pid_of(server, 0), pid_of(server, 1)
    with stopped(lame):
        # At first nobody knows that it is stopped; about half of these are dealt to it.
        assert pids([Client(server) for _ in range(60)]) == {other}
        wait_until(lambda: worker(server, 0)["condition"] == "pressed", "pressed worker")
        for _ in range(30):
            assert Client(server).pid() == other
    assert total(server, "realtime_rescued_connections_total") > 0
    assert total(server, "realtime_rescue_refusals_total") == 0
    # It comes round, and takes part again.
    wait_until(lambda: worker(server, 0)["condition"] == "healthy", "healthy worker")
    wait_until(lambda: Client(server).pid() == lame, "client of the worker that went on")
    assert {pid_of(server, 0), pid_of(server, 1)} == {lame, other}
    server.stop()


def test_a_stopped_worker_gets_no_new_clients(start_server: ServerStarter) -> None:
    server = start_server(loop={**NEVER_STUCK, "rescue": False})
    with stopped(pid_of(server, 0)):
        wait_until(lambda: worker(server, 0)["weight"] == 0, "weight 0")
        assert pids([Client(server) for _ in range(40)]) == {pid_of(server, 1)}
    server.stop()


def test_a_kill_with_a_full_accept_queue_loses_no_connection(start_server: ServerStarter) -> None:
    server = start_server(
        # Nothing is done about the stopped worker, so that its queue fills; and it is not replaced at once.
        loop={**NEVER_STUCK, "steering": False, "lagging": "50s", "max_lag": "50s"},
        http_server={"backlog": 64},
        workers={"restart_delay": "5s"},
    )
    lame, other = pid_of(server, 0), pid_of(server, 1)
    clients = []
    with stopped(lame):
        while worker(server, 0)["accept_queue"] < worker(server, 0)["accept_queue_limit"]:
            clients.append(Client(server))
        os.kill(lame, signal.SIGKILL)
    assert pids(clients) == {other}
    assert total(server, "realtime_rescued_connections_total") >= 64
    server.stop()


def test_killed_again_and_again_under_load_no_connection_is_lost(start_server: ServerStarter) -> None:
    server = start_server(workers={"restart_delay": "10ms", "restart_delay_max": "10ms"})
    for kill in range(6):
        pid = pid_of(server, kill % 2)
        clients = [Client(server) for _ in range(10)]
        # Those that it has accepted die with it. The others it never sees.
        assert pids(clients)
        with stopped(pid):
            clients = [Client(server) for _ in range(40)]
            os.kill(pid, signal.SIGKILL)
            clients += [Client(server) for _ in range(40)]
        assert pid not in pids(clients)
        wait_until(lambda slot=kill % 2: worker(server, slot)["condition"] == "healthy", "new worker")
    server.stop()


def test_a_worker_that_was_restarted_gets_more_of_the_new_clients(start_server: ServerStarter) -> None:
    server = start_server(client={"stale_close_delay": "60s"})

    def connect(number: int) -> list[Client]:
        clients = [Client(server, HANDSHAKE) for _ in range(number)]
        for client in clients:
            client.opened()
        return clients

    before = connect(300)
    pid = pid_of(server, 0)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: worker(server, 0)["pid"] not in (None, pid), "new worker")
    wait_until(lambda: worker(server, 0)["weight"] > worker(server, 1)["weight"], "greater weight")
    after = connect(40)
    wait_until(lambda: worker(server, 0)["connections"] > 25, "most of them at the new worker", limit=5)
    for client in before + after:
        client.close()
    server.stop()


def test_a_worker_that_is_out_of_descriptors_loses_no_rescued_connection(start_server: ServerStarter) -> None:
    server = start_server(loop={**NEVER_STUCK, "steering": False, "lagging": "3s", "max_lag": "3s"})
    lame, helper = pid_of(server, 0), psutil.Process(pid_of(server, 1))
    limits = helper.rlimit(resource.RLIMIT_NOFILE)
    clients: list[Client] = []
    with stopped(lame):
        while len(clients) < 30:
            client = Client(server)
            if worker(server, 0)["accept_queue"] > len(clients):
                clients.append(client)
            else:
                assert client.pid() == helper.pid
        helper.rlimit(resource.RLIMIT_NOFILE, (lowest_free_descriptor(helper.pid), limits[1]))
        wait_until(lambda: total(server, "realtime_rescue_failures_total") > 0, "refusal of the helper")
        assert total(server, "realtime_rescued_connections_total") == 0
        helper.rlimit(resource.RLIMIT_NOFILE, limits)
        assert pids(clients) == {helper.pid}
    server.stop()


def lowest_free_descriptor(pid: int) -> int:
    taken = {int(entry.name) for entry in Path(f"/proc/{pid}/fd").iterdir()}
    return min(set(range(len(taken) + 1)) - taken)


def test_when_all_workers_are_stopped_clients_are_told_to_come_back(start_server: ServerStarter) -> None:
    server = start_server(loop=NEVER_STUCK)
    with stopped(*server.workers()):
        answers = [client.answer() for client in [Client(server) for _ in range(20)]]
    assert answers == [(503, b"the server is overloaded; come back later\n")] * 20
    assert total(server, "realtime_rescue_refusals_total") == 20
    wait_until(lambda: worker(server, 0)["condition"] == worker(server, 1)["condition"] == "healthy", "recovery")
    assert pids([Client(server) for _ in range(20)]) == set(server.workers())
    server.stop()


def test_while_every_worker_is_dead_each_client_has_an_answer(start_server: ServerStarter) -> None:
    # Deaths in a row delay the restarts, here for longer than any client waits.
    server = start_server(workers={"count": 4, "restart_delay": "300s", "restart_delay_max": "300s"})
    for pid in server.workers():
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: all(worker(server, slot)["condition"] == "absent" for slot in range(4)), "dead workers")
    assert {client.answer()[0] for client in [Client(server) for _ in range(400)]} == {503}
    server.stop()


def test_without_either_clients_wait_for_their_worker(start_server: ServerStarter) -> None:
    server = start_server(loop={**NEVER_STUCK, "steering": False, "rescue": False})
    lame = pid_of(server, 0)
    with stopped(lame):
        clients = [Client(server) for _ in range(40)]
        wait_until(lambda: worker(server, 0)["condition"] == "pressed", "pressed worker")
        assert worker(server, 0)["accept_queue"] > 0
    assert lame in pids(clients)
    server.stop()
