"""Handlers in processes, for tests of the whole server."""

from __future__ import annotations

import os
from typing import Any

from realtime import App, ClientError

app = App()


@app.http.get("/pid", run="process")
def pid(request: Any) -> Any:
    return os.getpid()


@app.http.get("/spin", run="process", timeout=60)
def spin(request: Any) -> Any:
    return sum(range(10**12))


@app.http.get("/quit", run="process")
def quit_now(request: Any) -> Any:
    os._exit(3)


@app.http.get("/publish", run="process")
def publish(request: Any) -> Any:
    """Blocking calls: what they return is there at once."""
    position = app.publish("stream:here", {"from": os.getpid()}, idempotency_key="once")
    page = app.history("stream:here")
    try:
        app.publish("nosuch:x", 1)
    except ClientError as error:
        refused = error.code
    return {
        "pid": os.getpid(),
        "offset": position.offset,
        "history": [publication.data.decode() for publication in page.publications],
        "refused": refused,
        "channels": app.channels(),
        "nodes": len(app.info()),
    }


@app.http.get("/loop")
async def loop(request: Any) -> Any:
    return os.getpid()
