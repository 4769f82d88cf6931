"""A handler that blocks its worker's loop holds up its caller alone: the relief thread serves everybody else."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import threading
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import aiohttp
import pytest
from websockets.asyncio.client import ClientConnection as AsyncConnection
from websockets.asyncio.client import connect as connect_async
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from tests.system.serving import HERE, Server, ServerStarter, wait_until

APP = {"module": "relieving:app", "path": str(HERE / "apps")}
OPTIONS = {
    "allow_subscribe_for_client": True,
    "allow_publish_for_client": True,
    "allow_presence_for_client": True,
    "presence": True,
    "history_size": 100_000,
    "history_ttl": "600s",
}
CHANNEL = {"without_namespace": OPTIONS, "namespaces": [{"name": "checked", **OPTIONS}]}
KINDS = ("websocket", "http_stream", "websocket", "sse")
WRITERS = 6
READERS = 6


@pytest.fixture(scope="module")
def relieved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    starter = ServerStarter(tmp_path_factory.mktemp("relief"))
    yield starter(
        app=APP,
        workers={"count": 1, "processes": 1},
        channel=CHANNEL,
        loop={"max_lag": "0s"},
        http_stream={"enabled": True},
        sse={"enabled": True},
    )
    starter.finish()


@contextmanager
def connected(server: Server) -> Iterator[ClientConnection]:
    with connect(server.endpoint) as client:
        say(client, {"id": 1, "connect": {}})
        assert "connect" in hear(client)
        yield client


def say(client: ClientConnection, *commands: dict[str, Any]) -> None:
    client.send("\n".join(map(json.dumps, commands)))


def hear(client: ClientConnection) -> dict[str, Any]:
    """The next message but pings, of which one line each is expected."""
    while True:
        text = client.recv(timeout=25)
        if text != "{}":
            answer: dict[str, Any] = json.loads(text)
            return answer
        client.send("{}")


def ask(client: ClientConnection, method: str, data: Any = None) -> Any:
    say(client, {"id": 7, "rpc": {"method": method, "data": data}})
    return hear(client)["rpc"].get("data")


def api(server: Server, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(
        f"{server.http}/api/{method}", json.dumps(parameters).encode(), {"X-API-Key": "test-key"}
    )
    with urllib.request.urlopen(request, timeout=25) as response:
        answer: dict[str, Any] = json.load(response)
        return answer


@pytest.mark.parametrize("method", ["wait", "wait later"])
def test_everything_but_handlers_on_the_loop_goes_on(relieved: Server, method: str) -> None:
    """If relief did not serve, the blocked handler would return False: only another client's call releases it."""
    with connected(relieved) as blocked, connected(relieved) as other, connected(relieved) as third:
        say(other, {"id": 2, "subscribe": {"channel": "room"}})
        assert "subscribe" in hear(other)
        say(
            blocked, {"id": 3, "rpc": {"method": method, "data": True}}, {"id": 4, "rpc": {"method": "echo", "data": 4}}
        )
        assert ask(third, "entered")
        # What the blocked step itself has done.
        assert hear(other)["push"]["pub"]["data"] == {"from": "the blocked step"}
        # Commands without handlers, and publications of a client, of a thread, and of another program.
        say(third, {"id": 2, "publish": {"channel": "room", "data": 1}})
        assert "publish" in hear(third) and hear(other)["push"]["pub"]["data"] == 1
        say(third, {"id": 3, "presence_stats": {"channel": "room"}})
        assert hear(third)["presence_stats"]["num_clients"] == 1
        say(third, {"id": 4, "rpc": {"method": "publish", "data": 2}})
        assert {hear(third).get("id"), hear(third).get("id")} == {None, 4}  # a message from the thread, and the reply
        assert hear(other)["push"]["pub"]["data"] == 2
        assert "result" in api(relieved, "publish", {"channel": "room", "data": 3})
        assert hear(other)["push"]["pub"]["data"] == 3
        # A handler in a process, which publishes.
        say(third, {"id": 8, "rpc": {"method": "process", "data": 4}})
        assert hear(third)["rpc"]["data"] > 0 and hear(other)["push"]["pub"]["data"] == 4
        # New connections, up to the handler that decides on them, and the metrics.
        with connect(relieved.endpoint) as late:
            say(late, {"id": 1, "connect": {}})
            assert 'realtime_clients{process="worker",worker="0"} 3' in relieved.operate("/metrics")[1]
            # Handlers on the loop wait, in the order of their commands.
            say(third, {"id": 5, "rpc": {"method": "echo", "data": 5}}, {"id": 6, "rpc": {"method": "echo", "data": 6}})
            assert ask(other, "release") is None
            assert "connect" in hear(late)
        assert hear(blocked)["push"]["message"]["data"] == {"from": "the blocked step"}
        assert [hear(blocked)["rpc"]["data"] for _ in range(2)] == [True, 4]
        assert [hear(third)["rpc"]["data"] for _ in range(2)] == [5, 6]


