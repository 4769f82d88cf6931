"""The loss of a channel's last publication is detected, by one check for all subscribers."""

from __future__ import annotations

import pytest

from realtime.pubsub.engine import GetHistory
from tests.protocol.sessions import Peer, Server, run

CHANNEL = "room:a"


@pytest.fixture
def server() -> Server:
    return Server(allow_anonymous_connect_without_token=True)


def check(server: Server) -> int:
    """Check the channels as a worker does; return the number of requests to the engine."""
    asked = []

    async def counted(query):
        asked.append(query.channel)
        return await server.engine.carry_out(query)

    def done(result, error):
        assert error is None, error

    server.engine.overrides[GetHistory] = counted
    run(server.hub.check_positions(lambda channel: server.services.rules.options(channel).history_options), done)
    del server.engine.overrides[GetHistory]
    return len(asked)


def lose(server: Server) -> None:
    """Lose a publication between engine and hub."""
    published, server.hub.on_publication = server.hub.on_publication, lambda *args: None
    server.publish(CHANNEL, "lost")
    server.hub.on_publication = published


def subscribed(server: Server) -> Peer:
    peer = server.client()
    peer.say({"id": 2, "subscribe": {"channel": CHANNEL}})
    peer.heard()
    return peer


def test_nothing_is_lost(server):
    peer = subscribed(server)
    for _ in range(3):
        check(server)
    server.publish(CHANNEL, 1)
    assert peer.publications() == [1]


def test_subscribers_are_notified_and_recover(server):
    peers = [subscribed(server) for _ in range(5)]
    for peer in peers:
        peer.heard()
    check(server)
    lose(server)
    assert check(server) == 1
    for peer in peers:
        assert peer.heard()[0]["push"]["unsubscribe"] == {"code": 2500, "reason": "insufficient state"}
        result = peer.say({"id": 3, "subscribe": {"channel": CHANNEL, "recover": True}})[0]["subscribe"]
        assert [one["data"] for one in result["publications"]] == ["lost"]


def test_clients_with_server_side_subscriptions_reconnect(server):
    peer = server.peer()
    peer.connect(subs={CHANNEL: {}})
    check(server)
    lose(server)
    check(server)
    assert peer.close_code == (3010, "insufficient state")


def test_a_channel_that_is_in_use_is_not_asked_for(server):
    subscribed(server)
    check(server)
    server.publish(CHANNEL, 1)
    assert check(server) == 0
    assert check(server) == 1
