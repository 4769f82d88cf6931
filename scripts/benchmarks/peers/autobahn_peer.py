"""Twisted and Autobahn without changes."""

from __future__ import annotations

from autobahn.twisted.websocket import WebSocketServerFactory, WebSocketServerProtocol
from twisted.internet import epollreactor

epollreactor.install()

from twisted.internet import reactor  # noqa: E402

peers: set[Peer] = set()


class Peer(WebSocketServerProtocol):
    def onConnect(self, request):
        self.echoes = request.path == "/echo"

    def onOpen(self):
        peers.add(self)

    def onMessage(self, payload, isBinary):
        if self.echoes:
            self.sendMessage(payload, isBinary)
            return
        for peer in peers:
            peer.sendMessage(payload, isBinary)

    def onClose(self, wasClean, code, reason):
        peers.discard(self)


factory = WebSocketServerFactory()
factory.protocol = Peer
port = reactor.listenTCP(0, factory, backlog=4096, interface="127.0.0.1")
print(f"port {port.getHost().port}", flush=True)
reactor.run()
