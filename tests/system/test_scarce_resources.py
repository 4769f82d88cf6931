"""Descriptors run out: the server refuses the clients beyond its limit, and serves all others."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from websockets.exceptions import InvalidStatus
from websockets.sync.client import ClientConnection, connect

from tests.system.serving import Server, ServerStarter, wait_until

# Open files of each process of the server.
DESCRIPTORS = 256
CONNECT = json.dumps({"id": 1, "connect": {}})


@contextmanager
def kept_alive(server: Server, number: int) -> Iterator[list[socket.socket]]:
    """Connections that have made one HTTP request and stay open. The server may close some of them."""
    opened = []
    for _ in range(number):
        client = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
        client.request("GET", "/pid")
        assert client.getresponse().read()
        opened.append(client)
    try:
        yield [client.sock for client in opened if client.sock is not None]
    finally:
        for client in opened:
            client.close()


def join(server: Server, open_clients: ExitStack) -> ClientConnection:
    """A client whose connect command was answered. Raises InvalidStatus if its handshake is refused."""
    client = open_clients.enter_context(connect(server.endpoint, open_timeout=20, close_timeout=0))
    client.send(CONNECT)
    assert "connect" in json.loads(client.recv(timeout=20))
    return client


def publish(server: Server, channel: str) -> dict[str, object]:
    client = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    body = json.dumps({"channel": channel, "data": 1})
    client.request("POST", "/api/publish", body, {"X-API-Key": "test-key"})
    with client.getresponse() as response:
        found = json.loads(response.read())
    client.close()
    return found


def test_idle_http_connections_take_no_descriptor_from_clients(start_server: ServerStarter) -> None:
    server = start_server(descriptors=DESCRIPTORS)
    with kept_alive(server, 3 * DESCRIPTORS), ExitStack() as open_clients:
        for _ in range(20):
            join(server, open_clients)
        assert "result" in publish(server, "news")
    server.stop()


def test_at_the_limit_of_descriptors_clients_are_refused_and_the_others_served(start_server: ServerStarter) -> None:
    server = start_server(descriptors=DESCRIPTORS, client={"stale_close_delay": "120s"})
    with ExitStack() as open_clients:
        clients, refused = [], 0
        while len(clients) + refused < 2 * DESCRIPTORS:
            try:
                clients.append(join(server, open_clients))
            except InvalidStatus as error:
                assert error.response.status_code == 503
                assert 1 <= int(error.response.headers["Retry-After"]) <= 10
                refused += 1
        assert refused > 0 and len(clients) > DESCRIPTORS
        # The descriptors that are left serve the API and the operator.
        assert "result" in publish(server, "news")
        assert server.health()["workers"][0]["connections"] > 0
        for client in clients:
            client.send(json.dumps({"id": 2, "rpc": {"method": "echo", "data": 1}}))
            while not (reply := json.loads(client.recv(timeout=20))):
                client.send("{}")  # it was connected for longer than a ping takes
            assert reply["id"] == 2

    def is_welcome() -> bool:
        with suppress(InvalidStatus), ExitStack() as open_clients:
            join(server, open_clients)
            return True
        return False

    wait_until(is_welcome, "place for a new client")
    server.stop()
