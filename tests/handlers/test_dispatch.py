"""Handlers in their two kinds: what their callers get, whatever the handlers do."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextvars import ContextVar
from functools import partial
from typing import Any

import msgspec
import pytest
from twisted.internet import reactor as global_reactor
from twisted.internet.defer import Deferred, inlineCallbacks, succeed
from twisted.internet.task import Clock, deferLater
from twisted.internet.threads import deferToThread
from twisted.logger import Logger

from realtime.app import App, Request
from realtime.config.settings import WorkersSettings
from realtime.errors import ClientError, Disconnect, EngineUnavailable, HandlerTimeout, PoolFull, SettingsError
from realtime.handlers.coroutines import start_future
from realtime.handlers.dispatch import Dispatcher, Marker, never_waits
from realtime.metrics import Metrics
from realtime.supervision.loop_time import LoopAccount
from realtime.types import ConnectRequest, Credentials, Grant
from tests.driving import on_loop


class ClockedReactor(Clock):
    """Time that the test moves, over the real reactor's way from threads to the loop."""

    callFromThread = staticmethod(global_reactor.callFromThread)


class FakeClient:
    """Notes what was asked of it, and on which thread."""

    def __init__(self) -> None:
        self.id = "c1"
        self.user = "ada"
        self.channels = {"news"}
        self.asked: list[tuple[Any, ...]] = []

    def _note(self, *what: Any) -> None:
        self.asked.append((*what, threading.current_thread() is threading.main_thread()))

    def send(self, data: Any) -> None:
        self._note("send", data)

    def subscribe(self, channel: str, grant: Grant | None) -> None:
        self._note("subscribe", channel, grant)

    def refresh(self, expire_at: int | None, info: Any) -> None:
        self._note("refresh", expire_at, info)

    def unsubscribe(self, channel: str) -> None:
        self._note("unsubscribe", channel)

    def disconnect(self, code: int, reason: str) -> None:
        self._note("disconnect", code, reason)


class Bench:
    """An App, and the dispatcher that serves it once `start` was awaited."""

    def __init__(self) -> None:
        self.app = App()
        self.clock = ClockedReactor()
        self.metrics = Metrics()
        self.logged: list[dict[str, Any]] = []
        self.client = FakeClient()
        self.dispatcher: Dispatcher | None = None
        self.marks: Marker = Marked()

    async def start(self, **settings: Any) -> Dispatcher:
        log = Logger(observer=self.logged.append)
        self.dispatcher = Dispatcher(self.app, self.clock, WorkersSettings(**settings), self.metrics, log, self.marks)
        await self.dispatcher.start()
        return self.dispatcher

    async def call(self, method: str, data: Any = None) -> Any:
        """The decoded answer of one rpc handler, as a client would get it."""
        assert self.dispatcher is not None
        procedure = self.dispatcher.procedure(method)
        assert procedure is not None
        result = await procedure(self.client, data)
        return None if result is None else msgspec.json.decode(result)

    def begin(self, method: str, data: Any = None) -> asyncio.Future[Any]:
        return start_future(self.call(method, data))

    def count(self, outcome: str, handler: str = "rpc f") -> float:
        labels = [("handler", handler), ("outcome", outcome)]
        return sum(one.value for one in self.metrics.snapshot() if one.labels == labels)

    def gauge(self, name: str) -> float:
        return next(one.value for one in self.metrics.snapshot() if one.name == f"realtime_handler_threads_{name}")


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    if bench.dispatcher is not None and bench.dispatcher.threads._pool.started:
        bench.dispatcher.threads._pool.stop()


async def refusal(awaitable: Awaitable[Any]) -> ClientError:
    with pytest.raises(ClientError) as caught:
        await awaitable
    return caught.value


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


# -- what a coroutine may do ------------------------------------------------------------------------------------------


@on_loop
async def test_coroutine_gets_client_and_data_and_its_result_is_the_answer(bench: Bench) -> None:
    @bench.app.rpc("f")
    async def f(client: Any, data: Any) -> Any:
        return {"user": client.user, "data": data}

    await bench.start()
    assert await bench.call("f", [1]) == {"user": "ada", "data": [1]}
    assert bench.count("ok") == 1


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
async def test_tasks_are_real(bench: Bench) -> None:
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
async def test_context_reaches_the_handler_and_does_not_leak_back(bench: Bench) -> None:
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
async def test_a_deferred_that_has_fired_already_is_an_answer_too(bench: Bench) -> None:
    @bench.app.rpc("f", run="loop")
    def f(client: Any, data: Any) -> Any:
        return succeed("there already")

    await bench.start()
    assert await bench.call("f") == "there already"


@on_loop
async def test_plain_function_on_the_loop_may_return_a_deferred(bench: Bench) -> None:
    @bench.app.rpc("f", run="loop")
    @inlineCallbacks
    def f(client: Any, data: Any) -> Any:
        result = yield deferToThread(lambda: "from a thread")
        return result

    await bench.start()
    assert await bench.call("f") == "from a thread"


