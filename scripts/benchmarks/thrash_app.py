"""The application of the thrash benchmark: one route in five variants."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from realtime import App, Cache, Request

WAIT = 0.010
BLOCK = 0.020
ANSWER = {"weather": "rain", "degrees": 12}

app = App()


async def on_the_loop(request: Request) -> Any:
    await asyncio.sleep(WAIT)
    time.sleep(BLOCK)
    return ANSWER


def in_a_thread(request: Request) -> Any:
    time.sleep(WAIT)
    time.sleep(BLOCK)
    return ANSWER


app.http.get("/bare", pressure="ignore")(on_the_loop)
app.http.get("/shedding")(on_the_loop)
app.http.get("/load-aware", cache=Cache(ttl=1, stale=30))(on_the_loop)
app.http.get("/threaded")(in_a_thread)
app.http.get("/threaded-load-aware", cache=Cache(ttl=1, stale=30))(in_a_thread)
