"""PyPI `cent`, unmodified: what a backend says through the HTTP API reaches the clients; what it asks is answered."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from cent import (
    AsyncClient,
    BatchRequest,
    BroadcastRequest,
    CentApiResponseError,
    CentUnauthorizedError,
    ChannelsRequest,
    Client,
    DisconnectRequest,
    HistoryRemoveRequest,
    HistoryRequest,
    InfoRequest,
    PresenceRequest,
    PresenceStatsRequest,
    PublishRequest,
    RefreshRequest,
    StreamPosition,
    SubscribeRequest,
    UnsubscribeRequest,
)
from centrifuge import Client as Subscriber
from centrifuge import ClientEventHandler

from tests.system.serving import Server, run_node
from tests.system.test_python_sdk import connect, in_own_loop, leave, soon, subscribe

Check = Callable[[Any], bool]


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


def every_method(channel: str) -> Iterator[tuple[Any, Check]]:
    """A request of each kind, in an order that makes sense, and what is true of its result."""
    epochs = list[str]()
    yield (
        PublishRequest(channel=channel, data={"n": 1}, tags={"t": "1"}, version=7, version_epoch="v", delta=True),
        lambda result: result.offset == 1 and bool(epochs.append(result.epoch) or result.epoch),
    )
    yield PublishRequest(channel=channel, data=0, version=6, version_epoch="v"), lambda result: result.offset == 1
    yield PublishRequest(channel=channel, data=0, skip_history=True), lambda result: not result.offset
    yield PublishRequest(channel=channel, data=None, b64data="eyJuIjogMn0="), lambda result: result.offset == 2
    yield (
        BroadcastRequest(channels=[channel, f"{channel}-other"], data=3),
        lambda result: [one.result.offset for one in result.responses] == [3, 1],
    )
    yield (
        HistoryRequest(channel=channel, limit=10),
        lambda result: (
            [(one.data, one.offset) for one in result.publications] == [({"n": 1}, 1), ({"n": 2}, 2), (3, 3)]
        ),
    )
    yield (
        HistoryRequest(channel=channel, limit=1, since=StreamPosition(offset=1, epoch=epochs[0])),
        lambda result: [one.offset for one in result.publications] == [2] and result.offset == 3,
    )
    yield PresenceRequest(channel=channel), lambda result: result.presence == {}
    yield PresenceStatsRequest(channel=channel), lambda result: (result.num_clients, result.num_users) == (0, 0)
    yield ChannelsRequest(), lambda result: result.channels == {}
    yield ChannelsRequest(pattern="stream:*"), lambda result: result.channels == {}
    yield InfoRequest(), lambda result: result.nodes[0].num_clients == 0 and bool(result.nodes[0].uid)
    yield SubscribeRequest(user="nobody", channel=channel, info={}, data=[1]), lambda result: result is not None
    yield UnsubscribeRequest(user="nobody", channel=channel, session="s"), lambda result: result is not None
    yield RefreshRequest(user="nobody", expire_at=2_000_000_000), lambda result: result is not None
    yield DisconnectRequest(user="nobody", whitelist=["c"]), lambda result: result is not None
    for parallel in (False, True):
        yield (
            BatchRequest(
                requests=[PublishRequest(channel=f"{channel}-batch", data=1), PresenceStatsRequest(channel=channel)]
                * 10,
                parallel=parallel,
            ),
            lambda result: (
                len(result.replies) == 20 and result.replies[18].offset % 10 == 0 and result.replies[1].num_users == 0
            ),
        )
    yield HistoryRemoveRequest(channel=channel), lambda result: result is not None
    yield HistoryRequest(channel=channel, limit=-1), lambda result: (result.publications, result.offset) == ([], 3)


def test_every_method_by_both_clients(server: Server, api: Client) -> None:
    async def scenario() -> None:
        other = AsyncClient(f"{server.http}/api", "test-key")
        for client, channel in ((api, "stream:one"), (other, "stream:two")):
            for request, is_right in every_method(channel):
                result = getattr(client, request.__api_method__)(request)
                result = await result if inspect.isawaitable(result) else result
                assert is_right(result), (request, result)
        await other.close()

    in_own_loop(scenario())


class Told(ClientEventHandler):
    """What a client is told of the server's own accord, in order."""

    def __init__(self) -> None:
        self.events: asyncio.Queue[tuple[Any, ...]] = asyncio.Queue()

    async def on_connected(self, ctx: Any) -> None:
        self.events.put_nowait(("connected",))

    async def on_connecting(self, ctx: Any) -> None:
        self.events.put_nowait(("connecting", ctx.code))

    async def on_subscribed(self, ctx: Any) -> None:
        self.events.put_nowait(("subscribed", ctx.channel, ctx.data))

    async def on_publication(self, ctx: Any) -> None:
        self.events.put_nowait(("publication", ctx.channel, ctx.pub.data))

    async def on_unsubscribed(self, ctx: Any) -> None:
        self.events.put_nowait(("unsubscribed", ctx.channel))


def test_the_server_subscribes_a_user_on_every_worker(server: Server, api: Client) -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()

        async def say(request: Any) -> Any:
            return await loop.run_in_executor(None, getattr(api, request.__api_method__), request)

        async def told(user: str) -> tuple[Subscriber, Told]:
            events = Told()
            client = Subscriber(server.endpoint, events=events, data={"user": user}, min_reconnect_delay=0.02)
            await client.connect()
            return client, events

        async def all_told(*events: tuple[Any, ...]) -> None:
            for _, heard in clients:
                for event in events:
                    assert await soon(heard.events.get()) == event

        clients = [await told("ada") for _ in range(10)]
        await all_told(("connecting", 0), ("connected",))
        other, _ = await connect(server.endpoint, user="bob")
        await say(SubscribeRequest(user="ada", channel="stream:pushed", info={"by": "server"}, data={"n": 1}))
        await all_told(("subscribed", "stream:pushed", {"n": 1}))
        presence = (await say(PresenceRequest(channel="stream:pushed"))).presence
        assert [(info.user, info.chan_info) for info in presence.values()] == [("ada", {"by": "server"})] * 10
        channels = (await say(ChannelsRequest(pattern="{stream,plain}:p*"))).channels
        assert {name: info.num_clients for name, info in channels.items()} == {"stream:pushed": 10}
        await say(PublishRequest(channel="stream:pushed", data=1))
        await all_told(("publication", "stream:pushed", 1))
        await say(UnsubscribeRequest(user="ada", channel="stream:pushed"))
        await all_told(("unsubscribed", "stream:pushed"))
        assert (await say(ChannelsRequest())).channels == {}
        await say(RefreshRequest(user="ada", expired=True))
        await all_told(("connecting", 3005), ("connected",))
        await leave(other, *(client for client, _ in clients))

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
