"""The end of a hand-over that takes connections over. `realtime.worker.handover` has the whole of it."""

from __future__ import annotations

import errno
import os
from collections import deque

import msgspec
from twisted.internet.task import deferLater
from twisted.logger import Logger

from realtime.errors import SERVER_ERROR, SHUTDOWN, WORKER_LOST, ClientError, EngineUnavailable
from realtime.handlers.coroutines import drive
from realtime.process.fd_passing import take_claim
from realtime.process.fd_stream import FdStream, close_all
from realtime.protocol import handover
from realtime.protocol.client_state import StateError
from realtime.transports.connection import Unsupported
from realtime.types import ClientInfo
from realtime.worker.handover import (
    SLICE,
    VERSION,
    Accepted,
    Announced,
    Expected,
    HandOverMessage,
    HandOverParts,
    Moved,
    MovedConnection,
    MovedHTTP,
    Offered,
    Refused,
    Sent,
    Taken,
    decode_at_target,
    encode,
    log_unexpected,
)

LATE_CUT = 1.0
"""Seconds after the death of a source for the broker to read its last `Cut`, which moves clients that never arrive."""

_log = Logger()


class HandOverTarget:
    """Takes connections of another process over, as they come."""

    def __init__(self, parts: HandOverParts, stream: int) -> None:
        """stream: the descriptor of this end, owned by this object."""
        self._parts = parts
        self._frames: deque[tuple[bytes, list[int]]] = deque()
        self._is_working = self._is_closed = False
        self._batches: dict[str, None] = {}  # those that have not ended
        self._stream = FdStream(parts.reactor, stream, self._on_frame, self._work)

    @property
    def is_open(self) -> bool:
        """Whether more may arrive, or what has arrived is not served yet."""
        return self._stream.open or self._is_working

    def close(self) -> None:
        """Take nothing more over; the source keeps or closes what it has."""
        self._is_closed = True
        self._stream.close()
        self._work()

    def _on_frame(self, body: bytes, descriptors: list[int]) -> None:
        self._frames.append((body, descriptors))
        self._work()

    def _work(self) -> None:
        if not self._is_working:
            self._is_working = True
            drive(self._handle_all(), self._on_handled)

    def _on_handled(self, result: object, error: BaseException | None) -> None:
        self._is_working = False
        if error is not None:
            log_unexpected(result, error)
            self._stream.close()
            while self._frames:
                close_all(self._frames.popleft()[1])
            self._end_batches()

    async def _handle_all(self) -> None:
        """Handle the received messages one after the other. After the end of the stream, its batches end."""
        while self._frames:
            body, descriptors = self._frames.popleft()
            try:
                message = decode_at_target(body)
            except msgspec.MsgspecError as error:
                close_all(descriptors)
                self._refuse(f"the source sent an unknown message ({error})")
                continue
            if isinstance(message, Moved):
                await self._take(message, descriptors)
            elif isinstance(message, MovedHTTP):
                self._take_http(message, descriptors)
            else:
                close_all(descriptors)
                await self._handle(message)
        if not self._stream.open:
            if self._batches and not self._is_closed:
                await deferLater(self._parts.reactor, LATE_CUT)
            self._end_batches()

    def _end_batches(self) -> None:
        """Handle the loss of the clients that have not arrived."""
        for batch in list(self._batches):
            self._parts.report_ends(self._finish(batch), *WORKER_LOST)

    async def _handle(self, message: Offered | Announced | Sent) -> None:
        match message:
            case Offered(version=version) if version != VERSION:
                self._refuse(f"the source speaks version {version} of the hand-over, this worker {VERSION}")
            case Offered():
                self._send(Accepted(VERSION, self._parts.address))
            case Announced():
                await self._expect(message)
            case Sent(batch=batch):
                self._finish(batch)

    async def _expect(self, message: Announced) -> None:
        if not self._parts.admission.has_descriptors_for(message.connections):
            self._refuse("it has too few descriptors for further connections; raise the limit of open files")
            return
        self._batches[message.batch] = None
        self._parts.emulation.expect(message.batch, message.secrets)
        try:
            await handover.expect(self._parts.services, message.batch, message.channels)
        except (EngineUnavailable, ClientError) as error:
            self._finish(message.batch)
            self._send(Expected(message.batch, f"the target can't subscribe: {error}"))
        else:
            self._send(Expected(message.batch))

    async def _take(self, message: Moved, descriptors: list[int]) -> None:
        """Continue with connections, unless the source has taken them back, or their descriptors were lost."""
        if not self._has_all(descriptors, len(message.connections)):
            return
        await handover.arrived(self._parts.services, message.batch)
        sockets = self._claim(descriptors)
        failures: list[str] = []
        now = self._parts.reactor.seconds
        end = now() + SLICE
        for descriptor, moved in zip(sockets, message.connections, strict=bool(sockets)):
            failures.append(self._adopt(message.batch, descriptor, moved))
            if now() >= end:
                await deferLater(self._parts.reactor, 0)
                end = now() + SLICE
        self._send(Taken(failures))

    def _take_http(self, message: MovedHTTP, descriptors: list[int]) -> None:
        """Serve HTTP connections."""
        if not self._has_all(descriptors, message.connections):
            return
        failures: list[str] = []
        for descriptor in self._claim(descriptors):
            try:
                self._parts.adopt_http(descriptor)
            except OSError as error:
                failures.append("" if error.errno == errno.ENOTCONN else "descriptors")  # "": its client has gone
            else:
                failures.append("")
        self._send(Taken(failures))

    def _has_all(self, descriptors: list[int], connections: int) -> bool:
        """Return whether the claim and all connections have arrived; if not, the source keeps them."""
        if len(descriptors) == connections + 1:
            return True
        self._send(Taken(["descriptors"] * connections))
        return False

    def _claim(self, descriptors: list[int]) -> list[int]:
        """Return the connections of a message, if they are ours; none if the source has taken them back."""
        claim, *sockets = descriptors
        is_ours = take_claim(claim)
        os.close(claim)
        if not is_ours:
            close_all(sockets)
        return sockets if is_ours else []

    def _adopt(self, batch: str, descriptor: int, moved: MovedConnection) -> str:
        """Continue with one connection. Returns the reason if the source has to close it, else ""."""
        parts, handed = self._parts, moved.session
        try:
            connection = parts.open_connection(descriptor, moved.connection)
        except (Unsupported, msgspec.MsgspecError, OSError) as error:
            _log.info("a connection can't be taken over, and its client comes back: {error}", error=error)
            return "unsupported"
        try:
            connection.release_address = parts.admission.take_over(handed.request.remote_address)
            connection.adopt_session(parts.restore(batch, connection, handed))
            connection.start_receiving()
        except StateError as error:
            _log.warn("a connection ends, and its client comes back: {error}", error=error)
            connection.close(*SHUTDOWN)
        except Exception:
            _log.failure("restoring a session raised; its connection is closed")
            connection.close(*SERVER_ERROR)
        return ""

    def _finish(self, batch: str) -> list[ClientInfo]:
        self._batches.pop(batch, None)
        self._parts.emulation.end_batch(batch)
        return handover.finish(self._parts.services, batch)

    def _refuse(self, reason: str) -> None:
        self._send(Refused(reason))

    def _send(self, message: HandOverMessage) -> None:
        self._stream.send(encode(message))
