"""Periodic functions: the times of their runs, on a clock that the test moves."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from realtime.errors import ClientError
from tests.driving import on_loop
from tests.handlers.bench import Bench, until


def lines(bench: Bench) -> list[str]:
    return [event["log_format"].format(**event) for event in bench.logged if "next run" in (event["log_format"] or "")]


def skipped(bench: Bench) -> float:
    return sum(one.value for one in bench.metrics.snapshot() if one.name == "realtime_handler_runs_skipped")


async def begin(bench: Bench, **settings: Any) -> None:
    (await bench.start(**settings)).start_recurring("each")


@pytest.mark.parametrize(("immediately", "begins"), [(False, [2, 4, 6]), (True, [0, 2, 4, 6])])
@on_loop
async def test_runs_begin_one_interval_apart(bench: Bench, immediately: bool, begins: list[float]) -> None:
    seen: list[float] = []

    @bench.app.every("2s", where="each", immediately=immediately)
    async def tick() -> None:
        seen.append(bench.clock.seconds())

    await begin(bench)
    bench.clock.pump([1.0] * 7)
    assert seen == begins
    assert bench.count("ok", "every " + tick.__qualname__) == len(begins)


@on_loop
async def test_late_timers_do_not_shift_the_runs_after_them(bench: Bench) -> None:
    seen: list[float] = []

    @bench.app.every(1, where="each")
    async def tick() -> None:
        seen.append(bench.clock.seconds())

    await begin(bench)
    bench.clock.advance(1.25)
    bench.clock.advance(0.75)
    assert seen == [1.25, 2.0]
    assert skipped(bench) == 0


@on_loop
async def test_a_run_that_takes_long_leaves_out_runs_and_is_never_overlapped(bench: Bench) -> None:
    gates: list[asyncio.Future[None]] = []
    ended: list[int] = []

    @bench.app.every(1, where="each", timeout=0)
    async def tick() -> None:
        gates.append(asyncio.get_running_loop().create_future())
        await gates[-1]
        ended.append(len(gates))

    await begin(bench)
    bench.clock.pump([1.0, 1.0, 1.0, 0.5])
    assert len(gates) == 1
    gates[0].set_result(None)
    await until(lambda: skipped(bench) == 2)
    bench.clock.advance(0.5)  # at 4 s
    assert (len(gates), ended) == (2, [1])
    gates[1].cancel()


@on_loop
async def test_plain_functions_run_in_threads(bench: Bench) -> None:
    threads: list[threading.Thread] = []

    @bench.app.every(1, where="each")
    def tick() -> None:
        threads.append(threading.current_thread())

    await begin(bench)
    bench.clock.advance(1)
    await until(lambda: bool(threads))
    assert threads[0] is not threading.main_thread()


@on_loop
async def test_failures_are_logged_and_counted_and_the_next_run_comes(bench: Bench) -> None:
    @bench.app.every(1, where="each", name="broken")
    async def tick() -> None:
        raise ValueError("no number")

    @bench.app.every(1, where="each", name="refused")
    async def publish() -> None:
        raise ClientError(102, "unknown channel")

    await begin(bench)
    bench.clock.pump([1.0, 1.0])
    assert bench.count("error", "every broken") == 2
    assert bench.count("refused", "every refused") == 2
    assert any(event.get("log_failure") is not None for event in bench.logged)
    (line,) = lines(bench)  # once a minute
    assert line.startswith("every refused at ") and "unknown channel" in line


@on_loop
async def test_no_run_begins_after_the_stop(bench: Bench) -> None:
    seen: list[float] = []

    @bench.app.every(1, where="each")
    async def tick() -> None:
        seen.append(bench.clock.seconds())

    await begin(bench)
    bench.clock.advance(1)
    assert bench.dispatcher is not None
    bench.dispatcher.stop_recurring("each")
    bench.clock.pump([1.0, 1.0])
    assert seen == [1]
    assert not bench.clock.getDelayedCalls()


# Runs on one worker of all.


@on_loop
async def test_runs_of_one_worker_begin_at_multiples_of_the_interval(bench: Bench) -> None:
    seen: list[tuple[float, int]] = []

    @bench.app.every(10)
    async def tick(term: int) -> None:
        seen.append((bench.clock.seconds(), term))

    bench.wall_time = 1_000_003.0
    dispatcher = await bench.start()
    dispatcher.find_term(lambda: 7)
    dispatcher.start_recurring("each")
    bench.clock.pump([1.0] * 10)
    assert not seen
    dispatcher.start_recurring("one")
    bench.clock.pump([1.0] * 20)
    assert seen == [(17, 7), (27, 7)]


@on_loop
async def test_no_run_begins_outside_of_a_term(bench: Bench) -> None:
    seen: list[float] = []
    terms = {1.0: 1, 2.0: 0, 3.0: 1}

    @bench.app.every(1)
    async def tick() -> None:
        seen.append(bench.clock.seconds())

    dispatcher = await bench.start()
    dispatcher.find_term(lambda: terms[bench.clock.seconds()])
    dispatcher.start_recurring("one")
    bench.clock.pump([1.0] * 3)
    assert seen == [1, 3]


@on_loop
async def test_a_lost_term_cancels_the_run_and_a_new_one_waits_for_its_end(bench: Bench) -> None:
    begun: list[asyncio.Event] = []
    cleanup = asyncio.Event()

    @bench.app.every(1, timeout=0)
    async def tick() -> None:
        begun.append(asyncio.Event())
        try:
            await asyncio.Event().wait()
        finally:
            begun[-1].set()
            await cleanup.wait()

    dispatcher = await bench.start()
    dispatcher.find_term(lambda: 1)
    dispatcher.start_recurring("one")
    bench.clock.advance(1)
    assert dispatcher.is_running_once()
    dispatcher.give_up_recurring()
    await begun[0].wait()
    dispatcher.start_recurring("one")
    bench.clock.pump([1.0, 1.0])
    assert len(begun) == 1
    cleanup.set()
    await until(lambda: bench.clock.advance(1) or len(begun) > 1)
    dispatcher.give_up_recurring()


@on_loop
async def test_a_clock_that_is_set_back_does_not_stop_the_runs(bench: Bench) -> None:
    seen: list[float] = []

    @bench.app.every(1)
    async def tick() -> None:
        seen.append(bench.clock.seconds())

    bench.wall_time = 10_000.0
    dispatcher = await bench.start()
    dispatcher.find_term(lambda: 1)
    dispatcher.start_recurring("one")
    bench.clock.advance(1)
    bench.wall_time = 5_000.0
    bench.clock.pump([1.0] * 3)
    assert seen == [1, 2, 3, 4]
