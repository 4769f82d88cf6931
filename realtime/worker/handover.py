"""Moves established connections from this worker to another process, or from another process to this worker.

The supervisor gives each of the two processes one end of a stream (`realtime.process.fd_stream`). The *source* moves
connections in batches; `realtime.protocol.handover` moves their sessions:

    source                                             target
    Hello                            ─────────────▶
                                     ◀─────────────    Welcome, or Refused
    suspends some connections
    Announced (channels of a batch)  ─────────────▶    expects their events
                                     ◀─────────────    Expected
    cuts, and exports them
    Moved (state, descriptors)       ─────────────▶    restores them
                                     ◀─────────────    Taken
    Sent                             ─────────────▶

A connection is served once. Beside the descriptors, a Moved message carries a *claim*, an eventfd(2) with the value 1
(see `realtime.process.fd_passing`): the process that reads it owns the connections of the message. The target reads it
before it touches one of them, and the source reads it to take them back when the target does not answer, or has ended.
The source keeps its copies of the descriptors until the answer. What comes back is closed with 3001; connections that
the target has claimed before it died are closed without a close frame, as it may have written to them.

A connection whose commands take too long stays with the source, and so does all that a failure before the cut leaves.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Union

import msgspec
from msgspec import Struct
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure

from realtime.errors import SERVER_ERROR, SHUTDOWN, WORKER_LOST, ClientError, EngineUnavailable, RealtimeError
from realtime.handlers.coroutines import drive
from realtime.metrics import Counter, Metrics
from realtime.process import transport
from realtime.process.fd_passing import take_claim
from realtime.process.fd_stream import FdStream, close_all
from realtime.process.transport import DirectServer
from realtime.protocol import handover
from realtime.protocol.context import SessionServices
from realtime.protocol.handover import HandedSession
from realtime.protocol.session import Session
from realtime.protocol.session_state import SessionState
from realtime.transports.admission import Admission
from realtime.transports.connection import HandedConnection, HandOverEndpoint, Unsupported
from realtime.transports.emulation import Emulation
from realtime.types import ClientInfo
from realtime.worker.lost_clients import DisconnectedHandler, report_ends

VERSION = 1
"""Of the messages below. Processes of different versions move nothing between each other."""

BATCH = 64
"""Connections that move together."""

ANSWER_TIMEOUT = 5.0
"""Seconds for the target to answer, also while its loop is blocked."""

# Bytes of state in one message; a single connection may have more.
_MESSAGE_BYTES = 1 << 20
# Connections exported or restored in one turn of the loop, at about 0.1 ms each.
_AT_ONCE = 8
# Seconds between two batches, and between two looks at what is not ready.
_PAUSE, _POLL = 0.002, 0.005
# Looks at a connection that can't move, before it goes on here for a while.
_PATIENCE = 20
# Attempts that may fail one after the other, with the broker away for example, and seconds between them.
_MAX_FAILURES, _FAILURE_PAUSE = 10, 0.2

_log = Logger()


class _Message(Struct, frozen=True, array_like=True): ...


class Hello(_Message, frozen=True, tag=1):
    """Source: the first message, the same in every version. address: of the source, see `engine.worker_address`."""

    version: int
    address: str


class Announced(_Message, frozen=True, tag=2):
    """Source: the channels of a batch of connections, and the secrets of those that receive commands by emulation."""

    batch: str
    connections: int
    channels: list[str]
    secrets: list[str]


class MovedConnection(Struct, frozen=True, array_like=True):
    connection: HandedConnection
    session: HandedSession


class Moved(_Message, frozen=True, tag=3):
    """Source: connections of a batch, after its cut. Comes with the claim and a descriptor for each of them."""

    batch: str
    connections: list[MovedConnection]


class Sent(_Message, frozen=True, tag=4):
    """Source: the end of a batch, whether it was cut or not."""

    batch: str


class Welcome(_Message, frozen=True, tag=5):
    """Target: address as in `Hello`."""

    version: int
    address: str


class Refused(_Message, frozen=True, tag=6):
    """Target: it takes nothing over. reason: one readable line."""

    reason: str


class Expected(_Message, frozen=True, tag=7):
    """Target: the batch may be cut, unless there is an error."""

    batch: str
    error: str = ""


class Taken(_Message, frozen=True, tag=8):
    """Target: which connections of a Moved message it has; the others are the source's."""

    taken: list[bool]


