"""`engine.memory.path`: clients recover over the death of the broker, of the whole server, and over a clean restart."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from websockets.sync.client import ClientConnection, connect

from tests.system.serving import Server, ServerStarter, wait_until

CHANNEL = "stream:kept"


def publish(server: Server, text: str) -> dict[str, Any]:
    """Publish, again and again while there is no broker; return the position."""

    def published() -> dict[str, Any] | None:
        body = json.dumps({"channel": CHANNEL, "data": text, "idempotency_key": text}).encode()
        request = Request(f"{server.http}/api/publish", body, {"X-API-Key": "test-key"})
        with urlopen(request, timeout=20) as answer:
            result: dict[str, Any] | None = json.load(answer).get("result")
            return result

    position: dict[str, Any] = wait_until(published, f"a position for {text}")
    return position


def recover(client: ClientConnection, position: dict[str, Any]) -> tuple[bool, list[str]]:
    """Subscribe from a position: whether the client recovered, and the publications that it had missed."""
    client.send(json.dumps({"id": 1, "connect": {}}))
    client.send(json.dumps({"id": 2, "subscribe": {"channel": CHANNEL, "recover": True, **position}}))
    answer = reply(client, 2)["subscribe"]
    return answer.get("recovered", False), [one["data"] for one in answer.get("publications", ())]


def reply(client: ClientConnection, number: int) -> dict[str, Any]:
    while True:
        for line in str(client.recv(20)).splitlines():
            message: dict[str, Any] = json.loads(line)
            if message.get("id") == number:
                return message


def test_clients_recover_over_every_restart(start_server: ServerStarter, tmp_path: Path) -> None:
    settings = {
        "engine": {"memory": {"path": str(tmp_path / "channels.db")}},
        "client": {"insecure": True, "allowed_origins": ["*"]},
        "workers": {"count": 1},
    }
    server = start_server(**settings)
    first = publish(server, "first")
    with connect(server.endpoint) as client:
        assert recover(client, first) == (True, [])
        os.kill(server.broker(), signal.SIGKILL)
        second = publish(server, "second")
        assert second == {"offset": 2, "epoch": first["epoch"]}
    with connect(server.endpoint) as client:
        assert recover(client, first) == (True, ["second"])

    server.kill()
    start_server.started.remove(server)
    killed_at = publish(server := start_server(**settings), "third")
    assert killed_at == {"offset": 3, "epoch": first["epoch"]}
    assert publish(server, "first") == first  # a retry
    with connect(server.endpoint) as client:
        assert recover(client, first) == (True, ["second", "third"])

    server.stop()
    server = start_server(**settings)
    with connect(server.endpoint) as client:
        assert recover(client, second) == (True, ["third"])
