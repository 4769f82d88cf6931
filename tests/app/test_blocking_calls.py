"""Calls that block the loop, found in the source of handlers."""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
import time
import urllib.request
from time import sleep as pause
from typing import Any

from realtime.app import App
from realtime.app.blocking_calls import find_blocking_calls


async def sleeps(client: Any, data: Any) -> None:
    if data:
        time.sleep(data)


async def sleeps_by_another_name(data: Any) -> None:
    pause(1)


async def reads(data: Any) -> Any:
    with sqlite3.connect("shop.db") as database:
        return database.execute("select 1").fetchall()


async def starts_a_program(data: Any) -> Any:
    return [subprocess.run(["true"]), urllib.request.urlopen("http://127.0.0.1/")]


async def lets_threads_block(data: Any) -> None:
    await asyncio.to_thread(time.sleep, 1)
    await asyncio.to_thread(lambda: time.sleep(1))

    def wait() -> None:
        time.sleep(1)

    await asyncio.to_thread(wait)


async def waits_without_blocking(data: Any) -> None:
    sleep = asyncio.sleep
    await asyncio.sleep(1)
    await sleep(1)
    data.sleep(time.monotonic())


def runs_in_a_thread(data: Any) -> None:
    time.sleep(1)


def found(app: App, function: Any, **options: Any) -> list[str]:
    """Return what is called, by line of the function."""
    app.rpc("f", **options)(function)
    start = function.__code__.co_firstlineno
    lines = find_blocking_calls(app)
    assert all(line.startswith(f"{__file__}:") for line in lines)
    parts = [line.removeprefix(f"{__file__}:").split(" ", 4) for line in lines]
    return [f"{int(part[0].rstrip(':')) - start}: {part[4].partition(' ')[0]}" for part in parts]


def test_calls_of_known_functions_are_found(app: App) -> None:
    assert found(app, sleeps) == ["2: time.sleep"]


def test_functions_are_known_by_any_name(app: App) -> None:
    assert found(app, sleeps_by_another_name) == ["1: time.sleep"]


def test_drivers_and_programs_are_found(app: App) -> None:
    assert found(app, reads) == ["1: sqlite3.connect"]


def test_each_call_has_a_line_and_a_remedy(app: App) -> None:
    assert found(app, starts_a_program) == ["1: subprocess.run", "1: urllib.request.urlopen"]
    first, second = find_blocking_calls(app)
    assert first.endswith("meanwhile; await asyncio.create_subprocess_exec in its place")
    assert second.endswith("meanwhile; declare the handler with `def`, so that it runs in a thread")


def test_calls_in_other_threads_are_none(app: App) -> None:
    assert found(app, lets_threads_block) == []


def test_a_handler_in_a_thread_may_block(app: App) -> None:
    assert found(app, runs_in_a_thread) == []


def test_a_plain_function_on_the_loop_may_not(app: App) -> None:
    assert found(app, runs_in_a_thread, run="loop") == ["1: time.sleep"]


def test_other_functions_of_the_same_name_are_none(app: App) -> None:
    assert found(app, waits_without_blocking) == []


def test_a_callable_without_a_source_has_no_calls(app: App) -> None:
    exec_globals: dict[str, Any] = {"time": time}
    exec("async def f(data):\n    time.sleep(1)", exec_globals)
    app.rpc("f")(exec_globals["f"])
    assert find_blocking_calls(app) == []
