"""An application whose handlers block the loop, each in its own way. The lines that do are marked.

No handler is refused under pressure: each test calls one while the loop is still late from the test before.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import re
import socket
import threading
import time

from realtime import App

app = App()

DOCUMENT = "[" + ", ".join('{"name": [1, 2, {"more": "text"}]}' for _ in range(700_000)) + "]"


@app.http.get("/regex", pressure="ignore")
async def regex(request):
    return re.match(r"(a+)+$", "a" * 25 + "b") is None  # blocks: regex


@app.http.get("/sleep", pressure="ignore")
async def sleep(request):
    began = time.monotonic()
    time.sleep(1.0)  # blocks: sleep
    return time.monotonic() - began


@app.http.get("/loop", pressure="ignore")
async def loop(request):
    until = time.monotonic() + 0.7
    while time.monotonic() < until:  # blocks: loop
        pass  # blocks: loop
    return True


@app.http.get("/recv", pressure="ignore")
async def recv(request):
    ours, theirs = socket.socketpair()
    threading.Timer(0.8, theirs.send, [b"late"]).start()
    with ours, theirs:
        return ours.recv(4) == b"late"  # blocks: recv


@app.http.get("/json", pressure="ignore")
async def load(request):
    return len(json.loads(DOCUMENT))  # blocks: json


@app.http.get("/after", pressure="ignore")
async def after(request):
    """Blocks only after it has waited, in a function that it calls."""
    await asyncio.sleep(0.05)
    block()
    return True


def block():
    time.sleep(0.5)  # blocks: after


@app.http.get("/thread", pressure="ignore")
def thread(request):
    """In a thread, with the interpreter's lock held: libc's sleep by way of a call that does not release it."""
    ctypes.PyDLL(None).usleep(700_000)  # blocks: thread
    return True


@app.http.get("/long", pressure="ignore")
async def long(request):
    time.sleep(5)  # blocks: long
    return True


@app.http.get("/bloat", pressure="ignore")
async def bloat(request):
    app.leak = b"x" * 500_000_000
    return os.getpid()


@app.http.get("/stuck", pressure="ignore")
async def stuck(request):
    threading.Thread(target=wait_elsewhere, daemon=True).start()
    while True:  # blocks: stuck
        time.sleep(1)  # blocks: stuck


def wait_elsewhere():
    threading.Event().wait()
