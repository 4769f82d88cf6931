"""on_disconnected after the death of a worker: once for each of its clients, and for no other."""

from __future__ import annotations

import json
import os
import signal
from contextlib import ExitStack
from pathlib import Path

from websockets.sync.client import ClientConnection, connect

from tests.system.serving import HERE, ServerStarter, wait_until

CLIENTS = 12


def say_hello(client: ClientConnection, user: str) -> tuple[str, int]:
    """Connect. Returns the client id and the worker's pid."""
    client.send(json.dumps({"id": 1, "connect": {"data": {"user": user}}}))
    connected = json.loads(client.recv(timeout=20))["connect"]
    return connected["client"], connected["data"]["pid"]


def test_each_client_of_a_killed_worker_is_reported_once(start_server: ServerStarter, tmp_path: Path) -> None:
    noted = tmp_path / "noted"
    noted.touch()
    app = {"module": "parting:app", "path": str(HERE / "apps"), "options": {"file": str(noted)}}
    server = start_server(app=app)
    with ExitStack() as stack:
        clients = [stack.enter_context(connect(server.endpoint)) for _ in range(CLIENTS)]
        placed = [(client, *say_hello(client, f"user{number}")) for number, client in enumerate(clients)]
        victim = placed[0][2]
        lost = [client_id for _, client_id, pid in placed if pid == victim]
        orderly = next(entry for entry in reversed(placed) if entry[2] == victim) if len(lost) > 1 else None
        expected = dict.fromkeys(lost, "worker lost")
        if orderly is not None:
            orderly[0].close()
            expected[orderly[1]] = "connection closed"
            wait_until(lambda: orderly[1] in noted.read_text(), "the end of a connection")
        os.kill(victim, signal.SIGKILL)

        def lines() -> list[list[str]]:
            return [line.split(" ", 3) for line in noted.read_text().splitlines()]

        wait_until(lambda: len(lines()) >= len(expected), "a report of each client")
        assert {client_id: reason for client_id, _, _, reason in lines()} == expected
        for client, _, pid in placed:
            if pid != victim:
                client.ping()
