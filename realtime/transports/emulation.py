"""Emulation: commands of clients with a stream, which carries data from the server to the client only.

Each command is a separate HTTP request, on any connection and to any worker of any node. It names its session by the
secret from the client's connect result; a secret begins with the address of the worker that has the stream.

    POST /emulation ─▶ any worker ─▶ EmulateOrder, through the engine ─▶ stream's worker ─▶ StreamConnection.emulate

All commands pass through the engine, even if they arrive at the worker of the stream. A client that sends requests in a
row sends them over several connections, to several workers, and they overtake each other. The ids of its commands count
up, so the worker of the stream holds commands that come too early until those before them have come (`CommandOrder`).
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable
from functools import partial
from heapq import heappop, heappush
from itertools import islice
from typing import Any

import msgspec
from msgspec import Struct
from twisted.logger import Logger
from twisted.python.failure import Failure

from realtime.client_log import ClientLog
from realtime.config.settings import EmulationSettings
from realtime.errors import ClientError, EngineUnavailable, RealtimeError
from realtime.handlers.results import PreparedResponse, status_response
from realtime.http.cors import Headers
from realtime.metrics import Metrics
from realtime.protocol.encodings import CommandTooLong, Encoding
from realtime.protocol.json_encoding import JSON_ENCODING
from realtime.protocol.messages import ProtocolError
from realtime.protocol.orders import EmulateOrder, encode_order
from realtime.protocol.protobuf import PROTOBUF, EmulationRequest, emulation_request
from realtime.pubsub.engine import Engine, SendOrder, split_address
from realtime.pubsub.time_slices import TimeSlicer
from realtime.transports.http_server import Exchange, fault_response

# Random bytes in a secret.
_SECRET_BYTES = 24

# Bytes that a waiting message counts beside its own.
_SURCHARGE = 256

# Bytes before or after a command: its length as a varint, or a line end.
_LONGEST_HEAD = 10

IDS_READ = 128
"""Commands of one message whose ids are read."""

_log = Logger()


class _JSONRequest(Struct, frozen=True):
    """`EmulationRequest` as JSON. data: the commands, as text."""

    node: str = ""
    session: str = ""
    data: str = ""


_decode = msgspec.json.Decoder(_JSONRequest).decode


class EmulationLimits:
    """The settings of `[emulation]` and their counter. command_size: largest size of one command, in bytes.

    call_later: calls a function after some seconds, as `IReactorTime.callLater`.
    """

    __slots__ = ("call_later", "command_size", "held_bytes", "hold_time", "overtaken", "queued_bytes")

    def __init__(
        self, emulation: EmulationSettings, command_size: int, metrics: Metrics, call_later: Callable[..., Any]
    ) -> None:
        self.call_later = call_later
        self.command_size = command_size
        self.hold_time = emulation.hold_time
        self.held_bytes = emulation.max_held_bytes
        self.queued_bytes = emulation.max_queued_bytes
        self.overtaken = metrics.counter(
            "realtime_emulation_overtaken", "Requests with commands that were handled before earlier commands came."
        )


class HandedOrder(Struct, frozen=True, array_like=True):
    """A `CommandOrder` for another process: the next id, 0 for unknown, and the messages that came too early."""

    next: int
    held: list[bytes]


class CommandOrder:
    """Brings the messages of one session into the order of their commands' ids.

    A message whose first id is not the next one waits for those before it, up to `emulation.hold_time`: an id may never
    come. A message without ids, such as a pong, never waits.
    """

    def __init__(
        self, emulate: Callable[[bytes], None], encoding: Encoding, first: bytes, limits: EmulationLimits
    ) -> None:
        """emulate: takes the messages in order. first: the message that opened the session."""
        self._limits = limits
        self._emulate = emulate
        self._encoding = encoding
        last = self._ids(first)[1]
        self._next = last + 1 if last else 0  # 0 for unknown
        self._held: list[tuple[int, int, int, bytes]] = []  # a heap: first id, number of arrival, last id, message
        self._arrivals = self._held_bytes = 0
        self._timer: Any = None

    def hand_over(self) -> HandedOrder:
        """Return the state for another process, and end here."""
        handed = HandedOrder(self._next, [message for _, _, _, message in sorted(self._held)])
        self.close()
        return handed

    def take_over(self, handed: HandedOrder) -> None:
        """Continue where another process has stopped."""
        self._next = handed.next
        for message in handed.held:
            self.receive(message)

    def receive(self, message: bytes) -> None:
        """Pass a message on, now or later."""
        first, last = self._ids(message)
        if not self._next or first <= self._next:
            self._emulate(message)
            if last:
                self._next = max(self._next, last + 1)
                self._release()
            return
        self._arrivals += 1
        heappush(self._held, (first, self._arrivals, last, message))
        self._held_bytes += len(message) + _SURCHARGE
        if self._held_bytes > self._limits.held_bytes:
            self._stop_waiting()
        elif self._timer is None:
            self._timer = self._limits.call_later(self._limits.hold_time, self._stop_waiting)

    def close(self) -> None:
        """Drop the held messages."""
        self._held.clear()
        self._held_bytes = 0
        self._cancel()

    def _release(self, *, all: bool = False) -> None:
        while self._held and (all or self._held[0][0] <= self._next):
            _, _, last, message = heappop(self._held)
            self._held_bytes -= len(message) + _SURCHARGE
            self._next = max(self._next, last + 1)
            self._emulate(message)
        if not self._held:
            self._cancel()

    def _stop_waiting(self) -> None:
        self._limits.overtaken.value += len(self._held)
        self._release(all=True)

    def _cancel(self) -> None:
        timer, self._timer = self._timer, None
        if timer is not None and timer.active():
            timer.cancel()

    def _ids(self, message: bytes) -> tuple[int, int]:
        """Return the lowest and the highest id in a message; zeros if it has none, or can't be read."""
        try:
            ids = [id for id in islice(self._encoding.command_ids(message), IDS_READ) if id]
        except ProtocolError:
            return 0, 0
        return (min(ids), max(ids)) if ids else (0, 0)


