"""Calls of handlers: the result or the exception that the caller gets, whatever the handler does."""

from __future__ import annotations

import asyncio
import threading
import time
from contextvars import ContextVar
from functools import partial
from typing import Any

import msgspec
import pytest
from twisted.internet.defer import Deferred, inlineCallbacks, succeed
from twisted.internet.threads import deferToThread

from realtime.app import App, Request
from realtime.errors import ClientError, Disconnect, EngineUnavailable, HandlerTimeout
from realtime.handlers.call import never_waits
from realtime.handlers.coroutines import drive, start_future
from tests.driving import on_loop
from tests.handlers.bench import Bench, FakeClient, refusal, until


@on_loop
async def test_coroutine_gets_client_and_data_and_returns_the_answer(bench: Bench) -> None:
    @bench.app.rpc("f")
    async def f(client: Any, data: Any) -> Any:
        return {"user": client.user, "data": data}

    await bench.start()
    assert await bench.call("f", [1]) == {"user": "ada", "data": [1]}
    assert bench.count("ok") == 1


class Order(msgspec.Struct):
    article: str
    number: int = 1


@pytest.mark.parametrize("run", ["loop", "thread", "auto"])
@on_loop
async def test_typed_data_arrive_converted_or_are_refused(bench: Bench, run: Any) -> None:
    @bench.app.rpc("f", run=run)
    def f(data: Order) -> Order:
        return Order(data.article, data.number + 1)

    await bench.start()
    assert await bench.call("f", {"article": "pen"}) == {"article": "pen", "number": 2}
    error = await refusal(bench.call("f", {"article": "pen", "number": "two"}))
    assert (error.code, error.message) == (400, "Expected `int`, got `str` - at `$.number`")
    assert (bench.count("ok"), bench.count("refused")) == (1, 1)


@on_loop
async def test_a_coroutine_that_never_waits_gets_typed_data_at_once(bench: Bench) -> None:
    @bench.app.rpc("f")
    async def f(client: Any, data: Order) -> str:
        return data.article

    call = (await bench.start()).procedure("f")
    assert call is not None and call.is_immediate
    assert call.call_now(bench.client, {"article": "pen"}) == msgspec.Raw(b'"pen"')
    with pytest.raises(ClientError, match="400: Expected `object`, got `array`"):
        call.call_now(bench.client, [])
    assert (bench.count("ok"), bench.count("refused")) == (1, 1)


@on_loop
async def test_deferreds_and_asyncio_awaitables_mix(bench: Bench) -> None:
    fired: Deferred[str] = Deferred()
    already: Deferred[str] = Deferred()
    already.callback("at once")

    @bench.app.rpc("f")
    async def f(data: Any) -> Any:
        await asyncio.sleep(0)
        one = await already
        asyncio.get_running_loop().call_soon(fired.callback, "later")
        two = await fired
        three = await asyncio.gather(asyncio.sleep(0, "a"), asyncio.sleep(0.001, "b"))
        four = await deferToThread(lambda: "thread")
        return [one, two, three, four]

    await bench.start()
    assert await bench.call("f") == ["at once", "later", ["a", "b"], "thread"]


@on_loop
async def test_failure_of_a_deferred_is_raised_at_the_await(bench: Bench) -> None:
    failing: Deferred[None] = Deferred()

    @bench.app.rpc("f")
    async def f(data: Any) -> Any:
        asyncio.get_running_loop().call_soon(failing.errback, KeyError("lost"))
        try:
            await failing
        except KeyError as error:
            return repr(error)

    await bench.start()
    assert await bench.call("f") == "KeyError('lost')"


@on_loop
async def test_coroutine_runs_in_a_task(bench: Bench) -> None:
    @bench.app.rpc("f")
    async def f(data: Any) -> Any:
        assert asyncio.current_task() is not None
        try:
            async with asyncio.timeout(0.001):
                await Deferred()
        except TimeoutError:
            return "timed out"

    await bench.start()
    assert await bench.call("f") == "timed out"


