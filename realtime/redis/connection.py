"""One connection to a Redis server: RESP3, pipelined commands, and pub/sub on the same stream.

The commands of one turn of the loop leave in one write. Replies come in the order of the commands, and pushed messages
come between them, in the order in which Redis executed what caused them. One exception: from Redis 7.2 on, a message
that the connection's own command publishes to itself follows the command's reply; earlier ones write it before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol

import hiredis
from twisted.internet import protocol
from twisted.internet.protocol import connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure

from realtime.errors import EngineUnavailable, RealtimeError
from realtime.redis.scripts import Script
from realtime.supervision.loop_time import LoopTimeLedger, LoopWork

CHECKS = 8
"""Checks for late replies within the time limit of a reply: one is noticed at most an eighth later."""

Argument = bytes | str | int

ReplyCallback = Callable[[Any, Exception | None], None]
"""Gets (reply, None) or (None, error): EngineUnavailable without a reply, RedisError if Redis refused. It must not
raise."""

# Of a command: the call of a script, the channel of a subscription, or neither.
_Kind = tuple[Script, tuple[Argument, ...]] | bytes | object | None

_pack: Callable[[tuple[Argument, ...]], bytes] = hiredis.pack_command  # type: ignore[assignment]

_INCOMPLETE = object()
TEMPORARY_CODES = frozenset(
    [
        *("OOM", "MISCONF", "NOREPLICAS", "READONLY", "LOADING", "BUSY", "UNKILLABLE"),
        *("MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN", "MOVED", "ASK"),
    ]
)
_CONFIRMATIONS = {b"subscribe", b"unsubscribe", b"ssubscribe"}
# The kind of a command that an error answers, or a push that looks like those of Redis' own accord.
_ANSWERED_BY_PUSH = object()
_MESSAGES = {b"message", b"smessage"}

_log = Logger()


class RedisError(RealtimeError):
    """Redis refused a command. code: the first word of its reply (WRONGTYPE, READONLY ...). text: all of it."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text
        self.code = text.partition(" ")[0]

    @property
    def is_temporary(self) -> bool:
        """Whether it says nothing about the command: a later attempt, or one at another server, may succeed."""
        return self.code in TEMPORARY_CODES


def _ignore(reply: Any, error: Exception | None) -> None:
    pass


class ConnectionOwner(Protocol):
    """The holder of a connection."""

    def on_message(self, channel: bytes, payload: bytes) -> None:
        """Handle a message on a subscribed channel."""

    def on_unsubscribed(self, channel: bytes) -> None:
        """Handle the end of a subscription that was not asked for: the channel's slot has moved."""

    def on_refused(self, error: RedisError) -> Exception:
        """Return the error that the caller of a refused command gets."""

    def on_end(self, connection: RedisConnection, reason: str) -> None:
        """Handle the end, called once. All calls without a reply have failed by then."""


