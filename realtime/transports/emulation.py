"""Emulation: commands of clients with a stream, which carries data from the server to the client only.

Each command is a separate HTTP request, on any connection and to any worker. It names its session by the secret from
the client's connect result; a secret begins with the address of the worker that has the stream.

    POST /emulation ─▶ any worker ─▶ EmulateOrder, through the engine ─▶ stream's worker ─▶ StreamConnection.emulate

All commands pass through the engine, even if they arrive at the worker of the stream. So the session handles the
commands of a client in order, if the client waits for each response before it sends the next request.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from functools import partial

import msgspec
from msgspec import Struct
from twisted.logger import Logger
from twisted.python.failure import Failure

from realtime.errors import ClientError, EngineUnavailable
from realtime.handlers.results import PreparedResponse, status_response
from realtime.http.cors import Headers
from realtime.protocol.messages import ProtocolError
from realtime.protocol.orders import EmulateOrder, encode_order
from realtime.protocol.protobuf import EmulationRequest, emulation_request
from realtime.pubsub.engine import Engine, SendOrder
from realtime.transports.http_server import Exchange, fault_response

# Random bytes in a secret.
_SECRET_BYTES = 24

_log = Logger()


class _JSONRequest(Struct, frozen=True):
    """`EmulationRequest` as JSON. data: the commands, as text."""

    node: str = ""
    session: str = ""
    data: str = ""


_decode = msgspec.json.Decoder(_JSONRequest).decode


class Emulation:
    """The streams of this worker by their secrets, and the handler of emulation requests."""

    def __init__(self, engine: Engine, node: str, worker: str) -> None:
        """node: id of this node; requests for another node get status 404. worker: see `SendOrder`."""
        self._engine = engine
        self._node = node
        self._worker = worker
        self._by_secret: dict[str, Callable[[bytes], None]] = {}

    def register(self, emulate: Callable[[bytes], None] | None) -> str:
        """Make the secret of a new session. emulate: called with its commands; None if it accepts no commands."""
        secret = f"{self._worker}.{secrets.token_urlsafe(_SECRET_BYTES)}"
        if emulate is not None:
            self._by_secret[secret] = emulate
        return secret

    def unregister(self, secret: str) -> None:
        """Remove the session with this secret, if there is one."""
        self._by_secret.pop(secret, None)

    def receive(self, order: EmulateOrder) -> None:
        """Pass commands to their session; drop them if it has ended, which the client learns from its stream."""
        emulate = self._by_secret.get(order.secret)
        if emulate is not None:
            emulate(order.data)

    def serve(self, cors_headers: Headers, request: Exchange) -> None:
        """Handle one emulation request. cors_headers: added to the response."""
        try:
            emulation = _parse(request)
        except (ProtocolError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            request.respond(_with_headers(fault_response("emulation"), cors_headers))
            return
        if emulation.node != self._node:
            request.respond(_with_headers(status_response(404), cors_headers))
            return
        request.respond_with(self._forward(emulation), partial(_make_response, cors_headers), cancels=False)

    async def _forward(self, emulation: EmulationRequest) -> None:
        """Send the commands to the worker of the session; do nothing for a malformed secret.

        Raises EngineUnavailable, and ClientError 106 for commands above the engine's limit for one message.
        """
        worker, _, random_part = emulation.session.partition(".")
        if not worker or not random_part:
            return
        order = EmulateOrder(emulation.session, emulation.data)
        try:
            await self._engine.ask(SendOrder(encode_order(order), worker))
        except EngineUnavailable:
            # Without an engine, a session of this worker gets its commands directly: a lost pong would cost the client
            # its connection. No other command is on its way through the engine, so the order is kept.
            if emulation.session not in self._by_secret:
                raise
            self.receive(order)


def _parse(request: Exchange) -> EmulationRequest:
    content_type = (request.head.get("content-type")).partition(";")[0].strip().lower()
    if content_type == "application/octet-stream":
        return emulation_request(request.body)
    emulation = _decode(request.body)
    return EmulationRequest(emulation.node, emulation.session, emulation.data.encode())


def _make_response(cors_headers: Headers, result: None, error: BaseException | None) -> PreparedResponse:
    match error:
        case None:
            return _with_headers(PreparedResponse(204), cors_headers)
        case ClientError():
            return _with_headers(fault_response("body_too_large"), cors_headers)
        case EngineUnavailable():
            return _with_headers(status_response(500), cors_headers)
    _log.failure("forwarding commands to a client's worker raised an exception; responding with 500", Failure(error))
    return _with_headers(status_response(500), cors_headers)


def _with_headers(response: PreparedResponse, headers: Headers) -> PreparedResponse:
    return msgspec.structs.replace(response, headers=response.headers + headers)