@on_loop
async def test_context_reaches_the_handler_and_its_changes_stay_there(bench: Bench) -> None:
    setting: ContextVar[str] = ContextVar("setting")
    setting.set("outer")

    def change() -> str:
        before = setting.get()
        setting.set("inner")
        return before

    @bench.app.rpc("loop")
    async def loop(data: Any) -> Any:
        before = change()
        await asyncio.sleep(0)
        return [before, setting.get()]

    @bench.app.rpc("thread")
    def thread(data: Any) -> Any:
        return [change(), setting.get()]

    await bench.start()
    for method in ("loop", "thread"):
        assert await bench.call(method) == ["outer", "inner"]
        assert setting.get() == "outer"


@on_loop
async def test_plain_function_on_the_loop_may_return_a_fired_deferred(bench: Bench) -> None:
    @bench.app.rpc("f", run="loop")
    def f(client: Any, data: Any) -> Any:
        return succeed("fired before")

    await bench.start()
    assert await bench.call("f") == "fired before"


@on_loop
async def test_plain_function_on_the_loop_may_return_a_deferred(bench: Bench) -> None:
    @bench.app.rpc("f", run="loop")
    @inlineCallbacks
    def f(client: Any, data: Any) -> Any:
        result = yield deferToThread(lambda: "from a thread")
        return result

    await bench.start()
    assert await bench.call("f") == "from a thread"


# Exceptions.


def declare_failing(app: App, kind: str, error: BaseException) -> None:
    if kind == "thread":

        @app.rpc("f")
        def plain(data: Any) -> Any:
            raise error

    elif kind == "at once":

        @app.rpc("f")
        async def at_once(data: Any) -> Any:
            raise error

    else:

        @app.rpc("f")
        async def later(data: Any) -> Any:
            await asyncio.sleep(0)
            raise error


KINDS = ["thread", "at once", "later"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "error", [ValueError("secret"), SystemExit(3), StopIteration(1), KeyboardInterrupt(), asyncio.CancelledError()]
)
@on_loop
async def test_unexpected_exception_is_logged_once_and_answered_as_internal_error(
    bench: Bench, kind: str, error: BaseException
) -> None:
    declare_failing(bench.app, kind, error)
    await bench.start()
    refused = await refusal(bench.call("f"))
    assert (refused.code, refused.message, refused.temporary) == (100, "internal server error", True)
    [event] = bench.logged
    assert event["handler"] == "rpc f"
    assert event["place"].startswith(__file__)
    assert event["log_failure"].getTracebackObject() is not None or isinstance(error, asyncio.CancelledError)
    assert bench.count("error") == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("error", [ClientError(4000 - 3000, "no"), Disconnect(4500, "go away")])
@on_loop
async def test_refusals_reach_the_caller_and_are_not_logged(bench: Bench, kind: str, error: Exception) -> None:
    declare_failing(bench.app, kind, error)
    await bench.start()
    with pytest.raises(type(error)) as caught:
        await bench.call("f")
    assert caught.value is error
    assert bench.logged == []
    assert bench.count("refused") == 1


@on_loop
async def test_engine_outage_is_not_logged_as_an_error_of_the_handler(bench: Bench) -> None:
    declare_failing(bench.app, "at once", EngineUnavailable("gone"))
    await bench.start()
    assert (await refusal(bench.call("f"))).temporary
    assert bench.logged == []
    assert bench.count("unavailable") == 1


# Timeouts and limits.


@on_loop
async def test_coroutine_is_cancelled_at_its_deadline(bench: Bench) -> None:
    cancelled = []

    @bench.app.rpc("f", timeout=5)
    async def f(data: Any) -> Any:
        try:
            await Deferred()
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    await bench.start()
    call = bench.begin("f")
    await until(lambda: bool(bench.clock.getDelayedCalls()))
    bench.clock.advance(4.9)
    await asyncio.sleep(0)
    assert not call.done()
    bench.clock.advance(0.2)
    assert (await refusal(call)).temporary
    await until(lambda: bool(cancelled))
    assert bench.count("timeout") == 1
    assert bench.logged == []


