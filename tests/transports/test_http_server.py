"""HTTP over real sockets: routes, files, the server API, and requests that mean no good."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cent
import pytest
import pytest_twisted
import requests
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.threads import deferToThread
from twisted.logger import Logger, globalLogPublisher

from realtime.app import App, Response
from realtime.config.settings import ChannelSettings, HTTPAPISettings, Namespace, Settings, WorkersSettings
from realtime.errors import ClientError, EngineUnavailable
from realtime.handlers.dispatch import Dispatcher
from realtime.metrics import Metrics
from realtime.protocol.channel_rules import ChannelRules
from realtime.pubsub.engine import AddPresence, Publish
from realtime.pubsub.hub import Hub
from realtime.server_api.http_api import HTTPAPI
from realtime.server_api.operations import NodeIdentity, ServerAPI
from realtime.transports import http_server
from realtime.transports.http_server import make_site
from realtime.types import ClientInfo
from tests.driving import on_loop
from tests.pubsub.memory_engine import MemoryEngine

KEY = "k3y-of-the-tests"
LIMIT = 4096
CHAT = Namespace(name="chat", presence=True, history_size=10, history_ttl=60.0)


async def found_nothing(pattern: str) -> dict[str, int]:
    """A survey of the channels of no worker."""
    return {}


class Site:
    """The site of one worker on a free port, over an engine in memory."""

    def __init__(self, workers: WorkersSettings | None = None, **http_api: Any) -> None:
        options = {"key": KEY, "max_body_size": LIMIT, "body_timeout": 10.0} | http_api
        self.settings = Settings(http_api=HTTPAPISettings(**options), channel=ChannelSettings(namespaces=(CHAT,)))
        self.app = App()
        self.orders: list[bytes] = []
        self.logged: list[dict[str, Any]] = []
        self.metrics = Metrics()
        self.workers = workers or WorkersSettings(threads=2)
        self.reasons: tuple[str, ...] = ()  # what presses the worker
        self.others_are_free = False
        self._port: Any = None

    async def start(self) -> str:
        """Serve, and return the base URL."""
        hub = Hub(self.orders.append)
        self.engine = hub.engine = MemoryEngine(hub, self.settings.engine, time.monotonic)
        facts = NodeIdentity("n1", "node", "1.0", 12.5)
        operations = ServerAPI(self.engine, ChannelRules(self.settings.channel), lambda: facts, found_nothing)
        api = HTTPAPI(operations)
        log = Logger(observer=self.logged.append)
        self.dispatcher = Dispatcher(self.app, reactor, self.workers, self.metrics, log, pressure=self)
        await self.dispatcher.start()
        self.dispatcher.bind(operations)
        site = make_site(
            self.app, self.dispatcher, api, self.settings, self.metrics, relieved=lambda: self.others_are_free
        )
        self._port = reactor.listenTCP(0, site, interface="127.0.0.1")  # type: ignore[attr-defined]
        self.port = self._port.getHost().port
        return f"http://127.0.0.1:{self.port}"

    @property
    def pressed(self) -> bool:
        return bool(self.reasons)

    async def stop(self) -> None:
        await self._port.stopListening()
        await self.dispatcher.stop(5)

    def faults(self) -> dict[str, float]:
        """The refusals that were counted, by kind."""
        samples = [one for one in self.metrics.snapshot() if one.name == "realtime_bad_input"]
        return {one.labels[0][1]: one.value for one in samples if one.value}

    async def raw(self, *parts: bytes) -> bytes:
        """Everything that comes back for these bytes, until the server closes."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            for part in parts:
                writer.write(part)
                await writer.drain()
            return await reader.read()
        finally:
            writer.close()


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()
    yield site
    # The reactor of the tests goes on; what they opened is closed in it.
    if site._port is not None:
        pytest_twisted.blockon(Deferred.fromCoroutine(site.stop()))


async def fetch(method: str, url: str, **options: Any) -> requests.Response:
    """One request by an ordinary client, from a thread."""
    return await deferToThread(requests.request, method, url, timeout=20, **options)


def post(path: str, body: bytes, *headers: bytes) -> bytes:
    """The bytes of a POST request that closes its connection, without a Content-Length of its own."""
    head = [b"POST " + path.encode() + b" HTTP/1.1", b"Host: x", b"Connection: close", *headers]
    return b"\r\n".join([*head, b"", body])


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


