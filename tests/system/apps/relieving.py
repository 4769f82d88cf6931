"""Handlers that block their loop, until a thread releases them or at random, and that notice a second thread."""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from realtime import App, Client, ConnectRequest, Credentials, Grant, Request

app = App()

# Seconds after which a handler that no thread releases goes on.
PATIENCE = 20.0
released = threading.Event()
entered = threading.Event()


@app.rpc("wait")
async def wait(client: Client, data: Any) -> bool:
    """Block the loop until "release". data: whether to use the server meanwhile."""
    released.clear()
    entered.set()
    if data:
        client.send({"from": "the blocked step"})
        app.publish("room", {"from": "the blocked step"})
    return released.wait(PATIENCE)


@app.rpc("wait later")
async def wait_later(client: Client, data: Any) -> bool:
    await asyncio.sleep(0)
    return await wait(client, data)


@app.rpc("entered", run="thread")
def has_entered(client: Client, data: Any) -> bool:
    came = entered.wait(PATIENCE)
    entered.clear()
    return came


@app.rpc("release", run="thread")
def release(client: Client, data: Any) -> None:
    released.set()


@app.rpc("publish", run="thread")
def publish_in_thread(client: Client, data: Any) -> int:
    client.send({"from": "a thread"})
    return app.publish("room", data).offset


@app.rpc("process", run="process")
def process(data: Any) -> int:
    app.publish("room", data)
    return os.getpid()


@app.rpc("echo")
async def echo(client: Client, data: Any) -> Any:
    with alone():
        return data


# Blocks at random

violations: list[str] = []
_inside: list[str] = []


@contextmanager
def alone() -> Iterator[None]:
    """Note when two threads run handlers of the loop at once."""
    thread = threading.current_thread()
    if _inside or thread is not threading.main_thread():
        violations.append(f"{thread.name} beside {_inside}")
    _inside.append(thread.name)
    try:
        yield
    finally:
        _inside.pop()


def block_in_socket(seconds: float) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, suppress(TimeoutError):
        ours.settimeout(seconds)
        ours.recv(1)


def block_in_file(seconds: float) -> None:
    until = time.monotonic() + seconds
    with tempfile.TemporaryFile() as file:
        while time.monotonic() < until:
            file.write(b"x" * 65536)
            file.flush()
            file.seek(0)
            file.read()


def block_in_python(seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pass


def block_in_json(seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        json.loads(json.dumps([{"number": number} for number in range(5000)]))


def block_in_c(seconds: float) -> None:
    sum(range(int(seconds * 4e7)))  # keeps the interpreter's lock


def block_while_calling(seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        app.publish("noise", 1)
        time.sleep(0.001)


WAYS: tuple[Callable[[float], None], ...] = (
    time.sleep,
    block_in_socket,
    block_in_file,
    block_in_python,
    block_in_json,
    block_in_c,
    block_while_calling,
)
share = 0.0


def maybe_block() -> None:
    """Block in one call of some, for 50 to 500 ms."""
    with alone():
        if random.random() < share:
            random.choice(WAYS)(random.uniform(0.05, 0.5))


@app.rpc("share")
async def set_share(client: Client, data: float) -> None:
    global share
    share = data


@app.rpc("violations")
async def get_violations(client: Client, data: Any) -> list[str]:
    return violations[:10]


@app.on_connecting
async def connecting(request: ConnectRequest) -> Credentials:
    maybe_block()
    return Credentials(user="someone")


@app.on_subscribe("checked:*")
async def subscribing(client: Client, channel: str, data: Any) -> Grant:
    await asyncio.sleep(0)
    maybe_block()
    return Grant()


@app.on_publish("checked:*")
async def publishing(client: Client, channel: str, data: Any) -> Any:
    maybe_block()
    return data


@app.on_message
async def message(client: Client, data: Any) -> None:
    maybe_block()


@app.on_disconnected
async def disconnected(client: Client, code: int, reason: str) -> None:
    await asyncio.sleep(0)
    maybe_block()


@app.rpc("block")
async def block(client: Client, data: Any) -> Any:
    maybe_block()
    return data


@app.rpc("block later")
async def block_later(client: Client, data: Any) -> Any:
    await asyncio.sleep(0.001)
    maybe_block()
    await asyncio.sleep(0.001)
    maybe_block()
    return data


@app.rpc("thread", run="thread")
def thread(client: Client, data: Any) -> Any:
    time.sleep(0.002)
    return data


@app.http.get("/block")
async def block_http(request: Request) -> dict[str, str]:
    maybe_block()
    return {"number": request.query["number"]}
