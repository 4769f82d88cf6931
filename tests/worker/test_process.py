"""A whole worker: its start, its service, the supervisor's messages to it, and its drain."""

from __future__ import annotations

import select
import socket
import sys
from pathlib import Path

import pytest
from msgspec.structs import replace
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ClientEndpoint, connectProtocol
from twisted.internet.task import deferLater
from twisted.logger import capturedLogs

from realtime import cache
from realtime.config.settings import AppSettings, ShutdownSettings
from realtime.errors import SettingsError
from realtime.process.fd_passing import FdSender, pair
from realtime.worker.process import REPORT_INTERVAL, Worker
from tests.driving import on_loop
from tests.system.brokers import BrokerProcess
from tests.transports.stage import eventually
from tests.worker.serving import MODULE, SETTINGS, Peer, WorkerChild, serving


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch) -> cache.Host:
    """A host of caches in place of the process's own."""
    host = cache.Host()
    monkeypatch.setattr(cache, "HOST", host)
    return host


def app_events() -> list[str]:
    """The life cycle of the application that the worker has imported."""
    return list(sys.modules[MODULE].events)


# Start and service.


@on_loop
async def test_start_waits_for_the_broker_and_the_application_before_it_opens_the_port() -> None:
    sys.modules.pop(MODULE, None)
    broker = BrokerProcess(SETTINGS.engine)
    await broker.start()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        child = WorkerChild(SETTINGS, listening)
        worker = Worker(child)
        starting = Deferred.fromCoroutine(worker.start())
        await deferLater(reactor, 0.01)  # type: ignore[arg-type]
        assert not starting.called
        assert app_events() == []
        worker.link(0, await broker.stream(0))
        await starting
        assert app_events() == ["started"]
        await worker.drain(0.0)
    await broker.stop()
    child.page.close()


@on_loop
async def test_clients_publish_to_each_other_and_call_the_application() -> None:
    async with serving() as served:
        speaker, listener = await served.connect(), await served.connect()
        listener.say(id=2, subscribe={"channel": "news"})
        await listener.reply(2)
        speaker.say(id=2, publish={"channel": "news", "data": {"n": 1}})
        assert (await speaker.reply(2)).keys() == {"id", "publish"}
        await eventually(lambda: any("push" in message for message in listener.messages))
        [push] = [message["push"] for message in listener.messages if "push" in message]
        assert (push["channel"], push["pub"]["data"], push["pub"]["offset"]) == ("news", {"n": 1}, 1)
        speaker.say(id=3, rpc={"method": "double", "data": 21})
        assert (await speaker.reply(3))["rpc"] == {"data": 42}
        assert served.metric("realtime_clients") == 2
        assert served.metric("realtime_subscriptions") == 1


@on_loop
async def test_the_heartbeat_reports_the_load() -> None:
    async with serving() as served:
        client = await served.connect()
        client.say(id=2, subscribe={"channel": "news"})
        await client.reply(2)

        def load() -> tuple[int, int]:
            vitals = served.child.page.read()
            assert vitals is not None
            return vitals.connections, vitals.subscriptions

        await eventually(lambda: load() == (1, 1))
        client.leave()
        await eventually(lambda: load() == (0, 0))


@on_loop
async def test_the_engine_learns_the_number_of_subscriptions() -> None:
    async with serving() as served:
        client = await served.connect()
        client.say(id=2, subscribe={"channel": "news"})
        await client.reply(2)
        assert REPORT_INTERVAL <= 1.0
        await eventually(lambda: served.worker._reported_subscriptions == 1)


@pytest.mark.parametrize("module", ["no_such_module:app", f"{MODULE}:nothing"])
def test_an_application_that_cannot_be_loaded_is_named(module: str) -> None:
    child = WorkerChild(replace(SETTINGS, app=AppSettings(module=module)))
    with pytest.raises(SettingsError, match=r"app\.module"):
        Worker(child)
    child.page.close()


# The supervisor's messages.


