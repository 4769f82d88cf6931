"""An application with a handler that never lets the loop idle."""

from __future__ import annotations

import asyncio

from realtime import App, Credentials

app = App()


@app.on_connecting
async def let_in(request):
    return Credentials(user="42")


@app.rpc("spin")
async def spin(client, data):
    while True:
        await asyncio.sleep(0)


@app.rpc("echo")
async def echo(client, data):
    return data
