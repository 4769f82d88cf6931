"""Sessions and counters of a connection, whatever its transport."""

from __future__ import annotations

from typing import Any

import pytest
from twisted.logger import LogEvent, globalLogPublisher

from realtime.client_log import ClientLog
from realtime.config import settings
from realtime.deadlines import Deadlines
from realtime.errors import SERVER_ERROR
from realtime.http.handshake import OpeningRequest
from realtime.metrics import Metrics
from realtime.transports.connection import ClientConnection, ConnectionContext, TransportSession, close_code_label

REQUEST = OpeningRequest({}, {}, "/", "192.0.2.1")


class Session:
    """A session that counts its ends. is_faulty: raise an exception at the end."""

    def __init__(self, is_faulty: bool = False) -> None:
        self.is_faulty = is_faulty
        self.ends = 0

    def receive(self, payload: bytes) -> None: ...

    def describe(self) -> dict[str, object]:
        return {}

    def closed(self) -> None:
        self.ends += 1
        if self.is_faulty:
            raise RuntimeError("a bug in the session")


class Connection(ClientConnection):
    """A connection without a transport; it records its close codes."""

    def __init__(self, context: ConnectionContext) -> None:
        self.factory = context
        self.closes: list[tuple[int, str]] = []

    def close(self, code: int, reason: str) -> None:
        self.closes.append((code, reason))
        self._count_disconnect("server", close_code_label(code))


class Sessions:
    """Opens `session`, or raises an exception if it is None."""

    def __init__(self) -> None:
        self.session: Session | None = Session()
        self.opened: list[tuple[Any, OpeningRequest]] = []

    def open(self, connection: Any, request: OpeningRequest) -> TransportSession:
        self.opened.append((connection, request))
        if self.session is None:
            raise RuntimeError("a bug in the session")
        return self.session


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def sessions() -> Sessions:
    return Sessions()


@pytest.fixture
def connection(metrics: Metrics, sessions: Sessions) -> Connection:
    websocket = settings.WebSocketSettings()
    return Connection(ConnectionContext(sessions.open, websocket, 1000, Deadlines(0.0), metrics, ClientLog(metrics)))


def values(metrics: Metrics, name: str) -> dict[tuple[str, ...], float]:
    """Return the counters of this name that are not zero, by their label values."""
    return {
        tuple(value for _, value in sample.labels): sample.value for sample in metrics.snapshot([name]) if sample.value
    }


def test_a_session_is_opened_with_its_connection_and_ended_once(
    connection: Connection, sessions: Sessions, metrics: Metrics
) -> None:
    assert connection.open_session(REQUEST)
    assert sessions.opened == [(connection, REQUEST)]
    connection.end_session()
    connection.end_session()
    assert sessions.session is not None and sessions.session.ends == 1
    assert values(metrics, "realtime_disconnects") == {("", "client"): 1}


def test_a_connection_is_closed_if_its_session_cannot_be_opened(connection: Connection, sessions: Sessions) -> None:
    sessions.session = None
    assert not connection.open_session(REQUEST)
    assert connection.closes == [SERVER_ERROR]
    connection.end_session()


def test_a_disconnect_is_counted_once_with_its_first_reason(connection: Connection, metrics: Metrics) -> None:
    connection.open_session(REQUEST)
    connection.close(3012, "no pong")
    connection.close(3001, "shutdown")
    connection.end_session()
    assert values(metrics, "realtime_disconnects") == {("3012", "server"): 1}


def test_an_exception_at_the_end_of_a_session_is_logged(connection: Connection, sessions: Sessions) -> None:
    sessions.session = Session(is_faulty=True)
    connection.open_session(REQUEST)
    events: list[LogEvent] = []
    globalLogPublisher.addObserver(events.append)
    try:
        connection.end_session()
    finally:
        globalLogPublisher.removeObserver(events.append)
    assert [event["log_failure"].type for event in events] == [RuntimeError]


@pytest.mark.parametrize(
    ("code", "label"), [(1000, "1000"), (3999, "3999"), (4000, "application"), (4999, "application")]
)
def test_close_codes_of_the_application_share_a_label(code: int, label: str) -> None:
    assert close_code_label(code) == label