@pytest.mark.parametrize(("slot", "lines"), [(0, 1), (1, 0)])
def test_a_call_that_blocks_the_loop_is_a_warning_of_one_worker(
    slot: int, lines: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "import time\nfrom realtime import App\napp = App()\n@app.rpc('f')\nasync def f(data): time.sleep(1)\n"
    (tmp_path / "blocking_app.py").write_text(text)
    monkeypatch.setattr(sys, "path", sys.path[:])
    settings = replace(SETTINGS, app=AppSettings(module="blocking_app:app", path=str(tmp_path)))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        child = WorkerChild(settings, listening, slot)
        with capturedLogs() as events:
            Worker(child)
        child.page.close()
    sys.modules.pop("blocking_app")
    found = [event["line"] for event in events if "line" in event]
    assert [line.partition(" on the loop")[0] for line in found] == [
        f"{tmp_path}/blocking_app.py:5: rpc f calls time.sleep"
    ] * lines


@on_loop
async def test_another_stream_to_the_broker_takes_the_place_of_the_first() -> None:
    async with serving() as served:
        client = await served.connect()
        served.worker.link(0, await served.broker.stream(0))
        client.say(id=2, publish={"channel": "news", "data": 1})
        assert "publish" in await client.reply(2)
        assert served.child.lost_links == 0


@on_loop
async def test_connections_that_the_supervisor_has_accepted_are_served() -> None:
    async with serving() as served:
        ours, theirs = pair()
        sender = FdSender(reactor, ours)
        served.worker.adopt(theirs.detach())
        with socket.create_server(("127.0.0.1", 0)) as elsewhere:
            connecting = Deferred.fromCoroutine(connect(elsewhere))
            await eventually(lambda: is_acceptable(elsewhere))
            accepted, _ = elsewhere.accept()
            accepted.setblocking(False)
            settled: list[bool] = []
            sender.send(accepted, settled.append)
            peer = await connecting
            await served.open(peer)
        await eventually(lambda: settled == [True])
        peer.say(id=2, rpc={"method": "double", "data": "a"})
        assert (await peer.reply(2))["rpc"] == {"data": "aa"}
        sender.close()


async def connect(listening: socket.socket) -> Peer:
    return await connectProtocol(TCP4ClientEndpoint(reactor, *listening.getsockname()), Peer())


def is_acceptable(listening: socket.socket) -> bool:
    return bool(select.select([listening], [], [], 0)[0])


# Drain.


@on_loop
async def test_a_drain_disconnects_the_clients_stops_the_application_and_leaves_the_queue() -> None:
    async with serving() as served:
        client = await served.connect()
        await served.drain(2.0)
        assert client.close == (3001, "shutdown")
        assert app_events() == ["started", "stopped"]
        # The port is closed in this process alone: a new client waits in the queue of the original socket.
        with socket.create_connection(served.listening.getsockname(), timeout=5):
            assert is_acceptable(served.listening)


@pytest.mark.parametrize("shutdown", [ShutdownSettings(spread=0.3), ShutdownSettings(spread=0.0, reconnect_rate=10)])
@on_loop
async def test_a_drain_spreads_the_disconnects(shutdown: ShutdownSettings) -> None:
    settings = replace(SETTINGS, shutdown=shutdown)
    async with serving(settings) as served:
        clients = [await served.connect() for _ in range(3)]
        began = reactor.seconds()  # type: ignore[attr-defined]
        await served.drain(5.0)
        assert [client.close for client in clients] == [(3001, "shutdown")] * 3
        assert reactor.seconds() - began >= 0.2  # type: ignore[attr-defined]


@on_loop
async def test_a_drain_answers_the_calls_that_run_before_it_disconnects_their_clients() -> None:
    # Faults 10.6: an RPC under way was lost.
    async with serving() as served:
        client = await served.connect()
        client.say(id=2, rpc={"method": "slow", "data": 0.2})
        await eventually(lambda: served.worker._handlers.dispatcher.running == 1)
        await served.drain(10.0)
        assert served.worker._handlers.dispatcher.running == 0
        assert (await client.reply(2))["rpc"] == {"data": "done"}
        await eventually(lambda: client.close == (3001, "shutdown"))


@on_loop
async def test_a_drain_announces_the_end_of_kept_alive_connections() -> None:
    # Faults 10.6: behind a proxy, requests on connections that were cut became 502.
    request = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
    async with serving() as served:
        endpoint = TCP4ClientEndpoint(reactor, *served.listening.getsockname())
        peer = await connectProtocol(endpoint, Peer())
        peer.send(request)
        await eventually(lambda: peer.status == 404)
        drain = Deferred.fromCoroutine(served.drain(5.0))
        await deferLater(reactor, 0.1)  # type: ignore[arg-type]
        assert not peer.lost
        peer.send(request)
        await eventually(lambda: peer.lost)
        assert peer.received.count(b"HTTP/1.1 404") == 2
        assert peer.received.count(b"Connection: close") == 1
        await drain


@on_loop
async def test_a_drain_answers_the_first_request_of_a_connection_that_was_accepted_before() -> None:
    async with serving() as served:
        endpoint = TCP4ClientEndpoint(reactor, *served.listening.getsockname())
        peer = await connectProtocol(endpoint, Peer())
        await eventually(lambda: served.metric("realtime_pending_connections") == 1)
        drain = Deferred.fromCoroutine(served.drain(5.0))
        await deferLater(reactor, 0.1)  # type: ignore[arg-type]
        assert not drain.called
        peer.send(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await eventually(lambda: peer.lost)
        assert peer.received.count(b"HTTP/1.1 404") == 1
        assert peer.received.count(b"Connection: close") == 1
        await drain


@on_loop
async def test_a_drain_ends_at_its_deadline_whatever_runs() -> None:
    async with serving() as served:
        client = await served.connect()
        client.say(id=2, rpc={"method": "slow", "data": 60})
        await eventually(lambda: served.worker._handlers.dispatcher.running == 1)
        began = reactor.seconds()  # type: ignore[attr-defined]
        await served.drain(3.0)
        assert reactor.seconds() - began < 30  # type: ignore[attr-defined]
        assert app_events()[-1] == "stopped"
