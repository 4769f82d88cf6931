"""The application of the worker tests: a procedure, a route with a cache, and a record of its life cycle."""

from __future__ import annotations

import asyncio
from typing import Any

from realtime import App, Cache

app = App()
events: list[str] = []


@app.on_start
async def start() -> None:
    events.append("started")


@app.on_stop
async def stop() -> None:
    events.append("stopped")


@app.rpc("double")
async def double(data: Any) -> Any:
    return data * 2


@app.rpc("slow")
async def slow(data: float) -> str:
    await asyncio.sleep(data)
    return "done"


@app.http.get("/cached", cache=Cache(ttl=60))
async def cached(request: Any) -> str:
    return "text"
