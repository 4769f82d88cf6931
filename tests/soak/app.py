"""The application of a soak: its handlers block, wait and compute when they are asked to."""

from __future__ import annotations

import asyncio
import ctypes
import os
import time
from typing import Any

from realtime import App, ClientError, Credentials, Grant, Request
from tests.soak import steps

app = App()


@app.on_start
async def watch_steps() -> None:
    if folder := app.options.get("steps"):
        steps.watch(str(folder))


@app.on_connecting
async def let_in(request: Any) -> Credentials | None:
    """A client names itself, and the channels that the server is to subscribe it to. A token is left to the server."""
    if request.token:
        return None
    said = request.data
    if not isinstance(said, dict) or not isinstance(said.get("user"), str):
        raise ClientError(400, "who are you?")
    names = said.get("subs", ())
    return Credentials(user=said["user"], subs={name: Grant() for name in names if isinstance(name, str)})


@app.http.get("/block", pressure="ignore", timeout=0)
async def block(request: Request) -> dict[str, int]:
    time.sleep(float(request.query["seconds"]))
    return {"pid": os.getpid()}


@app.http.get("/hold", pressure="ignore", timeout=0)
def hold(request: Request) -> dict[str, int]:
    """In a thread, with the interpreter's lock."""
    ctypes.PyDLL(None).usleep(int(1e6 * float(request.query["seconds"])))
    return {"pid": os.getpid()}


@app.http.get("/compute", run="process", timeout=5)
def compute(request: Request) -> dict[str, int]:
    return {"sum": sum(range(100_000))}


@app.http.get("/thread")
def thread(request: Request) -> dict[str, int]:
    time.sleep(0.01)
    return {"pid": os.getpid()}


@app.rpc("wait")
async def wait(client: Any, data: Any) -> Any:
    await asyncio.sleep(0.01)
    return data