_encode = msgspec.msgpack.Encoder().encode
_decode_at_source = msgspec.msgpack.Decoder(Union[Welcome, Refused, Expected, Taken]).decode  # noqa: UP007
_decode_at_target = msgspec.msgpack.Decoder(Union[Hello, Announced, Moved, Sent]).decode  # noqa: UP007


class HandOverCounts(Struct, frozen=True):
    """What became of the connections of the source. reason: why the hand-over ended early, "" if it did not."""

    moved: int = 0
    closed: int = 0
    left: int = 0
    reason: str = ""


class HandOverParts(Struct, frozen=True):
    """The parts of a worker that a hand-over works with.

    address: this process's, see `engine.worker_address`. restore: `handover.restore` from its batch on. endpoints: by
    the name of the transport. transport: the class of TCP transports. disconnected: the application's handler, if any.
    """

    reactor: Any
    address: str
    services: SessionServices
    restore: Callable[[str, Any, HandedSession], Session]
    endpoints: Mapping[str, HandOverEndpoint]
    transport: type[DirectServer]
    emulation: Emulation
    admission: Admission
    metrics: Metrics
    disconnected: DisconnectedHandler | None

    def count(self, direction: str) -> Counter:
        """Return the counter of connections that went "out" to another process, or came "in"."""
        help = "Connections handed over from one process to another, without an end for the client."
        return self.metrics.counter("realtime_handovers", help, direction=direction)

    def count_failure(self, reason: str, connections: int = 1) -> None:
        """Count connections that could not be handed over."""
        help = "Connections that could not be handed over; those that were cut already are closed."
        self.metrics.counter("realtime_handover_failures", help, reason=reason).value += connections

    def open_connection(self, descriptor: int, handed: HandedConnection) -> Any:
        """Continue with a connection, still without a session. Owns the descriptor.

        Raises Unsupported, msgspec.MsgspecError and OSError; the connection is untouched then.
        """
        try:
            endpoint = self.endpoints.get(handed.transport)
            if endpoint is None:
                raise Unsupported(f"the transport {handed.transport} is off")
            connection = endpoint.restore_connection(handed)
        except BaseException:
            os.close(descriptor)
            raise
        stream = transport.take_over(self.reactor, descriptor, handed.peer, connection, self.transport)
        try:
            connection.take_over(stream, handed)
        except Exception:
            _log.failure("taking a connection over raised; it is aborted")
            stream.abortConnection()
        return connection

    def report_ends(self, clients: Iterable[ClientInfo], code: int, reason: str) -> None:
        """Call the application's `on_disconnected` for these clients."""
        if self.disconnected is not None:
            reports = report_ends(list(clients), self.disconnected, self.services.gather, code, reason)
            drive(reports, _log_unexpected)


class _Stopped(RealtimeError):
    """The hand-over ends here; the message says why."""


class _Shipment:
    """A Moved message without an answer. connections: with their descriptors, which the source keeps until then."""

    __slots__ = ("claim", "connections")

    def __init__(self, claim: int, connections: list[tuple[int, MovedConnection]]) -> None:
        self.claim = claim
        self.connections = connections