class Emulation:
    """The streams of this worker by their secrets, and the handler of emulation requests."""

    def __init__(
        self,
        engine: Engine,
        node: str,
        worker: str,
        limits: EmulationLimits,
        slices: TimeSlicer | None = None,
        client_log: ClientLog | None = None,
    ) -> None:
        """node: id of this node; requests for an unknown node get status 404. worker: see `SendOrder`.

        slices: reads long requests in later turns of the loop.
        """
        self._limits = limits
        self._slices = slices or TimeSlicer.unlimited()
        self._client_log = client_log or ClientLog()
        self._engine = engine
        self._node = node
        self._worker = worker
        self._by_secret: dict[str, CommandOrder] = {}
        # Numbers of the orders that this worker sends to itself. They come back in their order, or never.
        self._last_number = self._last_received = 0
        self._carried_out: set[int] = set()  # orders carried out before they came back
        self._expected: dict[str, dict[str, list[bytes]]] = {}  # messages by batch and secret, see `expect`

    def register(self, emulate: Callable[[bytes], None], encoding: Encoding, first: bytes) -> str:
        """Make the secret of a new session.

        emulate: called with its further messages. encoding, first: of the session, and its first message. A session
        with a unidirectional encoding has no further messages.
        """
        secret = f"{self._worker}.{secrets.token_urlsafe(_SECRET_BYTES)}"
        if not encoding.unidirectional:
            self._by_secret[secret] = CommandOrder(emulate, encoding, first, self._limits)
        return secret

    def hand_over(self, secret: str) -> HandedOrder | None:
        """End the session of this secret here; return its state, None for a session without further messages."""
        order = self._by_secret.pop(secret, None)
        return order.hand_over() if order is not None else None

    def expect(self, batch: str, secrets: Iterable[str]) -> None:
        """Keep messages to these sessions, which are on their way from another process, until `end_batch`."""
        self._expected[batch] = {secret: [] for secret in secrets}

    def take_over(self, secret: str, emulate: Callable[[bytes], None], encoding: Encoding, handed: HandedOrder) -> None:
        """Continue with a session from another process. encoding: of the session. emulate: as for `register`."""
        order = self._by_secret[secret] = CommandOrder(emulate, encoding, b"", self._limits)
        order.take_over(handed)
        for expected in self._expected.values():
            for message in expected.pop(secret, ()):
                order.receive(message)

    def end_batch(self, batch: str) -> None:
        """Drop messages to sessions that were expected and did not arrive. Idempotent."""
        for messages in self._expected.pop(batch, {}).values():
            for _ in messages:
                self._client_log.refuse("emulation_session")

    def unregister(self, secret: str) -> None:
        """Remove the session with this secret, if there is one."""
        session = self._by_secret.pop(secret, None)
        if session is not None:
            session.close()

    def receive(self, order: EmulateOrder) -> None:
        """Pass commands to their session; drop them if it has ended, which the client learns from its stream."""
        if order.number and order.worker == self._worker:
            self._last_received = order.number
            if self._carried_out:
                was_carried_out = order.number in self._carried_out
                self._carried_out = {number for number in self._carried_out if number > order.number}
                if was_carried_out:
                    return
        self._pass_on(order)

    def _pass_on(self, order: EmulateOrder) -> None:
        session = self._by_secret.get(order.secret)
        if session is not None:
            session.receive(order.data)
            return
        for expected in self._expected.values():
            messages = expected.get(order.secret)
            if messages is not None:
                # With more than it may queue, the session ends when it arrives.
                if sum(map(len, messages)) + _SURCHARGE * len(messages) <= self._limits.queued_bytes:
                    messages.append(order.data)
                return
        self._client_log.refuse("emulation_session")

    def serve(self, cors_headers: Headers, request: Exchange) -> None:
        """Handle one emulation request. cors_headers: added to the response."""
        try:
            emulation = _parse(request)
        except (ProtocolError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            request.respond(_with_headers(fault_response("emulation"), cors_headers))
            return
        encoding = PROTOBUF if _is_protobuf(request) else JSON_ENCODING
        request.respond_with(self._forward(emulation, encoding), partial(_make_response, cors_headers), cancels=False)

    async def _check_sizes(self, data: bytes, encoding: Encoding) -> None:
        """Raises CommandTooLong for a command over the limit, and ProtocolError for commands that can't be read."""
        start, limit = 0, self._limits.command_size
        while len(data) - start > limit:
            # A part holds a whole command and a line end, unless the command is too long.
            part = encoding.end_of_commands(data[start : start + limit + _LONGEST_HEAD], limit)
            if not part:
                raise ProtocolError("a command is cut off")
            start += part
            await self._slices.yield_to_loop()

    async def _forward(self, emulation: EmulationRequest, encoding: Encoding) -> None:
        """Send the commands to the worker of the session; do nothing for a malformed secret, or an ended session.

        Raises UnknownNode, EngineUnavailable, ProtocolError as `_check_sizes`, and ClientError 106 for commands above
        the engine's limit for one message.
        """
        is_elsewhere = emulation.node != self._node
        if len(emulation.data) > self._limits.command_size:
            await self._check_sizes(emulation.data, encoding)
        worker, _, random_part = emulation.session.partition(".")
        if is_elsewhere and not (emulation.node and emulation.node == split_address(worker)[0]):
            raise UnknownNode
        if not worker or not random_part:
            return
        number = 0
        if emulation.session in self._by_secret:
            self._last_number = number = self._last_number + 1
        order = EmulateOrder(emulation.session, emulation.data, number, self._worker if number else "")
        try:
            recipients = await self._engine.ask(SendOrder(encode_order(order), worker, emulation.session))
            if is_elsewhere and not recipients:
                raise UnknownNode
        except EngineUnavailable:
            # Without an engine, a session of this worker gets its commands directly: a lost pong would cost the client
            # its connection. The engine may still send the order, or has sent it: each is carried out once.
            if not number:
                raise
            if number > self._last_received:
                self._carried_out.add(number)
                self._pass_on(order)


class UnknownNode(RealtimeError):
    """The node with the session is not there, or has never been."""


def _is_protobuf(request: Exchange) -> bool:
    return request.head.get("content-type").partition(";")[0].strip().lower() == "application/octet-stream"


def _parse(request: Exchange) -> EmulationRequest:
    if _is_protobuf(request):
        return emulation_request(request.body)
    emulation = _decode(request.body)
    return EmulationRequest(emulation.node, emulation.session, emulation.data.encode())


def _make_response(cors_headers: Headers, result: None, error: BaseException | None) -> PreparedResponse:
    match error:
        case None:
            return _with_headers(PreparedResponse(204), cors_headers)
        case UnknownNode():
            return _with_headers(fault_response("emulation_node"), cors_headers)
        case ClientError() | CommandTooLong():
            return _with_headers(fault_response("body_too_large"), cors_headers)
        case ProtocolError():
            return _with_headers(fault_response("emulation"), cors_headers)
        case EngineUnavailable():
            return _with_headers(status_response(500), cors_headers)
    _log.failure("forwarding commands to a client's worker raised an exception; responding with 500", Failure(error))
    return _with_headers(status_response(500), cors_headers)


def _with_headers(response: PreparedResponse, headers: Headers) -> PreparedResponse:
    return msgspec.structs.replace(response, headers=response.headers + headers)
