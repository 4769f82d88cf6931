"""The log of exceptions that handlers raise, and the counters of outcomes."""

from __future__ import annotations

from typing import Any

from twisted.internet.task import Clock
from twisted.logger import Logger

from realtime.app import App
from realtime.handlers.compute_pool import HandlerFailed
from realtime.handlers.outcomes import MAX_LINES, HandlerErrorLog, OutcomeCounters
from realtime.metrics import Metrics
from tests.driving import on_loop
from tests.handlers.bench import Bench, refusal


@on_loop
async def test_line_is_logged_once_a_minute_with_the_number_left_out(bench: Bench) -> None:
    @bench.app.rpc("f")
    async def f(data: Any) -> Any:
        if data == "other":
            raise ValueError("another place")
        raise ValueError(data)

    await bench.start()
    for data in range(5):
        await refusal(bench.call("f", data))
    assert len(bench.logged) == 1
    await refusal(bench.call("f", "other"))
    assert len(bench.logged) == 2
    bench.clock.advance(60)
    await refusal(bench.call("f", 5))
    assert "4 times more" in bench.logged[2]["repeats"]
    bench.clock.advance(60)
    await refusal(bench.call("f", 6))
    assert bench.logged[3]["repeats"] == ""


def test_code_generated_at_run_time_fills_neither_memory_nor_log() -> None:
    logged: list[dict[str, Any]] = []
    error_log = HandlerErrorLog(Logger(observer=logged.append), Clock(), Metrics())
    app = App()
    app.rpc("f")(lambda data: data)
    handler = app.handlers("rpc")["f"]
    for number in range(2500):
        error_log.report(handler, HandlerFailed("no", (f"generated {number}", 1)))
    assert len(logged) == len(error_log._repetition) == MAX_LINES


def test_same_line_of_two_handlers_is_logged_for_each() -> None:
    logged: list[dict[str, Any]] = []
    error_log = HandlerErrorLog(Logger(observer=logged.append), Clock(), Metrics())
    app = App()
    for name in "fg":
        app.rpc(name)(lambda data: data)
        for _ in range(3):
            error_log.report(app.handlers("rpc")[name], HandlerFailed("no", ("report.py", 7)))
    assert [event["handler"] for event in logged] == ["rpc f", "rpc g"]


def test_outcomes_are_counted_by_handler() -> None:
    metrics = Metrics()
    counters = OutcomeCounters(metrics, "rpc f")
    for outcome in ("ok", "ok", "timeout"):
        counters[outcome].value += 1
    assert {dict(sample.labels)["outcome"]: sample.value for sample in metrics.snapshot()} == {"ok": 2, "timeout": 1}


def test_errors_are_counted_by_type_within_a_bound() -> None:
    metrics = Metrics()
    error_log = HandlerErrorLog(Logger(observer=lambda event: None), Clock(), metrics, max_series=20)
    app = App()
    app.rpc("a")(lambda client, data: None)
    handler = app.handlers("rpc")["a"]
    error_log.report(handler, KeyError("x"))
    error_log.report(handler, KeyError("y"))
    error_log.report(handler, HandlerFailed("in its process", ("a.py", 1), "ValueError"))
    for number in range(20 + 10):
        error_log.report(handler, type(f"Made{number}", (Exception,), {})())
    counted = {dict(sample.labels)["exception"]: sample.value for sample in metrics.snapshot()}
    assert (counted["KeyError"], counted["ValueError"], counted["Made0"]) == (2, 1, 1)
    assert counted["other"] == 12
    assert len(counted) == 20 + 1
