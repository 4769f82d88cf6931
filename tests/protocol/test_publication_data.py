"""Formats of published data, and their delivery to clients of both encodings."""

from __future__ import annotations

import json
from typing import Any

import pytest
from centrifuge.protocol import client_pb2

from realtime.config.settings import ChannelOptions, ChannelSettings, Namespace
from realtime.protocol.orders import SubscribeOrder
from tests.protocol.sessions import ALL, BARE_PROTOBUF, KEPT, Peer, Server, error_of

BINARY = {"publication_data_format": "binary"}
FORMATS = ("any", "json", "object", "binary")
CHANNELS = ChannelSettings(
    without_namespace=ChannelOptions(**ALL),
    namespaces=(
        Namespace(name="any", **ALL),
        Namespace(name="json", publication_data_format="json", **ALL),
        Namespace(name="object", publication_data_format="json_object", **ALL),
        Namespace(name="binary", publication_data_format="binary", **ALL),
        Namespace(name="kept", force_recovery=True, allowed_delta_types=("fossil",), **BINARY, **KEPT, **ALL),
        Namespace(name="cache", force_recovery=True, force_recovery_mode="cache", **BINARY, **KEPT, **ALL),
        Namespace(
            name="auto",
            force_recovery_mode="cache",
            auto_cache_recover=True,
            force_recovery=True,
            **BINARY,
            **KEPT,
            **ALL,
        ),
    ),
)


@pytest.fixture
def server() -> Server:
    return Server(CHANNELS, allow_anonymous_connect_without_token=True)


def publish(peer: Peer, channel: str, data: bytes | None) -> list[dict]:
    """Publish these bytes, unchanged."""
    if peer.form is BARE_PROTOBUF:
        request = {"channel": channel} if data is None else {"channel": channel, "data": data}
        message = client_pb2.Command(id=2, publish=client_pb2.PublishRequest(**request)).SerializeToString()
        return peer.say(bytes((len(message),)) + message)
    member = b"" if data is None else b',"data":' + data
    return peer.say(b'{"id":2,"publish":{"channel":"%b"%b}}' % (channel.encode(), member))


def outcome(replies: list[dict]) -> int:
    return error_of(replies) if "error" in replies[0] else 0


def client(server: Server, form: Any) -> Peer:
    peer = server.peer(form)
    peer.connect()
    return peer


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (None, (107, 107, 107, 0)),
        (b"1", (0, 0, 107, 0)),
        (b"null", (0, 0, 107, 0)),
        (b'"text"', (0, 0, 107, 0)),
        (b'{"a":1}', (0, 0, 0, 0)),
        (b' \t{"a":1}', (0, 0, 0, 0)),
        (b'[{"a":1}]', (0, 0, 107, 0)),
    ],
)
def test_json(server, data, expected):
    peer = server.client()
    assert tuple(outcome(publish(peer, f"{format}:a", data)) for format in FORMATS) == expected


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (None, (107, 107, 107, 0)),
        (b"", (107, 107, 107, 0)),
        (b"1", (0, 0, 107, 0)),
        (b'{"a":1}', (0, 0, 0, 0)),
        (b"not json", (107, 107, 107, 0)),
        (b"\xff\x00", (107, 107, 107, 0)),
        (b'"\xff"', (107, 107, 107, 0)),
        (b" ", (107, 107, 107, 0)),
        (b"\n", (0, 107, 107, 0)),
        (b'{"a":', (107, 107, 107, 0)),
        (b'{"a":"\\ud800"}', (107, 107, 107, 0)),
    ],
)
def test_protobuf(server, data, expected):
    peer = client(server, BARE_PROTOBUF)
    assert tuple(outcome(publish(peer, f"{format}:a", data)) for format in FORMATS) == expected


def test_a_namespace_without_a_format_has_the_common_one():
    channels = ChannelSettings(
        without_namespace=ChannelOptions(**ALL),
        namespaces=(Namespace(name="binary", publication_data_format="binary", **ALL),),
        publication_data_format="json_object",
    )
    peer = Server(channels, allow_anonymous_connect_without_token=True).client()
    assert outcome(publish(peer, "a", b"1")) == 107
    assert outcome(publish(peer, "binary:a", b"1")) == 0


