"""Handlers in real processes: a fault of a process concerns one call alone, and no process is left behind."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from twisted.internet import reactor
from twisted.logger import Logger

from realtime.app import App, Request
from realtime.config.settings import AppSettings, WorkersSettings
from realtime.errors import ClientError, Disconnect, EngineUnavailable, HandlerTimeout, PoolFull
from realtime.handlers.call import HandlerServices
from realtime.handlers.compute_pool import ComputePool, IdleProcesses
from realtime.handlers.coroutines import await_deferreds, start_future
from realtime.handlers.dispatch import Dispatcher
from realtime.handlers.error_answers import ErrorAnswer
from realtime.metrics import Metrics
from realtime.types import ClientInfo, HistoryPage, Position, Publication
from tests.driving import on_loop
from tests.handlers import heavy_app

HERE = Path(__file__).parent
APP = AppSettings(module="heavy_app:app", path=str(HERE), options={"colour": "blue"})


class Bench:
    """The dispatcher of `heavy_app`, with its processes."""

    def __init__(self, processes: int, queue: int, app: AppSettings) -> None:
        self.metrics = Metrics()
        self.logged: list[dict[str, Any]] = []
        workers = WorkersSettings(count=1, processes=processes, process_queue=queue)
        self.processes = ComputePool(reactor, workers, app, self.metrics)
        log = Logger(observer=self.logged.append)
        services = HandlerServices(reactor, workers, self.metrics, log, compute_pool=self.processes)
        self.dispatcher = Dispatcher(heavy_app.app, services)

    def call(self, method: str, data: Any = None) -> asyncio.Future[Any]:
        procedure = self.dispatcher.procedure(method)
        assert procedure is not None
        return start_future(procedure(None, data))

    async def echo(self) -> Any:
        """Call a handler that describes the process it runs in."""
        return msgspec.json.decode(await self.call("echo"))

    def value(self, name: str) -> float:
        return next(sample.value for sample in self.metrics.snapshot() if sample.name == f"realtime_handler_{name}")


@asynccontextmanager
async def serving(processes: int = 1, queue: int = 100, app: AppSettings = APP) -> AsyncIterator[Bench]:
    """A bench; afterwards its processes must have ended, whatever the test did."""
    bench = Bench(processes, queue, app)
    try:
        await bench.dispatcher.start()
        yield bench
    finally:
        pids = bench.processes.pids
        await bench.dispatcher.stop(5.0)
    assert [pid for pid in pids if psutil.pid_exists(pid)] == []


async def refusal(awaitable: Awaitable[Any]) -> ClientError:
    with pytest.raises(ClientError) as caught:
        await awaitable
    return caught.value


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def read_pids(path: Path) -> list[int]:
    """Return the pids that a handler writes to `path`."""
    await until(path.exists)
    return [int(pid) for pid in path.read_text().split()]


# Calls and results.


@on_loop
async def test_a_handler_gets_its_data_and_returns_its_result_from_another_process() -> None:
    async with serving() as bench:
        data = [1, 2**70, "\U0001f600", {"a": None}]
        answer = await bench.call("echo", data)
        said = msgspec.json.decode(answer)
        assert said["data"] == msgspec.json.decode(msgspec.json.encode(data))
        assert said["pid"] in bench.processes.pids
        assert said["pid"] != os.getpid()
        assert said["options"] == {"colour": "blue"}
        assert said["twisted"] is False


@on_loop
async def test_typed_data_are_converted_in_the_other_process() -> None:
    async with serving() as bench:
        assert msgspec.json.decode(await bench.call("order", {"article": "pen"})) == "pen"
        error = await refusal(bench.call("order", {"article": 1}))
        assert (error.code, error.message) == (400, "Expected `str`, got `int` - at `$.article`")


@on_loop
async def test_a_default_timeout_of_the_application_fails_no_call(request: pytest.FixtureRequest) -> None:
    request.addfinalizer(lambda: socket.setdefaulttimeout(None))
    socket.setdefaulttimeout(5.0)
    async with serving() as bench:
        assert await bench.echo()


async def test_a_route_gets_its_request_and_makes_its_response_there() -> None:
    async with serving() as bench:
        route = bench.dispatcher.route("POST", "/render")
        assert route is not None
        answer = await route.call(Request("POST", "/render", {}, {}, b"abc"))
        assert (answer.status, answer.body, answer.headers) == (201, b"ABC", (("X-Length", "3"),))


@on_loop
async def test_an_error_handler_answers_in_the_other_process() -> None:
    async with serving() as bench:
        route = bench.dispatcher.route("POST", "/fail")
        assert route is not None
        with pytest.raises(ErrorAnswer) as caught:
            await route.call(Request("POST", "/fail", {}, {}, b"pen"))
        response = caught.value.response
        assert (response.status, response.body) == (404, b"/fail: 'pen'")
        assert int(dict(response.headers)["X-Pid"]) in bench.processes.pids


@on_loop
async def test_refusals_arrive_as_they_were_raised() -> None:
    async with serving() as bench:
        error = await refusal(bench.call("refuse"))
        assert (error.code, error.message, error.temporary) == (444, "no such report", True)
        with pytest.raises(Disconnect) as caught:
            await bench.call("close")
        assert (caught.value.code, caught.value.reason) == (4500, "go away")


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ("fail", "SystemExit: the handler's own mistake"),
        ("unencodable", "TypeError"),
        ("unsendable", "function"),
    ],
)
@on_loop
async def test_an_exception_is_logged_with_its_own_traceback_and_costs_no_process(method: str, says: str) -> None:
    async with serving() as bench:
        assert (await refusal(bench.call(method))).code == 100
        [event] = bench.logged
        assert says in event["log_failure"].getErrorMessage()
        assert event["handler"] == f"rpc {method}"
        await bench.echo()
        assert bench.value("process_replacements") == 0


@on_loop
async def test_a_result_of_more_than_a_mebibyte_fails_its_call_alone() -> None:
    async with serving() as bench:
        assert len(await bench.call("huge", 900_000)) == 900_002
        assert (await refusal(bench.call("huge", 2_000_000))).code == 106
        await bench.echo()
        assert bench.value("process_replacements") == 0


# Calls of the server from a process.


class Server:
    """Carries out some methods of the server, and records the publications."""

    def __init__(self) -> None:
        self.publications: list[Any] = []
        self.cancelled = 0

    async def publish(self, channel: str, data: bytes, **options: Any) -> Position:
        self.publications.append((channel, data))
        match channel:
            case "never":
                try:
                    await asyncio.get_running_loop().create_future()
                except asyncio.CancelledError:
                    self.cancelled += 1
                    raise
            case "unknown":
                raise ClientError(102, "unknown channel")
            case "gone":
                raise EngineUnavailable("the broker was lost")
            case "odd":
                raise LookupError("no such thing")
        await asyncio.sleep(0)
        return Position(len(self.publications), "epoch")

    async def broadcast(self, channels: list[str], data: bytes, **options: Any) -> Any:
        return [Position(1, "e"), ClientError(107, "bad request", True)]

    async def history(self, channel: str, **options: Any) -> HistoryPage:
        publication = Publication(b"x" * 2_000_000, 7, ClientInfo("ada", "c1"), {"t": "1"}, binary=True)
        return HistoryPage([publication], Position(7, "e"))

    async def presence(self, channel: str) -> dict[str, ClientInfo]:
        return {"c1": ClientInfo("ada", "c1", b"{}")}


@pytest.mark.parametrize(
    ("method", "args", "said"),
    [
        ("publish", ["news", {"a": 1}], "Position(offset=1, epoch='epoch')"),
        ("presence", ["news"], repr({"c1": ClientInfo("ada", "c1", b"{}")})),
        ("broadcast", [["a", "b"], 1], repr([Position(1, "e"), ClientError(107, "bad request", True)])),
        ("publish", ["unknown", 1], repr(ClientError(102, "unknown channel"))),
        ("publish", ["gone", 1], repr(EngineUnavailable("the broker was lost"))),
        ("publish", ["odd", 1], "RuntimeError"),
        ("publish", ["news", "x" * 1_100_000], repr(ClientError(106, "limit exceeded"))),
        ("refresh", ["ada"], "RuntimeError"),
    ],
)
@on_loop
async def test_a_handler_calls_the_server_from_its_process(method: str, args: list[Any], said: str) -> None:
    async with serving() as bench:
        bench.dispatcher.bind(server := Server())  # type: ignore[arg-type]
        answer = msgspec.json.decode(await bench.call("voice", [method, args]))
        assert answer.startswith(said)
        if said.startswith("Position"):
            assert server.publications == [("news", b'{"a":1}')]
        await bench.echo()
        assert bench.value("process_replacements") == 0


@on_loop
async def test_a_result_of_the_server_may_be_long() -> None:
    async with serving() as bench:
        bench.dispatcher.bind(Server())  # type: ignore[arg-type]
        assert msgspec.json.decode(await bench.call("length of history")) == 2_000_000


@on_loop
async def test_threads_of_a_handler_take_turns_and_fail_after_it(tmp_path: Path) -> None:
    async with serving() as bench:
        bench.dispatcher.bind(server := Server())  # type: ignore[arg-type]
        assert msgspec.json.decode(await bench.call("publish twice", str(tmp_path / "said"))) == [1, 2]
        await until((tmp_path / "said").exists)
        assert "no longer" in (tmp_path / "said").read_text()
        await bench.echo()
        assert len(server.publications) == 2
        assert bench.value("process_replacements") == 0


@on_loop
async def test_nothing_is_published_while_the_application_is_imported() -> None:
    async with serving() as bench:
        bench.dispatcher.bind(server := Server())  # type: ignore[arg-type]
        assert "not during its import" in msgspec.json.decode(await bench.call("imported"))
        assert server.publications == []


@on_loop
async def test_a_call_that_ends_cancels_the_server_call_of_its_handler() -> None:
    async with serving() as bench:
        bench.dispatcher.bind(server := Server())  # type: ignore[arg-type]
        await bench.echo()
        procedure = bench.dispatcher.procedure("never answered")
        assert procedure is not None
        call = start_future(procedure.call(None, "x"))
        await until(lambda: bool(server.publications))
        call.cancel()
        await until(lambda: server.cancelled == 1)
        killed = bench.call("never answered", "y")
        await until(lambda: len(server.publications) == 2)
        os.kill(bench.processes.pids[0], signal.SIGKILL)
        assert (await refusal(killed)).code == 100
        await until(lambda: server.cancelled == 2)
        await bench.echo()


# Faults of a process.


@pytest.mark.parametrize("status", [0, 1])
@on_loop
async def test_a_process_that_exits_fails_its_call_and_is_replaced(status: int) -> None:
    async with serving() as bench:
        assert (await refusal(bench.call("quit", status))).code == 100
        await bench.echo()
        assert bench.value("process_replacements") == 1


@on_loop
async def test_a_killed_process_fails_its_call_alone(tmp_path: Path) -> None:
    async with serving(processes=2) as bench:
        files = tmp_path / "doomed", tmp_path / "other"
        doomed, other = (
            bench.call("sleep", [str(file), seconds]) for file, seconds in zip(files, (60, 1), strict=True)
        )
        [pid] = await read_pids(files[0])
        await read_pids(files[1])
        os.kill(pid, signal.SIGKILL)
        assert (await refusal(doomed)).code == 100
        assert msgspec.json.decode(await other) == "slept"
        assert bench.value("process_replacements") == 1


@on_loop
async def test_an_idle_process_that_is_killed_is_replaced_unnoticed() -> None:
    async with serving() as bench:
        pid = (await bench.echo())["pid"]
        os.kill(pid, signal.SIGKILL)
        await until(lambda: bench.processes.pids != [pid])
        assert (await bench.echo())["pid"] != pid


@on_loop
async def test_a_cancelled_call_kills_its_process_whatever_it_does(tmp_path: Path) -> None:
    async with serving() as bench:
        await bench.echo()
        deaf = bench.dispatcher.procedure("deaf")
        assert deaf is not None
        call = start_future(deaf.call(None, str(tmp_path / "pids")))
        pids = await read_pids(tmp_path / "pids")
        call.cancel()
        await until(lambda: not any(lives(pid) for pid in pids))
        assert (await bench.echo())["pid"] not in pids


@on_loop
async def test_a_stopped_process_fails_its_call_at_the_deadline(tmp_path: Path) -> None:
    async with serving() as bench:
        await bench.echo()
        sleep = bench.dispatcher.procedure("sleep")
        assert sleep is not None
        call = start_future(sleep.call(None, [str(tmp_path / "pid"), 0.2], timeout=1.0))
        [pid] = await read_pids(tmp_path / "pid")
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(HandlerTimeout):
            await call
        assert (await bench.echo())["pid"] != pid
        assert not lives(pid)


@pytest.mark.parametrize("junk", ["\x00\x00\x00\x04junk", "\xff\xff\xff\xff", "\x00\x00\x00\x01NN"])
@on_loop
async def test_a_process_that_writes_junk_fails_its_call_and_is_replaced(junk: str) -> None:
    async with serving() as bench:
        assert (await refusal(bench.call("junk", junk))).code == 100
        await bench.echo()
        assert bench.value("process_replacements") == 1


@on_loop
async def test_a_pickle_that_a_process_writes_runs_no_code_in_the_worker(tmp_path: Path) -> None:
    class Touch:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "touched",)

    content = pickle.dumps(Touch(), protocol=2)
    async with serving() as bench:
        junk = (len(content).to_bytes(4, "big") + content).decode("latin-1")
        assert (await refusal(bench.call("junk", junk))).code == 100
        await bench.echo()
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@on_loop
async def test_signals_to_the_whole_unit_leave_a_call_alone(number: int, tmp_path: Path) -> None:
    async with serving() as bench:
        call = bench.call("sleep", [str(tmp_path / "pid"), 0.3])
        [pid] = await read_pids(tmp_path / "pid")
        os.killpg(pid, number)
        assert msgspec.json.decode(await call) == "slept"


# The queue.


@on_loop
async def test_a_full_queue_refuses_at_once_and_waiting_calls_are_served(tmp_path: Path) -> None:
    async with serving(queue=1) as bench:
        await bench.echo()
        working = bench.call("sleep", [str(tmp_path / "pid"), 0.2])
        waiting = bench.call("echo")
        await until(lambda: (bench.value("processes_busy"), bench.value("processes_waiting")) == (1, 1))
        procedure = bench.dispatcher.procedure("echo")
        assert procedure is not None
        with pytest.raises(PoolFull):
            await procedure.call(None, None)
        await asyncio.gather(working, waiting)
        assert (bench.value("processes_busy"), bench.value("processes_waiting")) == (0, 0)


@on_loop
async def test_a_limit_of_its_own_leaves_processes_to_others(tmp_path: Path) -> None:
    async with serving(processes=2) as bench:
        first = await bench.call("limited", 1)
        assert [first, *await asyncio.gather(*(bench.call("limited", number) for number in range(5)))] == [
            msgspec.Raw(text) for text in (b"1", b"0", b"1", b"2", b"3", b"4")
        ]


@on_loop
async def test_a_caller_that_gives_up_in_the_queue_costs_no_process(tmp_path: Path) -> None:
    async with serving() as bench:
        await bench.echo()
        working = bench.call("sleep", [str(tmp_path / "pid"), 0.1])
        waiting = bench.call("echo")
        await until(lambda: bench.value("processes_waiting") == 1)
        waiting.cancel()
        await working
        await bench.echo()
        assert bench.value("process_replacements") == 0


class FakeProcess:
    """Stands for an idle process."""

    alive = True


async def taken(idle: IdleProcesses) -> Any:
    """Take a process in a task, which is resumed a turn after its assignment."""
    return await await_deferreds(idle.take())


@on_loop
async def test_a_process_assigned_in_the_moment_of_cancellation_goes_to_the_next_caller() -> None:
    idle, process = IdleProcesses(5), FakeProcess()
    first, second = asyncio.ensure_future(taken(idle)), asyncio.ensure_future(taken(idle))
    await until(lambda: idle.waiting == 2)
    idle.offer(process)  # type: ignore[arg-type]
    first.cancel()
    assert await second is process


@on_loop
async def test_a_process_that_died_before_its_caller_got_it_is_not_assigned_again() -> None:
    idle, process = IdleProcesses(5), FakeProcess()
    first, second = asyncio.ensure_future(taken(idle)), asyncio.ensure_future(taken(idle))
    await until(lambda: idle.waiting == 2)
    idle.offer(process)  # type: ignore[arg-type]
    process.alive = False
    first.cancel()
    await until(first.done)
    assert idle.waiting == 1
    second.cancel()


# Start and stop.


@on_loop
async def test_an_application_that_cannot_be_loaded_is_tried_again_later_and_calls_end_in_time() -> None:
    async with serving(app=AppSettings(module="heavy_app:nothing", path=str(HERE))) as bench:
        echo = bench.dispatcher.procedure("echo")
        assert echo is not None
        with pytest.raises(HandlerTimeout):
            await echo.call(None, None, timeout=1.0)
        assert bench.value("process_replacements") <= 3
        await until(lambda: bench.value("process_replacements") >= 1)


@on_loop
async def test_a_stop_ends_busy_processes_too(tmp_path: Path) -> None:
    async with serving(processes=2) as bench:
        call = bench.call("deaf", str(tmp_path / "pids"))
        pids = await read_pids(tmp_path / "pids")
        await bench.processes.stop(0.5)
        assert not any(lives(pid) for pid in pids)
        assert (await refusal(call)).code == 100


@on_loop
async def test_without_a_handler_that_runs_in_one_no_process_is_started() -> None:
    processes = ComputePool(reactor, WorkersSettings(), APP, Metrics())
    services = HandlerServices(reactor, WorkersSettings(), Metrics(), Logger(), compute_pool=processes)
    dispatcher = Dispatcher(App(), services)
    await dispatcher.start()
    assert processes.pids == []
    await dispatcher.stop(1.0)


ORPHANS = """
import sys
from twisted.internet import asyncioreactor
asyncioreactor.install()
from twisted.internet import reactor
import heavy_app
from realtime.metrics import Metrics
from realtime.handlers.coroutines import await_deferreds, start_future
from realtime.handlers.compute_pool import ComputePool
from realtime.config.settings import AppSettings, WorkersSettings
app = AppSettings(module="heavy_app:app", path=sys.argv[1])
processes = ComputePool(reactor, WorkersSettings(processes=2), app, Metrics())
sleep = heavy_app.app.handlers("rpc")["sleep"]

def begin():
    processes.start()
    for path in sys.argv[2:]:
        start_future(processes.call(sleep, ([path, 600],)))

reactor.callLater(0, begin)
reactor.run()
"""


@on_loop
async def test_a_killed_worker_leaves_no_process(tmp_path: Path) -> None:
    paths = [tmp_path / "first", tmp_path / "second"]
    command = [sys.executable, "-c", ORPHANS, str(HERE), *map(str, paths)]
    worker = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(HERE)})
    # Both are in the handler: a process that is stopped while it starts has not arranged yet to die with its worker.
    pids = [pid for path in paths for pid in await read_pids(path)]
    os.kill(pids[0], signal.SIGSTOP)
    worker.kill()
    worker.wait()
    await until(lambda: not any(lives(pid) for pid in pids))
