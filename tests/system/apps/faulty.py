"""An application that makes the server's own code raise, at a place and a number of times that a request asks for."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

from realtime import App, Request
from realtime.protocol.session import Session
from realtime.transports.outgoing import Outgoing
from realtime.transports.websocket import WebSocketConnection

app = App()
faults: Counter[str] = Counter()


def fail() -> None:
    raise RuntimeError("a bug, on purpose")


def inject(owner: type, name: str, place: str) -> None:
    """Make the method `name` raise while faults are asked for at `place`."""
    original = getattr(owner, name)

    def faulty(self: Any, *args: Any) -> Any:
        if faults[place] > 0:
            faults[place] -= 1
            fail()
        return original(self, *args)

    setattr(owner, name, faulty)


inject(WebSocketConnection, "dataReceived", "data")
inject(WebSocketConnection, "connectionLost", "end")
inject(Session, "on_deadline", "timer")
inject(Outgoing, "flush", "write")


@app.http.get("/fault")
async def fault(request: Request) -> Any:
    place, times = request.query["at"], int(request.query.get("times", "1"))
    if place == "callback":
        for _ in range(times):
            asyncio.get_running_loop().call_soon(fail)
    else:
        faults[place] += times
    return {}


@app.rpc("echo")
async def echo(data: Any) -> Any:
    return data