class HandOverSource:
    """Moves connections of this worker to another process: `run`, once."""

    def __init__(self, parts: HandOverParts, stream: int) -> None:
        """stream: the descriptor of this end, owned by this object."""
        self._parts = parts
        self._reactor = parts.reactor
        self._stream = FdStream(parts.reactor, stream, self._on_frame, self._on_end)
        self._answers: deque[Any] = deque()
        self._waiter: Deferred[None] | None = None
        self._target = ""
        self._batches = 0
        self._failures = 0
        self._suspended: dict[Session, int] = {}  # with the number of looks at a connection that can't move
        self._ready: deque[Session] = deque()
        self._postponed: list[Session] = []
        self._moved = self._closed = 0
        self._bytes = parts.metrics.counter("realtime_handover_bytes", "Bytes of state sent with connections.")

    async def run(self, sessions: Callable[[], Iterable[Session]], connections: int, timeout: float) -> HandOverCounts:
        """Move connections until `timeout` seconds have passed. Never raises.

        sessions: returns those of this worker; called again until there is none that has not been tried. connections:
        their number; -1 for all, also those of clients that connect meanwhile.
        """
        deadline = self._reactor.seconds() + timeout
        reason = ""
        try:
            await self._greet()
            await self._move_all(sessions, connections, deadline)
        except _Stopped as stopped:
            reason = str(stopped)
        except Exception:
            _log.failure("handing connections over raised; the others stay here")
            reason = "an unexpected exception"
        left = self._resume_all()
        self._stream.close()
        if connections < 0:
            left = sum(1 for _ in sessions())
        return HandOverCounts(self._moved, self._closed, left, reason)

    # The batches

    async def _greet(self) -> None:
        self._send(Hello(VERSION, self._parts.address))
        welcome = await self._answer()
        if not isinstance(welcome, Welcome):
            raise _Stopped("the target sent no welcome")
        if welcome.version != VERSION:
            raise _Stopped(f"the target speaks version {welcome.version} of the hand-over, this worker {VERSION}")
        self._target = welcome.address

    async def _move_all(self, sessions: Callable[[], Iterable[Session]], connections: int, deadline: float) -> None:
        tried: set[Session] = set()
        candidates: Iterator[Session] = iter(())
        while self._reactor.seconds() < deadline:
            wanted = connections - self._moved - self._closed if connections >= 0 else BATCH
            if wanted <= 0:
                return
            if not self._suspend_some(candidates, min(wanted, BATCH), connections):
                fresh = [session for session in sessions() if session not in tried and _is_alive(session)]
                fresh += [session for session in self._postponed if _is_alive(session)]
                self._postponed.clear()
                tried.update(fresh)
                candidates = iter(fresh)
                if not (fresh or self._suspended):
                    return
            batch = self._take_ready(min(wanted, BATCH))
            if batch:
                await self._move(batch)
                await self._sleep(_PAUSE)
            elif self._suspended:
                await self._sleep(_POLL)

    def _suspend_some(self, candidates: Iterator[Session], number: int, limit: int) -> bool:
        """Suspend connections until `number` of them are ready. Returns False if there are not so many candidates.

        limit: of the suspended ones; -1 for none.
        """
        while len(self._ready) < number and not 0 <= limit <= len(self._suspended):
            session = next(candidates, None)
            if session is None:
                return False
            if _is_alive(session):
                self._suspended[session] = 0
                session.connection.stop_receiving()  # type: ignore[attr-defined]
                handover.suspend(session, partial(self._ready.append, session))
        return True

    def _take_ready(self, number: int) -> list[Session]:
        """Return suspended sessions that can move now."""
        for session in [session for session in self._suspended if not _is_alive(session)]:
            del self._suspended[session]
        batch: list[Session] = []
        for _ in range(len(self._ready)):
            if len(batch) == number:
                break
            session = self._ready.popleft()
            if session not in self._suspended:
                continue
            connection: Any = session.connection
            if connection.is_movable and not connection.is_held:
                batch.append(session)
            elif self._suspended[session] < _PATIENCE:
                self._suspended[session] += 1
                self._ready.append(session)
            else:
                self._resume(session)  # it is in the middle of a compressed message, for example
                self._postponed.append(session)
        return batch

    def _resume(self, session: Session) -> None:
        del self._suspended[session]
        if _is_alive(session):
            connection: Any = session.connection
            handover.resume(session)
            connection.start_receiving()

    def _resume_all(self) -> int:
        """Have all suspended sessions go on here; return their number."""
        left = sum(map(_is_alive, self._suspended))
        self._parts.count_failure("busy", left)
        for session in list(self._suspended):
            self._resume(session)
        return left

    async def _move(self, sessions: list[Session]) -> None:
        """Move one batch. Its sessions go on here after a failure before the cut."""
        self._batches += 1
        batch = f"{self._parts.address}/{self._batches}"
        secrets = [session.secret for session in sessions if session.secret]
        self._send(Announced(batch, len(sessions), handover.channels_of(sessions), secrets))
        expected = await self._answer()
        if not isinstance(expected, Expected) or expected.batch != batch:
            raise _Stopped("the target sent a wrong answer")
        failure = expected.error
        if not failure:
            try:
                sessions = await handover.cut(self._parts.services, batch, self._target, sessions)
            except (EngineUnavailable, ClientError) as error:
                failure = f"the broker did not move the connections: {error}"
        if failure:
            self._send(Sent(batch))
            self._failures += 1
            if self._failures == _MAX_FAILURES:
                raise _Stopped(failure)
            self._ready.extendleft(reversed(sessions))
            await self._sleep(_FAILURE_PAUSE)
            return
        self._failures = 0
        try:
            await self._ship(batch, sessions)
        finally:
            self._send(Sent(batch))

    async def _ship(self, batch: str, sessions: list[Session]) -> None:
        """Export the sessions of a batch that was cut, send them, and wait for the answers."""
        shipments: deque[_Shipment] = deque()
        exported: list[tuple[int, MovedConnection]] = []
        size = 0
        for number, session in enumerate(sessions, 1):
            moved = self._export(session)
            if moved is not None:
                exported.append(moved)
                size += len(moved[1].connection.output.data) + len(bytes(moved[1].connection.state))
            if exported and (size > _MESSAGE_BYTES or number == len(sessions)):
                self._dispatch(batch, exported, shipments)
                exported, size = [], 0
            if number % _AT_ONCE == 0:
                await self._sleep(0)
        if exported:
            self._dispatch(batch, exported, shipments)
        try:
            while shipments:
                answer = await self._answer()
                if not isinstance(answer, Taken) or len(answer.taken) != len(shipments[0].connections):
                    raise _Stopped("the target sent a wrong answer")
                self._settle(shipments.popleft(), answer.taken)
        finally:
            self._recover(shipments)

    def _export(self, session: Session) -> tuple[int, MovedConnection] | None:
        """End a connection here; return its descriptor and its state. None if it has ended meanwhile."""
        self._suspended.pop(session, None)
        if not _is_alive(session):
            return None
        connection: Any = session.connection
        try:
            handed = handover.export(session)
            descriptor, state = connection.hand_over()
        except Exception:
            _log.failure("exporting a session raised; its connection is closed")
            self._parts.count_failure("error")
            self._closed += 1
            connection.close(*SERVER_ERROR)
            return None
        return descriptor, MovedConnection(state, handed)

    def _dispatch(self, batch: str, exported: list[tuple[int, MovedConnection]], shipments: deque[_Shipment]) -> None:
        """Send exported connections in one message."""
        try:
            claim = os.eventfd(1, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        except OSError:  # no free descriptor
            self._close_with_shutdown(exported, "descriptors")
            return
        body = _encode(Moved(batch, [moved for _, moved in exported]))
        self._bytes.value += len(body)
        self._stream.send(body, [claim, *(descriptor for descriptor, _ in exported)])
        shipments.append(_Shipment(claim, exported))

    def _settle(self, shipment: _Shipment, taken: Sequence[bool]) -> None:
        """Close our copies of the connections that the target has, and the connections that it refused."""
        os.close(shipment.claim)
        refused = []
        for is_taken, (descriptor, moved) in zip(taken, shipment.connections, strict=True):
            if is_taken:
                os.close(descriptor)
                self._moved += 1
                self._parts.count("out").value += 1
            else:
                refused.append((descriptor, moved))
        self._close_with_shutdown(refused, "refused")

    def _recover(self, shipments: Iterable[_Shipment]) -> None:
        """Take back what the target has not claimed."""
        for shipment in shipments:
            is_ours = take_claim(shipment.claim)
            os.close(shipment.claim)
            if is_ours:
                self._close_with_shutdown(shipment.connections, "no_answer")
                continue
            # The target serves them, or has closed them with its end.
            close_all([descriptor for descriptor, _ in shipment.connections])
            self._moved += len(shipment.connections)
            self._parts.count("out").value += len(shipment.connections)

    def _close_with_shutdown(self, connections: Iterable[tuple[int, MovedConnection]], reason: str) -> None:
        """Close exported connections that are still ours with 3001."""
        ended: list[ClientInfo] = []
        for descriptor, moved in connections:
            self._parts.count_failure(reason)
            self._closed += 1
            if moved.session.state == SessionState.CONNECTED.name:
                ended.append(moved.session.info)
            with suppress(OSError):
                self._parts.open_connection(descriptor, moved.connection).close(*SHUTDOWN)
        self._parts.report_ends(ended, *SHUTDOWN)

    # The stream

    def _send(self, message: _Message) -> None:
        self._stream.send(_encode(message))

    async def _answer(self) -> Any:
        """Return the next message of the target. Raises _Stopped."""
        late_at = self._reactor.seconds() + ANSWER_TIMEOUT
        while not self._answers:
            if not self._stream.open:
                raise _Stopped("the target has ended")
            self._waiter = Deferred()
            timer = self._reactor.callLater(max(late_at - self._reactor.seconds(), 0), self._wake)
            await self._waiter
            if timer.active():
                timer.cancel()
            elif not self._answers:
                raise _Stopped(f"the target did not answer within {ANSWER_TIMEOUT:g} s")
        answer = self._answers.popleft()
        if isinstance(answer, Refused):
            raise _Stopped(f"the target refused: {answer.reason}")
        return answer

    def _on_frame(self, body: bytes, descriptors: list[int]) -> None:
        close_all(descriptors)
        try:
            self._answers.append(_decode_at_source(body))
        except msgspec.MsgspecError as error:
            self._answers.append(Refused(f"it sent an unknown message ({error})"))
        self._wake()

    def _on_end(self) -> None:
        self._wake()

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None:
            waiter.callback(None)

    def _sleep(self, seconds: float) -> Deferred[None]:
        return deferLater(self._reactor, seconds)


class HandOverTarget:
    """Takes connections of another process over, as they come."""

    def __init__(self, parts: HandOverParts, stream: int) -> None:
        """stream: the descriptor of this end, owned by this object."""
        self._parts = parts
        self._frames: deque[tuple[bytes, list[int]]] = deque()
        self._is_working = False
        self._batches: dict[str, None] = {}  # those that have not ended
        self._refused = ""
        self._stream = FdStream(parts.reactor, stream, self._on_frame, self._work)

    def close(self) -> None:
        """Take nothing more over; the source keeps or closes what it has."""
        self._stream.close()
        self._work()

    def _on_frame(self, body: bytes, descriptors: list[int]) -> None:
        self._frames.append((body, descriptors))
        self._work()

    def _work(self) -> None:
        if not self._is_working:
            self._is_working = True
            drive(self._handle_all(), _log_unexpected)

    async def _handle_all(self) -> None:
        """Handle the received messages one after the other. After the end of the stream, its batches end."""
        try:
            while self._frames:
                body, descriptors = self._frames.popleft()
                try:
                    message = _decode_at_target(body)
                except msgspec.MsgspecError as error:
                    close_all(descriptors)
                    self._refuse(f"the source sent an unknown message ({error})")
                    continue
                if isinstance(message, Moved):
                    await self._take(message, descriptors)
                else:
                    close_all(descriptors)
                    await self._handle(message)
            if not self._stream.open:
                for batch in list(self._batches):
                    self._parts.report_ends(self._finish(batch), *WORKER_LOST)
        finally:
            self._is_working = False

    async def _handle(self, message: Hello | Announced | Sent) -> None:
        match message:
            case Hello(version=version) if version != VERSION:
                self._refuse(f"the source speaks version {version} of the hand-over, this worker {VERSION}")
            case Hello():
                self._send(Welcome(VERSION, self._parts.address))
            case Announced():
                await self._expect(message)
            case Sent(batch=batch):
                self._finish(batch)

    async def _expect(self, message: Announced) -> None:
        if not self._parts.admission.has_descriptors_for(message.connections):
            self._parts.count_failure("descriptors", message.connections)
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
        if len(descriptors) != len(message.connections) + 1:
            self._parts.count_failure("descriptors", len(message.connections))
            self._send(Taken([False] * len(message.connections)))
            return
        claim, *sockets = descriptors
        await handover.arrived(self._parts.services, message.batch)
        is_ours = message.batch in self._batches and take_claim(claim)
        os.close(claim)
        if not is_ours:
            close_all(sockets)
            return
        taken: list[bool] = []
        for descriptor, moved in zip(sockets, message.connections, strict=True):
            taken.append(self._adopt(message.batch, descriptor, moved))
            if len(taken) % _AT_ONCE == 0:
                await deferLater(self._parts.reactor, 0)
        self._send(Taken(taken))

    def _adopt(self, batch: str, descriptor: int, moved: MovedConnection) -> bool:
        """Continue with one connection. Returns False if the source has to close it."""
        parts, handed = self._parts, moved.session
        try:
            connection = parts.open_connection(descriptor, moved.connection)
        except (Unsupported, msgspec.MsgspecError, OSError) as error:
            _log.info("a connection can't be taken over, and its client comes back: {error}", error=error)
            parts.count_failure("unsupported")
            return False
        try:
            connection.release_address = parts.admission.take_over(handed.request.remote_address)
            connection.adopt_session(parts.restore(batch, connection, handed))
            connection.start_receiving()
        except Exception:
            _log.failure("restoring a session raised; its connection is closed")
            parts.count_failure("error")
            connection.close(*SERVER_ERROR)
            return True
        parts.count("in").value += 1
        return True

    def _finish(self, batch: str) -> list[ClientInfo]:
        self._batches.pop(batch, None)
        self._parts.emulation.end_batch(batch)
        return handover.finish(self._parts.services, batch)

    def _refuse(self, reason: str) -> None:
        self._send(Refused(reason))

    def _send(self, message: _Message) -> None:
        self._stream.send(_encode(message))


def _is_alive(session: Session) -> bool:
    connection: Any = session.connection
    return session.state is not SessionState.CLOSED and not connection.is_closing


def _log_unexpected(result: object, error: BaseException | None) -> None:
    if error is not None:
        _log.failure("taking connections over raised", Failure(error))
