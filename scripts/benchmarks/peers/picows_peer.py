"""picows: WebSocket framing in Cython, on asyncio, or on uvloop if installed."""

from __future__ import annotations

import asyncio

from picows import WSListener, WSMsgType, ws_create_server

try:
    import uvloop

    run = uvloop.run
except ImportError:
    run = asyncio.run

peers = set()


class Peer(WSListener):
    def __init__(self, echoes):
        super().__init__()
        self.echoes = echoes

    def on_ws_connected(self, transport):
        peers.add(transport)

    def on_ws_frame(self, transport, frame):
        if frame.msg_type != WSMsgType.TEXT:
            transport.disconnect()
            return
        message = frame.get_payload_as_bytes()
        if self.echoes:
            transport.send(WSMsgType.TEXT, message)
            return
        for peer in peers:
            peer.send(WSMsgType.TEXT, message)

    def on_ws_disconnected(self, transport):
        peers.discard(transport)


async def main():
    server = await ws_create_server(lambda request: Peer(request.path == b"/echo"), "127.0.0.1", 0, backlog=4096)
    print(f"port {server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


run(main())