@on_loop
async def test_caller_is_answered_even_when_the_coroutine_ignores_cancellation(bench: Bench) -> None:
    began, release = asyncio.Event(), asyncio.Event()

    @bench.app.rpc("f", limit=1)
    async def f(data: Any) -> Any:
        began.set()
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue
        raise ValueError("after all")

    await bench.start(handler_timeout=3)
    call = bench.begin("f")
    await began.wait()
    bench.clock.advance(3)
    await refusal(call)
    release.set()
    await until(lambda: bool(bench.logged))
    assert "after all" in str(bench.logged[0]["log_failure"].value)


@pytest.mark.parametrize("kind", ["loop", "thread"])
@on_loop
async def test_limit_of_one_handler_leaves_the_others_alone(bench: Bench, kind: str) -> None:
    inside: list[int] = []
    most = []
    lock = threading.Lock()

    def enter(data: int) -> None:
        with lock:
            inside.append(data)
            most.append(len(inside))

    if kind == "loop":

        @bench.app.rpc("f", limit=2)
        async def f(data: Any) -> Any:
            enter(data)
            await asyncio.sleep(0.001)
            inside.remove(data)
            return data
    else:

        @bench.app.rpc("f", limit=2)
        def f(data: Any) -> Any:
            enter(data)
            time.sleep(0.002)
            with lock:
                inside.remove(data)
            return data

    @bench.app.rpc("g")
    def g(data: Any) -> Any:
        return "free"

    await bench.start(threads=8)
    calls = [bench.begin("f", number) for number in range(10)]
    assert await bench.call("g") == "free"
    assert await asyncio.gather(*calls) == list(range(10))
    assert max(most) == 2


@on_loop
async def test_cancelling_the_caller_cancels_the_coroutine(bench: Bench) -> None:
    seen = []

    @bench.app.rpc("f")
    async def f(data: Any) -> Any:
        try:
            seen.append("began")
            await asyncio.Event().wait()
        finally:
            seen.append("ended")

    await bench.start()
    call = bench.begin("f")
    await until(lambda: bool(seen))
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await until(lambda: len(seen) == 2)
    assert bench.count("cancelled") == 1
    assert bench.logged == []
    assert not bench.clock.getDelayedCalls()


@on_loop
async def test_call_raises_a_timeout_as_such(bench: Bench) -> None:
    @bench.app.http.get("/slow", timeout=2)
    async def slow(request: Any) -> Any:
        await Deferred()

    await bench.start()
    route = bench.dispatcher.route("GET", "/slow")  # type: ignore[union-attr]
    call = start_future(route.call(Request("GET", "/slow", {}, {}, b"")))
    await until(lambda: bool(bench.clock.getDelayedCalls()))
    bench.clock.advance(2)
    with pytest.raises(HandlerTimeout, match="GET /slow"):
        await call


@on_loop
async def test_an_answer_does_not_wait_for_handlers_that_go_on_in_the_same_turn(bench: Bench) -> None:
    gate = asyncio.Event()
    order: list[str] = []

    @bench.app.rpc("f")
    async def f(data: Any) -> Any:
        await gate.wait()
        order.append(f"{data} ran")

    await bench.start()
    procedure = bench.dispatcher.procedure("f")  # type: ignore[union-attr]
    assert procedure is not None
    for name in ("one", "two"):
        drive(procedure(FakeClient(), name), lambda result, error, name=name: order.append(f"{name} answered"))
    gate.set()
    await until(lambda: len(order) == 4)
    assert order == ["one ran", "one answered", "two ran", "two answered"]


