"""The driver for our own coroutines: on the caller's stack, over Deferreds and asyncio alike."""

from __future__ import annotations

import asyncio
from contextvars import ContextVar
from typing import Any

import pytest
from twisted.internet.defer import CancelledError, Deferred, fail, succeed

from realtime.handlers.coroutines import drive, eager_task, gather, start_future
from tests.driving import on_loop


class Outcome:
    """Takes what `drive` reports, once."""

    def __init__(self) -> None:
        self.got: list[tuple[Any, BaseException | None]] = []
        self.there = asyncio.Event()

    def __call__(self, result: Any, error: BaseException | None) -> None:
        self.got.append((result, error))
        self.there.set()

    @property
    def result(self) -> Any:
        [(result, error)] = self.got
        assert error is None
        return result

    @property
    def error(self) -> BaseException | None:
        [(_, error)] = self.got
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
    assert outcome.got == []
    future.set_result("set")
    await outcome.there.wait()
    assert outcome.result == ["fired", "set", "slept"]


@on_loop
async def test_resumes_on_the_stack_of_whoever_fires_the_deferred() -> None:
    deferred: Deferred[int] = Deferred()

    async def work() -> int:
        return await deferred + 1

    outcome = Outcome()
    drive(work(), outcome)
    deferred.callback(1)
    assert outcome.result == 2


@pytest.mark.parametrize("at_once", [True, False])
@on_loop
async def test_errors_arrive_as_they_are(at_once: bool) -> None:
    error = ValueError("no")
    deferred: Deferred[None] = Deferred()

    async def work() -> None:
        await (fail(error) if at_once else deferred)

    outcome = Outcome()
    drive(work(), outcome)
    if not at_once:
        deferred.errback(error)
    assert outcome.error is error


@on_loop
async def test_coroutine_may_catch_and_go_on() -> None:
    async def work() -> str:
        try:
            await fail(KeyError("x"))
        except KeyError:
            await asyncio.sleep(0)
        return "went on"

    outcome = Outcome()
    drive(work(), outcome)
    await outcome.there.wait()
    assert outcome.result == "went on"


@on_loop
async def test_what_can_not_be_awaited_is_an_error_in_the_coroutine() -> None:
    class Odd:
        def __await__(self) -> Any:
            yield "what is this"

    async def work() -> None:
        await Odd()

    outcome = Outcome()
    drive(work(), outcome)
    assert isinstance(outcome.error, TypeError)


@pytest.mark.parametrize("awaits", ["deferred", "future", "turn"])
@on_loop
async def test_cancel_reaches_what_is_awaited(awaits: str) -> None:
    async def work() -> None:
        match awaits:
            case "deferred":
                await Deferred()
            case "future":
                await asyncio.get_running_loop().create_future()
            case "turn":
                await asyncio.sleep(0)

    outcome = Outcome()
    running = drive(work(), outcome)
    assert running is not None
    running.cancel()
    await outcome.there.wait()
    assert isinstance(outcome.error, CancelledError | asyncio.CancelledError)
    running.cancel()  # harmless when all is over


@on_loop
async def test_context_is_a_copy_that_lasts() -> None:
    setting: ContextVar[str] = ContextVar("setting", default="outer")
    deferred: Deferred[None] = Deferred()

    async def work() -> str:
        setting.set("inner")
        await deferred
        return setting.get()

    outcome = Outcome()
    drive(work(), outcome)
    assert setting.get() == "outer"
    deferred.callback(None)
    assert outcome.result == "inner"


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
async def test_together_starts_all_in_order_and_keeps_it() -> None:
    eager_task = []
    waits: list[Deferred[str]] = [Deferred(), Deferred()]

    async def work(number: int) -> str:
        eager_task.append(number)
        return await waits[number]

    answers = start_future(gather([work(0), work(1)]))
    assert eager_task == [0, 1]
    waits[1].callback("b")
    waits[0].callback("a")
    assert await answers == ["a", "b"]


@on_loop
async def test_a_begun_task_that_never_waits_is_done_at_once() -> None:
    async def quick() -> Any:
        return asyncio.current_task()

    task = eager_task(quick())
    assert task.done()
    assert task.result() is task


@on_loop
async def test_a_begun_task_waits_times_out_and_is_cancelled_as_any() -> None:
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
async def test_a_task_begins_another_in_its_midst() -> None:
    async def outer() -> list[Any]:
        inner = eager_task(asyncio.sleep(0, "inner"))
        return [asyncio.current_task(), await inner]

    task = eager_task(outer())
    assert await task == [task, "inner"]


@on_loop
async def test_a_begun_task_has_its_own_context() -> None:
    name: ContextVar[str] = ContextVar("name", default="none")

    async def named() -> None:
        name.set("its own")

    eager_task(named())
    assert name.get() == "none"


@on_loop
async def test_what_a_begun_task_raises_is_kept_in_it() -> None:
    async def fails() -> None:
        raise ValueError("its own")

    task = eager_task(fails())
    with pytest.raises(ValueError, match="its own"):
        await task
