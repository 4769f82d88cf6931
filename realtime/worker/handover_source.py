"""The end of a hand-over that gives its connections away. `realtime.worker.handover` has the whole of it."""

from __future__ import annotations

import math
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import count
from typing import Any

import msgspec
from msgspec import Raw
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater
from twisted.logger import Logger

from realtime.errors import SERVER_ERROR, SHUTDOWN, ClientError, EngineUnavailable, RealtimeError
from realtime.process.fd_passing import take_claim
from realtime.process.fd_stream import FdStream, close_all
from realtime.protocol import handover
from realtime.protocol.client_state import StateError
from realtime.protocol.session import Session
from realtime.protocol.session_state import SessionState
from realtime.types import ClientInfo
from realtime.worker.handover import (
    SLICE,
    VERSION,
    Accepted,
    Announced,
    Expected,
    HandOverCounts,
    HandOverMessage,
    HandOverParts,
    Moved,
    MovedConnection,
    MovedHTTP,
    Offered,
    Refused,
    Sent,
    Taken,
    decode_at_source,
    encode,
)

BATCH = 64
"""The most connections with one subscription that move together; fewer with more."""

ANSWER_TIMEOUT = 5.0
"""Seconds for the target to answer, also while its loop is blocked."""

# Bytes of state in one message; a single connection may have more.
_MESSAGE_BYTES = 1 << 20
# Seconds between two batches, and between two looks at what is not ready.
_PAUSE, _POLL = 0.002, 0.005
# Connections suspended in one turn of the loop, and seconds between two looks for further ones.
_SUSPENDED_AT_ONCE, _LOOK_INTERVAL = 200, 0.1
# Looks at a connection that can't move, before it goes on here for a while.
_PATIENCE = 20
# Attempts that may fail one after the other, with the broker away for example, and seconds between them.
_MAX_FAILURES, _FAILURE_PAUSE = 10, 0.2

_new_batch = count(1).__next__

_Exported = Sequence[tuple[int, MovedConnection | None]]

_log = Logger()


class _Stopped(RealtimeError):
    """The hand-over ends here; the message says why."""