# -- routes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("result", "status", "kind", "body"),
    [
        ({"a": [1]}, 200, "application/json", b'{"a":[1]}'),
        ([1, 2], 200, "application/json", b"[1,2]"),
        ("grüße", 200, "text/plain; charset=utf-8", "grüße".encode()),
        (b"\x00\x01", 200, "application/octet-stream", b"\x00\x01"),
        (None, 204, None, b""),
        (Response(201, {"X-Mine": "1", "Content-Type": "text/css"}, "a{}"), 201, "text/css", b"a{}"),
        (Response(404), 404, None, b""),
    ],
)
@pytest.mark.parametrize("kind_of_handler", ["loop", "thread"])
@on_loop
async def test_what_a_handler_returns_is_the_response(
    site: Site, kind_of_handler: str, result: Any, status: int, kind: str | None, body: bytes
) -> None:
    if kind_of_handler == "loop":

        @site.app.http.get("/it")
        async def it(request: Any) -> Any:
            await asyncio.sleep(0)
            return result
    else:

        @site.app.http.get("/it")
        def it(request: Any) -> Any:
            return result

    url = await site.start()
    answer = await fetch("GET", f"{url}/it")
    assert (answer.status_code, answer.headers.get("Content-Type"), answer.content) == (status, kind, body)
    assert answer.headers["Server"] == "realtime"
    head = await fetch("HEAD", f"{url}/it")
    assert (head.status_code, head.content) == (status, b"")
    assert head.headers.get("Content-Length") == answer.headers.get("Content-Length")


@on_loop
async def test_handler_gets_the_whole_request(site: Site) -> None:
    @site.app.http.post("/echo")
    async def echo(request: Any) -> Any:
        return [
            request.method,
            request.path,
            request.query,
            request.headers["x-a"],
            request.json(),
            request.remote_address,
        ]

    url = await site.start()
    answer = await fetch("POST", f"{url}/echo?a=1&b=%C3%A9&a=2", json={"n": 1}, headers={"X-A": "yes"})
    assert answer.json() == ["POST", "/echo", {"a": "2", "b": "é"}, "yes", {"n": 1}, "127.0.0.1"]
    assert (await fetch("POST", f"{url}/echo", data=b"{no json", headers={"X-A": "yes"})).status_code == 400


@pytest.mark.parametrize(
    ("error", "status", "body"),
    [
        (ClientError(107, "bad request"), 400, b'{"code":107,"message":"bad request"}'),
        (ClientError(404, "no such room"), 400, b'{"code":404,"message":"no such room"}'),
        (ClientError(103, "permission denied"), 403, b'{"code":103,"message":"permission denied"}'),
        (ValueError("the secret plan"), 500, b'{"code":100,"message":"internal server error"}'),
    ],
)
@on_loop
async def test_errors_of_handlers_tell_the_peer_no_more_than_they_say(
    site: Site, error: Exception, status: int, body: bytes
) -> None:
    @site.app.http.get("/it")
    async def it(request: Any) -> Any:
        raise error

    url = await site.start()
    answer = await fetch("GET", f"{url}/it")
    assert (answer.status_code, answer.content) == (status, body)
    assert len(site.logged) == (status == 500)


@on_loop
async def test_result_that_is_no_response_is_500(site: Site) -> None:
    @site.app.http.get("/it")
    async def it(request: Any) -> Any:
        return object()

    url = await site.start()
    answer = await fetch("GET", f"{url}/it")
    assert (answer.status_code, answer.json()) == (500, {"code": 100, "message": "internal server error"})
    [entry] = site.logged
    assert entry["handler"] == "http GET /it"


@on_loop
async def test_slow_handler_and_full_pool_are_503() -> None:
    site = Site(WorkersSettings(threads=1, thread_queue=0))
    release = threading.Event()
    began = threading.Event()

    @site.app.http.get("/slow", timeout=0.05)
    async def slow(request: Any) -> Any:
        await Deferred()

    @site.app.http.get("/busy")
    def busy(request: Any) -> Any:
        began.set()
        release.wait(20)
        return "done"

    url = await site.start()
    try:
        answer = await fetch("GET", f"{url}/slow")
        assert answer.status_code == 503
        assert 3 <= int(answer.headers["Retry-After"]) <= 10
        first = fetch("GET", f"{url}/busy")
        running = asyncio.ensure_future(_as_future(first))
        await deferToThread(began.wait, 10)
        assert (await fetch("GET", f"{url}/busy")).status_code == 503
        release.set()
        assert (await running).text == "done"
    finally:
        release.set()
        await site.stop()


