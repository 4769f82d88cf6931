"""Handlers in processes, for tests of the whole server."""

from __future__ import annotations

import os
from typing import Any

from realtime import App

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


@app.http.get("/loop")
async def loop(request: Any) -> Any:
    return os.getpid()