# -- mistakes ---------------------------------------------------------------------------------------------------------


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
async def test_mistake_is_logged_once_and_answered_as_internal_error(
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
async def test_refusals_pass_and_are_not_logged(bench: Bench, kind: str, error: Exception) -> None:
    declare_failing(bench.app, kind, error)
    await bench.start()
    with pytest.raises(type(error)) as caught:
        await bench.call("f")
    assert caught.value is error
    assert bench.logged == []
    assert bench.count("refused") == 1


@on_loop
async def test_engine_outage_is_no_mistake_of_the_handler(bench: Bench) -> None:
    declare_failing(bench.app, "at once", EngineUnavailable("gone"))
    await bench.start()
    assert (await refusal(bench.call("f"))).temporary
    assert bench.logged == []
    assert bench.count("unavailable") == 1


@on_loop
async def test_place_is_logged_once_a_minute_with_the_number_left_out(bench: Bench) -> None:
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


@pytest.mark.parametrize("run", ["loop", "thread"])
@on_loop
async def test_answer_that_is_no_json_is_the_handlers_mistake(bench: Bench, run: str) -> None:
    @bench.app.rpc("f", run=run)
    def f(data: Any) -> Any:
        return object()

    await bench.start()
    assert (await refusal(bench.call("f"))).code == 100
    assert isinstance(bench.logged[0]["log_failure"].value, TypeError)


@on_loop
async def test_bytes_are_an_answer_as_they_are(bench: Bench) -> None:
    @bench.app.rpc("f")
    def f(data: Any) -> Any:
        return data + b"\xff"

    procedure = (await bench.start()).procedure("f")
    assert procedure is not None
    assert await procedure(bench.client, b"\x00") == b"\x00\xff"


@pytest.mark.parametrize("unit", ["x", b"x"])
@on_loop
async def test_answer_over_the_limit_is_refused(bench: Bench, unit: str | bytes) -> None:
    @bench.app.rpc("f")
    def f(data: Any) -> Any:
        return unit * 1_100_000

    await bench.start()
    assert (await refusal(bench.call("f"))).code == 106


@on_loop
async def test_coroutine_made_in_a_thread_is_a_mistake(bench: Bench) -> None:
    async def work() -> None: ...

    @bench.app.rpc("f")
    def f(data: Any) -> Any:
        return work()

    await bench.start()
    assert (await refusal(bench.call("f"))).code == 100
    assert 'run="loop"' in str(bench.logged[0]["log_failure"].value)


# -- deadlines, limits and pools --------------------------------------------------------------------------------------


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
async def test_caller_is_freed_even_when_the_coroutine_ignores_cancellation(bench: Bench) -> None:
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
        await procedure.perform(bench.client, None)
    assert bench.count("full") == 2
    release.set()
    assert await asyncio.gather(*calls) == [0, 1, 2, 3, 4]
    assert await bench.call("f", "again") == "again"


@on_loop
async def test_call_that_gives_up_in_the_queue_never_runs(bench: Bench) -> None:
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


@pytest.mark.parametrize("kind", ["loop", "thread"])
@on_loop
async def test_limit_holds_for_one_handler_and_spares_the_others(bench: Bench, kind: str) -> None:
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
async def test_perform_tells_timeouts_from_errors(bench: Bench) -> None:
    @bench.app.http.get("/slow", timeout=2)
    async def slow(request: Any) -> Any:
        await Deferred()

    await bench.start()
    route = bench.dispatcher.route("GET", "/slow")  # type: ignore[union-attr]
    call = start_future(route.perform(Request("GET", "/slow", {}, {}, b"")))
    await until(lambda: bool(bench.clock.getDelayedCalls()))
    bench.clock.advance(2)
    with pytest.raises(HandlerTimeout, match="GET /slow"):
        await call


# -- threads and the loop ---------------------------------------------------------------------------------------------


@on_loop
async def test_client_acts_on_the_loop_whoever_calls(bench: Bench) -> None:
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
    assert bench.client.asked == [
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
    assert bench.client.asked == []


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
async def test_app_methods_wait_in_a_thread_and_are_awaited_on_the_loop(bench: Bench, kind: str) -> None:
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


# -- the kinds of handlers --------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("answer", "expected"),
    [(None, None), (True, None), (Grant(data=1), Grant(data=1)), (False, 103), ("yes", 100), (0, 100)],
)
@on_loop
async def test_on_subscribe_answers(bench: Bench, answer: Any, expected: Any) -> None:
    @bench.app.on_subscribe("chat:*")
    async def may(client: Any, channel: str, data: Any) -> Any:
        assert (channel, data) == ("chat:1", {"x": 1})
        return answer

    may_join = (await bench.start()).subscribing("chat:1")
    assert may_join is not None
    if isinstance(expected, int):
        assert (await refusal(may_join(bench.client, "chat:1", {"x": 1}))).code == expected
    else:
        assert await may_join(bench.client, "chat:1", {"x": 1}) == expected


@pytest.mark.parametrize("answer", [None, Credentials("ada"), "ada", Credentials(42), Credentials("\ud800")])
@on_loop
async def test_on_connecting_answers(bench: Bench, answer: Any) -> None:
    @bench.app.on_connecting
    def who(request: ConnectRequest) -> Any:
        assert request.token == "t"
        return answer

    connecting = (await bench.start()).connecting
    assert connecting is not None
    if answer not in (None, Credentials("ada")):
        assert (await refusal(connecting(ConnectRequest(token="t")))).code == 100
    else:
        assert await connecting(ConnectRequest(token="t")) == answer


@on_loop
async def test_on_publish_changes_data_or_leaves_it(bench: Bench) -> None:
    @bench.app.on_publish("chat:*")
    async def moderate(client: Any, channel: str, data: Any) -> Any:
        return data if data is None else {"text": data["text"].upper()}

    moderating = (await bench.start()).publishing("chat:1")
    assert moderating is not None
    assert await moderating(bench.client, "chat:1", None) is None
    assert bytes(await moderating(bench.client, "chat:1", {"text": "hi"})) == b'{"text":"HI"}'


# -- start and stop ---------------------------------------------------------------------------------------------------


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
    await dispatcher.stop(5)
    assert seen == ["first", "second", "failing", "closing"]
    assert len(bench.logged) == 1


@on_loop
async def test_failing_start_names_place_and_reason(bench: Bench) -> None:
    @bench.app.on_start
    async def connect() -> None:
        raise OSError("no database")

    with pytest.raises(SettingsError) as caught:
        await bench.start()
    [line] = caught.value.problems
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


# -- which handler runs ------------------------------------------------------------------------------------------------


class Marked:
    """Keeps which handler runs now."""

    def __init__(self) -> None:
        self.now: list[tuple[bytes, bytes]] = []

    def enter(self, names: tuple[bytes, bytes], account: LoopAccount) -> None:
        self.now.append(names)

    def leave(self, outer: None) -> None:
        self.now.pop()


@on_loop
async def test_each_step_of_a_handler_on_the_loop_is_marked(bench: Bench) -> None:
    marks = Marked()
    bench.marks = marks
    seen = []

    @bench.app.rpc("f")
    async def f(data: Any) -> None:
        seen.append(list(marks.now))
        await asyncio.sleep(0.001)
        seen.append(list(marks.now))
        await deferLater(global_reactor, 0.001, lambda: None)
        seen.append(list(marks.now))

    @bench.app.rpc("g", run="loop")
    def g(data: Any) -> None:
        seen.append(list(marks.now))

    @bench.app.on_subscribe("chat:*")
    async def may_join(client: Any, channel: str) -> bool:
        seen.append(list(marks.now))
        raise ValueError("a mistake")

    dispatcher = await bench.start()
    call = bench.begin("f")
    while not call.done():
        assert marks.now == []
        await asyncio.sleep(0)
    await call
    assert seen == [[(b"rpc f", b"f")]] * 3
    await bench.call("g")
    assert seen.pop() == [(b"rpc g", b"g")]
    subscribing = dispatcher.subscribing("chat:7")
    assert subscribing is not None
    await refusal(subscribing(bench.client, "chat:7", None))
    assert seen.pop() == [(b"on_subscribe chat:*", b"chat:7")]
    assert marks.now == []


# -- what needs no task -----------------------------------------------------------------------------------------------


async def nothing_to_wait_for(client: Any, data: Any) -> Any:
    return [str(one) for one in data] or {"data": data}


async def one_await(client: Any, data: Any) -> Any:
    if data:
        await asyncio.sleep(0)


async def in_a_comprehension(client: Any, data: Any) -> Any:
    return [await one for one in data]


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
def test_a_coroutine_without_an_await_never_waits(function: Any, never: bool) -> None:
    assert never_waits(function) is never


@on_loop
@pytest.mark.parametrize("error", [ValueError("its own"), SystemExit(1), StopIteration()])
async def test_a_mistake_in_a_coroutine_that_never_waits(bench: Bench, error: BaseException) -> None:
    @bench.app.rpc("f")
    async def f(client: Any, data: Any) -> Any:
        raise error

    await bench.start()
    assert (await refusal(bench.call("f"))).code == 100
    assert bench.count("error") == 1


# -- without a coroutine ----------------------------------------------------------------------------------------------


@on_loop
async def test_who_never_waits_answers_at_once_as_if_awaited(bench: Bench) -> None:
    where: ContextVar[str] = ContextVar("where", default="outside")
    seen = []

    @bench.app.rpc("f")
    async def f(client: Any, data: Any) -> Any:
        seen.append((where.get(), list(bench.marks.now)))  # type: ignore[attr-defined]
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
    assert bench.marks.now == []  # type: ignore[attr-defined]
    assert (bench.count("ok"), bench.count("refused")) == (1, 1)


@on_loop
async def test_a_mistake_of_one_that_answers_at_once(bench: Bench) -> None:
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
    assert bench.marks.now == []  # type: ignore[attr-defined]


@on_loop
async def test_who_may_wait_is_never_called_at_once(bench: Bench) -> None:
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
