"""A relay in front of a Redis server, which changes the order of what the server sends."""

from __future__ import annotations

from typing import Any

import hiredis
from twisted.internet import reactor
from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.endpoints import TCP4ClientEndpoint
from twisted.internet.protocol import Factory, Protocol
from twisted.python.failure import Failure


class LateMessages(Factory):
    """Passes each message on behind the next reply, as Redis 7.2 does with those of the client's own. For few messages:
    the last one of a read waits for the reply.

    port: of the relay.
    """

    noisy = False

    def __init__(self, server: int) -> None:
        """server: the port of the Redis server."""
        self.server = server
        self.port = 0
        self._open: set[Protocol] = set()

    async def start(self) -> None:
        self._listener = reactor.listenTCP(0, self, interface="127.0.0.1")
        self.port = self._listener.getHost().port

    async def stop(self) -> None:
        await maybeDeferred(self._listener.stopListening)
        for each in list(self._open):
            each.transport.abortConnection()  # type: ignore[union-attr]

    def buildProtocol(self, address: object) -> Protocol:
        return _Client(self)


class _Client(Protocol):
    def __init__(self, relay: LateMessages) -> None:
        self.relay = relay
        self.early = b""
        self.upstream: _Server | None = None

    def connectionMade(self) -> None:
        self.relay._open.add(self)
        endpoint = TCP4ClientEndpoint(reactor, "127.0.0.1", self.relay.server)
        connected: Deferred[Any] = endpoint.connect(_to(_Server(self)))
        connected.addCallbacks(self._connected, lambda failure: self.transport.abortConnection())  # type: ignore

    def _connected(self, upstream: _Server) -> None:
        self.upstream = upstream
        upstream.transport.write(self.early)  # type: ignore[union-attr]

    def dataReceived(self, data: bytes) -> None:
        if self.upstream is None:
            self.early += data
        else:
            self.upstream.transport.write(data)  # type: ignore[union-attr]

    def connectionLost(self, reason: Failure | None = None) -> None:
        self.relay._open.discard(self)
        if self.upstream is not None:
            self.upstream.transport.abortConnection()  # type: ignore[union-attr]


class _Server(Protocol):
    def __init__(self, client: _Client) -> None:
        self.client = client
        self.reader = hiredis.Reader(notEnoughData=self)
        self.late: list[Any] = []

    def connectionMade(self) -> None:
        self.client.relay._open.add(self)

    def dataReceived(self, data: bytes) -> None:
        self.reader.feed(data)
        while (reply := self.reader.gets()) is not self:
            if type(reply) is hiredis.PushNotification and reply[0] == b"message":
                self.late.append(reply)
            else:
                self._pass(reply)
                late, self.late = self.late, []
                for message in late:
                    self._pass(message)

    def _pass(self, reply: Any) -> None:
        self.client.transport.write(_packed(reply))  # type: ignore[union-attr]

    def connectionLost(self, reason: Failure | None = None) -> None:
        self.client.relay._open.discard(self)
        self.client.transport.abortConnection()  # type: ignore[union-attr]


def _to(protocol: Protocol) -> Factory:
    factory = Factory.forProtocol(lambda: protocol)  # type: ignore[arg-type]
    factory.noisy = False
    return factory


def _packed(reply: Any) -> bytes:
    """Return a reply in RESP3."""
    match reply:
        case None:
            return b"_\r\n"
        case int():
            return b":%d\r\n" % reply
        case str():
            return _packed(reply.encode())
        case bytes():
            return b"$%d\r\n%b\r\n" % (len(reply), reply)
        case hiredis.ReplyError():
            return b"-%b\r\n" % str(reply).encode()
        case dict():
            return b"%%%d\r\n" % len(reply) + b"".join(_packed(part) for item in reply.items() for part in item)
        case list():
            kind = b">" if type(reply) is hiredis.PushNotification else b"*"
            return b"%b%d\r\n" % (kind, len(reply)) + b"".join(map(_packed, reply))
    raise TypeError(type(reply))
