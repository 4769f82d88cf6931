"""Coroutines on the caller's stack, which await Deferreds and asyncio's awaitables alike."""

from __future__ import annotations

import asyncio
from contextvars import ContextVar
from typing import Any

import pytest
from twisted.internet.defer import CancelledError, Deferred, fail, succeed

from realtime.handlers.coroutines import drive, eager_task, gather, start_future
from tests.driving import on_loop


class Outcome:
    """Records the one outcome that `drive` reports."""

    def __init__(self) -> None:
        self.reports: list[tuple[Any, BaseException | None]] = []
        self.done = asyncio.Event()

    def __call__(self, result: Any, error: BaseException | None) -> None:
        self.reports.append((result, error))
        self.done.set()

    @property
    def result(self) -> Any:
        [(result, error)] = self.reports
        assert error is None
        return result

    @property
    def error(self) -> BaseException | None:
        [(_, error)] = self.reports
        return error


@on_loop
async def test_finishes_on_the_callers_stack_without_waiting() -> None:
    async def work() -> Any:
        return [await succeed(1), await succeed(2)]

    outcome = Outcome()
    assert drive(work(), outcome) is None
    assert outcome.result == [1, 2]


@on_loop
async def test_waits_for_deferreds_and_futures() -> None:
    deferred: Deferred[str] = Deferred()
    future: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def work() -> Any:
        return [await deferred, await future, await asyncio.sleep(0, "slept")]

    outcome = Outcome()
    assert drive(work(), outcome) is not None
    deferred.callback("fired")
    assert outcome.reports == []
    future.set_result("set")
    await outcome.done.wait()
    assert outcome.result == ["fired", "set", "slept"]


@on_loop
async def test_resumes_on_the_stack_that_fires_the_deferred() -> None:
    deferred: Deferred[int] = Deferred()

    async def work() -> int:
        return await deferred + 1

    outcome = Outcome()
    drive(work(), outcome)
    deferred.callback(1)
    assert outcome.result == 2


@pytest.mark.parametrize("already_failed", [True, False])
@on_loop
async def test_errors_arrive_unchanged(already_failed: bool) -> None:
    error = ValueError("no")
    deferred: Deferred[None] = Deferred()

    async def work() -> None:
        await (fail(error) if already_failed else deferred)

    outcome = Outcome()
    drive(work(), outcome)
    if not already_failed:
        deferred.errback(error)
    assert outcome.error is error


@on_loop
async def test_coroutine_may_catch_an_error_and_continue() -> None:
    async def work() -> str:
        try:
            await fail(KeyError("x"))
        except KeyError:
            await asyncio.sleep(0)
        return "continued"

    outcome = Outcome()
    drive(work(), outcome)
    await outcome.done.wait()
    assert outcome.result == "continued"


@on_loop
async def test_an_unknown_awaitable_raises_in_the_coroutine() -> None:
    class Odd:
        def __await__(self) -> Any:
            yield "no future"

    async def work() -> None:
        await Odd()

    outcome = Outcome()
    drive(work(), outcome)
    assert isinstance(outcome.error, TypeError)


@pytest.mark.parametrize("awaits", ["deferred", "future", "turn"])
@on_loop
async def test_cancel_reaches_the_awaited_object(awaits: str) -> None:
    async def work() -> None:
        match awaits:
            case "deferred":
                await Deferred()
            case "future":
                await asyncio.get_running_loop().create_future()
            case "turn":
                await asyncio.sleep(0)

    outcome = Outcome()
    driver = drive(work(), outcome)
    assert driver is not None
    driver.cancel()
    await outcome.done.wait()
    assert isinstance(outcome.error, CancelledError | asyncio.CancelledError)
    driver.cancel()  # harmless after the end


@on_loop
async def test_the_context_of_a_future_is_a_copy_that_is_kept_between_steps() -> None:
    setting: ContextVar[str] = ContextVar("setting", default="outer")
    deferred: Deferred[None] = Deferred()

    async def work() -> str:
        setting.set("inner")
        await deferred
        return setting.get()

    future = start_future(work())
    assert setting.get() == "outer"
    deferred.callback(None)
    assert await future == "inner"


@on_loop
async def test_cancelling_a_started_future_cancels_its_coroutine() -> None:
    cancelled: list[bool] = []
    deferred: Deferred[None] = Deferred(canceller=lambda _: cancelled.append(True))

    async def work() -> None:
        await deferred

    start_future(work()).cancel()
    await asyncio.sleep(0)
    assert cancelled == [True]


@on_loop
async def test_gather_starts_all_in_order_and_keeps_the_order() -> None:
    started = []
    waits: list[Deferred[str]] = [Deferred(), Deferred()]

    async def work(number: int) -> str:
        started.append(number)
        return await waits[number]

    answers = start_future(gather([work(0), work(1)]))
    assert started == [0, 1]
    waits[1].callback("b")
    waits[0].callback("a")
    assert await answers == ["a", "b"]


@on_loop
async def test_an_eager_task_that_never_waits_is_done_at_once() -> None:
    async def quick() -> Any:
        return asyncio.current_task()

    task = eager_task(quick())
    assert task.done()
    assert task.result() is task


@on_loop
async def test_an_eager_task_waits_times_out_and_is_cancelled_as_any() -> None:
    async def slow() -> Any:
        async with asyncio.timeout(0.01):
            await asyncio.sleep(60)

    with pytest.raises(TimeoutError):
        await eager_task(slow())
    task = eager_task(asyncio.sleep(60))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@on_loop
async def test_a_task_starts_an_eager_task_during_its_step() -> None:
    async def outer() -> list[Any]:
        inner = eager_task(asyncio.sleep(0, "inner"))
        return [asyncio.current_task(), await inner]

    task = eager_task(outer())
    assert await task == [task, "inner"]


@on_loop
async def test_an_eager_task_has_its_own_context() -> None:
    name: ContextVar[str] = ContextVar("name", default="none")

    async def named() -> None:
        name.set("its own")

    eager_task(named())
    assert name.get() == "none"


@on_loop
async def test_the_exception_of_an_eager_task_is_kept_in_it() -> None:
    async def fails() -> None:
        raise ValueError("its own")

    task = eager_task(fails())
    with pytest.raises(ValueError, match="its own"):
        await task
