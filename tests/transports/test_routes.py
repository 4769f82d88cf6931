"""Routes over real sockets: handlers of the application and the server API."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Iterator
from typing import Any

import cent
import pytest
import requests
from twisted.internet.defer import Deferred
from twisted.internet.threads import deferToThread
from twisted.logger import globalLogPublisher

from realtime.app import Cookie, Request, Response
from realtime.cache import Cache
from realtime.config.settings import WorkersSettings
from realtime.errors import ClientError, EngineUnavailable
from realtime.pubsub.engine import AddPresence, Publish
from realtime.types import ClientInfo
from tests.driving import on_loop
from tests.transports.http_site import KEY, Site, fetch, site_for_test


@pytest.fixture
def site() -> Iterator[Site]:
    with site_for_test() as site:
        yield site


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
async def test_the_response_of_each_result_of_a_handler(
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


@pytest.mark.parametrize("kind", ["loop", "thread"])
@on_loop
async def test_a_handler_gets_the_parameters_of_its_path(site: Site, kind: str) -> None:
    def answer(request: Request) -> Any:
        return [request.method, request.path, request.path_parameters]

    async def answer_on_loop(request: Request) -> Any:
        return answer(request)

    handler = answer_on_loop if kind == "loop" else answer
    site.app.http.get("/rooms/{room}/{number:int}")(handler)
    site.app.http.get("/rooms/new/1")(handler)
    url = await site.start()
    room = await fetch("GET", f"{url}/rooms/a%2Fb%20c/12?x=1")
    assert room.json() == ["GET", "/rooms/a%2Fb%20c/12", {"room": "a/b c", "number": 12}]
    assert (await fetch("GET", f"{url}/rooms/new/1")).json() == ["GET", "/rooms/new/1", {}]
    head = await fetch("HEAD", f"{url}/rooms/blue/1")
    assert (head.status_code, head.content) == (200, b"")
    for path in ("/rooms/blue", "/rooms/blue/x", "/rooms/{room}/{number:int}", "/rooms/%FF/1"):
        assert b"HTTP/1.1 404 " in await site.raw(
            b"GET %b HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" % path.encode()
        )


@on_loop
async def test_a_browser_gets_cookies_and_sends_them_back(site: Site) -> None:
    @site.app.http.get("/visit")
    async def visit(request: Request) -> Response:
        visits = int(request.cookies.get("visits", "0")) + 1
        return Response(body="", cookies=[Cookie("visits", str(visits)), Cookie("last", "today", max_age=60)])

    @site.app.http.get("/shared", cache=Cache(ttl=1))
    async def shared(request: Request) -> Response:
        return Response(cookies=[Cookie("session", "of-one-user")])

    url = await site.start()
    browser = requests.Session()
    for number in (1, 2):
        answer = await deferToThread(browser.get, f"{url}/visit", timeout=20)
        assert browser.cookies.get_dict() == {"visits": str(number), "last": "today"}
    assert "visits=2; Path=/; HttpOnly; SameSite=Lax" in answer.headers["Set-Cookie"]
    refused = await fetch("GET", f"{url}/shared")
    assert (refused.status_code, "Set-Cookie" in refused.headers) == (500, False)
    [entry] = site.logged
    assert "a route with a cache sets no cookies" in str(entry)


@on_loop
async def test_a_form_and_its_mistakes_over_http(site: Site) -> None:
    @site.app.http.post("/upload")
    def upload(request: Request) -> Any:
        form = request.form(max_fields=2)
        return [form.fields, {name: [file.name, len(file.content)] for name, file in form.files.items()}]

    url = await site.start()
    answer = await fetch("POST", f"{url}/upload", data={"title": "a"}, files={"page": ("a.txt", b"x" * 1000)})
    assert answer.json() == [{"title": "a"}, {"page": ["a.txt", 1000]}]
    assert (await fetch("POST", f"{url}/upload", data={"title": "a b"})).json() == [{"title": "a b"}, {}]
    refused = await fetch("POST", f"{url}/upload", data="a=1&b=2&c=3", headers=FORM)
    assert (refused.status_code, refused.json()["code"]) == (400, 400)
    assert (await fetch("POST", f"{url}/upload", files={"page": b"x" * 5000})).status_code == 413


FORM = {"Content-Type": "application/x-www-form-urlencoded"}


@on_loop
async def test_each_method_has_its_route(site: Site) -> None:
    async def answer(request: Request) -> Any:
        return [request.method, request.body.decode()]

    http = site.app.http
    for declare in (http.get, http.put, http.patch, http.delete):
        declare("/items/{id}")(answer)
    http.post("/items/new")(answer)
    url = await site.start()
    for method in ("PUT", "PATCH", "DELETE"):
        assert (await fetch(method, f"{url}/items/new", data=b"x")).json() == [method, "x"]
    assert (await fetch("POST", f"{url}/items/new")).json() == ["POST", ""]
    for path, allow in (
        ("/items/1", "GET, HEAD, PUT, PATCH, DELETE, OPTIONS"),
        ("/items/new", "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"),
    ):
        options = await fetch("OPTIONS", url + path)
        assert (options.status_code, options.headers["Allow"], options.content) == (204, allow, b"")
        refused = await fetch("BREW", url + path)
        assert (refused.status_code, refused.headers["Allow"]) == (405, allow)
    assert (await fetch("OPTIONS", f"{url}/nothing")).status_code == 404
    assert (await fetch("POST", f"{url}/items/1")).status_code == 405
    assert site.faults() == {"method": 3}


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
async def test_the_response_of_each_error_of_a_handler(site: Site, error: Exception, status: int, body: bytes) -> None:
    @site.app.http.get("/it")
    async def it(request: Any) -> Any:
        raise error

    url = await site.start()
    answer = await fetch("GET", f"{url}/it")
    assert (answer.status_code, answer.content) == (status, body)
    assert len(site.logged) == (status == 500)


class Missing(LookupError):
    pass


@pytest.mark.parametrize("kind", ["at once", "loop", "thread", "cache"])
@on_loop
async def test_an_error_handler_answers_the_exceptions_of_its_type(site: Site, kind: str) -> None:
    errors = {
        "missing": Missing("pen"),
        "key": KeyError("pen"),
        "client": ClientError(404, "no"),
        "bug": ValueError("x"),
    }

    def fail(request: Request) -> Any:
        raise errors[request.query["by"]]

    async def fail_at_once(request: Request) -> Any:
        raise errors[request.query["by"]]

    async def fail_later(request: Request) -> Any:
        await asyncio.sleep(0)
        raise errors[request.query["by"]]

    if kind == "cache":
        site.app.http.get("/it", cache=Cache(ttl=60))(fail)
    else:
        site.app.http.get("/it")({"at once": fail_at_once, "loop": fail_later, "thread": fail}[kind])
    answered: list[str] = []

    @site.app.http.on_error(LookupError)
    def nothing(request: Request, error: LookupError) -> Response:
        answered.append(request.query["by"])
        return Response(404, {"X-Error": type(error).__name__}, f"no {error.args[0]}")

    @site.app.http.on_error(KeyError)
    def wrong(request: Request, error: KeyError) -> Any:
        return object()

    @site.app.http.on_error(ClientError)
    def refused(request: Request, error: ClientError) -> dict[str, int]:
        return {"refused": error.code}

    url = await site.start()
    for _ in range(2):  # a cache keeps no answer to an error
        answer = await fetch("GET", f"{url}/it?by=missing")
        assert (answer.status_code, answer.text, answer.headers["X-Error"]) == (404, "no pen", "Missing")
    assert answered == ["missing", "missing"]
    assert (await fetch("GET", f"{url}/it?by=client")).json() == {"refused": 404}
    assert site.logged == []
    # A fault of the error handler itself, and an exception without one.
    for by in ("key", "bug"):
        answer = await fetch("GET", f"{url}/it?by={by}")
        assert (answer.status_code, answer.json()) == (500, {"code": 100, "message": "internal server error"})
    assert len(site.logged) == 2


@on_loop
async def test_an_unsupported_result_is_500(site: Site) -> None:
    @site.app.http.get("/it")
    async def it(request: Any) -> Any:
        return object()

    url = await site.start()
    answer = await fetch("GET", f"{url}/it")
    assert (answer.status_code, answer.json()) == (500, {"code": 100, "message": "internal server error"})
    [entry] = site.logged
    assert entry["handler"] == "http GET /it"


@on_loop
async def test_a_slow_handler_and_a_full_pool_are_503() -> None:
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

    site.has_available_peer = True
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
    assert (answer.status_code, answer.headers["Allow"]) == (405, "GET, HEAD, OPTIONS")
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
async def test_the_official_client_raises_for_a_wrong_key(site: Site) -> None:
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
async def test_an_insecure_api_needs_no_key_and_a_disabled_one_is_404() -> None:
    for options, status in [({"insecure": True, "key": ""}, 200), ({"disabled": True}, 404)]:
        site = Site(**options)
        url = await site.start()
        try:
            assert (await fetch("POST", f"{url}/api/info", data=b"{}")).status_code == status
        finally:
            await site.stop()


@pytest.mark.parametrize(("verdict", "status"), [(False, 401), (True, 200)])
@on_loop
async def test_keys_are_compared_in_constant_time(
    site: Site, monkeypatch: pytest.MonkeyPatch, verdict: bool, status: int
) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return verdict

    monkeypatch.setattr("hmac.compare_digest", compare)
    url = await site.start()
    keys = (KEY, KEY[:-1], "k", "another")
    for key in keys:
        assert (await fetch("POST", f"{url}/api/info", data=b"{}", headers={"X-API-Key": key})).status_code == status
    assert set(compared) == {(key.encode(), KEY.encode()) for key in keys}


OF_PAGES = [
    ({}, 200),
    ({"Origin": "SERVER"}, 200),
    ({"Origin": "SERVER", "Sec-Fetch-Site": "same-origin"}, 200),
    ({"Sec-Fetch-Site": "none"}, 200),
    ({"Origin": "http://evil.example"}, 403),
    ({"Origin": "http://localhost:5173"}, 403),
    ({"Origin": "null"}, 403),
    ({"Sec-Fetch-Site": "cross-site"}, 403),
    ({"Sec-Fetch-Site": "same-site"}, 403),
    ({"Origin": "SERVER", "Sec-Fetch-Site": "cross-site"}, 403),
]


@pytest.mark.parametrize(("headers", "status"), OF_PAGES)
@pytest.mark.parametrize("path", ["/api/publish", "/api"])
@on_loop
async def test_a_page_of_another_origin_can_not_call_an_insecure_api(
    headers: dict[str, str], status: int, path: str
) -> None:
    body = b'{"channel":"plain","data":1,"method":"publish","params":{"channel":"plain","data":1}}'
    site = Site(insecure=True, key="")
    url = await site.start()
    try:
        sent = {name: url if value == "SERVER" else value for name, value in headers.items()}
        answer = await fetch("POST", url + path, data=body, headers={"Content-Type": "text/plain", **sent})
        assert answer.status_code == status
        assert site.faults() == ({"origin": 1} if status == 403 else {})
    finally:
        await site.stop()


@on_loop
async def test_a_page_that_knows_the_key_may_call_the_api_from_any_origin(site: Site) -> None:
    url = await site.start()
    headers = {"X-API-Key": KEY, "Origin": "http://evil.example", "Sec-Fetch-Site": "cross-site"}
    assert (await fetch("POST", f"{url}/api/info", data=b"{}", headers=headers)).status_code == 200


@pytest.mark.parametrize("size", [0, 2, 4096, 64 * 1024])
@on_loop
async def test_a_wrong_key_keeps_the_connection(size: int) -> None:
    site = Site(max_body_size=1 << 20)
    await site.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
    try:
        head = b"POST /api/info HTTP/1.1\r\nHost: x\r\nX-API-Key: %b\r\nContent-Length: %d\r\n\r\n"
        for _ in range(3):
            writer.write(head % (b"wrong", size) + b"x" * size)
            answer = await reader.readuntil(b"\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 401 ") and b"Connection: close" not in answer
        writer.write(head % (KEY.encode(), 2) + b"{}")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
        assert site.faults() == {"api_key": 3}
    finally:
        writer.close()
        await site.stop()


@pytest.mark.parametrize("headers", [b"Content-Length: 65537", b"Transfer-Encoding: chunked"])
@on_loop
async def test_a_wrong_key_with_a_long_body_closes_the_connection(headers: bytes) -> None:
    site = Site(max_body_size=1 << 20)
    await site.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
    try:
        writer.write(b"POST /api/info HTTP/1.1\r\nHost: x\r\n%b\r\n\r\n" % headers)
        answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 401 ") and b"Connection: close" in answer
    finally:
        writer.close()
        await site.stop()


@on_loop
async def test_commands_one_a_line(site: Site) -> None:
    url = await site.start()
    line = b'{"method":"publish","params":{"channel":"plain","data":%b}}'
    body = b"\n".join([line % b"1", b'{"method":"nothing"}', line % b"2", b""])
    for mode in ("", "transport"):
        headers = {"X-API-Key": KEY, "X-Centrifugo-Error-Mode": mode}
        answer = await fetch("POST", f"{url}/api", data=body, headers=headers)
        assert (answer.status_code, answer.headers["Content-Type"]) == (200, "application/json")
        assert answer.content.split(b"\n") == [
            b'{"result":{}}',
            b'{"error":{"code":104,"message":"not found"}}',
            b'{"result":{}}',
        ]
    answer = await fetch("POST", f"{url}/api", data=body + b"junk", headers={"X-API-Key": KEY})
    assert answer.status_code == 400


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
async def test_responses_of_the_api(site: Site, path: str, body: bytes, status: int, content: bytes) -> None:
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
async def test_the_legacy_format_of_a_call(site: Site, body: bytes, headers: Any, status: int, content: bytes) -> None:
    url = await site.start()
    answer = await fetch("POST", f"{url}/api", data=body, headers={"X-API-Key": KEY} | headers)
    assert (answer.status_code, answer.content) == (status, content)


@on_loop
async def test_the_api_requires_post(site: Site) -> None:
    url = await site.start()
    answer = await fetch("GET", f"{url}/api/info", headers={"X-API-Key": KEY})
    assert (answer.status_code, answer.headers["Allow"]) == (405, "POST")
    assert site.lines == [
        "answered a GET request for /api/info with 405: the path takes other methods, which the response lists"
        " (at 127.0.0.1)"
    ]


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


# Requests of pages

ORIGIN = {"Origin": "https://app.example"}
PREFLIGHT = {"Access-Control-Request-Method": "GET"}


@on_loop
async def test_routes_answer_pages_of_allowed_origins() -> None:
    # Faults 12.9.
    site = Site(allowed_origins=("https://*.example",))

    @site.app.http.get("/items")
    async def items(request: Any) -> Any:
        raise ClientError(103, "permission denied") if request.query else Exception

    @site.app.http.post("/items")
    async def add(request: Any) -> Any:
        return {"ok": True}

    url = await site.start()
    try:
        preflight = await fetch(
            "OPTIONS",
            f"{url}/items",
            headers={**ORIGIN, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-a"},
        )
        assert preflight.status_code == 204
        assert preflight.headers["Access-Control-Allow-Origin"] == "https://app.example"
        assert preflight.headers["Access-Control-Allow-Headers"] == "x-a"
        assert preflight.headers["Access-Control-Allow-Methods"] == "GET, HEAD, POST, OPTIONS"
        for method, path, status in (("POST", "/items", 200), ("GET", "/items?a=b", 403), ("GET", "/items", 500)):
            answer = await fetch(method, url + path, headers=ORIGIN)
            assert answer.status_code == status
            assert answer.headers["Access-Control-Allow-Origin"] == "https://app.example"
            assert answer.headers["Vary"] == "Origin"
        for origin in ({}, {"Origin": "https://evil.test"}):
            answer = await fetch("POST", f"{url}/items", headers=origin)
            assert answer.status_code == 200
            assert "Access-Control-Allow-Origin" not in answer.headers
        evil = {"Origin": "https://evil.test", **PREFLIGHT}
        assert (await fetch("OPTIONS", f"{url}/items", headers=evil)).status_code == 405
    finally:
        await site.stop()


@on_loop
async def test_no_route_answers_pages_of_other_origins_by_default(site: Site) -> None:
    @site.app.http.get("/items")
    async def items(request: Any) -> Any:
        return "x"

    url = await site.start()
    assert "Access-Control-Allow-Origin" not in (await fetch("GET", f"{url}/items", headers=ORIGIN)).headers
    assert (await fetch("OPTIONS", f"{url}/items", headers={**ORIGIN, **PREFLIGHT})).status_code == 405


@on_loop
async def test_no_foreign_page_publishes_by_an_insecure_api() -> None:
    # Faults 12.6: a text/plain POST needs no preflight.
    site = Site(insecure=True, key="")
    url = await site.start()
    body = b'{"channel":"chat:a","data":1}'
    try:
        for headers, status in (
            ({"Origin": "http://evil.example", "Content-Type": "text/plain"}, 403),
            ({"Origin": "http://evil.example", "Host": "evil.example"}, 403),
            ({"Origin": url}, 200),
            ({}, 200),
        ):
            answer = await fetch("POST", f"{url}/api/publish", data=body, headers=headers)
            assert answer.status_code == status, headers
        assert site.faults() == {"origin": 2}
    finally:
        await site.stop()


@pytest.mark.parametrize(
    ("request_line", "headers", "options", "line"),
    [
        (
            "POST /api/info",
            {"X-API-Key": "wrong"},
            {},
            "at /api/info without the right key: compare it with http_api.key",
        ),
        ("POST /api/info", {}, {"disabled": True}, "refused a call of the API at /api/info: http_api.disabled is set"),
        ("POST /api/info", ORIGIN, {"insecure": True}, "refused a page of https://app.example at /api/info: http_api."),
        ("GET /connection/sse", {}, {}, "/connection/sse, the path of a transport that is off: set `enabled`"),
        (
            "OPTIONS /items",
            {**ORIGIN, **PREFLIGHT},
            {},
            "page of https://app.example: add it to client.allowed_origins",
        ),
        ("GET /websocket", {"Upgrade": "websocket", "Connection": "Upgrade"}, {}, "with websocket.handler_prefix"),
        ("OPTIONS /items", {"Origin": "null", **PREFLIGHT}, {}, "refused a page with the origin null"),
        ("POST /api/info?api_key=k3y-of-the-tests", {}, {"max_body_size": 1}, "http_api.max_body_size"),
    ],
)
@on_loop
async def test_a_refusal_has_a_line_with_cause_key_and_address(
    request_line: str, headers: dict[str, str], options: dict[str, Any], line: str
) -> None:
    site = Site(**options)
    site.app.http.get("/items")(lambda request: "x")
    url = await site.start()
    method, path = request_line.split(" ")
    try:
        await fetch(method, url + path, headers=headers, data=b"{}" if method == "POST" else None)
    finally:
        await site.stop()
    [logged] = site.lines
    assert line in logged
    assert logged.endswith("(at 127.0.0.1)")
    assert "k3y" not in logged
