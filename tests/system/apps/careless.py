"""Handlers that do what no handler should, in each place where handlers run."""

from __future__ import annotations

import asyncio
import socket
import time
from typing import Any

from realtime import App

app = App()
# For every socket that the process makes without saying otherwise.
socket.setdefaulttimeout(5.0)
LARGE = "x" * 20_000_000


@app.on_connecting
async def let_in(request: Any) -> Any:
    """Leaves it to the token, unless it fails with all that the client said at hand."""
    said = request.data
    if said == {"password": "raise"}:
        raise RuntimeError("on purpose")
    return None


def raises(data: Any) -> Any:
    raise ValueError(data)


def junk(data: Any) -> Any:
    return object()


def large(data: Any) -> Any:
    return LARGE


def forever(data: Any) -> Any:
    time.sleep(4)


async def forever_on_the_loop(data: Any) -> Any:
    await asyncio.get_running_loop().create_future()


def on_loop(function: Any) -> Any:
    async def handler(data: Any) -> Any:
        return function(data)

    return handler


for function in (raises, junk, large):
    app.rpc(f"{function.__name__} loop")(on_loop(function))
    app.rpc(f"{function.__name__} thread", run="thread")(function)
    app.rpc(f"{function.__name__} process", run="process")(function)
app.rpc("forever loop", timeout=1)(forever_on_the_loop)
app.rpc("forever thread", run="thread", timeout=1)(forever)
app.rpc("forever process", run="process", timeout=1)(forever)


@app.rpc("late loop")
async def late(client: Any, data: Any) -> Any:
    """Goes on long after its client has left."""
    await asyncio.sleep(0.5)
    act(client)


@app.rpc("late thread", run="thread")
def late_in_a_thread(client: Any, data: Any) -> Any:
    time.sleep(0.5)
    act(client)


def act(client: Any) -> None:
    client.send("too late")
    client.subscribe("anything")
    client.unsubscribe("anything")
    client.refresh(1)
    client.disconnect(4000, "too late")
    print(f"acted for {client.user} in {client.channels}", flush=True)


@app.rpc("echo")
async def echo(client: Any, data: Any) -> Any:
    return data


@app.http.get("/raise")
async def raise_over_http(request: Any) -> Any:
    raise ValueError(request.query["text"])
