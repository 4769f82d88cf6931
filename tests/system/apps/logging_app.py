"""An application that logs everywhere, by Python's `logging`, and whose handlers refuse, hang and take long."""

from __future__ import annotations

import logging
import threading
import time
import warnings

from realtime import App, ClientError

app = App()
log = logging.getLogger("shop.orders")
log.info("imported")
RELEASE = threading.Event()


@app.on_start
def on_start():
    log.info("started")


@app.rpc("loop")
async def on_loop(data):
    logging.info("in a coroutine")
    warnings.warn("an old name", DeprecationWarning, stacklevel=1)
    warnings.warn("a careless use", UserWarning, stacklevel=1)


@app.rpc("thread")
def in_thread(data):
    log.warning("in a thread\r\n2026-01-01 [supervisor#info] forged")


@app.rpc("process", run="process")
def in_process(data):
    log.info("in a process")
    log.debug("of no interest")


@app.rpc("hang", timeout=0.2)
def hang(data):
    RELEASE.wait(6)


@app.rpc("slow", timeout=0.2)
async def slow(data):
    import asyncio

    await asyncio.sleep(20)


@app.rpc("refuse")
async def refuse(data):
    raise ClientError(1400, "out of stock")


@app.rpc("cpu", pressure="ignore")
async def cpu(data):
    until = time.monotonic() + 0.02
    while time.monotonic() < until:
        pass