def test_a_relief_is_shown_and_hides_nothing(relieved: Server) -> None:
    with connected(relieved) as blocked, connected(relieved) as other:
        say(blocked, {"id": 3, "rpc": {"method": "wait", "data": None}})
        assert ask(other, "entered")

        def is_pressing() -> bool:
            return relieved.health()["workers"][0]["condition"] != "healthy"

        def served() -> dict[str, Any] | None:
            found = json.loads(relieved.operate("/incidents")[1])["incidents"]
            return next((one for one in found if one["handler"] == "rpc wait" and one["relieved"]), None)

        wait_until(is_pressing, "the condition of a blocked worker")
        wait_until(served, "an incident that relief serves")
        ask(other, "release")
        assert hear(blocked)["rpc"]["data"] is True
    metrics = relieved.operate("/metrics")[1]
    assert 'realtime_reliefs_total{handler="rpc wait",process="worker",worker="0"}' in metrics


def test_a_caller_gets_its_timeout_while_its_handler_blocks(start_server: ServerStarter) -> None:
    server = start_server(
        app=APP, workers={"count": 1, "handler_timeout": "200ms"}, channel=CHANNEL, loop={"max_lag": "0s"}
    )
    with connected(server) as blocked, connected(server) as other:
        say(blocked, {"id": 3, "rpc": {"method": "wait later", "data": None}})
        assert ask(other, "entered")
        assert hear(blocked)["error"]["code"] == 100
        ask(other, "release")
        assert ask(blocked, "echo", 1) == 1


def test_a_worker_that_blocks_without_end_is_still_replaced(start_server: ServerStarter) -> None:
    server = start_server(
        app=APP, workers={"count": 1}, channel=CHANNEL, loop={"max_lag": "0s", "stuck": "1s", "relief_after": "10ms"}
    )
    pid = server.health()["workers"][0]["pid"]
    with connected(server) as blocked, connected(server) as other:
        say(blocked, {"id": 3, "rpc": {"method": "wait", "data": None}})
        assert ask(other, "entered")
        wait_until(lambda: server.health()["workers"][0]["pid"] not in (None, pid), "the successor of the worker")


def test_a_drain_disconnects_the_other_clients_while_a_handler_blocks(start_server: ServerStarter) -> None:
    server = start_server(app=APP, workers={"count": 1}, channel=CHANNEL, loop={"max_lag": "0s"})
    with connected(server) as blocked, connected(server) as other:
        say(blocked, {"id": 3, "rpc": {"method": "wait", "data": None}})
        assert ask(other, "entered")
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(ConnectionClosed) as closed:
            hear(other)
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 3001
        with pytest.raises(TimeoutError):
            blocked.recv(timeout=0)
        server.kill()
        start_server.started.remove(server)


