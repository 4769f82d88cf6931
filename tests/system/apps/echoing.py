"""An application whose worker echoes each WebSocket message in place of a session, as the Autobahn Testsuite expects.

All but the session is the server's own: listening, handshake, receiving, decompression, checks, sending. The frames
leave by the worker's means for fan-out: io_uring, where the kernel has it.
"""

from __future__ import annotations

from typing import Any

from realtime import App
from realtime.http.frames import binary_frame, text_frame
from realtime.pubsub.fanout import broadcast
from realtime.transports.websocket import WebSocketConnection
from realtime.worker import io_uring

app = App()

io_uring.MIN_SINKS = 1  # each echo has one receiver
try:
    send = io_uring.IOURing().broadcast
except OSError:
    send = broadcast

check_message = WebSocketConnection.onMessage


class Echo:
    """A session that sends each message back."""

    def __init__(self, connection: Any, session: Any) -> None:
        self._connection = connection
        self._session = session
        self.build_frame = text_frame

    def receive(self, payload: bytes) -> None:
        send(self.build_frame(payload), [self._connection.sink])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)


def on_message(self: Any, payload: bytes, isBinary: bool) -> None:
    if not isinstance(self._session, Echo):
        self._session = Echo(self, self._session)
    self._session.build_frame = binary_frame if isBinary else text_frame
    if isBinary:
        self._session.receive(payload)  # the server itself takes binary messages for JSON
    else:
        check_message(self, payload, False)


WebSocketConnection.onMessage = on_message  # type: ignore[method-assign]
