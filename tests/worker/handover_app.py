"""The application of the hand-over tests: it records the ends of clients, and answers late if asked to."""

from __future__ import annotations

import asyncio
from typing import Any

from realtime import App

app = App()
ended: list[tuple[str, int]] = []


@app.on_disconnected
async def disconnected(client: Any, code: int, reason: str) -> None:
    ended.append((client.id, code))


@app.rpc("late")
async def late(data: float) -> str:
    await asyncio.sleep(data)
    return "done"


@app.rpc("echo")
async def echo(data: Any) -> Any:
    return data


@app.rpc("remember")
async def remember(client: Any, data: Any) -> None:
    client.state["data"] = data


@app.rpc("recall")
async def recall(client: Any, data: Any) -> Any:
    return client.state.get("data")


@app.rpc("keep a function")
async def keep_function(client: Any, data: Any) -> None:
    client.state["function"] = lambda: None
