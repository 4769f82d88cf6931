"""Calls while the worker is under pressure, and calls of handlers with a cache."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater
from twisted.logger import Logger

from realtime.app import App, Request
from realtime.cache import Cache, Host
from realtime.config.settings import WorkersSettings
from realtime.errors import TOO_MANY_REQUESTS, ClientError, HandlerTimeout, Overloaded
from realtime.handlers.call import HandlerServices
from realtime.handlers.coroutines import start_future
from realtime.handlers.dispatch import Dispatcher
from realtime.metrics import Metrics
from realtime.supervision.loop_time import LoopTimeLedger
from tests.driving import on_loop


class FakePressure:
    """The pressure on a worker, as the test sets it."""

    def __init__(self) -> None:
        self.reasons: tuple[str, ...] = ()

    @property
    def pressed(self) -> bool:
        return bool(self.reasons)


class FakeClient:
    def __init__(self, user: str) -> None:
        self.user = user


class Bench:
    """An App with its dispatcher; the test sets the pressure, and the clock of the caches."""

    def __init__(self) -> None:
        self.app = App()
        self.pressure = FakePressure()
        self.metrics = Metrics()
        self.now = 0.0
        self.logged: list[dict[str, Any]] = []
        self.calls = 0
        self.settings = WorkersSettings()

    def cache(self, ttl: float = 10, stale: float = 30, **options: Any) -> Cache:
        host = Host(clock=lambda: self.now, load=lambda: float(self.pressure.pressed))
        return Cache(ttl, stale, host=host, **options)

    def answer(self, *_: Any) -> int:
        """Count a call; the handlers of these tests return its number."""
        self.calls += 1
        return self.calls

    async def start(self) -> None:
        log = Logger(observer=self.logged.append)
        self.ledger = LoopTimeLedger(time.monotonic_ns)
        services = HandlerServices(
            reactor, self.settings, self.metrics, log, ledger=self.ledger, pressure=self.pressure
        )
        self.dispatcher = Dispatcher(self.app, services)
        await self.dispatcher.start()
        self.dispatcher.bind(None)  # type: ignore[arg-type]

    async def call(self, data: Any = None, user: str = "ada") -> Any:
        """Call rpc "f", and return the text of its result."""
        procedure = self.dispatcher.procedure("f")
        assert procedure is not None
        return bytes(await procedure(FakeClient(user), data)).decode()

    async def get(self, path: str = "/f", **query: str) -> str:
        """Call a route, and return the body of its response."""
        route = self.dispatcher.route("GET", path)
        assert route is not None
        answer = await route.call(Request("GET", path, query, {}, b""))
        return bytes(answer.body).decode()

    def shed(self) -> dict[tuple[str, str], float]:
        return {
            (dict(sample.labels)["kind"], dict(sample.labels)["reason"]): sample.value
            for sample in self.metrics.snapshot()
            if sample.name == "realtime_shed_requests"
        }


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.dispatcher.threads._pool.stop()


@on_loop
async def test_a_route_is_refused_under_pressure_and_a_procedure_is_not(bench: Bench) -> None:
    @bench.app.http.get("/f")
    async def route(request: Request) -> Any:
        return bench.answer()

    @bench.app.rpc("f")
    async def procedure(data: Any) -> Any:
        return bench.answer()

    await bench.start()
    assert await bench.get() == "1"
    bench.pressure.reasons = ("lag", "rss")
    with pytest.raises(Overloaded):
        await bench.get()
    assert await bench.call() == "2"
    assert bench.shed() == {("http", "lag"): 1}
    bench.pressure.reasons = ()
    assert await bench.get() == "3"


@pytest.mark.parametrize("sample", [5, 2])
@on_loop
async def test_a_burst_waits_until_the_first_calls_show_what_they_cost(bench: Bench, sample: int) -> None:
    bench.settings = WorkersSettings(sample_calls=sample, sample_timeout=60.0)
    gate: asyncio.Event = asyncio.Event()
    running = 0

    @bench.app.http.get("/f")
    async def f(request: Any) -> Any:
        nonlocal running
        running += 1
        await gate.wait()

    await bench.start()
    route = bench.dispatcher.route("GET", "/f")
    assert route is not None
    burst = [start_future(route.call(Request("GET", "/f", {}, {}, b""))) for _ in range(20)]
    assert running == sample
    assert bench.metrics.counter("realtime_handler_sample_waits", "", handler=route.handler.name).value == 20 - sample
    burst.pop().cancel()  # a peer that leaves while it waits
    gate.set()
    await asyncio.gather(*burst)
    assert running == 19
    # From now on, calls start at once.
    gate.clear()
    burst = [start_future(route.call(Request("GET", "/f", {}, {}, b""))) for _ in range(20)]
    assert running == 39
    gate.set()
    await asyncio.gather(*burst)


@on_loop
async def test_the_end_of_that_wait_starts_no_call_in_the_relief_thread(bench: Bench) -> None:
    bench.settings = WorkersSettings(sample_calls=2, sample_timeout=0.01)
    gate: asyncio.Event = asyncio.Event()
    running: list[int] = []

    @bench.app.http.get("/f")
    async def f(request: Any) -> Any:
        running.append(1)
        await gate.wait()

    await bench.start()
    route, lock = bench.dispatcher.route("GET", "/f"), bench.dispatcher._services.lock
    assert route is not None
    burst = [start_future(route.call(Request("GET", "/f", {}, {}, b""))) for _ in range(4)]
    lock.is_relieving = True
    route._end_sample()
    assert len(running) == 2
    lock.is_relieving = False  # the loop's own thread is back, with the next turn
    gate.set()
    await asyncio.gather(*burst)
    assert len(running) == 4


@on_loop
async def test_a_burst_does_not_wait_for_first_calls_that_take_long(bench: Bench) -> None:
    gate: asyncio.Event = asyncio.Event()
    running: list[int] = []

    @bench.app.http.get("/f")
    async def f(request: Any) -> Any:
        running.append(1)
        await gate.wait()

    await bench.start()
    route = bench.dispatcher.route("GET", "/f")
    assert route is not None
    burst = [start_future(route.call(Request("GET", "/f", {}, {}, b""))) for _ in range(20)]
    while len(running) < 20:
        await asyncio.sleep(0.005)
    gate.set()
    await asyncio.gather(*burst)


@on_loop
async def test_a_refused_procedure_is_a_temporary_error(bench: Bench) -> None:
    bench.app.rpc("f", pressure="refuse")(bench.answer)
    await bench.start()
    bench.pressure.reasons = ("threads_waiting",)
    with pytest.raises(ClientError) as caught:
        await bench.call()
    assert (caught.value.code, caught.value.message, caught.value.temporary) == TOO_MANY_REQUESTS
    assert bench.calls == 0
    assert bench.shed() == {("rpc", "threads_waiting"): 1}


@on_loop
async def test_under_pressure_a_refusing_policy_rules_out_an_immediate_call(bench: Bench) -> None:
    @bench.app.rpc("f", pressure="refuse")
    async def f(client: Any, data: Any) -> None: ...

    @bench.app.rpc("g")
    async def g(client: Any, data: Any) -> None: ...

    await bench.start()
    f_and_g = [bench.dispatcher.procedure(method) for method in "fg"]
    assert [procedure.is_immediate for procedure in f_and_g] == [True, True]
    bench.pressure.reasons = ("lag",)
    assert [procedure.is_immediate for procedure in f_and_g] == [False, True]


@on_loop
async def test_stale_answers_are_served_under_pressure_and_others_refused(bench: Bench) -> None:
    bench.app.http.get("/f", cache=bench.cache())(bench.answer)
    await bench.start()
    assert await bench.get() == "1"
    bench.pressure.reasons = ("lag",)
    bench.now = 39
    assert [await bench.get(), await bench.get()] == ["1", "1"]
    with pytest.raises(Overloaded):
        await bench.get(other="query")
    bench.now = 40
    with pytest.raises(Overloaded):
        await bench.get()
    assert bench.calls == 1
    assert bench.shed() == {("http", "lag"): 2}


@on_loop
async def test_a_cache_that_ignores_pressure_computes_missing_answers(bench: Bench) -> None:
    bench.app.rpc("f", cache=bench.cache())(bench.answer)
    await bench.start()
    bench.pressure.reasons = ("lag",)
    assert [await bench.call(1), await bench.call(1), await bench.call(2)] == ["1", "1", "2"]


@on_loop
async def test_a_policy_may_be_a_function_of_the_arguments(bench: Bench) -> None:
    bench.app.rpc("f", pressure=lambda client, data: "refuse" if client.user == "bob" else "ignore")(bench.answer)
    await bench.start()
    bench.pressure.reasons = ("lag",)
    assert await bench.call(user="ada") == "1"
    with pytest.raises(ClientError):
        await bench.call(user="bob")
    bench.pressure.reasons = ()
    assert await bench.call(user="bob") == "2"


@pytest.mark.parametrize("policy", [lambda client, data: "perhaps", lambda client, data: 1 / 0])
@on_loop
async def test_a_policy_that_raises_is_an_error_of_the_application(bench: Bench, policy: Any) -> None:
    bench.app.rpc("f", pressure=policy)(bench.answer)
    await bench.start()
    bench.pressure.reasons = ("lag",)
    with pytest.raises(ClientError) as caught:
        await bench.call()
    assert caught.value.code == 100
    [entry] = bench.logged
    assert entry["handler"] == "rpc f"


@on_loop
async def test_a_cache_key_that_raises_is_an_error_of_the_application(bench: Bench) -> None:
    bench.app.rpc("f", cache=bench.cache(key=lambda client, data: data["absent"]))(bench.answer)
    await bench.start()
    with pytest.raises(ClientError) as caught:
        await bench.call({})
    assert caught.value.code == 100
    assert len(bench.logged) == 1


@on_loop
async def test_users_do_not_share_answers_unless_the_handler_never_sees_them(bench: Bench) -> None:
    @bench.app.rpc("f", cache=bench.cache())
    async def f(client: Any, data: Any) -> Any:
        return f"{client.user} {bench.answer()}"

    await bench.start()
    assert [await bench.call(user=user) for user in ("ada", "bob", "ada")] == ['"ada 1"', '"bob 2"', '"ada 1"']


@on_loop
async def test_callers_share_one_call_of_a_thread(bench: Bench) -> None:
    release = threading.Event()

    @bench.app.rpc("f", cache=bench.cache())
    def f(data: Any) -> Any:
        release.wait(20)
        return bench.answer()

    await bench.start()
    calls = [start_future(bench.call()) for _ in range(5)]
    await asyncio.sleep(0)
    calls[0].cancel()
    release.set()
    assert await asyncio.gather(*calls[1:]) == ["1"] * 4


@on_loop
async def test_a_handler_with_a_cache_may_await_deferreds(bench: Bench) -> None:
    @bench.app.rpc("f", cache=bench.cache())
    async def f(data: Any) -> Any:
        await deferLater(reactor, 0)  # type: ignore[arg-type]
        await asyncio.sleep(0)
        return bench.answer()

    await bench.start()
    assert [await bench.call(), await bench.call()] == ["1", "1"]


@on_loop
async def test_a_timeout_reaches_all_waiting_callers_and_is_not_cached(bench: Bench) -> None:
    @bench.app.http.get("/f", timeout=0.01, cache=bench.cache())
    async def f(request: Request) -> Any:
        if bench.answer() == 1:
            await Deferred()
        return "later"

    await bench.start()
    waiting = [start_future(bench.get()) for _ in range(3)]
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(result) for result in results] == [HandlerTimeout] * 3
    assert await bench.get() == "later"


@on_loop
async def test_an_exception_is_logged_once_and_not_cached(bench: Bench) -> None:
    @bench.app.rpc("f", cache=bench.cache())
    async def f(data: Any) -> Any:
        await asyncio.sleep(0)
        return 1 / (bench.answer() - 1)

    await bench.start()
    results = await asyncio.gather(*[start_future(bench.call()) for _ in range(3)], return_exceptions=True)
    assert [type(result) for result in results] == [ClientError] * 3
    assert len(bench.logged) == 1
    assert await bench.call() == "1.0"


@on_loop
async def test_a_handler_that_blocked_the_loop_is_throttled(bench: Bench) -> None:
    release = asyncio.Event()

    @bench.app.http.get("/f")
    async def f(request: Request) -> Any:
        await release.wait()
        return "done"

    @bench.app.http.get("/other")
    async def other(request: Request) -> Any:
        return "other"

    await bench.start()
    throttle = bench.dispatcher.throttles[0]
    throttle.limit = 2
    running = [start_future(bench.get()) for _ in range(3)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await running[2]
    assert bench.shed() == {("http", "lag"): 1}
    assert await bench.get("/other") == "other"
    release.set()
    assert await asyncio.gather(*running[:2]) == ["done"] * 2
    assert throttle.running == 0
    assert await bench.get() == "done"


@on_loop
async def test_the_time_of_a_handler_on_the_loop_is_measured(bench: Bench) -> None:
    @bench.app.http.get("/f")
    async def f(request: Request) -> Any:
        await asyncio.sleep(0.05)
        until = time.perf_counter() + 0.01
        while time.perf_counter() < until:
            pass
        return "done"

    @bench.app.http.get("/thread")
    def thread(request: Request) -> Any:
        time.sleep(0.02)

    await bench.start()
    await bench.get()
    await bench.get("/thread")
    assert len(bench.dispatcher.throttles) == 1  # a handler that runs in a thread has none
    spent = {account.name: account.spent / 1e9 for account in bench.ledger}
    assert 0.01 <= spent["http GET /f"] < 0.05  # waiting is not charged
    assert spent["http GET /thread"] == 0


@on_loop
async def test_handlers_can_read_the_pressure(bench: Bench) -> None:
    @bench.app.rpc("f")
    def f(client: Any, data: Any) -> Any:
        return [client.under_pressure, list(bench.app.pressure)]

    await bench.start()
    assert await bench.call() == "[false,[]]"
    bench.pressure.reasons = ("lag", "rss")
    assert await bench.call() == '[true,["lag","rss"]]'
