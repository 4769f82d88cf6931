"""The dispatcher: handlers by event, the methods of the App, and the start and stop of the pools."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import Any

import pytest

from realtime.errors import ApplicationFailed, ClientError
from realtime.handlers.coroutines import start_future
from realtime.handlers.dispatch import POLL_INTERVAL
from tests.driving import on_loop
from tests.handlers.bench import Bench, refusal, until


@on_loop
async def test_missing_handlers_are_none(bench: Bench) -> None:
    dispatcher = await bench.start()
    assert dispatcher.connecting is None
    assert dispatcher.disconnected is None
    assert dispatcher.message is None
    assert dispatcher.subscribing("news") is None
    assert dispatcher.publishing("news") is None
    assert dispatcher.procedure("f") is None
    assert dispatcher.route("GET", "/") is None
    assert not dispatcher.has_procedures


# Methods of the App.


class EchoServer:
    """A server whose history answers with its arguments, on the loop, after a turn."""

    async def history(self, channel: str, **options: Any) -> Any:
        assert threading.current_thread() is threading.main_thread()
        await asyncio.sleep(0)
        if channel == "none":
            raise ClientError(102, "unknown channel")
        return (channel, options["limit"])


@pytest.mark.parametrize("kind", ["loop", "thread"])
@on_loop
async def test_app_methods_block_in_a_thread_and_are_awaited_on_the_loop(bench: Bench, kind: str) -> None:
    if kind == "loop":

        @bench.app.rpc("f")
        async def f(data: Any) -> Any:
            return await bench.app.history(data, limit=3)
    else:

        @bench.app.rpc("f")
        def f(data: Any) -> Any:
            return bench.app.history(data, limit=3)

    dispatcher = await bench.start()
    dispatcher.bind(EchoServer())  # type: ignore[arg-type]
    assert await bench.call("f", "news") == ["news", 3]
    assert (await refusal(bench.call("f", "none"))).code == 102


@on_loop
async def test_app_methods_start_at_once_on_the_loop(bench: Bench) -> None:
    began = []

    class Server:
        async def presence(self, channel: str) -> Any:
            began.append(channel)
            return {}

    (await bench.start()).bind(Server())  # type: ignore[arg-type]
    answer = bench.app.presence("news")
    assert began == ["news"]
    assert await answer == {}


# Start and stop.


@on_loop
async def test_start_and_stop_handlers_run_in_order(bench: Bench) -> None:
    seen: list[str] = []

    @bench.app.on_start
    async def first() -> None:
        await asyncio.sleep(0)
        seen.append("first")

    @bench.app.on_start
    def second() -> None:
        seen.append("second")

    @bench.app.on_stop
    def closing() -> None:
        seen.append("closing")

    @bench.app.on_stop
    async def failing() -> None:
        seen.append("failing")
        raise ValueError("on the way out")

    dispatcher = await bench.start()
    assert seen == ["first", "second"]
    await until(lambda: not dispatcher.running)
    await dispatcher.stop_handlers(5)
    await dispatcher.stop(5)
    assert seen == ["first", "second", "failing", "closing"]
    assert len(bench.logged) == 1


@on_loop
async def test_a_stop_cancels_calls_whose_finally_blocks_run_before_on_stop(bench: Bench) -> None:
    seen: list[str] = []

    @bench.app.rpc("f")
    async def f(data: Any) -> None:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            await asyncio.sleep(0)
            seen.append("finally")

    @bench.app.on_stop
    async def closing() -> None:
        seen.append("closing")

    dispatcher = await bench.start()
    call = bench.begin("f")
    assert dispatcher.running == 1
    stopping = start_future(dispatcher.stop_handlers(5))
    with pytest.raises(ClientError) as caught:
        await call
    assert caught.value.code == 100
    await until(lambda: dispatcher.running == 0)
    bench.clock.advance(POLL_INTERVAL)
    await stopping
    assert seen == ["finally", "closing"]
    assert bench.logged == []


@on_loop
async def test_a_call_that_ignores_its_cancellation_takes_no_time_from_on_stop(bench: Bench) -> None:
    seen: list[str] = []
    release = asyncio.Event()

    @bench.app.rpc("f")
    async def f(data: Any) -> None:
        while not release.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await release.wait()

    @bench.app.on_stop
    async def closing() -> None:
        seen.append("closing")

    dispatcher = await bench.start()
    call = bench.begin("f")
    stopping = start_future(dispatcher.stop_handlers(8))
    for _ in range(3):
        bench.clock.advance(1)
        await asyncio.sleep(0)
    await stopping
    assert seen == ["closing"]
    assert (await refusal(call)).code == 100
    release.set()


@on_loop
async def test_failing_start_names_place_and_reason(bench: Bench) -> None:
    @bench.app.on_start
    async def connect() -> None:
        raise OSError("no database")

    with pytest.raises(ApplicationFailed) as caught:
        await bench.start()
    line = str(caught.value)
    assert line.startswith(f"{__file__}:")
    assert "OSError: no database" in line


@on_loop
async def test_stop_does_not_wait_for_a_thread_past_its_grace(bench: Bench) -> None:
    release = threading.Event()
    began = threading.Event()

    @bench.app.rpc("f", timeout=0)
    def f(data: Any) -> Any:
        began.set()
        release.wait(30)
        return threading.current_thread().daemon

    dispatcher = await bench.start()
    call = bench.begin("f")
    await until(began.is_set)
    stopping = start_future(dispatcher.stop(2))
    await until(lambda: bool(bench.clock.getDelayedCalls()))
    bench.clock.advance(2)
    await stopping
    release.set()
    assert await call is True


# Handlers by event.


@on_loop
async def test_handlers_are_found_by_channel_method_and_route(bench: Bench) -> None:
    @bench.app.on_subscribe("chat:*")
    async def may_join(client: Any, channel: str) -> bool:
        return True

    @bench.app.on_publish("chat:1")
    async def moderate(client: Any, channel: str, data: Any) -> None: ...

    @bench.app.rpc("sum")
    async def total(data: Any) -> int:
        return sum(data)

    @bench.app.http.get("/page")
    async def page(request: Any) -> str:
        return "text"

    dispatcher = await bench.start()
    found = [
        dispatcher.subscribing("chat:7"),
        dispatcher.publishing("chat:1"),
        dispatcher.procedure("sum"),
        dispatcher.route("GET", "/page"),
    ]
    assert [call and call.handler.function for call in found] == [may_join, moderate, total, page]
    assert dispatcher.publishing("chat:2") is None
    assert dispatcher.route("POST", "/page") is None
    assert dispatcher.has_procedures


@on_loop
async def test_running_counts_the_calls_that_wait(bench: Bench) -> None:
    release = asyncio.Event()

    @bench.app.rpc("f")
    async def f(data: Any) -> None:
        await release.wait()

    dispatcher = await bench.start()
    calls = [bench.begin("f") for _ in range(3)]
    assert dispatcher.running == 3
    release.set()
    await asyncio.gather(*calls)
    await until(lambda: dispatcher.running == 0)