# Coroutines that never wait.


async def nothing_to_wait_for(client: Any, data: Any) -> Any:
    return [str(item) for item in data] or {"data": data}


async def one_await(client: Any, data: Any) -> Any:
    if data:
        await asyncio.sleep(0)


async def in_a_comprehension(client: Any, data: Any) -> Any:
    return [await item for item in data]


async def a_context(client: Any, data: Any) -> Any:
    async with data:
        pass


async def a_loop(client: Any, data: Any) -> Any:
    async for _ in data:
        pass


async def a_generator(client: Any, data: Any) -> Any:
    yield data


def plain(client: Any, data: Any) -> Any:
    return one_await(client, data)


@pytest.mark.parametrize(
    ("function", "never"),
    [
        (nothing_to_wait_for, True),
        (one_await, False),
        (in_a_comprehension, False),
        (a_context, False),
        (a_loop, False),
        (a_generator, False),
        (plain, False),
        (partial(nothing_to_wait_for, None), False),
        (FakeClient, False),
    ],
)
def test_coroutine_without_an_await_never_waits(function: Any, never: bool) -> None:
    assert never_waits(function) is never


@on_loop
@pytest.mark.parametrize("error", [ValueError("its own"), SystemExit(1), StopIteration()])
async def test_unexpected_exception_of_a_coroutine_that_never_waits(bench: Bench, error: BaseException) -> None:
    @bench.app.rpc("f")
    async def f(client: Any, data: Any) -> Any:
        raise error

    await bench.start()
    assert (await refusal(bench.call("f"))).code == 100
    assert bench.count("error") == 1


@on_loop
async def test_immediate_call_does_what_an_awaited_one_does(bench: Bench) -> None:
    where: ContextVar[str] = ContextVar("where", default="outside")
    seen = []

    @bench.app.rpc("f")
    async def f(client: Any, data: Any) -> Any:
        seen.append((where.get(), list(bench.marker.running)))
        where.set("inside")
        if data is None:
            raise ClientError(400, "no")
        return {"user": client.user, "data": data}

    procedure = (await bench.start()).procedure("f")
    assert procedure is not None and procedure.is_immediate
    assert msgspec.json.decode(procedure.call_now(bench.client, [1])) == {"user": "ada", "data": [1]}
    with pytest.raises(ClientError) as refused:
        procedure.call_now(bench.client, None)
    assert refused.value.code == 400
    # Each call has a context of its own, and is marked while it runs.
    assert seen == [("outside", [(b"rpc f", b"f")])] * 2
    assert where.get() == "outside"
    assert bench.marker.running == []
    assert (bench.count("ok"), bench.count("refused")) == (1, 1)


@on_loop
async def test_unexpected_exception_of_an_immediate_call(bench: Bench) -> None:
    @bench.app.rpc("f")
    async def f(client: Any, data: Any) -> Any:
        raise RuntimeError("a bug")

    procedure = (await bench.start()).procedure("f")
    assert procedure is not None
    for _ in range(2):
        with pytest.raises(ClientError) as caught:
            procedure.call_now(bench.client, 1)
        assert (caught.value.code, caught.value.temporary) == (100, True)
    assert bench.count("error") == 2
    assert len(bench.logged) == 1
    assert bench.marker.running == []


@on_loop
async def test_handlers_that_may_wait_are_never_immediate(bench: Bench) -> None:
    @bench.app.rpc("waits")
    async def waits(client: Any, data: Any) -> None:
        await asyncio.sleep(0)

    @bench.app.rpc("in a thread")
    def in_a_thread(client: Any, data: Any) -> None: ...

    @bench.app.rpc("limited", limit=1)
    async def limited(client: Any, data: Any) -> None: ...

    dispatcher = await bench.start()
    for method in ("waits", "in a thread", "limited"):
        procedure = dispatcher.procedure(method)
        assert procedure is not None and not procedure.is_immediate, method
