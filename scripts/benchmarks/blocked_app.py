"""The application of the blocked benchmark: an echo, and a handler that blocks its worker's loop in several ways."""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
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
    way, seconds = data if isinstance(data, list) else ("time.sleep", data)
    WAYS[way](seconds)


def block_in_socket(seconds: float) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, suppress(TimeoutError):
        ours.settimeout(seconds)
        ours.recv(1)


def block_in_python(seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pass


def block_in_c(seconds: float) -> None:
    began = time.monotonic()
    sum(range(1_000_000))
    # One call that neither returns nor lets other threads run.
    sum(range(int(1_000_000 * seconds / (time.monotonic() - began))))


WAYS = {
    "time.sleep": time.sleep,
    "a blocking socket": block_in_socket,
    "pure Python": block_in_python,
    "C with the interpreter's lock": block_in_c,
}
