"""An application with a cached answer, and every way to clear it."""

from __future__ import annotations

import asyncio
import os
from itertools import count
from typing import Any

from realtime import App, Cache

app = App()
answers = Cache(ttl=600, key=lambda request: "only")
computations = count(1)
running: list[str] = []


@app.http.get("/answer", cache=answers)
async def answer(request: Any) -> Any:
    return {"pid": os.getpid(), "computation": next(computations)}


@app.http.get("/slow", cache=Cache(ttl=600, key=lambda request: request.query["key"]))
async def slow(request: Any) -> Any:
    running.append(request.query["key"])
    await asyncio.sleep(float(request.query["seconds"]))
    return {"pid": os.getpid(), "computation": next(computations)}


@app.http.get("/running")
async def list_running(request: Any) -> Any:
    return {"pid": os.getpid(), "running": running}


@app.http.get("/clear/loop")
async def clear_on_loop(request: Any) -> Any:
    await answers.clear()
    return {}


@app.http.get("/clear/thread", run="thread")
def clear_in_thread(request: Any) -> Any:
    answers.invalidate("only")
    return {}


@app.http.get("/clear/process", run="process")
def clear_in_process(request: Any) -> Any:
    answers.clear()
    return {}