class RedisConnection(protocol.Protocol):
    """See the module.

    call_soon: has its argument called at the end of the loop's turn, see `reactor.turn_end_caller`. limit: bytes that
    may be queued here; a call beyond it fails. io_timeout: seconds within which a reply has to come; the connection
    ends when one does not, as all later ones wait for it. owner: gets messages and the end.
    """

    def __init__(
        self,
        reactor: Any,
        call_soon: Callable[[Callable[[], None]], object],
        owner: ConnectionOwner,
        io_timeout: float,
        limit: int,
        ledger: LoopTimeLedger,
    ) -> None:
        self._reactor = reactor
        self._call_soon = call_soon
        self._owner = owner
        self._timeout = io_timeout
        self._limit = limit
        self._ledger = ledger
        self._account = ledger.open(LoopWork.ENGINE)
        self._reader = hiredis.Reader(notEnoughData=_INCOMPLETE)
        self._queue: list[bytes] = []
        self._queued_bytes = 0
        self._buffered_bytes = 0  # in the transport, when last read
        self._is_flush_due = False
        # Of each command without a reply: its callback, and for a script its call, for a subscription its channel.
        self._unanswered: deque[tuple[ReplyCallback, _Kind]] = deque()
        self._sent = self._answered = 0
        self._marks: deque[tuple[float, int]] = deque()  # times, and the commands sent by then
        self._timer: Any = None
        self._end_reason = ""
        # While Redis lacks a script: its calls, in order, then those made since; and the commands sent before.
        self._again: list[tuple[ReplyCallback, bytes]] = []
        self._held: list[tuple[bytes, ReplyCallback, _Kind]] = []
        self._again_after = 0
        self._leaving: dict[bytes, int] = {}  # sharded channels whose end was asked for

    def connectionMade(self) -> None:
        with suppress(AttributeError):  # of a unix socket
            self.transport.setTcpNoDelay(True)  # type: ignore[union-attr]

    @property
    def is_open(self) -> bool:
        """Whether it has not ended."""
        return not self._end_reason

    @property
    def unanswered(self) -> int:
        """The number of commands without a reply."""
        return len(self._unanswered)

    # Commands

    def call(self, done: ReplyCallback, *command: Argument) -> None:
        """Send a command."""
        self._send(_pack(command), done, None)

    def run(
        self,
        done: ReplyCallback,
        script: Script,
        keys: Sequence[Argument],
        generation: str,
        arguments: Sequence[Argument],
    ) -> None:
        """Run a script. If Redis does not know it, it is sent, and no later command overtakes it.

        generation: its ARGV[1], which `arguments` follow.
        """
        command = (b"EVALSHA", script.sha, len(keys), *keys, generation, *arguments)
        self._send(_pack(command), done, (script, command))

    def subscribe(self, done: ReplyCallback, channel: bytes, *, is_sharded: bool = False) -> None:
        """Subscribe to a channel. done: called before the first message."""
        self._send(_pack((b"SSUBSCRIBE" if is_sharded else b"SUBSCRIBE", channel)), done, channel)

    def unsubscribe(self, done: ReplyCallback, channel: bytes, *, is_sharded: bool = False) -> None:
        """Undo `subscribe`. done: called after the last message."""
        if not is_sharded:
            self._send(_pack((b"UNSUBSCRIBE", channel)), done, channel)
            return
        # A node that has lost the slot meanwhile has pushed the end of the subscription already, and answers by an
        # error. So a push is no sign of an answer, and the next reply tells.
        self._leaving[channel] = self._leaving.get(channel, 0) + 1
        self._send(_pack((b"SUNSUBSCRIBE", channel)), _ignore, _ANSWERED_BY_PUSH)
        self._send(_pack((b"PING",)), lambda reply, error: self._on_left(channel, done, error), None)

    def _on_left(self, channel: bytes, done: ReplyCallback, error: Exception | None) -> None:
        self._leaving[channel] -= 1
        if not self._leaving[channel]:
            del self._leaving[channel]
        done(None, error)

    def _send(self, data: bytes, done: ReplyCallback, kind: _Kind) -> None:
        if self._end_reason:
            done(None, EngineUnavailable(self._end_reason))
            return
        if self._again_after:
            self._held.append((data, done, kind))
            return
        self._queued_bytes += len(data)
        if self._queued_bytes + self._buffered_bytes > self._limit and not self._has_room():
            self._queued_bytes -= len(data)
            done(None, EngineUnavailable("Redis is too far behind"))
            return
        self._unanswered.append((done, kind))
        self._sent += 1
        self._queue.append(data)
        if not self._is_flush_due:
            self._is_flush_due = True
            self._call_soon(self._flush)
            if self._timer is None:
                self._timer = self._reactor.callLater(self._timeout / CHECKS, self._check)

    def _flush(self) -> None:
        self._is_flush_due = False
        if self._queue and not self._end_reason:
            data = b"".join(self._queue)
            self._queue.clear()
            self._queued_bytes = 0
            self.transport.write(data)  # type: ignore[union-attr]
            self._has_room()

    def _has_room(self) -> bool:
        """Read how much the transport holds. Returns whether it is within the limit, with what is queued here."""
        self._buffered_bytes = getattr(self.transport, "buffered", 0)
        return self._queued_bytes + self._buffered_bytes <= self._limit

    def _check(self) -> None:
        """End the connection if a reply is late; check again while there are commands without one."""
        self._timer = None
        now = self._reactor.seconds()
        while self._marks and self._marks[0][0] <= now - self._timeout:
            _, sent = self._marks.popleft()
            if self._answered < sent:
                self.end(f"Redis did not answer within {self._timeout:g} s")
                return
        if self._unanswered:
            self._marks.append((now, self._sent))
            self._timer = self._reactor.callLater(self._timeout / CHECKS, self._check)
        else:
            self._marks.clear()

    # Replies and messages

    def dataReceived(self, data: bytes) -> None:
        before = self._ledger.switch(self._account)
        try:
            self._reader.feed(data)
            gets, on_message = self._reader.gets, self._owner.on_message
            while (reply := gets()) is not _INCOMPLETE:
                if type(reply) is hiredis.PushNotification:
                    if reply[0] in _MESSAGES:
                        on_message(reply[1], reply[2])
                    else:
                        self._receive_push(reply)
                else:
                    self._receive_reply(reply)
                if self._end_reason:
                    return
        except hiredis.ProtocolError as error:
            self.end(f"not RESP3: {error}")
        except Exception:
            _log.failure("handling a reply of Redis raised; ending the connection, which is then set up anew")
            self.end("an exception while handling a reply")
        finally:
            self._ledger.switch(before)

    def _receive_push(self, push: list[Any]) -> None:
        if push[0] in _CONFIRMATIONS:
            if self._unanswered and self._unanswered[0][1] == push[1]:
                self._receive_reply(None)
        elif push[0] == b"sunsubscribe" and push[1] not in self._leaving:
            self._owner.on_unsubscribed(push[1])

    def _receive_reply(self, reply: Any) -> None:
        done, kind = self._unanswered.popleft()
        self._answered += 1
        if kind is _ANSWERED_BY_PUSH and type(reply) is not hiredis.ReplyError:
            done, kind = self._unanswered.popleft()
            self._answered += 1
        if type(reply) is not hiredis.ReplyError:
            done(reply, None)
        else:
            error = RedisError(str(reply))
            if error.code == "NOSCRIPT" and type(kind) is tuple:
                self._run_again(done, *kind)
            else:
                done(None, self._owner.on_refused(error))
        if self._again_after and self._answered >= self._again_after:
            self._send_again()

    def _run_again(self, done: ReplyCallback, script: Script, command: tuple[Argument, ...]) -> None:
        """Hold further commands until those sent before are answered: they may lack the script, too."""
        self._again_after = self._again_after or self._sent
        self._again.append((done, _pack((b"EVAL", script.source, *command[2:]))))

    def _send_again(self) -> None:
        again, held, self._again, self._held, self._again_after = self._again, self._held, [], [], 0
        for done, data in again:
            self._send(data, done, None)
        for data, done, kind in held:
            self._send(data, done, kind)

    # The end

    def end(self, reason: str) -> None:
        """End the connection at once. Idempotent."""
        if not self._end_reason:
            self._finish(reason)
            if self.transport is not None:
                self.transport.abortConnection()  # type: ignore[attr-defined]

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        if not self._end_reason:
            self._finish(f"the connection ended: {reason.getErrorMessage()}")

    def _finish(self, reason: str) -> None:
        self._end_reason = reason
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._queue.clear()
        failed = [done for done, _ in self._again]
        failed += [done for done, _ in self._unanswered]
        failed += [done for _, done, _ in self._held]
        self._unanswered.clear()
        self._again, self._held, self._again_after = [], [], 0
        for done in failed:
            done(None, EngineUnavailable(reason))
        self._owner.on_end(self, reason)