class _Shipment:
    """A message with connections, without an answer. connections: with their descriptors, which the source keeps until
    then; None for an HTTP connection."""

    __slots__ = ("claim", "connections")

    def __init__(self, claim: int, connections: _Exported) -> None:
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
        self._failures = 0
        self._tried: set[Session] = set()
        self._suspended: dict[Session, int] = {}  # with the number of looks at a connection that can't move
        self._ready: dict[Session, None] = {}
        self._postponed: list[Session] = []
        self._moved = self._closed = 0
        self._bytes = 0
        self._not_moved: Counter[str] = Counter()  # by reason

    async def run(self, sessions: Callable[[], Iterable[Session]], connections: int, timeout: float) -> HandOverCounts:
        """Move connections until `timeout` seconds have passed. Never raises.

        sessions: returns those of this worker; called again until there is none that has not been tried. connections:
        their number; -1 for all, also those of clients that connect meanwhile, and for HTTP connections.
        """
        deadline = self._reactor.seconds() + timeout
        reason = ""
        try:
            await self._greet()
            if connections < 0:
                await self._move_everything(sessions, deadline)
            else:
                await self._move_sessions(sessions, connections, deadline)
        except _Stopped as stopped:
            reason = str(stopped)
        except Exception:
            _log.failure("handing connections over raised; the others stay here")
            reason = "an unexpected exception"
        self._stream.close()
        left = self._resume_all()
        self._not_moved["stopped" if reason else "busy"] += left
        if connections < 0:
            left = sum(map(_is_alive, sessions()))
        failures = [{"reason": failure, "count": number} for failure, number in self._not_moved.items() if number]
        return HandOverCounts(self._moved, self._closed, left, reason, self._bytes, failures)

    # The batches

    async def _greet(self) -> None:
        self._send(Offered(VERSION, self._parts.address))
        acceptance = await self._answer()
        if not isinstance(acceptance, Accepted):
            raise _Stopped("the target sent no acceptance")
        if acceptance.version != VERSION:
            raise _Stopped(f"the target speaks version {acceptance.version} of the hand-over, this worker {VERSION}")
        self._target = acceptance.address

    async def _move_everything(self, sessions: Callable[[], Iterable[Session]], deadline: float) -> None:
        """Move all sessions and idle HTTP connections, until no connection may become one of a client."""
        while self._reactor.seconds() < deadline:
            await self._move_http()
            await self._move_sessions(sessions, -1, deadline)
            if not self._parts.frontend.pending:
                return
            await self._sleep(_POLL)

    async def _move_http(self) -> None:
        while descriptors := self._parts.frontend.take_idle(BATCH):
            shipments: deque[_Shipment] = deque()
            exported: _Exported = [(descriptor, None) for descriptor in descriptors]
            self._dispatch(MovedHTTP(len(descriptors)), exported, shipments)
            await self._await_answers(shipments)

    async def _move_sessions(
        self, sessions: Callable[[], Iterable[Session]], connections: int, deadline: float
    ) -> None:
        candidates: Iterator[Session] = iter(())
        look_at = 0.0
        while (now := self._reactor.seconds()) < deadline:
            wanted = connections - self._moved - self._closed if connections >= 0 else math.inf
            if wanted <= 0:
                return
            if not self._suspend_some(candidates, wanted) and (not self._suspended or look_at <= now):
                look_at = now + _LOOK_INTERVAL
                fresh = self._candidates(sessions)
                candidates = iter(fresh)
                if not (fresh or self._suspended):
                    return
            batch = self._take_ready(wanted)
            if batch:
                await self._move(batch)
                await self._sleep(_PAUSE)
            elif self._suspended:
                await self._sleep(_POLL)

    def _candidates(self, sessions: Callable[[], Iterable[Session]]) -> list[Session]:
        """Forget suspended sessions that have ended; return those that were not tried, and those to be tried again."""
        for session in [session for session in self._suspended if not _is_alive(session)]:
            del self._suspended[session]
        fresh = [session for session in sessions() if session not in self._tried and _is_alive(session)]
        self._tried.update(fresh)
        fresh += filter(_is_alive, self._postponed)
        self._postponed.clear()
        return fresh

    def _suspend_some(self, candidates: Iterator[Session], wanted: float) -> bool:
        """Suspend connections for a batch. Returns False if there is no further candidate.

        wanted: the most connections that may be suspended.
        """
        for _ in range(_SUSPENDED_AT_ONCE):
            if len(self._ready) >= BATCH or len(self._suspended) >= wanted:
                return True
            session = next(candidates, None)
            if session is None:
                return False
            if _is_alive(session):
                connection: Any = session.connection
                self._suspended[session] = 0
                connection.stop_receiving()
                handover.suspend(session, partial(self._ready.setdefault, session))
        return True

    def _take_ready(self, wanted: float) -> list[Session]:
        """Return suspended sessions that can move now: a batch, and not more than `wanted`."""
        batch: list[Session] = []
        effort = 0.0  # in connections with one subscription
        for session in list(self._ready):
            if len(batch) >= wanted or effort >= BATCH:
                break
            if session not in self._suspended or not _is_alive(session):
                del self._ready[session]
                continue
            connection: Any = session.connection
            if connection.is_movable and not connection.is_held:
                del self._ready[session]
                if not self._has_movable_state(session):
                    self._resume(session)
                    continue
                batch.append(session)
                effort += 0.75 + len(session.subscriptions) / 4
            elif self._suspended[session] < _PATIENCE:
                self._suspended[session] += 1
            else:
                self._resume(session)  # it is in the middle of a compressed message, for example
                self._postponed.append(session)
        return batch

    def _has_movable_state(self, session: Session) -> bool:
        try:
            handover.check_state(session)
        except StateError as error:
            self._not_moved["state"] += 1
            _log.warn(
                "a connection of user {user} does not move: {error}; keep values in client.state that pickle accepts",
                user=repr(session.user),
                error=error,
            )
            return False
        return True

    def _resume(self, session: Session) -> None:
        self._suspended.pop(session, None)
        self._ready.pop(session, None)
        if _is_alive(session):
            connection: Any = session.connection
            handover.resume(session)
            connection.start_receiving()

    def _resume_all(self) -> int:
        """Have all suspended sessions go on here; return their number."""
        left = sum(map(_is_alive, self._suspended))
        for session in list(self._suspended):
            self._resume(session)
        return left

    async def _move(self, sessions: list[Session]) -> None:
        """Move one batch. Its sessions go on here after a failure before the cut."""
        batch = f"{self._parts.address}/{_new_batch()}"
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
            for session in sessions:
                self._resume(session)
            self._postponed += sessions
            await self._sleep(_FAILURE_PAUSE)
            return
        self._failures = 0
        try:
            await self._ship(batch, sessions)
        finally:
            for session in sessions:
                if self._suspended.pop(session, None) is not None:  # after an unexpected exception
                    session.disconnect(*SERVER_ERROR)
            self._send(Sent(batch))

    async def _ship(self, batch: str, sessions: list[Session]) -> None:
        """Export the sessions of a batch that was cut, send them, and wait for the answers."""
        shipments: deque[_Shipment] = deque()
        exported: list[tuple[int, MovedConnection]] = []
        packed: list[Any] = []
        size = 0
        end = self._reactor.seconds() + SLICE
        for session in sessions:
            moved = self._export(session)
            if moved is not None:
                exported.append(moved)
                packed.append(Raw(encode(moved[1])))
                size += len(packed[-1])
            if size > _MESSAGE_BYTES:
                self._dispatch(Moved(batch, packed), exported, shipments)
                exported, packed, size = [], [], 0
            if self._reactor.seconds() >= end:
                await self._sleep(0)
                end = self._reactor.seconds() + SLICE
        if exported:
            self._dispatch(Moved(batch, packed), exported, shipments)
        await self._await_answers(shipments)

    async def _await_answers(self, shipments: deque[_Shipment]) -> None:
        """Wait until the target has answered everything that was sent. Raises _Stopped; then the rest is recovered."""
        try:
            while shipments:
                answer = await self._answer()
                if not isinstance(answer, Taken) or len(answer.failures) != len(shipments[0].connections):
                    raise _Stopped("the target sent a wrong answer")
                self._settle(shipments.popleft(), answer.failures)
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
            self._not_moved["error"] += 1
            self._closed += 1
            connection.close(*SERVER_ERROR)
            return None
        return descriptor, MovedConnection(state, handed)

    def _dispatch(self, message: Moved | MovedHTTP, exported: _Exported, shipments: deque[_Shipment]) -> None:
        """Send a message with these connections."""
        try:
            claim = os.eventfd(1, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        except OSError:  # no free descriptor
            self._close_with_shutdown(exported, "descriptors")
            return
        body = encode(message)
        self._bytes += len(body)
        self._stream.send(body, [claim, *(descriptor for descriptor, _ in exported)])
        shipments.append(_Shipment(claim, exported))

    def _settle(self, shipment: _Shipment, failures: Sequence[str]) -> None:
        """Close our copies of the connections that the target has, and the connections that it refused."""
        os.close(shipment.claim)
        for failure, (descriptor, moved) in zip(failures, shipment.connections, strict=True):
            if failure:
                self._close_with_shutdown([(descriptor, moved)], failure)
            else:
                self._give_up(descriptor, moved)

    def _give_up(self, descriptor: int, moved: MovedConnection | None) -> None:
        """Close our copy of a connection that the target has."""
        os.close(descriptor)
        if moved is not None:
            self._moved += 1

    def _recover(self, shipments: Iterable[_Shipment]) -> None:
        """Take back what the target has not claimed."""
        for shipment in shipments:
            is_ours = take_claim(shipment.claim)
            os.close(shipment.claim)
            if is_ours:
                self._close_with_shutdown(shipment.connections, "no_answer")
                continue
            for descriptor, moved in shipment.connections:
                self._give_up(descriptor, moved)  # the target serves it, or has closed it with its end

    def _close_with_shutdown(self, connections: _Exported, reason: str) -> None:
        """Close exported connections that are still ours with 3001, and HTTP connections."""
        ended: list[ClientInfo] = []
        for descriptor, moved in connections:
            if moved is None:
                os.close(descriptor)
                continue
            self._not_moved[reason] += 1
            self._closed += 1
            if moved.session.state == SessionState.CONNECTED.name:
                ended.append(moved.session.info)
            with suppress(OSError):
                self._parts.open_connection(descriptor, moved.connection).close(*SHUTDOWN)
        self._parts.report_ends(ended, *SHUTDOWN)

    # The stream

    def _send(self, message: HandOverMessage) -> None:
        self._stream.send(encode(message))

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
            self._answers.append(decode_at_source(body))
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


def _is_alive(session: Session) -> bool:
    connection: Any = session.connection
    return session.state is not SessionState.CLOSED and not connection.is_closing