def test_a_handler_is_not_called_for_data_of_a_wrong_format(server):
    async def moderate(client, channel, data):
        raise AssertionError

    server.app.publish_handlers["object:a"] = moderate
    assert outcome(publish(server.client(), "object:a", b"1")) == 107


class TestWhoCanBeSentIt:
    def test_json_reaches_clients_of_every_encoding(self, server):
        peers = [client(server, form) for form in (BARE_PROTOBUF, server.client().form)]
        for peer in peers:
            peer.subscribe("any:a")
        publish(client(server, BARE_PROTOBUF), "any:a", b'{"n": 1}')
        assert [peer.publications() for peer in peers] == [[{"n": 1}]] * 2

    @pytest.mark.parametrize(("data", "received"), [(None, {}), (b"", {}), (b"\n", {"data": None})])
    def test_empty_data_reaches_clients_of_every_encoding(self, server, data, received):
        browser, protobuf = server.client(), client(server, BARE_PROTOBUF)
        browser.subscribe("binary:a")
        publish(protobuf, "binary:a", data)
        (push,) = browser.heard()
        info = {"user": "", "client": protobuf.session.client}
        assert push["push"] == {"channel": "binary:a", "pub": {"info": info, **received}}

    def test_empty_data_of_a_json_client_reaches_all(self, server):
        browser, protobuf = server.client(), client(server, BARE_PROTOBUF)
        for peer in (browser, protobuf):
            peer.subscribe("binary:a")
        assert {"id": 2, "publish": {}} in publish(browser, "binary:a", None)
        assert browser.close_code is None
        (payload,) = protobuf.raw
        assert client_pb2.Reply.FromString(payload[1:]).push.pub.data == b""

    @pytest.mark.parametrize("data", [None, b"\n"])
    def test_empty_data_is_null_for_json_clients_with_deltas(self, server, data):
        peer = server.client()
        assert peer.subscribe("kept:a", delta="fossil")["delta"]
        publish(client(server, BARE_PROTOBUF), "kept:a", data)
        assert [json.loads(text) for text in peer.publications()] == [None]

    @pytest.mark.parametrize("data", [b"\xff", b"not json"])
    def test_binary_data_ends_the_subscriptions_of_json_clients_alone(self, server, data):
        browser, protobuf = server.client(), client(server, BARE_PROTOBUF)
        browser.subscribe("binary:a")
        protobuf.subscribe("binary:a")
        publish(client(server, BARE_PROTOBUF), "binary:a", data)
        (push,) = browser.heard()
        assert push["push"]["unsubscribe"] == {"code": 2500, "reason": "insufficient state"}
        assert browser.close_code is None and browser.session.subscriptions == {}
        (payload,) = protobuf.raw
        push = client_pb2.Reply.FromString(payload[1:]).push
        assert push.pub.data == data
        assert server.count("realtime_bad_input", kind="encoding") == 1

    def test_a_server_side_subscriber_reconnects(self, server):
        peer = server.client()
        server.order(SubscribeOrder("", "binary:a"))
        publish(client(server, BARE_PROTOBUF), "binary:a", b"\xff")
        assert peer.close_code == (3010, "insufficient state")

    @pytest.mark.parametrize("channel", ["kept:a", "cache:a", "auto:a"])
    def test_stored_binary_data_is_a_gap_in_a_recovery(self, server, channel):
        sender, peer = client(server, BARE_PROTOBUF), server.client()
        publish(sender, channel, b"\xff")
        result = peer.subscribe(channel, recover=True)
        assert result["was_recovering"] and "recovered" not in result and "publications" not in result
        assert result["offset"] == 1
        publish(sender, channel, b"1")
        assert peer.publications() == [1]
        assert server.count("realtime_bad_input", kind="encoding") == 1

    def test_a_client_that_refuses_a_gap_gets_112(self, server):
        publish(client(server, BARE_PROTOBUF), "kept:a", b"\xff")
        request = {"channel": "kept:a", "recover": True, "flag": 2}
        assert error_of(server.client().say({"id": 2, "subscribe": request})) == 112
        assert server.hub.subscriptions == 0

    def test_history_with_binary_data_is_not_available_in_json(self, server):
        publish(client(server, BARE_PROTOBUF), "kept:a", b"\xff")
        peer = server.client()
        assert error_of(peer.say({"id": 2, "history": {"channel": "kept:a", "limit": 1}})) == 108
        assert peer.close_code is None
