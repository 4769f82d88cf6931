"""PyPI `cent`, unmodified: what a backend says through the HTTP API reaches the clients; what it asks is answered."""

from __future__ import annotations

import asyncio

import pytest
from cent import (
    BroadcastRequest,
    CentApiResponseError,
    CentUnauthorizedError,
    Client,
    DisconnectRequest,
    HistoryRemoveRequest,
    HistoryRequest,
    InfoRequest,
    PresenceRequest,
    PresenceStatsRequest,
    PublishRequest,
    StreamPosition,
    UnsubscribeRequest,
)
from serving import Server, run_node
from test_python_sdk import connect, in_own_loop, leave, soon, subscribe


@pytest.fixture
def api(server: Server) -> Client:
    return Client(f"{server.http}/api", "test-key")


def test_a_publication_is_numbered_kept_and_delivered(server: Server, api: Client) -> None:
    async def scenario() -> None:
        client, _ = await connect(server.endpoint, user="ada")
        _, seen = await subscribe(client, "stream:cent")
        await soon(seen.subscribed.get())
        loop = asyncio.get_running_loop()
        result = await loop.run_in_executor(None, api.publish, PublishRequest(channel="stream:cent", data={"n": 1}))
        assert result.offset == 1 and result.epoch
        publication = (await soon(seen.publications.get())).pub
        assert (publication.data, publication.offset, publication.info) == ({"n": 1}, 1, None)
        await leave(client)

    in_own_loop(scenario())


def test_an_idempotency_key_publishes_once(api: Client) -> None:
    request = PublishRequest(channel="stream:once", data=1, idempotency_key="k")
    first, second = api.publish(request), api.publish(request)
    assert (first.offset, first.epoch) == (second.offset, second.epoch) == (1, first.epoch)
    assert api.history(HistoryRequest(channel="stream:once")).offset == 1


def test_history_pages_forwards_and_backwards(api: Client) -> None:
    for n in range(1, 8):
        api.publish(PublishRequest(channel="stream:pages", data=n))
    epoch = api.history(HistoryRequest(channel="stream:pages")).epoch

    def offsets(**options: object) -> list[int]:
        page = api.history(HistoryRequest(channel="stream:pages", **options))
        return [publication.offset for publication in page.publications]

    assert offsets() == []
    assert offsets(limit=-1) == [1, 2, 3, 4, 5, 6, 7]
    assert offsets(limit=2, since=StreamPosition(offset=3, epoch=epoch)) == [4, 5]
    assert offsets(limit=2, reverse=True) == [7, 6]
    assert offsets(limit=2, reverse=True, since=StreamPosition(offset=4, epoch=epoch)) == [3, 2]
    api.history_remove(HistoryRemoveRequest(channel="stream:pages"))
    assert offsets(limit=-1) == []
    assert api.publish(PublishRequest(channel="stream:pages", data=8)).offset == 8


def test_a_broadcast_answers_for_each_channel(api: Client) -> None:
    answers = api.broadcast(BroadcastRequest(channels=["stream:a", "nosuch:b"], data=1)).responses
    assert answers[0].result is not None and answers[0].result.offset == 1
    assert answers[1].error is not None and answers[1].error.code == 102


def test_presence_and_info_know_the_clients_of_all_workers(server: Server, api: Client) -> None:
    async def scenario() -> None:
        clients = [await connect(server.endpoint, user=f"user{n % 3}") for n in range(20)]
        workers = set()
        for client, events in clients:
            workers.add((await soon(events.connected.get())).data["pid"])
            _, seen = await subscribe(client, "stream:here")
            await soon(seen.subscribed.get())
        assert workers == set(server.workers()), "twenty connections all went to one worker"
        presence = api.presence(PresenceRequest(channel="stream:here")).presence
        assert sorted(info.user for info in presence.values()) == sorted(f"user{n % 3}" for n in range(20))
        stats = api.presence_stats(PresenceStatsRequest(channel="stream:here"))
        assert (stats.num_clients, stats.num_users) == (20, 3)
        (node,) = api.info(InfoRequest()).nodes
        assert (node.num_clients, node.num_users, node.num_channels) == (20, 3, 1)
        for client, _ in clients:
            await leave(client)

    in_own_loop(scenario())


@pytest.mark.node
def test_disconnect_and_unsubscribe_reach_every_worker(server: Server, api: Client) -> None:
    seen = run_node("orders.mjs", server.endpoint, server.http, "test-key")
    assert seen["unsubscribed"] == [{"code": 2000, "reason": "server unsubscribe"}] * 2
    assert seen["disconnected"] == [{"code": 3503, "reason": "force disconnect"}] * 2
    assert seen["spared"] == "connected"
    # An order for nobody is no error.
    api.disconnect(DisconnectRequest(user="nobody"))
    api.unsubscribe(UnsubscribeRequest(user="nobody", channel="stream:x"))


def test_errors_are_those_of_the_reference(server: Server, api: Client) -> None:
    with pytest.raises(CentApiResponseError) as unknown:
        api.publish(PublishRequest(channel="nosuch:x", data=1))
    assert (unknown.value.code, unknown.value.message) == (102, "unknown channel")
    with pytest.raises(CentApiResponseError) as off:
        api.presence(PresenceRequest(channel="plain"))
    assert off.value.code == 108
    with pytest.raises(CentUnauthorizedError):
        Client(f"{server.http}/api", "wrong key").info(InfoRequest())
