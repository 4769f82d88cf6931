"""What a server logs and shows that is told secrets and lies in every place that there is."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jwt
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from tests.system.serving import HERE, Server, ServerStarter, toml

KEY, OLD_KEY, API_KEY = (f"marked-{name}-0123456789abcdef0123456789" for name in ("secret", "old-secret", "api-key"))
# What must appear nowhere: what the configuration keeps secret, and what clients say in confidence.
MARK = "marked-"


def marked(name: str) -> str:
    return f"{MARK}{name}-5d41402abc4b"


@pytest.fixture(scope="module")
def careless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    starter = ServerStarter(tmp_path_factory.mktemp("logged"))
    server = starter(
        app={"module": "careless:app", "path": str(HERE / "apps")},
        workers={"count": 1, "processes": 1},
        log={"level": "trace"},
        client={
            "token": {"hmac_secret_key": KEY, "hmac_previous_secret_key": OLD_KEY},
            "user_id_http_header": "X-User-Id",
        },
        http_api={"key": API_KEY},
        **{name: {"enabled": True} for name in ("sse", "http_stream", "uni_sse", "uni_http_stream", "uni_websocket")},
    )
    server.expect_traceback()
    yield server
    starter.finish()


def token(key: str = KEY, **claims: object) -> str:
    return jwt.encode(claims, key, algorithm="HS256")


def raw(server: Server, data: bytes, until: bytes | None = None) -> bytes:
    """What comes back, to the end of the connection, or until this has come."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as client:
        client.sendall(data)
        received = b""
        while piece := client.recv(65536):
            received += piece
            if until is not None and until in received:
                break
        return received


def request(method: str, path: str, *lines: str, body: bytes = b"") -> bytes:
    head = [f"{method} {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}", "Connection: close", *lines]
    return "\r\n".join([*head, "", ""]).encode("latin-1") + body


def converse(server: Server, *commands: dict[str, Any], path: str = "", headers: dict[str, str] | None = None) -> str:
    """Say these on a WebSocket, one after another, and return all that came back."""
    heard = []
    with connect(server.endpoint + path, additional_headers=headers) as client:
        for command in commands:
            client.send(json.dumps(command))
            try:
                heard.append(client.recv(timeout=20))
            except ConnectionClosed as closed:
                heard.append(repr(closed))
                break
    return "\n".join(map(str, heard))


def everything_told(server: Server) -> dict[str, str]:
    """All that operators can see."""
    pages = ("/metrics", "/health", "/snapshot", "/incidents", "/", *(f"/dump?worker=0&what={what}" for what in DUMPS))
    return {"the log": server.log} | {page: server.operate(page)[1] for page in pages}


DUMPS = ("stacks", "tasks", "memory")


def test_no_secret_is_logged_or_shown(careless: Server) -> None:
    good = token(sub="ann", info={"phone": marked("info")}, meta={"plan": marked("meta")})
    secrets = {
        "signature": good.split(".")[2],
        "claims": good.split(".")[1],
        "old signature": token(OLD_KEY, sub="7").split(".")[2],
    }
    cookie = {"Cookie": f"session={marked('cookie')}", "Authorization": f"Bearer {marked('bearer')}"}
    password = {"password": marked("password")}

    connected = {"id": 1, "connect": {"token": good, "data": password}}
    private = token(sub="ann", channel="$private", info=marked("sub"))
    assert '"subscribe":{' in converse(
        careless,
        connected,
        {"id": 2, "subscribe": {"channel": "$private", "token": private, "data": password}},
        {"id": 3, "subscribe": {"channel": "$other", "token": marked("sub-token")}},
        {"id": 4, "rpc": {"method": "echo", "data": password}},
        {"id": 5, "rpc": {"method": "raises loop"}},
        {"id": 6, "rpc": {"method": "junk thread", "data": password}},
        {"id": 7, "rpc": {"method": "forever loop", "data": password}},
        {"id": 8, "rpc": {"method": "junk process", "data": password}},
        {"id": 9, "refresh": {"token": marked("refresh")}},
        path=f"?token={marked('query')}&api_key={API_KEY}",
        headers=cookie,
    )
    # Those who are not let in, and one whose handler fails with all of it at hand.
    for bad in (good[:-4], marked("token"), token(marked("guess") * 2, sub="7"), token(OLD_KEY, sub="7", exp=1)):
        converse(careless, {"id": 1, "connect": {"token": bad, "data": password}}, headers=cookie)
    failing = {"id": 1, "connect": {"token": good, "data": {"password": "raise"}, "headers": cookie}}
    assert '"code":100' in converse(careless, failing, headers=cookie)
    converse(careless, {"id": 1, "connect": {}}, headers={"X-User-Id": "header"})

    for path in ("/api/info", "/api", "/api/nothing"):
        for key in (API_KEY, marked("wrong-key")):
            raw(careless, request("POST", f"{path}?api_key={key}", body=b"{}"))
            raw(careless, request("POST", path, f"X-API-Key: {key}", body=b"{"))
            raw(careless, request("POST", path, f"Authorization: apikey {key}", body=b"{}"))
    data = json.dumps({"channel": "a", "data": password, "idempotency_key": marked("key")}).encode()
    assert b" 200 " in raw(careless, request("POST", "/api/publish", f"X-API-Key: {API_KEY}", body=data))
    body = json.dumps({"token": good, "data": password})
    for path in ("sse", "uni_sse"):
        command = body if path == "uni_sse" else json.dumps(connected)
        said = raw(careless, request("GET", f"/connection/{path}?cf_connect={quote(command)}"), b'"ping"')
        secrets |= {f"session of {path}": found for found in re.findall(r'"session":"([^"]+)"', said.decode())}
    assert len(secrets) >= 4
    raw(careless, request("GET", f"/connection/websocket?token={marked('plain-get')}"))
    raw(careless, request("POST", "/emulation", body=json.dumps({"session": marked("session"), "data": "{}"}).encode()))
    raw(careless, b"GET /" + marked("garbage").encode() + b"\0 HTTP/1.1\r\n\r\n")

    careless.wait_for_log("on purpose")
    time.sleep(0.2)  # what else is logged of all this comes at once
    for place, text in everything_told(careless).items():
        assert len(text) > 2, place
        assert MARK not in text, (place, text[max(text.find(MARK) - 300, 0) :][:400])
        for name, secret in secrets.items():
            assert secret not in text, (place, name)


