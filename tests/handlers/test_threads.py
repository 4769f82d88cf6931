"""Threads of the handlers: the bounded queue, threads that do not return in time, and the client in a thread."""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
from functools import partial
from types import MethodType
from typing import Any

import pytest

from realtime.cache import Cache
from realtime.errors import PoolFull
from realtime.handlers.coroutines import await_deferreds, start_future
from realtime.handlers.threads import BoundedSemaphore, DaemonPool, ThreadSafeClient
from realtime.types import Grant
from tests.driving import on_loop
from tests.handlers.bench import Bench, FakeClient, refusal, until


@on_loop
async def test_timed_out_thread_keeps_its_place_and_its_result_is_dropped(bench: Bench) -> None:
    release = threading.Event()
    began = threading.Event()

    @bench.app.rpc("f", timeout=1)
    def f(data: Any) -> Any:
        began.set()
        release.wait(30)
        return "too late"

    @bench.app.rpc("g")
    def g(data: Any) -> Any:
        return "next"

    await bench.start(threads=1, handler_timeout=0)
    call = bench.begin("f")
    await until(began.is_set)
    bench.clock.advance(1)
    await refusal(call)
    await until(lambda: bench.gauge("overdue") == 1)
    assert bench.gauge("busy") == 1
    following = bench.begin("g")
    await until(lambda: bench.gauge("waiting") == 1)
    release.set()
    assert await following == "next"
    assert (bench.gauge("busy"), bench.gauge("overdue"), bench.gauge("waiting")) == (0, 0, 0)
    assert bench.count("timeout") == 1


