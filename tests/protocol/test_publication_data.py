"""Formats of published data, and their delivery to clients of both encodings."""

from __future__ import annotations

from typing import Any

import pytest
from centrifuge.protocol import client_pb2

from realtime.config.settings import ChannelOptions, ChannelSettings, Namespace
from tests.protocol.sessions import ALL, BARE_PROTOBUF, KEPT, Peer, Server, error_of

FORMATS = ("any", "json", "object", "binary")
CHANNELS = ChannelSettings(
    without_namespace=ChannelOptions(**ALL),
    namespaces=(
        Namespace(name="any", **ALL),
        Namespace(name="json", publication_data_format="json", **ALL),
        Namespace(name="object", publication_data_format="json_object", **ALL),
        Namespace(name="binary", publication_data_format="binary", **ALL),
        Namespace(name="kept", force_recovery=True, publication_data_format="binary", **KEPT, **ALL),
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
        (b"not json", (0, 107, 107, 0)),
        (b"\xff\x00", (0, 107, 107, 0)),
        (b'{"a":', (0, 107, 107, 0)),
        (b'{"a":"\\ud800"}', (0, 107, 107, 0)),
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

    @pytest.mark.parametrize("data", [b"\xff", b"not json", None])
    def test_binary_data_closes_json_clients_with_3506(self, server, data):
        json, protobuf = server.client(), client(server, BARE_PROTOBUF)
        json.subscribe("binary:a")
        protobuf.subscribe("binary:a")
        publish(client(server, BARE_PROTOBUF), "binary:a", data)
        assert json.close_code == (3506, "inappropriate protocol")
        assert protobuf.close_code is None
        (payload,) = protobuf.raw
        push = client_pb2.Reply.FromString(payload[1:]).push
        assert push.pub.data == (data or b"")
        assert server.count("realtime_bad_input", kind="encoding") == 1

    @pytest.mark.parametrize("ask", [{"history": {"channel": "kept:a", "limit": 1}}, {"subscribe": {"recover": True}}])
    def test_stored_data_passes_too(self, server, ask):
        publish(client(server, BARE_PROTOBUF), "kept:a", b"\xff")
        peer = server.client()
        ((name, request),) = ask.items()
        assert peer.say({"id": 2, name: {"channel": "kept:a", **request}}) == []
        assert peer.close_code == (3506, "inappropriate protocol")
        assert server.hub.subscriptions == 0
