"""A real server replaces its workers while clients of every transport listen and call: none of them notices."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred

from tests.driving import on_loop
from tests.system.brokers import until
from tests.system.serving import Server, ServerStarter
from tests.worker import handover_app
from tests.worker.moving import BIDIRECTIONAL, UNIDIRECTIONAL, Moving, arrive, publish

ENABLED = {"enabled": True}
RELOADS = 2


class Place:
    """The clients' port of a server."""

    def __init__(self, server: Server) -> None:
        self.address = "127.0.0.1", server.port


def serve(start_server: ServerStarter) -> Server:
    options = {
        "allow_subscribe_for_client": True,
        "allow_subscribe_for_anonymous": True,
        "allow_publish_for_client": True,
        "allow_publish_for_anonymous": True,
        "history_size": 1000,
        "history_ttl": "60s",
        "presence": True,
        "join_leave": True,
        "force_push_join_leave": True,
    }
    return start_server(
        app={"module": "handover_app:app", "path": str(Path(handover_app.__file__).parent)},
        client={"allow_anonymous_connect_without_token": True},
        channel={"without_namespace": options},
        **dict.fromkeys(("sse", "http_stream", "uni_websocket", "uni_sse", "uni_http_stream"), ENABLED),
    )


async def call_until(done: list[Any], clients: list[Moving], place: Place, ids: Iterator[int]) -> None:
    """Have each client call the application again and again."""
    while not done:
        for client in clients:
            number = next(ids)
            await client.say(place, id=number, rpc={"method": "echo", "data": number})
            assert (await client.reply(number))["rpc"]["data"] == number


@on_loop
async def test_clients_of_every_transport_stay_while_all_workers_are_replaced(start_server: ServerStarter) -> None:
    server = serve(start_server)
    place = Place(server)
    witness = await arrive(place)
    clients = [await arrive(place, kind) for kind in (*BIDIRECTIONAL, *UNIDIRECTIONAL)]
    await until(lambda: len(witness.pushes("join")) == 8)
    number, ids = 0, count(100_000)
    for reload in range(1, RELOADS + 1):
        done: list[Any] = []
        calling = Deferred.fromCoroutine(call_until(done, clients[: len(BIDIRECTIONAL)], place, ids))
        os.kill(server.pid, signal.SIGHUP)
        while server.log.count("has been replaced") < 2 * reload:
            await publish(witness, place, number)
            number += 1
        done.append(True)
        await calling
    for client in (witness, *clients):
        await until(lambda: number - 1 in client.numbers)  # noqa: B023
        assert client.numbers == list(range(number))
        assert not client.client.lost
    assert (len(witness.pushes("join")), len(witness.pushes("leave"))) == (8, 0)
    for client in (witness, *clients):
        client.leave()
