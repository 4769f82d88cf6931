"""Handlers that compute in processes of their own, forked from the worker."""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from realtime import App

app = App()
FORK = multiprocessing.get_context("fork")
executor = ProcessPoolExecutor(2, mp_context=FORK)


def square(number: int) -> int:
    return number * number


def publish_in_fork() -> str:
    try:
        app.publish("news", 1)
    except RuntimeError as error:
        return str(error)
    return "published"


@app.rpc("squares")
async def squares(data: Any) -> Any:
    loop = asyncio.get_running_loop()
    return await asyncio.gather(*(loop.run_in_executor(executor, square, number) for number in data))


@app.rpc("squares in a thread")
def squares_in_a_thread(data: Any) -> Any:
    return list(executor.map(square, data))


@app.rpc("squares in a process", run="process")
def squares_in_a_process(data: Any) -> Any:
    return list(executor.map(square, data))


@app.rpc("keep busy")
async def keep_busy(data: Any) -> Any:
    for _ in range(4):
        executor.submit(time.sleep, 600)


@app.rpc("publish in a fork")
def publish(data: Any) -> Any:
    return executor.submit(publish_in_fork).result()


@app.rpc("publish in a fork of a process", run="process")
def publish_in_a_process(data: Any) -> Any:
    return executor.submit(publish_in_fork).result()


def terminated() -> dict[str, int]:
    process = FORK.Process(target=time.sleep, args=(600,))
    process.start()
    process.terminate()
    process.join(20)
    return {"status": process.exitcode or 0}


@app.rpc("terminate")
def terminate(data: Any) -> Any:
    return terminated()


@app.rpc("terminate in a process", run="process")
def terminate_in_a_process(data: Any) -> Any:
    return terminated()
