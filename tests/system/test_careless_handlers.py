"""Handlers that raise, answer with junk or far too much, never end, or act for clients that have gone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jwt
import pytest
from websockets.sync.client import ClientConnection, connect

from tests.system.serving import HERE, TRACEBACK, Server, ServerStarter

APP = {"module": "careless:app", "path": str(HERE / "apps")}
PLACES = ("loop", "thread", "process")


@pytest.fixture(scope="module")
def careless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    starter = ServerStarter(tmp_path_factory.mktemp("careless"))
    server = starter(app=APP, workers={"count": 1, "processes": 1})
    server.expect_traceback()
    yield server
    starter.finish()


@contextmanager
def connected(server: Server, user: str) -> Iterator[ClientConnection]:
    with connect(server.endpoint) as client:
        say(client, {"id": 1, "connect": {"token": jwt.encode({"sub": user}, "secret", algorithm="HS256")}})
        assert "connect" in hear(client)
        yield client


def say(client: ClientConnection, *commands: dict[str, Any]) -> None:
    client.send("\n".join(map(json.dumps, commands)))


def hear(client: ClientConnection) -> dict[str, Any]:
    return json.loads(client.recv(timeout=20))


def ask(client: ClientConnection, method: str, data: Any = None) -> Any:
    say(client, {"id": 7, "rpc": {"method": method, "data": data}})
    return hear(client)


INTERNAL = {"code": 100, "message": "internal server error", "temporary": True}


def test_whatever_a_handler_does_its_caller_gets_one_error_and_lives(careless: Server) -> None:
    with connected(careless, "ada") as client:
        for place in PLACES:
            for kind, code in (("raises", 100), ("junk", 100), ("large", 106), ("forever", 100)):
                error = ask(client, f"{kind} {place}")["error"]
                assert error["code"] == code, (kind, place)
                assert code != 100 or error == INTERNAL
                assert ask(client, "echo", [kind, place])["rpc"]["data"] == [kind, place]


def test_a_mistake_is_logged_once_with_its_place_however_often_it_is_made(careless: Server) -> None:
    with connected(careless, "bob") as client:
        for number in range(50):
            for place in PLACES:
                assert ask(client, f"raises {place}", f"number {number} {place}")["error"] == INTERNAL
    for place in PLACES:
        careless.wait_for_log(f"rpc 'raises {place}'|rpc raises {place}")
    # One for each place of "raises" and "junk", here and in the test before; not one for each of 150 calls.
    assert careless.log.count(TRACEBACK) <= 12
    assert "careless.py" in careless.log


@pytest.mark.parametrize("place", ["loop", "thread"])
def test_what_is_done_for_a_client_that_has_gone_does_nothing(careless: Server, place: str) -> None:
    with connected(careless, f"gone-{place}") as client:
        say(client, {"id": 7, "rpc": {"method": f"late {place}"}})

    careless.wait_for_log(rf"acted for gone-{place} in frozenset\(\)")
    with connected(careless, "eve") as other:
        assert ask(other, "echo", 1)["rpc"]["data"] == 1
