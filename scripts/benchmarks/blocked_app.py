"""The application of the blocked benchmark: an echo, and a handler that blocks its worker's loop."""

from __future__ import annotations

import os
import time
from typing import Any

from realtime import App, Client, ConnectRequest, Credentials

app = App()


@app.on_connecting
async def send_pid(request: ConnectRequest) -> Credentials:
    return Credentials(user="client", data={"pid": os.getpid()})


@app.rpc("echo")
async def echo(client: Client, data: Any) -> Any:
    return data


@app.rpc("block")
async def block(client: Client, data: Any) -> None:
    time.sleep(data)
