"""The `websockets` library on asyncio, or on uvloop if installed."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from websockets.asyncio.server import broadcast, serve

try:
    import uvloop

    run = uvloop.run
except ImportError:
    run = asyncio.run

peers = set()


async def talk(peer):
    echoes = peer.request.path == "/echo"
    peers.add(peer)
    with suppress(Exception):
        async for message in peer:
            if echoes:
                await peer.send(message)
            else:
                broadcast(peers, message)
    peers.discard(peer)


async def main():
    options = {"compression": None, "ping_interval": None, "backlog": 4096, "max_queue": None}
    async with serve(talk, "127.0.0.1", 0, **options) as server:
        print(f"port {server.sockets[0].getsockname()[1]}", flush=True)
        await asyncio.Future()


run(main())
