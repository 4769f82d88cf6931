"""WebSockets as they may also be: compressed, one way only, with pings by frames. Real clients, a real server."""

from __future__ import annotations

import asyncio
import json
import urllib.parse
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jwt
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from tests.system.serving import Server, ServerStarter, run_node

OPTIONS: dict[str, Any] = {
    "websocket": {"compression": True},
    "uni_websocket": {"enabled": True, "compression": True},
    "client": {"ping_interval": "400ms", "pong_timeout": "300ms"},
    "http_api": {"key": "test-key"},
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One for all tests here."""
    starter = ServerStarter(tmp_path_factory.mktemp("options"))
    yield starter(**OPTIONS)
    starter.finish()


def in_own_loop(coroutine: Coroutine[Any, Any, Any]) -> Any:
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, asyncio.wait_for(coroutine, 30)).result()


async def receive(socket: ClientConnection) -> Any:
    return json.loads(await socket.recv())


async def receive_push(socket: ClientConnection) -> Any:
    """The next push that is no ping."""
    while not (push := await receive(socket)):
        pass
    return push


async def connected(socket: ClientConnection) -> Any:
    await socket.send('{"id":1,"connect":{}}')
    return (await receive(socket))["connect"]


@pytest.mark.node
def test_the_sdk_compresses_both_ways_beside_one_that_does_not(server: Server) -> None:
    seen = run_node("compressed.mjs", server.endpoint)

    assert "permessage-deflate" in seen["extensions"][0]
    assert seen["extensions"][1] == ""
    assert seen["numbers"] == [list(range(10))] * 2
    assert seen["echoed"]
    # Ten publications of 18 kB each came, five were sent, and 40 kB went both ways.
    assert seen["received"][0] < 20_000 < 180_000 < seen["received"][1]
    assert seen["sent"][0] < 20_000 < 80_000 < seen["sent"][1]


def test_a_python_client_compresses_with_the_window_that_it_asks_for(server: Server) -> None:
    async def talk() -> None:
        async with connect(server.endpoint, compression="deflate") as socket:
            assert "permessage-deflate" in socket.response.headers["Sec-WebSocket-Extensions"]
            await connected(socket)
            data = ["again and again"] * 1000
            await socket.send(json.dumps({"id": 2, "rpc": {"method": "echo", "data": data}}))
            assert (await receive(socket))["rpc"]["data"] == data

    in_own_loop(talk())


def test_one_way(server: Server) -> None:
    address = f"ws://127.0.0.1:{server.port}/connection/uni_websocket"

    def token(user: str) -> str:
        return jwt.encode({"sub": user, "channels": ["stream:one-way"]}, "secret", algorithm="HS256")

    async def talk() -> None:
        query = urllib.parse.quote(json.dumps({"token": token("bob")}))
        async with connect(address) as ada, connect(f"{address}?cf_connect={query}") as bob:
            await ada.send(json.dumps({"token": token("ada")}))
            for socket in (ada, bob):
                welcome = (await receive(socket))["connect"]
                assert welcome["client"]
                assert welcome["session"]
                assert list(welcome["subs"]) == ["stream:one-way"]
                assert not welcome.get("pong")
            async with connect(server.endpoint) as talker:
                await connected(talker)
                await talker.send('{"id":2,"subscribe":{"channel":"stream:one-way"}}')
                await talker.send('{"id":3,"publish":{"channel":"stream:one-way","data":{"n":1}}}')
                for socket in (ada, bob):
                    while "pub" not in (push := await receive_push(socket)):
                        assert push.keys() == {"channel", "join"}
                    assert push["channel"] == "stream:one-way"
                    assert push["pub"]["data"] == {"n": 1}
            for _ in range(3):  # pings, for which no pong is expected
                while await receive(ada):
                    pass
                await ada.send("ignored")

    in_own_loop(talk())


def test_who_is_not_let_in_is_told_by_a_push_and_by_the_close_frame(server: Server) -> None:
    async def talk() -> None:
        async with connect(f"ws://127.0.0.1:{server.port}/connection/uni_websocket") as socket:
            await socket.send('{"token":"bad"}')
            assert (await receive(socket))["disconnect"] == {"code": 3500, "reason": "invalid token"}
            with pytest.raises(ConnectionClosed):
                await socket.recv()
            assert (socket.close_code, socket.close_reason) == (3500, "invalid token")

    in_own_loop(talk())


def test_pings_by_frames(server: Server) -> None:
    async def talk() -> None:
        address = server.endpoint + "?cf_ws_frame_ping_pong=true"
        async with connect(address, ping_interval=None) as socket:
            result = await connected(socket)
            assert "ping" not in result
            assert "pong" not in result
            # The library answers pings of itself; protocol pings would be messages.
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(socket.recv(), 1.0)
            await socket.send('{"id":2,"rpc":{"method":"echo","data":1}}')
            assert (await receive(socket))["rpc"] == {"data": 1}

    in_own_loop(talk())
