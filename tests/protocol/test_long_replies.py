"""Long replies are made in several turns of the loop, between which other clients are served."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from realtime.config.settings import ChannelOptions, ChannelSettings
from realtime.protocol.messages import PresenceResult
from realtime.pubsub.engine import AddPresence
from realtime.pubsub.time_slices import TimeSlicer
from realtime.server_api.http_api import HTTPAPI
from realtime.server_api.operations import ServerAPI
from realtime.types import ClientInfo, SubscribeOptions
from tests.protocol.sessions import Gate, Server, run

MANY = 2_000
CHANNEL = ChannelSettings(
    without_namespace=ChannelOptions(
        presence=True,
        history_size=10_000,
        history_ttl=60.0,
        allow_recovery=True,
        allow_subscribe_for_client=True,
        allow_subscribe_for_anonymous=True,
        allow_presence_for_subscriber=True,
        allow_presence_for_anonymous=True,
        allow_history_for_subscriber=True,
        allow_history_for_anonymous=True,
    )
)


class Turn(Gate):
    def callback(self, result: None) -> None:
        self.open()


class Turns:
    """A server whose time slices end after every step."""

    def __init__(self, **client: object) -> None:
        self.asked: list[Callable[[], None]] = []
        self.now = 0
        slices = TimeSlicer(self.tick, 1, self.asked.append, Turn)
        self.server = Server(CHANNEL, slices, allow_anonymous_connect_without_token=True, **client)

    def tick(self) -> int:
        self.now += 1
        return self.now

    def enter(self, channel: str, number: int) -> None:
        info = ClientInfo("42", f"client {number}")
        self.server.engine.execute(AddPresence(channel, info, present=True, announce=False))

    def until_idle(self) -> int:
        turns = 0
        while self.asked:
            self.asked.pop()()
            turns += 1
        return turns


@pytest.fixture
def turns() -> Turns:
    return Turns(history_max_publication_limit=0, recovery_max_publication_limit=0, recovery_reply_size=1_000_000)


def test_presence_of_many(turns: Turns) -> None:
    asking, other = turns.server.client(), turns.server.client()
    asking.subscribe("a")
    for number in range(MANY):
        turns.enter("a", number)
    assert asking.say({"id": 3, "presence": {"channel": "a"}}) == []
    assert other.say({"id": 3, "rpc": {"method": "ping"}})
    assert turns.until_idle() >= 3
    (reply,) = asking.heard()
    assert len(reply["presence"]["presence"]) == MANY + 1


def test_history_of_many(turns: Turns) -> None:
    asking, other = turns.server.client(), turns.server.client()
    asking.subscribe("a")
    turns.server.publish("a", *range(MANY))
    asking.heard()
    assert asking.say({"id": 3, "history": {"channel": "a", "limit": -1}}) == []
    assert other.say({"id": 3, "rpc": {"method": "ping"}})
    assert turns.until_idle() >= 3
    (reply,) = asking.heard()
    assert [one["data"] for one in reply["history"]["publications"]] == list(range(MANY))


def test_recovery_of_many_and_what_comes_meanwhile(turns: Turns) -> None:
    client = turns.server.client()
    epoch = turns.server.client().subscribe("a", recoverable=True)["epoch"]
    turns.server.publish("a", *range(MANY))
    position = {"recover": True, "offset": 0, "epoch": epoch}
    assert client.say({"id": 2, "subscribe": {"channel": "a", "recoverable": True, **position}}) == []
    turns.server.publish("a", "meanwhile")
    turns.until_idle()
    reply, *pushes = client.heard()
    assert [one["data"] for one in reply["subscribe"]["publications"]] == list(range(MANY))
    assert [push["push"]["pub"]["data"] for push in pushes] == ["meanwhile"]


def test_a_renewed_subscription_states_its_position_after_the_publications_up_to_there(turns: Turns) -> None:
    client = turns.server.client()
    client.subscribe("a", recoverable=True)
    turns.server.services.hub.fanout.slices = turns.server.services.slices
    turns.server.services.slices.start_slice()  # the turn has no time left, so the publications wait for the next one
    turns.server.publish("a", "one")
    client.session.subscribe("a", SubscribeOptions(), None)
    turns.server.publish("a", "two")
    turns.until_idle()
    pushes = [push["push"] for push in client.heard()]
    assert [push["pub"]["offset"] if "pub" in push else push["subscribe"]["offset"] for push in pushes] == [1, 1, 2]
    assert "subscribe" in pushes[1]


def test_a_client_that_leaves_during_its_connect_leaves_nothing_behind(turns: Turns) -> None:
    client = turns.server.client()
    client.subscribe("a")
    turns.server.publish("a", *range(MANY))
    client.heard()
    client.say({"id": 3, "history": {"channel": "a", "limit": -1}})
    client.session.closed()
    turns.until_idle()
    assert client.heard() == []
    assert turns.server.mistakes == []


def test_presence_by_the_server_api(turns: Turns) -> None:
    server = turns.server
    server.client().subscribe("a")
    for number in range(MANY):
        turns.enter("a", number)
    operations = ServerAPI(server.engine, server.services.rules, lambda: None, None)  # type: ignore[arg-type, return-value]
    api = HTTPAPI(operations, slices=server.services.slices)
    results: list[object] = []
    run(api.call("presence", b'{"channel":"a"}'), lambda result, error: results.append(error or result))
    assert results == []
    turns.until_idle()
    (result,) = results
    assert isinstance(result, PresenceResult)
    assert len(result.presence) == MANY + 1