def test_without_relief_everybody_waits(start_server: ServerStarter) -> None:
    server = start_server(app=APP, workers={"count": 1}, channel=CHANNEL, loop={"max_lag": "0s", "relief": False})
    with connected(server) as blocked, connected(server) as other:
        assert ask(blocked, "share", 1.0) is None
        say(blocked, {"id": 3, "rpc": {"method": "block", "data": 1}})
        assert hear(blocked)["rpc"]["data"] == 1
        assert ask(other, "violations") == []
        assert "realtime_reliefs" not in server.operate("/metrics")[1]


# Blocks at random, on every entrance


class Account:
    """What a client has sent and what every reader has got."""

    def __init__(self) -> None:
        self.faults: list[str] = []
        self.acknowledged: dict[int, int] = {}  # by writer: publications
        self.read: list[list[tuple[int, int]]] = []  # by reader: writer and number of each publication
        self.calls = 0

    def check(self, condition: object, fault: str) -> None:
        if not condition:
            self.faults.append(fault)


class Stream:
    """A connection by an HTTP stream or SSE and emulation, with the methods of a WebSocket that a Talker calls."""

    def __init__(self, server: Server, kind: str) -> None:
        self.server = server
        self.kind = kind
        self._http = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(60))
        self._order = asyncio.Lock()
        self._opened: asyncio.Future[aiohttp.ClientResponse] = asyncio.get_running_loop().create_future()
        self._connected: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()

    async def send(self, text: str) -> None:
        async with self._order:  # one command after the other, as over one connection
            if not self._opened.done():
                self._opened.set_result(await self._open(text))
                return
            connected = await self._connected
            body = {"session": connected["session"], "node": connected["node"], "data": text}
            async with self._http.post(f"{self.server.http}/emulation", json=body) as response:
                assert response.status == 204

    async def _open(self, text: str) -> aiohttp.ClientResponse:
        url = f"{self.server.http}/connection/{self.kind}"
        if self.kind == "sse":
            return await self._http.get(url, params={"cf_connect": text})
        return await self._http.post(url, data=text)

    async def __aiter__(self) -> AsyncIterator[str]:
        response = await self._opened
        with suppress(aiohttp.ClientError):  # `close` has ended it
            async for line in response.content:
                text = line.decode().removeprefix("data: ").strip()
                if not self._connected.done() and text:
                    self._connected.set_result(json.loads(text)["connect"])
                if text:
                    yield text

    async def close(self) -> None:
        (await self._opened).close()
        await self._http.close()


class Talker:
    """A connection that is read all the time."""

    def __init__(self, account: Account, socket: AsyncConnection | Stream) -> None:
        self.account = account
        self.socket = socket
        self.publications: list[tuple[int, int]] = []
        self.offset = 0
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}  # in the order of the commands
        self._last = 0
        self.reading = asyncio.ensure_future(self._read())

    def ask(self, **command: Any) -> asyncio.Future[dict[str, Any]]:
        self._last += 1
        reply = self._waiting[self._last] = asyncio.get_running_loop().create_future()
        self._sending = asyncio.ensure_future(self.socket.send(json.dumps({"id": self._last, **command})))
        return reply

    async def _read(self) -> None:
        async for text in self.socket:
            for line in str(text).splitlines():
                message = json.loads(line)
                if not message:
                    await self.socket.send("{}")
                elif "id" in message:
                    expected = next(iter(self._waiting), None)
                    self.account.check(message["id"] == expected, f"reply {message['id']} in place of {expected}")
                    self._waiting.pop(message["id"]).set_result(message)
                elif (publication := message.get("push", {}).get("pub")) is not None:
                    self.account.check(publication["offset"] == self.offset + 1, f"a gap at {publication['offset']}")
                    self.offset = publication["offset"]
                    self.publications.append(tuple(publication["data"]))  # type: ignore[arg-type]


async def talker(server: Server, account: Account, number: int) -> Talker:
    """Connect by the transport of this number."""
    kind = KINDS[number % len(KINDS)]
    websocket = await connect_async(server.endpoint, ping_interval=None) if kind == "websocket" else None
    made = Talker(account, websocket or Stream(server, kind))
    await made.ask(connect={})
    return made