# A line that an operator would take for one of the server's, and what hides or colours it in a terminal.
FORGED = "2026-01-01T00:00:00+0000 [realtime.supervisor.service#info] FORGED"
LIES = [
    f"a\r\n{FORGED}",
    f"b\n{FORGED}",
    f"c\r{FORGED}",
    f"d\x1b[2K\x1b[1G{FORGED}",
    f"e\x9b2K\x85{FORGED}",
    "f\x07\x00",
]


def test_no_line_is_forged_and_no_terminal_commanded(careless: Server) -> None:
    for lie in [*LIES, "x" * 10_000]:
        user = token(sub=lie, info={"name": lie})
        converse(
            careless,
            {"id": 1, "connect": {"token": user, "name": lie, "version": lie}},
            {"id": 2, "subscribe": {"channel": lie}},
            {"id": 3, "subscribe": {"channel": f"unknown:{lie}", "token": lie}},
            {"id": 4, "rpc": {"method": lie}},
        )
        with connect(careless.endpoint) as client:
            client.close(4000, lie[:100])
        raw(careless, request("GET", f"/{quote(lie)[:8000]}"))
        raw(careless, request("GET", "/", f"User-Agent: {lie[:500]}"))
        raw(careless, f"GET /{lie} HTTP/1.1\r\nHost: {lie}\r\n\r\n".encode("latin-1"))
    # What a handler says of what it was sent is logged with its mistake.
    all_lies = "|".join(LIES)
    connected = {"id": 1, "connect": {"token": token(sub="7")}}
    mistakes = [{"id": 2, "rpc": {"method": f"raises {place}", "data": all_lies}} for place in ("thread", "process")]
    converse(careless, connected, *mistakes)
    raw(careless, request("GET", f"/raise?text={quote(all_lies)}"))
    for said in ("raises thread", "raises process", "/raise"):
        careless.wait_for_log(rf"{said}(.*\n)+?.*ValueError: a")
    for line in careless.lines:
        assert not line.startswith(FORGED)
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", line.removesuffix("\n")), repr(line)


@pytest.mark.parametrize(("level", "warnings", "errors"), [("warn", 1, 1), ("none", 0, 0)])
def test_the_level_is_the_supervisor_s_too(tmp_path: Path, level: str, warnings: int, errors: int) -> None:
    config = tmp_path / "realtime.toml"
    sections = {
        "log": {"level": level},
        "http_server": {"address": "127.0.0.1", "port": 0, "internal_port": 0},
        "workers": {"count": 1},
        "client": {"insecure": True},
        "app": {"module": "nobody_wrote_this:app"},
    }
    config.write_text("".join(f"{key} = {toml(value)}\n" for key, value in sections.items()))
    server = Server(config)
    try:
        assert server.process.wait(30) == 78
    finally:
        server.kill()
    server._reader.join(30)
    assert "serving clients" not in server.log
    assert server.log.count("client.insecure") == warnings
    assert ("nobody_wrote_this" in server.log) is bool(errors)
    assert ("[realtime." in server.log) is bool(warnings + errors)
