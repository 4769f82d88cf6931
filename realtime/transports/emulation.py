"""Emulation: the way from the client to the server for streams, which lead only the other way.

Every command is a request of its own, over whatever connection and to whatever worker. It names its session by the
secret that the connect result told the client; a secret begins with the address of the worker that holds the stream.

    POST /emulation ─▶ any worker ─▶ EmulateOrder, through the engine ─▶ that worker ─▶ StreamConnection.emulate

All of them take the way through the engine, also those that arrive at the right worker: so the commands of a client
that waits for the response to one before it sends the next are carried out in order.
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
from realtime.handlers.results import PreparedResponse, plain
from realtime.http.cors import Headers
from realtime.protocol.messages import ProtocolError
from realtime.protocol.orders import EmulateOrder, encode_order
from realtime.protocol.protobuf import EmulationRequest, emulation_request
from realtime.pubsub.engine import Engine, SendOrder
from realtime.transports.http_server import HTTPRequest, faulty

# Bytes of randomness in a secret.
_RANDOMNESS = 24

_log = Logger()


class _JSONRequest(Struct, frozen=True):
    """The same as EmulationRequest. data: text, with the commands in it."""

    node: str = ""
    session: str = ""
    data: str = ""


_decode = msgspec.json.Decoder(_JSONRequest).decode


class Emulation:
    """The sessions of this worker that are sent commands so, and the requests that bring them."""

    def __init__(self, engine: Engine, node: str, worker: str) -> None:
        """node: the id of this node; streams of another one can't be here. worker: see `SendOrder`."""
        self._engine = engine
        self._node = node
        self._worker = worker
        self._by_secret: dict[str, Callable[[bytes], None]] = {}

    def enter(self, emulate: Callable[[bytes], None] | None) -> str:
        """The secret of a new session. emulate: is handed its commands; None for a session that takes none."""
        secret = f"{self._worker}.{secrets.token_urlsafe(_RANDOMNESS)}"
        if emulate is not None:
            self._by_secret[secret] = emulate
        return secret

    def leave(self, secret: str) -> None:
        """The session is gone. Harmless when it was never here."""
        self._by_secret.pop(secret, None)

    def receive(self, order: EmulateOrder) -> None:
        """Hand commands to their session. Those of one that is gone are dropped: its client knows by its stream."""
        emulate = self._by_secret.get(order.secret)
        if emulate is not None:
            emulate(order.data)

    def serve(self, shared: Headers, request: HTTPRequest) -> None:
        """Answer one request. shared: the headers for a page of an allowed origin."""
        try:
            asked = _read(request)
        except (ProtocolError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            request.answer(_with(shared, faulty("emulation")))
            return
        if asked.node != self._node:
            request.answer(_with(shared, plain(404)))
            return
        request.start(self._pass_on(asked), partial(_answer, shared), cancel=False)

    async def _pass_on(self, asked: EmulationRequest) -> None:
        """Raises EngineUnavailable, and ClientError 106 for more than the engine takes in one piece."""
        worker, _, rest = asked.session.partition(".")
        if not worker or not rest:
            return
        order = EmulateOrder(asked.session, asked.data)
        try:
            await self._engine.ask(SendOrder(encode_order(order), worker))
        except EngineUnavailable:
            # A pong is not worth a new connection, and no command goes by the engine now that this one could overtake.
            if asked.session not in self._by_secret:
                raise
            self.receive(order)


def _read(request: HTTPRequest) -> EmulationRequest:
    kind = (request.getHeader("Content-Type") or "").partition(";")[0].strip().lower()
    if kind == "application/octet-stream":
        return emulation_request(request.body())
    asked = _decode(request.body())
    return EmulationRequest(asked.node, asked.session, asked.data.encode())


def _answer(shared: Headers, result: None, error: BaseException | None) -> PreparedResponse:
    match error:
        case None:
            return _with(shared, PreparedResponse(204))
        case ClientError():
            return _with(shared, faulty("body_too_large"))
        case EngineUnavailable():
            return _with(shared, plain(500))
    _log.failure("commands could not be passed on", Failure(error))
    return _with(shared, plain(500))


def _with(shared: Headers, answer: PreparedResponse) -> PreparedResponse:
    return msgspec.structs.replace(answer, headers=answer.headers + shared)