async def read(server: Server, account: Account, number: int, channel: str) -> Talker:
    reader = await talker(server, account, number)
    account.check("error" not in await reader.ask(subscribe={"channel": channel}), "a refused subscription")
    account.read.append(reader.publications)
    return reader


async def write(server: Server, account: Account, number: int, channel: str, until: float) -> None:
    """Publish, and call handlers of every kind, several at a time; come back now and then."""
    sent = 0
    client = await talker(server, account, number)
    while time.monotonic() < until:
        replies = []
        for _ in range(random.randint(1, 4)):
            what = random.choice(("publish", "publish", "block", "block later", "thread", "send", "presence"))
            account.calls += 1
            if what == "publish":
                sent += 1
                replies.append((None, client.ask(publish={"channel": channel, "data": [number, sent]})))
            elif what == "presence":
                replies.append((None, client.ask(presence_stats={"channel": channel})))
            elif what == "send":
                await client.socket.send(json.dumps({"send": {"data": 1}}))
            else:
                value = random.random()
                replies.append((value, client.ask(rpc={"method": what, "data": value})))
        for value, reply in replies:
            answer = await reply
            account.check("error" not in answer, f"{answer}")
            account.check(value is None or answer.get("rpc", {}).get("data") == value, f"{answer} for {value}")
        await asyncio.sleep(random.uniform(0, 0.02))
        if random.random() < 0.02:
            await client.socket.close()
            client = await talker(server, account, number)
    account.acknowledged[number] = sent
    await client.socket.close()


async def request(server: Server, account: Account, until: float) -> None:
    number = 0
    while time.monotonic() < until:
        number += 1

        def fetch(number: int = number) -> Any:
            with urllib.request.urlopen(f"{server.http}/block?number={number}", timeout=30) as response:
                return json.load(response)

        answer = await asyncio.to_thread(fetch)
        account.check(answer == {"number": str(number)}, f"HTTP {answer}")
        account.calls += 1


async def stress(server: Server, account: Account, seconds: float) -> None:
    channel = "checked:room"
    readers = [await read(server, account, number, channel) for number in range(READERS)]
    assert "error" not in await readers[0].ask(rpc={"method": "share", "data": 0.15})
    until = time.monotonic() + seconds
    writers = [write(server, account, number, channel, until) for number in range(WRITERS)]
    await asyncio.gather(*writers, request(server, account, until))
    await readers[0].ask(rpc={"method": "share", "data": 0})
    total = sum(account.acknowledged.values())
    limit = time.monotonic() + 30
    while time.monotonic() < limit and any(len(reader.publications) < total for reader in readers):
        await asyncio.sleep(0.02)
    violations = (await readers[0].ask(rpc={"method": "violations"}))["rpc"].get("data")
    account.check(violations == [], f"two threads in the application: {violations}")
    for reader in readers:
        await reader.socket.close()
        await reader.reading


def test_every_message_is_accounted_for_while_handlers_block_at_random(
    relieved: Server, request: pytest.FixtureRequest
) -> None:
    """Every publication arrives once and in order, every call gets its own answer, and the application has one thread.

    `--relief-seconds` makes it longer.
    """
    account = Account()
    failure: list[BaseException] = []

    def run() -> None:
        try:
            asyncio.run(stress(relieved, account, request.config.getoption("--relief-seconds")))
        except BaseException as error:
            failure.append(error)

    # A loop of its own, beside pytest-twisted's.
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    assert account.faults == []
    expected = {number: list(range(1, sent + 1)) for number, sent in account.acknowledged.items()}
    assert account.calls > 0 and len(expected) == WRITERS
    for publications in account.read:
        got: dict[int, list[int]] = {number: [] for number in expected}
        for writer, number in publications:
            got[writer].append(number)
        assert got == expected
    assert "realtime_reliefs_total" in relieved.operate("/metrics")[1]
