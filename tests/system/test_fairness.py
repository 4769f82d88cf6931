"""Long work on a loop lets others have their turn: bursts on a channel with many subscribers, handlers without end."""

from __future__ import annotations

import json
import re
import socket
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tests.system.idle_clients import HANDSHAKE, masked
from tests.system.serving import HERE, Server, ServerStarter

CROWD = 300
BURST = 300
QUIET = 20
LIMIT = 60.0


class Client:
    """A raw client on a socket of its own: small commands out, whatever comes in."""

    def __init__(self, server: Server, opened: ExitStack) -> None:
        """opened: closes the socket."""
        self.socket = opened.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=LIMIT))
        self.received = b""
        self.socket.sendall(HANDSHAKE)
        self.read_to(b"\r\n\r\n")
        self.send(1, "connect", {})

    def send(self, id: int, method: str, request: Any) -> None:
        self.socket.sendall(masked(json.dumps({"id": id, method: request}).encode()))

    def read_to(self, text: bytes) -> None:
        """Read until `text` has come."""
        while text not in self.received:
            data = self.socket.recv(65536)
            assert data, self.received
            self.received += data

    def numbers(self) -> list[int]:
        """Those of the publications that have come."""
        return [int(number) for number in re.findall(rb'"n":(\d+)', self.received)]


def subscribed(server: Server, channel: str, opened: ExitStack) -> Client:
    client = Client(server, opened)
    client.send(2, "subscribe", {"channel": channel})
    client.read_to(b'"subscribe"')
    return client


def publish_all(server: Server, publications: list[tuple[str, int]]) -> None:
    """Publish numbers to channels, in one call of the API."""
    commands = [{"publish": {"channel": channel, "data": {"n": number}}} for channel, number in publications]
    request = urllib.request.Request(
        f"{server.http}/api/batch",
        json.dumps({"commands": commands}, separators=(",", ":")).encode(),
        {"X-API-Key": "test-key", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=LIMIT) as response:
        replies = json.load(response)["replies"]
    assert [reply for reply in replies if "error" in reply] == []


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    start = ServerStarter(tmp_path_factory.mktemp("fairness"))
    app = {"module": "endless:app", "path": str(HERE / "apps")}
    yield start(workers={"count": 1}, app=app, shutdown={"timeout": "1s"})
    start.finish()


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    """Closes the sockets of a test's clients."""
    with ExitStack() as stack:
        yield stack


def test_a_burst_on_a_large_channel_costs_nobody_a_publication(server: Server, opened: ExitStack) -> None:
    crowd = [subscribed(server, "crowd", opened) for _ in range(CROWD)]
    quiet = subscribed(server, "quiet", opened)
    burst = [("crowd", number) for number in range(BURST)]
    for number in range(QUIET):
        burst.insert((number + 1) * (BURST // QUIET + 1) - 1, ("quiet", number))

    publish_all(server, burst)

    quiet.read_to(b'"n":%d}' % (QUIET - 1))
    assert quiet.numbers() == list(range(QUIET))
    for client in crowd:
        client.read_to(b'"n":%d}' % (BURST - 1))
        assert client.numbers() == list(range(BURST))


def test_a_handler_that_never_ends_starves_nobody(server: Server, opened: ExitStack) -> None:
    for _ in range(10):
        Client(server, opened).send(2, "rpc", {"method": "spin"})
    client = subscribed(server, "news", opened)

    for number in range(100):
        client.send(number + 3, "rpc", {"method": "echo", "data": number})
    publish_all(server, [("news", number) for number in range(100)])

    client.read_to(b'"n":99}')
    client.read_to(b'"id":102,')
    assert client.numbers() == list(range(100))
    assert [int(answer) for answer in re.findall(rb'"rpc":{"data":(\d+)}', client.received)] == list(range(100))
