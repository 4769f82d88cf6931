"""An application whose handlers take a known time of the loop."""

from __future__ import annotations

import asyncio
import os
import time

from realtime import App, Credentials

app = App()


@app.on_connecting
async def let_in(request):
    return Credentials(user="somebody")


@app.rpc("spin")
async def spin(client, data):
    """Half of it before a wait and half after, so that both steps must be charged."""
    for _ in range(2):
        until = time.monotonic() + data["seconds"] / 2
        while time.monotonic() < until:
            pass
        await asyncio.sleep(0.001)


@app.rpc("spin until")
async def spin_until(client, data):
    """Until this file is there."""
    limit = time.monotonic() + 60
    while not os.path.exists(data) and time.monotonic() < limit:
        pass


@app.rpc("rest")
async def rest(client, data):
    await asyncio.sleep(data["seconds"])


@app.http.get("/spin")
async def spin_over_http(request):
    until = time.monotonic() + 0.1
    while time.monotonic() < until:
        pass
    return "done"