@on_loop
async def test_a_refusal_under_pressure_keeps_the_connection_unless_another_worker_is_free(site: Site) -> None:
    @site.app.http.get("/it")
    async def it(request: Any) -> Any:
        return "done"

    await site.start()
    site.reasons = ("lag",)
    ask = b"GET /it HTTP/1.1\r\nHost: x\r\n\r\n"
    last = ask.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    answers = await site.raw(ask + last)
    assert answers.count(b"HTTP/1.1 503 ") == 2
    waits = {int(wait) for wait in re.findall(rb"Retry-After: (\d+)", answers)}
    assert waits <= set(range(3, 11))

    site.others_are_free = True
    answers = await site.raw(ask + ask)
    assert answers.count(b"HTTP/1.1 503 ") == 1
    assert b"\r\nConnection: close\r\n" in answers
    assert b"\r\nRetry-After: 1\r\n" in answers


async def _as_future(coroutine: Any) -> Any:
    return await Deferred.fromCoroutine(coroutine).asFuture(asyncio.get_running_loop())


@on_loop
async def test_handler_is_cancelled_when_the_peer_leaves(site: Site) -> None:
    began, ended = asyncio.Event(), asyncio.Event()

    @site.app.http.get("/wait")
    async def wait(request: Any) -> Any:
        began.set()
        try:
            await Deferred()
        finally:
            ended.set()

    await site.start()
    _, writer = await asyncio.open_connection("127.0.0.1", site.port)
    writer.write(b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n")
    await began.wait()
    writer.close()
    await ended.wait()


@on_loop
async def test_unknown_paths_and_methods(site: Site) -> None:
    @site.app.http.get("/it")
    async def it(request: Any) -> Any:
        return "it"

    url = await site.start()
    assert (await fetch("GET", f"{url}/other")).status_code == 404
    assert (await fetch("GET", f"{url}/it/")).status_code == 404
    answer = await fetch("POST", f"{url}/it", data=b"x")
    assert (answer.status_code, answer.headers["Allow"]) == (405, "GET")
    assert (await fetch("GET", f"{url}/it?" + "&".join(f"p{n}=1" for n in range(101)))).status_code == 400


@on_loop
async def test_connection_serves_many_requests(site: Site) -> None:
    @site.app.http.post("/add")
    async def add(request: Any) -> Any:
        return sum(request.json())

    url = await site.start()

    def ask() -> list[int]:
        with requests.Session() as session:
            return [session.post(f"{url}/add", json=[n, 1], timeout=20).json() for n in range(5)]

    assert await deferToThread(ask) == [1, 2, 3, 4, 5]


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> Path:
    root = tmp_path / "public"
    (root / "sub").mkdir(parents=True)
    (root / "index.html").write_text("<p>hello")
    (root / "sub" / "index.html").write_text("below")
    (root / "app.js").write_text("let a = 1")
    (root / "with space.txt").write_text("spaced")
    (root / "picture.png").write_bytes(b"\x89PNG")
    (root / ".env").write_text("hidden")
    (root / ".git").mkdir()
    (root / ".git" / "config").write_text("hidden")
    (tmp_path / "secret.txt").write_text("secret")
    (root / "link.txt").symlink_to(tmp_path / "secret.txt")
    return root


@pytest.mark.parametrize(
    ("path", "body", "kind"),
    [
        ("/", b"<p>hello", "text/html; charset=utf-8"),
        ("/index.html", b"<p>hello", "text/html; charset=utf-8"),
        ("/sub/", b"below", "text/html; charset=utf-8"),
        ("/app.js", b"let a = 1", "text/javascript"),
        ("/with%20space.txt", b"spaced", "text/plain; charset=utf-8"),
        ("/picture.png", b"\x89PNG", "image/png"),
    ],
)
@on_loop
async def test_files_are_served(site: Site, files: Path, path: str, body: bytes, kind: str) -> None:
    site.app.http.static("/", files)
    url = await site.start()
    answer = await fetch("GET", url + path)
    assert (answer.status_code, answer.content) == (200, body)
    assert answer.headers["Content-Type"].replace("application/javascript", "text/javascript").startswith(kind)
    assert answer.headers["Server"] == "realtime"
    head = await fetch("HEAD", url + path)
    assert (head.status_code, head.content, head.headers["Content-Length"]) == (200, b"", str(len(body)))
    again = await fetch("GET", url + path, headers={"If-Modified-Since": answer.headers["Last-Modified"]})
    assert (again.status_code, again.content) == (304, b"")
    part = await fetch("GET", url + path, headers={"Range": "bytes=1-2"})
    assert (part.status_code, part.content) == (206, body[1:3])


@pytest.mark.parametrize(
    ("asked", "status", "content"),
    [("bytes=2-", 206, b"log()"[2:]), ("bytes=-3", 206, b"g()"), ("bytes=0-99", 206, b"log()"), ("bytes=9-", 416, b"")],
)
@on_loop
async def test_a_part_of_a_file(site: Site, files: Path, asked: str, status: int, content: bytes) -> None:
    (files / "part.txt").write_bytes(b"log()")
    site.app.http.static("/", files)
    url = await site.start()
    answer = await fetch("GET", url + "/part.txt", headers={"Range": asked})
    assert (answer.status_code, answer.content) == (status, content)


@on_loop
async def test_a_connection_that_was_idle_is_no_event(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "IDLE", 0.05)
    await site.start()
    events: list[dict[str, Any]] = []
    globalLogPublisher.addObserver(events.append)
    try:
        answer = await site.raw(b"GET /nothing HTTP/1.1\r\nHost: h\r\n\r\n")
    finally:
        globalLogPublisher.removeObserver(events.append)
    assert status_of(answer) == 404
    assert not events


@on_loop
async def test_the_front_alone_limits_heads(site: Site) -> None:
    await site.start()
    lines = b"".join(b"X-%d: %s\r\n" % (number, b"x" * 50) for number in range(1000))
    answer = await site.raw(b"GET /nothing HTTP/1.1\r\nHost: h\r\nConnection: close\r\n" + lines + b"\r\n")
    assert status_of(answer) == 404


STRANGE = [
    *(
        b"Range: bytes=" + value
        for value in (b"0-" + b",0-" * 1000, b"0-0," * 1000 + b"0-0", b"-0", b"5-1", b"\xff-", b"a-b")
    ),
    *(
        b"Range: bytes=" + value
        for value in (b"9" * 5000 + b"-", b"-" + b"9" * 5000, b"", b"-", b"0-1\r\nRange: bytes=1-2")
    ),
    *(
        b"If-Modified-Since: " + value
        for value in (b";", b"\xff", b"Sun, 22 Nov " + b"9" * 5000 + b" 08:00:00 GMT", b"x")
    ),
]


@pytest.mark.parametrize("line", STRANGE, ids=[line[:40] for line in STRANGE])
@on_loop
async def test_a_strange_wish_is_ignored_without_a_word(site: Site, files: Path, line: bytes) -> None:
    site.app.http.static("/", files)
    await site.start()
    events: list[dict[str, Any]] = []
    globalLogPublisher.addObserver(events.append)
    try:
        answer = await site.raw(b"GET /picture.png HTTP/1.1\r\nHost: h\r\nConnection: close\r\n" + line + b"\r\n\r\n")
    finally:
        globalLogPublisher.removeObserver(events.append)
    assert status_of(answer) == 200
    assert answer.endswith(b"\r\n\r\n\x89PNG")
    assert not events


@pytest.mark.parametrize(
    "path",
    [
        "/../secret.txt",
        "/%2e%2e/secret.txt",
        "/..%2fsecret.txt",
        "/sub/../../secret.txt",
        "/sub/%2e%2e/app.js",
        "//etc/passwd",
        "/./app.js",
        "/app.js/",
        "/app.js%00.html",
        "/..%5csecret.txt",
        "/.env",
        "/.git/config",
        "/%2egit/config",
        "/link.txt",
        "/%ff",
        "/sub",
        "/missing",
        "/" + "a" * 1000,
    ],
)
@on_loop
async def test_nothing_else_is_served(site: Site, files: Path, path: str) -> None:
    site.app.http.static("/", files)
    await site.start()
    answer = await site.raw(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    assert status_of(answer) == 404
    assert b"secret" not in answer
    assert b"hidden" not in answer


@on_loop
async def test_longest_prefix_wins_and_a_route_before_it(site: Site, files: Path) -> None:
    site.app.http.static("/", files)
    site.app.http.static("/deep", files / "sub")

    @site.app.http.get("/app.js")
    async def script(request: Any) -> Any:
        return "made"

    url = await site.start()
    assert (await fetch("GET", f"{url}/deep/index.html")).text == "below"
    assert (await fetch("GET", f"{url}/app.js")).text == "made"
    assert (await fetch("GET", f"{url}/deep")).url == f"{url}/deep/"
    answer = await fetch("POST", f"{url}/deep/index.html")
    assert (answer.status_code, answer.headers["Allow"]) == (405, "GET, HEAD")


# -- the server API ---------------------------------------------------------------------------------------------------


@on_loop
async def test_official_client_calls_every_method(site: Site) -> None:
    url = await site.start()
    site.engine.execute(AddPresence("chat:1", ClientInfo("ada", "c1", b'{"nick":"A"}'), present=True, announce=False))

    def use() -> list[Any]:
        client = cent.Client(f"{url}/api", KEY)
        first = client.publish(cent.PublishRequest(channel="chat:1", data={"n": 1}, tags={"t": "1"}))
        broadcast = client.broadcast(cent.BroadcastRequest(channels=["chat:1", "nope:1"], data=2))
        presence = client.presence(cent.PresenceRequest(channel="chat:1"))
        stats = client.presence_stats(cent.PresenceStatsRequest(channel="chat:1"))
        history = client.history(cent.HistoryRequest(channel="chat:1", limit=-1))
        since = cent.StreamPosition(offset=1, epoch=first.epoch)
        rest = client.history(cent.HistoryRequest(channel="chat:1", limit=10, since=since))
        info = client.info(cent.InfoRequest())
        client.disconnect(cent.DisconnectRequest(user="ada"))
        client.unsubscribe(cent.UnsubscribeRequest(user="ada", channel="chat:1"))
        client.history_remove(cent.HistoryRemoveRequest(channel="chat:1"))
        batch = client.batch(
            cent.BatchRequest(
                requests=[
                    cent.PublishRequest(channel="chat:1", data=3),
                    cent.PresenceStatsRequest(channel="chat:1"),
                ]
            )
        )
        return [first, broadcast, presence, stats, history, rest, info, batch]

    first, broadcast, presence, stats, history, rest, info, batch = await deferToThread(use)
    assert first.offset == 1
    assert first.epoch
    assert broadcast.responses[0].result.offset == 2
    assert broadcast.responses[1].error.code == 102
    assert presence.presence["c1"].user == "ada"
    assert presence.presence["c1"].conn_info == {"nick": "A"}
    assert (stats.num_clients, stats.num_users) == (1, 1)
    assert [publication.data for publication in history.publications] == [{"n": 1}, 2]
    assert history.publications[0].tags == {"t": "1"}
    assert [publication.offset for publication in rest.publications] == [2]
    assert (info.nodes[0].uid, info.nodes[0].name, info.nodes[0].uptime) == ("n1", "node", 12)
    assert batch.replies[0].offset == 3
    assert batch.replies[1].num_clients == 1
    assert len(site.orders) == 2


@on_loop
async def test_official_client_hears_of_a_wrong_key(site: Site) -> None:
    url = await site.start()

    def use() -> None:
        with pytest.raises(cent.CentUnauthorizedError):
            cent.Client(f"{url}/api", "wrong").info(cent.InfoRequest())

    await deferToThread(use)


@pytest.mark.parametrize(
    ("key", "headers", "query", "status"),
    [
        (KEY, {"X-API-Key": KEY}, "", 200),
        (KEY, {"Authorization": f"apikey {KEY}"}, "", 200),
        (KEY, {"Authorization": f"ApiKey {KEY}"}, "", 200),
        (KEY, {}, f"?api_key={KEY}", 200),
        (KEY, {}, "", 401),
        (KEY, {"X-API-Key": ""}, "", 401),
        (KEY, {"X-API-Key": KEY[:-1]}, "", 401),
        (KEY, {"X-API-Key": KEY + "x"}, "", 401),
        (KEY, {"X-API-Key": "wrong"}, f"?api_key={KEY}", 401),
        (KEY, {"Authorization": f"bearer {KEY}"}, "", 401),
        (KEY, {"Authorization": "apikey"}, "", 401),
        (KEY, {"Authorization": "apikey wrong"}, f"?api_key={KEY}", 401),
        ("", {}, "", 401),
        ("", {"X-API-Key": ""}, "", 401),
        ("", {}, "?api_key=", 401),
        ("schlüssel", {"X-API-Key": "schlüssel".encode()}, "", 200),
    ],
)
@on_loop
async def test_key(key: str, headers: dict[str, Any], query: str, status: int) -> None:
    site = Site(key=key)
    url = await site.start()
    try:
        answer = await fetch("POST", f"{url}/api/info{query}", data=b"{}", headers=headers)
        assert answer.status_code == status
        assert site.faults() == ({"api_key": 1} if status == 401 else {})
        if status == 401:
            assert answer.content == b""
    finally:
        await site.stop()


@on_loop
async def test_insecure_api_wants_no_key_and_a_disabled_one_is_not_there() -> None:
    for options, status in [({"insecure": True, "key": ""}, 200), ({"disabled": True}, 404)]:
        site = Site(**options)
        url = await site.start()
        try:
            assert (await fetch("POST", f"{url}/api/info", data=b"{}")).status_code == status
        finally:
            await site.stop()


@on_loop
async def test_keys_are_never_logged(site: Site) -> None:
    lines: list[str] = []
    globalLogPublisher.addObserver(note := lambda event: lines.append(repr(event)))
    try:
        url = await site.start()
        await fetch("POST", f"{url}/api/info?api_key={KEY}", data=b"{}")
        await fetch("POST", f"{url}/api/info?api_key=another-key", data=b"{}")
    finally:
        globalLogPublisher.removeObserver(note)
    assert not [line for line in lines if KEY in line or "another-key" in line]


@pytest.mark.parametrize(
    ("path", "body", "status", "content"),
    [
        ("publish", b"", 400, b"Bad Request"),
        ("publish", b"{", 400, b"Bad Request"),
        ("publish", b"[]", 400, b"Bad Request"),
        ("publish", b'{"channel":7}', 400, b"Bad Request"),
        ("publish", b"{}", 200, b'{"error":{"code":107,"message":"bad request"}}'),
        ("rpc", b'{"method":"x"}', 200, b'{"error":{"code":104,"message":"not found"}}'),
        ("channels", b"{}", 200, b'{"result":{"channels":{}}}'),
        ("subscribe", b'{"user":"ada","channel":"plain"}', 200, b'{"result":{}}'),
        ("refresh", b'{"user":"ada","expired":true}', 200, b'{"result":{}}'),
        ("publish", b'{"channel":"nope:1","data":1}', 200, b'{"error":{"code":102,"message":"unknown channel"}}'),
        ("publish", b'{"channel":"plain","data":1,"unknown":2}', 200, b'{"result":{}}'),
        ("presence", b'{"channel":"plain"}', 200, b'{"error":{"code":108,"message":"not available"}}'),
        ("presence", b'{"channel":"chat:1"}', 200, b'{"result":{"presence":{}}}'),
        ("disconnect", b'{"user":"ada"}', 200, b'{"result":{}}'),
        ("batch", b'{"commands":[]}', 200, b'{"replies":[]}'),
        ("nothing", b"{}", 404, b"Not Found"),
        ("", b"{}", 404, b"Not Found"),
        ("publish/", b"{}", 404, b"Not Found"),
    ],
)
@on_loop
async def test_answers_of_the_api(site: Site, path: str, body: bytes, status: int, content: bytes) -> None:
    url = await site.start()
    answer = await fetch("POST", f"{url}/api/{path}", data=body, headers={"X-API-Key": KEY})
    assert (answer.status_code, answer.content) == (status, content)
    if status == 200:
        assert answer.headers["Content-Type"] == "application/json"


@pytest.mark.parametrize(
    ("body", "headers", "status", "content"),
    [
        (b'{"method":"publish","params":{"channel":"plain","data":1}}', {}, 200, b'{"result":{}}'),
        (b'{"method":"x","params":{}}', {}, 200, b'{"error":{"code":104,"message":"not found"}}'),
        (b'{"method":"x"}', {"X-Centrifugo-Error-Mode": "transport"}, 404, b'{"code":104,"message":"not found"}'),
        (b"{", {}, 400, b"Bad Request"),
        (b"{}", {"X-API-Key": "another"}, 401, b""),
    ],
)
@on_loop
async def test_the_old_form_of_a_call(site: Site, body: bytes, headers: Any, status: int, content: bytes) -> None:
    url = await site.start()
    answer = await fetch("POST", f"{url}/api", data=body, headers={"X-API-Key": KEY} | headers)
    assert (answer.status_code, answer.content) == (status, content)


@on_loop
async def test_api_wants_post(site: Site) -> None:
    url = await site.start()
    answer = await fetch("GET", f"{url}/api/info", headers={"X-API-Key": KEY})
    assert (answer.status_code, answer.headers["Allow"]) == (405, "POST")


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("publish", {}, 400, 107),
        ("publish", {"channel": "nope:1", "data": 1}, 404, 102),
        ("presence", {"channel": "plain"}, 400, 108),
        ("history", {"channel": "chat:1", "since": {"offset": 1, "epoch": "other"}}, 416, 112),
    ],
)
@on_loop
async def test_transport_error_mode(site: Site, path: str, body: Any, status: int, code: int) -> None:
    url = await site.start()
    headers = {"X-API-Key": KEY, "X-Centrifugo-Error-Mode": "transport"}
    answer = await fetch("POST", f"{url}/api/{path}", json=body, headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert set(answer.json()) == {"code", "message"}


@on_loop
async def test_transport_error_mode_for_every_call() -> None:
    site = Site(error_mode="transport")
    url = await site.start()
    try:
        for mode, status in ((None, 400), ("transport", 400), ("other", 200)):
            headers = {"X-API-Key": KEY} | ({"X-Centrifugo-Error-Mode": mode} if mode else {})
            answer = await fetch("POST", f"{url}/api/publish", json={}, headers=headers)
            assert answer.status_code == status
        answer = await fetch("POST", f"{url}/api/info", json={}, headers={"X-API-Key": KEY})
        assert "result" in answer.json()
    finally:
        await site.stop()


@on_loop
async def test_engine_outage_is_error_100_and_a_bug_is_logged(site: Site) -> None:
    url = await site.start()
    events: list[dict[str, Any]] = []
    for error in (EngineUnavailable("gone"), ZeroDivisionError("a bug of ours")):

        async def fail(*_: Any, error: Exception = error, **__: Any) -> Any:
            raise error

        site.engine.overrides[Publish] = fail
        globalLogPublisher.addObserver(events.append)
        try:
            answer = await fetch(
                "POST", f"{url}/api/publish", json={"channel": "chat:1", "data": 1}, headers={"X-API-Key": KEY}
            )
        finally:
            globalLogPublisher.removeObserver(events.append)
        assert answer.json() == {"error": {"code": 100, "message": "internal server error"}}
    assert [event["log_failure"].type for event in events if "log_failure" in event] == [ZeroDivisionError]


# -- bodies -----------------------------------------------------------------------------------------------------------

WITH_KEY = f"X-API-Key: {KEY}".encode()


@pytest.mark.parametrize("path", ["/api/publish", "/take"])
@on_loop
async def test_declared_body_over_the_limit_is_refused_from_its_head(site: Site, path: str) -> None:
    @site.app.http.post("/take")
    async def take(request: Any) -> Any:
        return len(request.body)

    await site.start()
    answer = await site.raw(post(path, b"", WITH_KEY, b"Content-Length: 200000000"))
    assert status_of(answer) == 413
    assert b"Connection: close" in answer
    assert site.faults() == {"body_too_large": 1}


@pytest.mark.parametrize("path", ["/api/publish", "/take"])
@on_loop
async def test_very_many_tiny_chunks_are_not_read(site: Site, path: str) -> None:
    @site.app.http.post("/take")
    async def take(request: Any) -> Any:
        return len(request.body)

    await site.start()
    answer = await site.raw(
        post(path, b"1\r\nx\r\n" * (LIMIT - 1) + b"0\r\n\r\n", WITH_KEY, b"Transfer-Encoding: chunked")
    )
    assert status_of(answer) == 400
    assert b"Connection: close" in answer
    assert site.faults() == {"body_syntax": 1}


@on_loop
async def test_chunked_body_is_refused_at_the_byte_that_passes_the_limit(site: Site) -> None:
    calls = []

    @site.app.http.post("/take")
    async def take(request: Any) -> Any:
        calls.append(len(request.body))
        return len(request.body)

    await site.start()
    chunked = b"Transfer-Encoding: chunked"
    fits = b"1000\r\n" + b"x" * LIMIT + b"\r\n0\r\n\r\n"
    assert (await site.raw(post("/take", fits, chunked))).endswith(b"\r\n\r\n4096")
    one_more = b"1000\r\n" + b"x" * LIMIT + b"\r\n1\r\nx\r\n"
    assert status_of(await site.raw(post("/take", one_more, chunked))) == 413
    assert status_of(await site.raw(post("/take", one_more + b"0\r\n\r\n", chunked))) == 413
    assert calls == [LIMIT]


@on_loop
async def test_response_arrives_although_the_peer_goes_on_sending(site: Site) -> None:
    await site.start()
    answer = await site.raw(
        post("/api/publish", b"", WITH_KEY, b"Content-Length: 3000000"), *[b"x" * 100_000 for _ in range(20)]
    )
    assert status_of(answer) == 413


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/api/publish", [WITH_KEY], b"HTTP/1.1 100 Continue"),
        ("/api/publish", [b"X-API-Key: wrong"], b"HTTP/1.1 401 Unauthorized"),
        ("/api/publish", [WITH_KEY, b"Content-Encoding: gzip"], b"HTTP/1.1 415 Unsupported Media Type"),
        ("/nowhere", [], b"HTTP/1.1 404 Not Found"),
    ],
)
@on_loop
async def test_only_a_request_that_may_come_is_told_to_continue(
    site: Site, path: str, headers: list[bytes], status: bytes
) -> None:
    await site.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
    writer.write(post(path, b"", *headers, b"Expect: 100-continue", b"Content-Length: 2"))
    assert (await reader.readline()).strip() == status
    writer.close()


