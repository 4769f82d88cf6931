"""The live page's feed: server-sent events at /live on the operators' port.

A viewer is an open response (`text/event-stream`, HTML Living Standard 9.2). It is sent the past once and then each new
snapshot, one a second, which is the heartbeat too: a page that has heard none for a few seconds says so. Each snapshot
replaces the one before, so none is queued: a viewer whose socket buffer is full misses snapshots, and is dropped when
the buffer stays full. Memory held for one viewer is thus one event and the transport's own 64 KiB at most.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from twisted.internet.interfaces import IPushProducer
from twisted.python.failure import Failure
from twisted.web.http import OK, SERVICE_UNAVAILABLE
from zope.interface import implementer

from realtime.operators.site import OperatorRequest

PATH = b"/live"
MAX_VIEWERS = 20
# Seconds for which a viewer's socket may take nothing before the viewer is dropped.
MAX_STALL = 10.0
# Milliseconds after which a browser reconnects when the stream has ended.
_RETRY = 1000


class SnapshotSource(Protocol):
    """The live figures, as `realtime.operators.live.LiveFigures` keeps them."""

    @property
    def json(self) -> bytes: ...
    def past(self) -> bytes: ...
    def add_listener(self, listener: Callable[[bytes], None]) -> None: ...


class Viewers:
    """All open streams of the live page."""

    def __init__(self, reactor: Any, live: SnapshotSource) -> None:
        """reactor: with monotonic `seconds`. live: each new snapshot of it goes to every viewer."""
        self._reactor = reactor
        self._live = live
        self._viewers: set[_Viewer] = set()
        live.add_listener(self._send)

    def __len__(self) -> int:
        return len(self._viewers)

    def open(self, request: OperatorRequest) -> None:
        """Answer a GET or HEAD of /live: with a stream, or with 503 when MAX_VIEWERS are open."""
        if len(self._viewers) >= MAX_VIEWERS:
            request.setHeader("retry-after", "5")
            text = f"{MAX_VIEWERS} live pages are open, which is the limit; close one, or read /snapshot\n"
            request.reply(SERVICE_UNAVAILABLE, "text/plain", text)
        elif request.method == b"HEAD":
            request.begin_reply(OK, "text/event-stream")
            request.finish()
        else:
            viewer = _Viewer(request, self._reactor.seconds, self._viewers.discard)
            self._viewers.add(viewer)
            first = b'{"past":' + self._live.past() + b',"snapshot":' + self._live.json + b"}"
            viewer.begin(b"retry: %d\ndata: %b\n\n" % (_RETRY, first))

    def close(self) -> None:
        """End every stream."""
        for viewer in list(self._viewers):
            viewer.end()

    def _send(self, snapshot: bytes) -> None:
        """Send a snapshot to every viewer, and drop the stalled ones. snapshot: JSON without line ends."""
        event = b'data: {"snapshot":' + snapshot + b"}\n\n"
        for viewer in list(self._viewers):
            viewer.send(event)


@implementer(IPushProducer)
class _Viewer:
    """One stream, as the producer of its response: the transport pauses it while its buffer is full."""

    def __init__(
        self, request: OperatorRequest, seconds: Callable[[], float], on_end: Callable[[_Viewer], None]
    ) -> None:
        """seconds: a monotonic clock. on_end: called once, when the stream has ended for any reason."""
        self._request = request
        self._seconds = seconds
        self._on_end = on_end
        self._paused_at: float | None = None

    def begin(self, event: bytes) -> None:
        """Open the stream with its first event."""
        self._request.begin_reply(OK, "text/event-stream")
        self._request.notifyFinish().addBoth(self._ended)
        self._request.registerProducer(self, True)
        self._request.write(event)

    def send(self, event: bytes) -> None:
        """Write an event; skip it while the buffer is full, and drop the viewer after MAX_STALL seconds of that."""
        if self._paused_at is None:
            self._request.write(event)
        elif self._seconds() - self._paused_at >= MAX_STALL:
            self._request.abort()

    def end(self) -> None:
        """Finish the response and close the connection; at once where the buffer is full."""
        if self._paused_at is not None:
            self._request.abort()
            return
        self._request.unregisterProducer()
        self._request.finish_and_close()

    def pauseProducing(self) -> None:
        self._paused_at = self._seconds()

    def resumeProducing(self) -> None:
        self._paused_at = None

    def stopProducing(self) -> None:
        """Called by twisted when the connection is lost; `_ended` follows."""

    def _ended(self, _: Failure | None) -> None:
        self._on_end(self)
