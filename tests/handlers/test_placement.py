"""Where a function with run="auto" runs, on a clock that the test moves."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from twisted.logger import Logger

from realtime.app import App
from realtime.config.settings import WorkersSettings
from realtime.errors import ClientError
from realtime.handlers.call import HandlerServices
from realtime.handlers.dispatch import Dispatcher
from realtime.handlers.placement import QUIET_PERIOD, WINDOW, Placement
from realtime.metrics import Metrics
from tests.driving import on_loop
from tests.handlers.bench import ClockedReactor

SLOW = 0.05


def record_calls(auto: Placement, *calls: tuple[float, float]) -> list[bool]:
    """Record calls as (seconds, time of the end) in the place that the function has at that time."""
    return [auto.record(seconds, auto.place, now) for seconds, now in calls]


def test_quick_calls_stay_on_the_loop() -> None:
    auto = Placement(SLOW)
    assert not any(record_calls(auto, *((0.049, now / 10) for now in range(1000))))
    assert auto.place == "loop"


def test_the_third_slow_call_within_a_minute_moves_to_threads() -> None:
    auto = Placement(SLOW)
    assert record_calls(auto, (SLOW, 100.0), (0.001, 101.0), (0.3, 130.0), (0.001, 131.0), (0.3, 100.0 + WINDOW)) == [
        False,
        False,
        False,
        False,
        True,
    ]
    assert auto.place == "thread"


def test_slow_calls_that_are_further_apart_stay_on_the_loop() -> None:
    auto = Placement(SLOW)
    assert not any(record_calls(auto, *((1.0, number * (WINDOW / 2 + 0.1)) for number in range(100))))


def test_without_a_limit_nothing_is_slow() -> None:
    auto = Placement(0.0)
    assert not any(record_calls(auto, *((9.0, number) for number in range(100))))


def in_threads(now: float) -> Placement:
    auto = Placement(SLOW)
    record_calls(auto, *[(1.0, now)] * 3)
    assert auto.place == "thread"
    return auto


def test_a_quiet_period_moves_back_to_the_loop() -> None:
    auto = in_threads(100.0)
    assert record_calls(auto, (0.01, 100.0 + QUIET_PERIOD - 0.1), (0.01, 100.0 + QUIET_PERIOD)) == [False, True]
    assert auto.place == "loop"


def test_a_slow_call_starts_the_quiet_period_anew() -> None:
    auto = in_threads(100.0)
    calls = (
        (0.01, 140.0),
        (SLOW, 150.0),
        (0.01, 100.0 + QUIET_PERIOD),
        (0.01, 149.9 + QUIET_PERIOD),
        (0.01, 150.0 + QUIET_PERIOD),
    )
    assert record_calls(auto, *calls) == [False, False, False, False, True]


def test_back_on_the_loop_it_takes_three_again() -> None:
    auto = in_threads(100.0)
    record_calls(auto, (0.01, 100.0 + QUIET_PERIOD))
    assert record_calls(auto, (1.0, 161.0), (1.0, 162.0), (1.0, 163.0)) == [False, False, True]


def test_calls_that_began_before_the_move_do_not_count_after_it() -> None:
    auto = in_threads(100.0)
    assert not auto.record(0.01, "loop", 100.0 + QUIET_PERIOD)
    assert auto.place == "thread"


# The moves of a handler.


class Bench:
    """One handler with run="auto", called with the seconds that it takes; negative: it raises after that time."""

    def __init__(self) -> None:
        self.metrics = Metrics()
        self.clock = ClockedReactor()
        self.logged: list[str] = []
        app = App()
        app.rpc("f", run="auto")(self.f)
        log = Logger(observer=self._observe)
        services = HandlerServices(self.clock, WorkersSettings(handler_timeout=0), self.metrics, log, slow_call=0.01)
        self.dispatcher = Dispatcher(app, services)

    def f(self, data: float) -> str:
        time.sleep(abs(data))
        if data < 0:
            raise ClientError(444, "no")
        return "loop" if threading.current_thread() is threading.main_thread() else "thread"

    def _observe(self, event: dict[str, Any]) -> None:
        self.logged.append(event["log_format"].format(**event))

    async def call(self, seconds: float) -> str:
        procedure = self.dispatcher.procedure("f")
        assert procedure is not None
        return bytes(await procedure(None, seconds)).decode().strip('"')

    def moves(self, to: str) -> float:
        labels = [("handler", "rpc f"), ("to", to)]
        return next(sample.value for sample in self.metrics.snapshot() if sample.labels == labels)


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.dispatcher.threads._pool.stop()


@on_loop
async def test_a_handler_moves_to_threads_and_back_with_a_line_and_a_count_each(bench: Bench) -> None:
    await bench.dispatcher.start()
    assert [await bench.call(0.02) for _ in range(4)] == ["loop", "loop", "loop", "thread"]
    assert (bench.moves("thread"), bench.moves("loop")) == (1, 0)
    [line] = bench.logged
    assert line.startswith("handler rpc f at ")
    assert "runs in threads from now on" in line
    while bench.moves("loop") == 0:
        bench.clock.advance(QUIET_PERIOD)
        assert await bench.call(0.002) == "thread"
        await asyncio.sleep(0)
    assert await bench.call(0.002) == "loop"
    assert len(bench.logged) == 2


@on_loop
async def test_calls_that_raise_count_too(bench: Bench) -> None:
    await bench.dispatcher.start()
    for _ in range(3):
        with pytest.raises(ClientError):
            await bench.call(-0.02)
    assert bench.moves("thread") == 1
