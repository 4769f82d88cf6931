"""Who watches the live figures: WebSockets on the operators' port.

The port has the same strict front as the clients' one. A viewer is sent the past once and then every new snapshot;
what it says means nothing. One that does not keep up is dropped by the outbox's limit, like a slow client.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.web.http import FORBIDDEN
from twisted.web.server import Site

from realtime.config import settings
from realtime.deadlines import Deadlines
from realtime.errors import SHUTDOWN
from realtime.http.frames import text_frame
from realtime.http.handshake import OpeningRequest
from realtime.http.request import UNCOUNTED, Refusal, RequestHead
from realtime.metrics import Metrics
from realtime.operators.live import LiveFigures
from realtime.transports.admission import Admission
from realtime.transports.frontend import HTTPFrontendFactory
from realtime.transports.websocket import WebSocketConnection, WebSocketFactory

PATH = "/live"
MOST_VIEWERS = 20
# Bytes that a viewer may say at once, and bytes that may wait for it.
_MAX_MESSAGE = 1024
_MAX_WAITING = 4 << 20


class Viewers:
    """Everybody who watches. front: the factory for the operators' port."""

    def __init__(self, reactor: Any, live: LiveFigures, site: Site, is_own: Callable[[str], bool]) -> None:
        """site: serves everything but the WebSocket. is_own: whether a Host header names this port."""
        self._reactor = reactor
        self._live = live
        self._all: set[_Viewer] = set()
        self._deadlines = Deadlines(reactor.seconds())
        # The operators' own connections are no clients: they don't show in the metrics.
        metrics = Metrics()
        client = settings.ClientSettings(connection_limit=MOST_VIEWERS, queue_max_size=_MAX_WAITING)
        websocket = _Factory(
            self._open,
            settings.WebSocketSettings(message_size_limit=_MAX_MESSAGE),
            client,
            self._deadlines,
            metrics,
            reactor,
            Admission(client, metrics, reactor.seconds),
        )
        websocket.is_own = is_own
        self.front = HTTPFrontendFactory(
            settings.HTTPServerSettings(), {PATH: websocket}, site, self._deadlines, metrics
        )
        live.added.append(self._tell)

    def __len__(self) -> int:
        return len(self._all)

    def sweep(self) -> None:
        """Mind the deadlines. Every `realtime.deadlines.RESOLUTION` seconds."""
        self._deadlines.sweep(self._reactor.seconds())

    def close(self) -> None:
        """Send everybody away."""
        for viewer in list(self._all):
            viewer.connection.close(*SHUTDOWN)

    def _open(self, connection: WebSocketConnection, request: OpeningRequest) -> _Viewer:
        viewer = _Viewer(connection, self._all.discard)
        self._all.add(viewer)
        connection.send(b'{"past":' + self._live.past() + b',"snapshot":' + self._live.json + b"}")
        return viewer

    def _tell(self, snapshot: bytes) -> None:
        if self._all:
            frame = text_frame(b'{"snapshot":' + snapshot + b"}")
            for viewer in list(self._all):
                viewer.connection.sink.deliver(frame)


class _Viewer:
    """A connection that is told everything and asked nothing."""

    def __init__(self, connection: WebSocketConnection, gone: Callable[[_Viewer], None]) -> None:
        self.connection = connection
        self._gone = gone

    def receive(self, payload: bytes) -> None:
        """Nothing that a viewer could say has a meaning."""

    def closed(self) -> None:
        self._gone(self)


class _Factory(WebSocketFactory):
    """Lets in pages of this very port. is_own: see `Viewers`."""

    is_own: Callable[[str], bool]

    def check(self, head: RequestHead) -> Refusal | None:
        """A name that is not ours stops DNS rebinding, which the origin alone does not."""
        if not all(map(self.is_own, head.get_all("host") or [""])):
            return Refusal(FORBIDDEN, "unknown Host: use localhost, or the address that is bound", UNCOUNTED)
        return super().check(head)
