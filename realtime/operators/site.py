"""twisted.web's side of the operators' port: requests without a body, answered whole, and no access log.

A request has IDLE seconds to arrive, counted from the connection's beginning or from the end of the response before it.
Heads are bounded by twisted.web: 16 KiB, 500 lines.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from twisted.logger import Logger, LogPublisher
from twisted.python.failure import Failure
from twisted.web.http import HTTPChannel
from twisted.web.http import Request as HTTPRequest
from twisted.web.server import Request, Site

# Seconds for a request to arrive whole.
IDLE = 30.0
# Bytes of pipelined requests that may arrive while an earlier one has no answer yet.
MAX_HELD = 65536
# How a browser says that a request comes from another page than ours (Fetch Metadata, Sec-Fetch-Site).
_FOREIGN_SITES = ("cross-site", "same-site")
# Ports that an origin leaves out, by scheme. A proxy may have taken the TLS off.
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}


class OperatorRequest(Request):
    """A GET or HEAD request to the operators' port."""

    def __init__(self, answer: Callable[[OperatorRequest], None], channel: HTTPChannel, queued: object = None) -> None:
        """answer: called with each complete request."""
        super().__init__(channel)
        self._answer = answer
        self._has_body = False
        self._client_left = False
        self.notifyFinish().addErrback(self._note_client_left)

    def _note_client_left(self, _: Failure) -> None:
        self._client_left = True

    def gotLength(self, length: int | None) -> None:
        """Called by twisted when the head is complete: a body would be kept in memory without a limit."""
        super().gotLength(0)
        if length != 0:
            self._has_body = True
            self.channel.write(b"HTTP/1.1 413 Content Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
            self.channel.loseConnection()

    def process(self) -> None:
        """Called by twisted when the request is complete."""
        if not self._has_body:
            self._answer(self)

    @property
    def hosts(self) -> list[str]:
        """The values of all Host headers."""
        return self._values("host")

    def is_foreign(self) -> bool:
        """Whether a page of another origin has sent the request. Clients that are no browsers send no such header."""
        if self.getHeader("sec-fetch-site") in _FOREIGN_SITES:
            return True
        origins = self._values("origin")
        return bool(origins) and not (
            len(origins) == len(self.hosts) == 1 and _is_same_origin(origins[0].lower(), self.hosts[0].lower())
        )

    def begin_reply(self, status: int, content_type: str, length: int | None = None) -> None:
        """Set the response's status and headers. length: of the body in bytes; None for a stream."""
        self.setResponseCode(status)
        self.setHeader("content-type", content_type)
        if length is not None:
            self.setHeader("content-length", str(length))
        self.setHeader("cache-control", "no-store")
        self.setHeader("x-content-type-options", "nosniff")
        self.setHeader("server", "realtime")

    def reply(self, status: int, content_type: str, body: str | bytes) -> None:
        """Send the whole response. Without effect when the client has left."""
        if self._client_left:
            return
        content = body.encode() if isinstance(body, str) else body
        self.begin_reply(status, content_type, len(content))
        if self.method != b"HEAD":
            self.write(content)
        self.finish()

    def finish_and_close(self) -> None:
        """End the response, and the connection once all of it is sent."""
        channel = self.channel
        self.finish()
        channel.loseConnection()

    def abort(self) -> None:
        """Close the connection at once; what its buffer holds is lost."""
        transport: Any = self.channel.transport
        transport.abortConnection()

    def _values(self, name: str) -> list[str]:
        return [str(value) for value in self.requestHeaders.getRawHeaders(name, [])]


def _is_same_origin(origin: str, host: str) -> bool:
    """Whether a page of `origin` was served under the Host header `host`. Both in lower case."""
    scheme, _, authority = origin.partition("://")
    default = _DEFAULT_PORTS.get(scheme)
    return default is not None and authority.removesuffix(default) == host.removesuffix(default)


class _Channel(HTTPChannel):
    """A connection to the operators' port."""

    _log = Logger(observer=LogPublisher())  # without observers: an idle connection is worth no line

    _is_waiting = False  # for the next turn of the loop
    _held = 0  # bytes that have arrived meanwhile

    def dataReceived(self, data: bytes) -> None:
        """Called by twisted for each piece of a request; called with b"" for the rest of the last piece."""
        if self._is_waiting:
            self._held += len(data)
            if self._held > MAX_HELD:
                transport: Any = self.transport
                transport.abortConnection()
                return
        super().dataReceived(data)

    def allContentReceived(self) -> None:
        """Called by twisted when a request is complete: pipelined requests wait, each for a turn of the loop."""
        self.paused = True
        self._is_waiting = True
        self.factory.reactor.callLater(0, self._continue)
        super().allContentReceived()

    def _continue(self) -> None:
        self.paused = self._is_waiting = False
        self._held = 0
        if self.connected:
            self.dataReceived(b"")

    def resetTimeout(self) -> None:
        """Called by twisted for each piece of a request: keep the deadline, so that a slow head has one too."""


class OperatorSite(Site):
    """The factory of the port's connections. Writes no access log: a scrape every second is no event."""

    protocol = _Channel  # type: ignore[assignment]
    noisy = False
    displayTracebacks = False

    def __init__(self, answer: Callable[[OperatorRequest], None]) -> None:
        """answer: called with each complete request, and must answer it now or later."""
        factory: Any = partial(OperatorRequest, answer)
        super().__init__(None, requestFactory=factory, timeout=IDLE)

    def log(self, request: HTTPRequest) -> None:
        pass