@on_loop
async def test_expecting_too_much_is_refused_without_a_hundred(site: Site) -> None:
    await site.start()
    answer = await site.raw(post("/api/publish", b"", WITH_KEY, b"Expect: 100-continue", b"Content-Length: 200000000"))
    assert status_of(answer) == 413


@on_loop
async def test_body_that_trickles_meets_an_absolute_deadline() -> None:
    site = Site(body_timeout=0.2)
    await site.start()
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
        writer.write(post("/api/publish", b"", WITH_KEY, b"Content-Length: 1000"))
        answer = asyncio.ensure_future(reader.read())
        while not answer.done():
            writer.write(b"x")
            await asyncio.sleep(0.02)
        assert status_of(await answer) == 408
        assert site.faults() == {"body_timeout": 1}
        writer.close()
    finally:
        await site.stop()


@on_loop
async def test_compressed_body_is_refused(site: Site) -> None:
    url = await site.start()
    answer = await fetch(
        "POST",
        f"{url}/api/publish",
        data=gzip.compress(b'{"channel":"plain","data":1}'),
        headers={"X-API-Key": KEY, "Content-Encoding": "gzip"},
    )
    assert answer.status_code == 415
    assert site.faults() == {"body_encoding": 1}


@on_loop
async def test_refused_peer_that_does_not_leave_is_cut_off(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("realtime.transports.http_server.LINGER", 0.1)
    await site.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
    writer.write(post("/api/publish", b"", b"Content-Length: 10"))
    assert status_of(await reader.read()) == 401
    with pytest.raises(ConnectionError):  # the aborted connection answers with a reset
        while True:
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.01)
    writer.close()


@on_loop
async def test_large_body_within_the_limit_arrives_whole() -> None:
    site = Site(max_body_size=0)

    @site.app.http.post("/take")
    def take(request: Any) -> Any:
        return {"size": len(request.body), "last": request.body[-1:].decode()}

    url = await site.start()
    try:
        answer = await fetch("POST", f"{url}/take", data=b"x" * 2_000_000 + b"y")
        assert json.loads(answer.content) == {"size": 2_000_001, "last": "y"}
    finally:
        await site.stop()
