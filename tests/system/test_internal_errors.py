"""Exceptions in the server's own code: logged, counted, shown, and the end of no connection but the one in question."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Iterator

import pytest
from websockets.exceptions import ConnectionClosedError
from websockets.sync.client import ClientConnection, connect

from tests.system.serving import HERE, Server, ServerStarter, wait_until

ERRORS = re.compile(r'realtime_internal_errors_total\{process="worker",worker="0"\} (\S+)')


@pytest.fixture
def faulty(start_server: ServerStarter) -> Server:
    server = start_server(
        workers={"count": 1},
        app={"module": "faulty:app", "path": str(HERE / "apps")},
        client={"insecure": True, "stale_close_delay": "1s"},
    )
    server.expect_traceback()
    return server


@pytest.fixture
def bystander(faulty: Server) -> Iterator[ClientConnection]:
    """A client that is connected, and must stay so."""
    with connect(faulty.endpoint) as client:
        assert "connect" in ask(client, connect={})
        yield client
        assert ask(client, rpc={"method": "echo", "data": "still here"})["rpc"] == {"data": "still here"}


def ask(client: ClientConnection, **command: object) -> dict[str, object]:
    client.send(json.dumps({"id": 1, **command}))
    reply: dict[str, object] = json.loads(client.recv(timeout=20))
    return reply


def inject(server: Server, place: str, times: int = 1) -> None:
    with urllib.request.urlopen(f"{server.http}/fault?at={place}&times={times}", timeout=20):
        pass


def errors(server: Server) -> float:
    found = ERRORS.search(server.operate("/metrics")[1])
    return float(found[1]) if found else 0.0


@pytest.mark.parametrize(
    ("place", "sent", "line"),
    [
        ("data", [{"id": 1, "connect": {}}], "a protocol raised an exception while handling received data"),
        (
            "write",
            [{"id": n + 1, "rpc": {"method": "echo", "data": n}} for n in range(3)],
            "serving a client raised an exception",
        ),
        ("timer", [], "a time limit of a connection raised an exception; aborting the connection"),
    ],
)
def test_only_the_connection_in_question_is_aborted(
    faulty: Server, bystander: ClientConnection, place: str, sent: list[dict[str, object]], line: str
) -> None:
    with connect(faulty.endpoint) as client:
        if place == "write":
            ask(client, connect={})
        inject(faulty, place)
        if sent:
            client.send("\n".join(map(json.dumps, sent)))
        with pytest.raises(ConnectionClosedError) as closed:
            while True:
                client.recv(timeout=20)
        assert closed.value.rcvd is None, "a connection in an unknown state gets no close frame"
    faulty.wait_for_log(re.escape(line))
    wait_until(lambda: errors(faulty) == 1, "a count")


def test_an_exception_at_the_end_of_a_connection_does_not_end_the_worker(
    faulty: Server, bystander: ClientConnection
) -> None:
    pids = faulty.workers()
    with connect(faulty.endpoint) as client:
        ask(client, connect={})
        inject(faulty, "end")
    faulty.wait_for_log("a protocol raised an exception at the end of its connection")
    assert faulty.workers() == pids


def test_more_than_a_hundred_a_minute_make_the_server_unhealthy(faulty: Server, bystander: ClientConnection) -> None:
    assert faulty.operate("/health")[0] == 200
    inject(faulty, "callback", 101)
    wait_until(lambda: faulty.operate("/health")[0] == 503, "an unhealthy server")
    assert faulty.health()["status"] == "exceptions in the server's own code in the last minute: 101; see the log"
    assert errors(faulty) == 101
