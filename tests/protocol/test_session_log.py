"""What the log says of the refusals of sessions: one line with the cause and the key to set, and the client."""

from __future__ import annotations

from typing import Any

import pytest

from realtime.config.settings import PersonalChannelSettings
from realtime.protocol.wire_formats import WireFormat
from realtime.repetition import REPEAT_AFTER
from tests.protocol.sessions import BARE, BARE_PUSHES, Server, token

SUBSCRIBE_TOKEN = token(sub="ann", channel="another")


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ({"subscribe": {"channel": "nothing:a"}}, "client to 'nothing:a' with 103: set allow_subscribe_for_client"),
        ({"subscribe": {"channel": "limited:a#bob"}}, "the name lists its users (allow_user_limited_channels)"),
        ({"subscribe": {"channel": "$a"}}, "channel.private_prefix needs a subscription token"),
        ({"subscribe": {"channel": "$a", "token": "x"}}, "token is invalid (not three parts in base64url)"),
        ({"subscribe": {"channel": "$a", "token": SUBSCRIBE_TOKEN}}, "names another channel, user or client"),
        ({"subscribe": {"channel": "unknown:a"}}, "refused subscribe 'unknown:a' with 102"),
        ({"subscribe": {"channel": "x" * 300}}, "see channel.max_length"),
        ({"subscribe": {"channel": "a", "type": 1}}, "map and shared_poll subscriptions are not served"),
        ({"publish": {"channel": "nothing:a", "data": 1}}, "allow_publish_for_client"),
        ({"history": {"channel": "nothing:a"}}, "set history_size and history_ttl"),
        ({"presence": {"channel": "a"}}, "refused presence 'a' with 108: set presence"),
        ({"presence_stats": {"channel": "a"}}, "refused presence_stats 'a' with 108: set presence"),
        ({"rpc": {"method": "m"}}, "refused rpc 'm' with 104: the application declares no handler of this name"),
        ({"sub_refresh": {"channel": "a", "token": "x"}}, "the client is not subscribed"),
        ({"send": {"data": 1}}, "the application declares no on_message handler"),
        ({"refresh": {"token": token(sub="bob")}}, "names another user than the client's first token"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_refused_command_names_its_cause_and_its_client(command: dict[str, Any], says: str) -> None:
    server = Server(allow_anonymous_connect_without_token=True)
    peer = server.client("ann")
    assert server.info == []
    peer.say({"id": 2, **command} if "send" not in command else command)
    [line] = server.info
    assert says in line
    assert line.endswith(f"(client {peer.session.client} user 'ann' at 10.0.0.1 by websocket)")


@pytest.mark.parametrize(
    ("settings", "connect", "says"),
    [
        ({}, {}, "without a token (3501): send one, declare on_connecting, or set client.allow_anonymous_connect_w"),
        ({}, {"token": token(sub="ann") + "x"}, "token is invalid (3500): "),
        ({}, {"token": token(sub="ann", exp=1)}, "refused connect with 109: the client's token has expired"),
        ({"user_connection_limit": 1}, {"token": token(sub="bob")}, "user 'bob', who has client.user_connection_limit"),
        ({}, {"token": token(sub="ann"), "subs": {"nothing:a": {}}}, "left out 'nothing:a' of a connect request"),
        ({"channel_limit": 1}, {"token": token(sub="ann", channels=["a", "b"])}, "client.channel_limit (3505)"),
        (
            {"subscribe_to_user_personal_channel": PersonalChannelSettings(enabled=True)},
            {"token": token(sub="a,b")},
            "gave user 'a,b' no personal channel",
        ),
    ],
)
@pytest.mark.parametrize("form", [BARE, BARE_PUSHES], ids=["bidirectional", "unidirectional"])
def test_a_refused_connect_names_its_cause(
    settings: dict[str, Any], connect: dict[str, Any], says: str, form: WireFormat
) -> None:
    server = Server(**settings)
    bob = server.client("bob")
    bob.heard()
    peer = server.peer(form)
    peer.say(connect if form is BARE_PUSHES else {"id": 1, "connect": connect})
    [line] = server.info
    assert says in line
    assert "at 10.0.0.1 by websocket)" in line


def test_a_connection_that_says_nothing_has_a_line() -> None:
    server = Server()
    peer = server.peer()
    server.advance(11)
    assert peer.close_code == (3000, "stale")
    assert "client.stale_close_delay" in server.info[0]


def test_a_flood_of_refusals_has_one_line_and_a_number() -> None:
    server = Server(error_limit=0)
    peer = server.client("ann")
    for _ in range(2):
        peer.say(*({"id": n, "subscribe": {"channel": "unknown:a"}} for n in range(2, 52)))
        server.now += REPEAT_AFTER
    assert len(server.info) == 2
    assert server.info[1].endswith("; 49 more since the last such line")


def test_a_client_comes_and_goes() -> None:
    server = Server()
    ann, bob = server.client("ann"), server.client("bob")
    ann.session.closed()
    bob.session.disconnect(3001, "shutdown")
    assert [line.partition(" (")[0] for line in server.debug] == [
        "connected",
        "connected",
        "left: its connection has ended",
        "disconnected a client with 3001 shutdown: this worker ends, and the client goes to another one",
    ]
    assert server.info == []


def test_the_end_of_a_subscription_by_the_server_has_a_line() -> None:
    server = Server()
    peer = server.client("ann")
    for code, reason in ((2000, "server unsubscribe"), (2500, "insufficient state"), (2501, "subscription expired")):
        peer.say({"id": 2, "subscribe": {"channel": "a"}})
        server.info.clear()
        peer.session.unsubscribe("a", code, reason)
        [line] = server.info
        assert line.startswith(f"ended the subscription of a client to 'a' with {code}")
        assert line.endswith(f"(client {peer.session.client} user 'ann' at 10.0.0.1 by websocket)")