@on_loop
async def test_a_thread_that_can_not_be_started_costs_no_place(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """As under a limit of the control group on processes (pids.max)."""

    @bench.app.rpc("f")
    def f(data: Any) -> Any:
        return "done"

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    await bench.start(threads=1, handler_timeout=0)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        for _ in range(3):
            await refusal(bench.begin("f"))
    assert (bench.gauge("busy"), bench.gauge("waiting")) == (0, 0)
    assert await bench.begin("f") == "done"


@on_loop
async def test_full_pool_refuses_at_once_and_recovers(bench: Bench) -> None:
    release = threading.Event()

    @bench.app.rpc("f")
    def f(data: Any) -> Any:
        release.wait(30)
        return data

    await bench.start(threads=2, thread_queue=3)
    calls = [bench.begin("f", number) for number in range(5)]
    await until(lambda: bench.gauge("waiting") == 3)
    assert (await refusal(bench.call("f"))).temporary
    procedure = bench.dispatcher.procedure("f")  # type: ignore[union-attr]
    with pytest.raises(PoolFull):
        await procedure.call(bench.client, None)
    assert bench.count("full") == 2
    release.set()
    assert await asyncio.gather(*calls) == [0, 1, 2, 3, 4]
    assert await bench.call("f", "again") == "again"


@on_loop
async def test_call_cancelled_in_the_queue_never_runs(bench: Bench) -> None:
    release = threading.Event()
    ran = []

    @bench.app.rpc("f", timeout=1)
    def f(data: Any) -> Any:
        ran.append(data)
        release.wait(30)

    await bench.start(threads=1)
    first = bench.begin("f", "first")
    await until(lambda: bool(ran))
    second = bench.begin("f", "second")
    await until(lambda: bench.gauge("waiting") == 1)
    bench.clock.advance(1)
    await refusal(first)
    await refusal(second)
    release.set()
    await until(lambda: bench.gauge("busy") == 0)
    assert ran == ["first"]


# The client in a thread.


@on_loop
async def test_methods_of_the_client_run_on_the_loop(bench: Bench) -> None:
    @bench.app.rpc("thread")
    def thread(client: Any, data: Any) -> Any:
        client.send({"n": 1})
        client.unsubscribe("news")
        client.subscribe("room", Grant(info="vip"))
        client.refresh(7)
        client.disconnect(4100, "bye")
        return [client.id, sorted(client.channels)]

    @bench.app.rpc("loop")
    async def loop(client: Any, data: Any) -> Any:
        client.send("hello")

    await bench.start()
    assert await bench.call("thread") == ["c1", ["news"]]
    await bench.call("loop")
    assert bench.client.calls == [
        ("send", {"n": 1}, True),
        ("unsubscribe", "news", True),
        ("subscribe", "room", Grant(info="vip"), True),
        ("refresh", 7, None, True),
        ("disconnect", 4100, "bye", True),
        ("send", "hello", True),
    ]


@on_loop
async def test_disconnect_with_a_bad_code_fails_in_the_handler(bench: Bench) -> None:
    @bench.app.rpc("f")
    def f(client: Any, data: Any) -> Any:
        try:
            client.disconnect(5, "bye")
        except ValueError:
            return "refused"

    await bench.start()
    assert await bench.call("f") == "refused"
    assert bench.client.calls == []


# The pool and its queue.


def test_threads_of_the_pool_are_daemons() -> None:
    pool = DaemonPool(0, 1)
    factory: Any = inspect.getattr_static(DaemonPool, "threadFactory")
    # Since Python 3.14 a partial object in a class body binds the instance, as a function does.
    thread_factory = MethodType(factory, pool) if isinstance(factory, partial) else pool.threadFactory
    assert thread_factory(target=int, name="worker").daemon


@on_loop
async def test_permits_go_to_the_waiters_in_order_of_arrival() -> None:
    semaphore = BoundedSemaphore(permits=1, queue=2)
    await semaphore.acquire()
    entered: list[str] = []

    async def enter(name: str) -> None:
        await semaphore.acquire()
        entered.append(name)

    first, second = start_future(enter("first")), start_future(enter("second"))
    assert (semaphore.held, semaphore.waiting) == (1, 2)
    with pytest.raises(PoolFull):
        await semaphore.acquire()
    semaphore.release()
    await first
    assert (entered, semaphore.waiting) == (["first"], 1)
    semaphore.release()
    await second
    semaphore.release()
    assert (semaphore.held, semaphore.waiting) == (0, 0)


@on_loop
async def test_permit_granted_in_the_moment_of_cancellation_goes_to_the_next_waiter() -> None:
    semaphore = BoundedSemaphore(permits=1, queue=2)
    await semaphore.acquire()

    async def acquire() -> None:
        await await_deferreds(semaphore.acquire())

    first, second = asyncio.ensure_future(acquire()), asyncio.ensure_future(acquire())
    await until(lambda: semaphore.waiting == 2)
    semaphore.release()
    first.cancel()
    await second
    assert (semaphore.held, semaphore.waiting) == (1, 0)


# Identity of the client.


def test_client_is_equal_and_cached_by_its_connection_and_user() -> None:
    client = FakeClient()
    one, same, other = (
        ThreadSafeClient(each, None, lambda: False)  # type: ignore[arg-type]
        for each in (client, client, FakeClient())
    )
    assert one == same and hash(one) == hash(same)
    assert one != other
    assert one.cache_key() == other.cache_key() == "ada"
    assert repr(one) == "<Client c1 of user 'ada'>"


@on_loop
async def test_in_the_relief_thread_only_handlers_of_the_loop_wait_for_its_own_thread(bench: Bench) -> None:
    ran: list[str] = []

    @bench.app.rpc("loop")
    async def loop(data: Any) -> None:
        ran.append("loop")

    @bench.app.rpc("thread")
    def thread(data: Any) -> None:
        ran.append("thread")

    @bench.app.rpc("quick", run="auto")
    def quick(data: Any) -> None:
        ran.append("quick")

    @bench.app.rpc("slow", run="auto")
    def slow(data: Any) -> None:
        ran.append("slow")

    dispatcher = await bench.start()
    procedure, lock = dispatcher.procedure("loop"), dispatcher._services.lock
    assert procedure is not None and procedure.is_immediate
    moved: Any = dispatcher.procedure("slow")
    moved._placement._placement.place = "thread"
    lock.is_relieving = True
    on_loop = [bench.begin("loop"), bench.begin("quick")]
    in_threads = [bench.begin("thread"), bench.begin("slow")]
    assert not procedure.is_immediate
    while len(ran) < 2:
        time.sleep(0.001)  # without a turn of the loop
    assert sorted(ran) == ["slow", "thread"]
    lock.is_relieving = False
    await asyncio.gather(*in_threads, *on_loop)
    assert sorted(ran) == ["loop", "quick", "slow", "thread"]


@pytest.mark.parametrize("key", [None, lambda client, data: "one"], ids=["usual key", "key of the application"])
@on_loop
async def test_the_relief_thread_answers_from_a_cache_without_code_of_the_application(bench: Bench, key: Any) -> None:
    @bench.app.rpc("f", cache=Cache(ttl=60, key=key))
    async def f(client: Any, data: Any) -> Any:
        return data

    dispatcher = await bench.start()
    await bench.call("f", [1])
    lock = dispatcher._services.lock
    lock.is_relieving = True
    call = bench.begin("f", [1])
    assert call.done() == (key is None)
    lock.is_relieving = False
    assert await call == [1]
