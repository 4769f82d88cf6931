"""Unidirectional connections, connections with emulation, and connections whose transport sends the pings."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from realtime.errors import ClientError, Disconnect
from realtime.protocol.orders import SubscribeOrder, UnsubscribeOrder
from tests.protocol.sessions import BARE_PUSHES, NOW, Gate, Peer, Server, token


@pytest.fixture
def server() -> Server:
    return Server(allow_anonymous_connect_without_token=True)


def connect(peer: Peer, **request: Any) -> list[dict]:
    peer.session.receive(msgspec.json.encode(request))
    return peer.heard()


class TestUnidirectional:
    def test_the_connect_reply_is_a_push(self, server):
        peer = server.peer(BARE_PUSHES, secret="s3cret")
        (push,) = connect(peer, token=token(sub="42", exp=NOW + 60), subs={"kept:a": {"recoverable": True}})
        body = push["connect"]
        assert body.pop("client") == peer.session.client and body["subs"]["kept:a"].pop("epoch")
        assert body == {
            "version": "test",
            "expires": True,
            "ttl": 60,
            "subs": {"kept:a": {"recoverable": True, "positioned": True}},
            "ping": 25,
            "session": "s3cret",
        }

    def test_an_empty_request_is_one(self, server):
        peer = server.peer(BARE_PUSHES)
        peer.session.receive(b"")
        assert "connect" in peer.heard()[0]

    def test_pushes_are_bare(self, server):
        peer = server.peer(BARE_PUSHES)
        connect(peer, subs={"a": {}})
        server.publish("a", {"n": 1})
        server.order(SubscribeOrder("", "b"))
        server.order(UnsubscribeOrder("", "a"))
        peer.session.handle.send("hi")
        assert peer.heard() == [
            {"channel": "a", "pub": {"data": {"n": 1}}},
            {"channel": "b", "subscribe": {}},
            {"channel": "a", "unsubscribe": {"code": 2000, "reason": "server unsubscribe"}},
            {"message": {"data": "hi"}},
        ]

    def test_pings_need_no_pong(self, server):
        peer = server.peer(BARE_PUSHES)
        connect(peer)
        server.advance(200)
        assert len(pings := peer.heard()) in (7, 8) and not any(pings)
        assert peer.close_code is None

    @pytest.mark.parametrize("message", [b"{}", b"junk", b'{"id":2,"rpc":{}}', b"\n" * 1000])
    def test_later_messages_are_ignored(self, server, message):
        peer = server.peer(BARE_PUSHES)
        connect(peer)
        peer.session.receive(message)
        assert (peer.heard(), peer.close_code) == ([], None)

    def test_nor_do_subscriptions_begun_during_its_connect(self, server):
        gate = Gate()

        async def connecting(request):
            await gate

        server.app.connecting = connecting
        peer = server.peer(BARE_PUSHES)
        assert connect(peer) == []
        peer.session.receive(b"junk")
        gate.open()
        assert "connect" in peer.heard()[0]
        assert peer.close_code is None

    @pytest.mark.parametrize(
        ("raised", "closed"),
        [
            (ClientError(109, "token expired"), (3005, "connection expired")),
            (ClientError(110, "expired"), (3005, "connection expired")),
            (ClientError(111, "too many requests", True), (3013, "too many requests")),
            (ClientError(103, "permission denied"), (3507, "permission denied")),
            (ClientError(102, "unknown channel"), (3004, "internal server error")),
            (ClientError(1000, "no"), (3004, "internal server error")),
            (ZeroDivisionError(), (3004, "internal server error")),
            (Disconnect(4500, "never"), (4500, "never")),
        ],
    )
    def test_a_refusal_is_a_disconnect(self, server, raised, closed):
        async def connecting(request):
            raise raised

        server.app.connecting = connecting
        peer = server.peer(BARE_PUSHES)
        assert connect(peer) == []
        assert peer.close_code == closed

    def test_an_expired_token(self, server):
        peer = server.peer(BARE_PUSHES)
        connect(peer, token=token(sub="42", exp=1))
        assert peer.close_code == (3005, "connection expired")

    @pytest.mark.parametrize("message", [b"junk", b"[]", b'{"token":5}', b'{"subs":{"a":1}}'])
    def test_an_invalid_connect_request_is_3501(self, server, message):
        peer = server.peer(BARE_PUSHES)
        peer.session.receive(message)
        assert peer.close_code == (3501, "bad request")

    def test_a_stream_without_a_connect_is_closed_and_may_come_back(self, server):
        peer = server.peer(BARE_PUSHES)
        server.advance(11)
        assert peer.close_code == (3000, "stale")

    def test_a_connection_that_is_not_refreshed_ends(self, server):
        peer = server.peer(BARE_PUSHES)
        connect(peer, token=token(sub="42", exp=NOW + 10))
        server.advance(34)
        assert peer.close_code is None
        server.advance(5)
        assert peer.close_code == (3005, "connection expired")


class TestEmulated:
    def test_the_reply_names_the_session_and_the_node(self, server):
        (reply,) = server.peer(secret="s3cret").say({"id": 1, "connect": {}})
        assert (reply["connect"]["session"], reply["connect"]["node"]) == ("s3cret", "node")

    def test_other_clients_are_not_notified(self, server):
        (reply,) = server.peer().say({"id": 1, "connect": {}})
        assert "session" not in reply["connect"] and "node" not in reply["connect"]


class TestPingsOfTheTransport:
    """`cf_ws_frame_ping_pong`: the transport checks the connection."""

    def test_other_procedures_of_the_server_do_not_exist(self, server):
        peer = server.peer(needs_pings=False)
        (reply,) = peer.say({"id": 1, "connect": {}})
        assert reply["connect"].keys() == {"client", "version"}
        server.advance(100)
        assert (peer.heard(), peer.close_code) == ([], None)

    def test_a_protocol_pong_closes_with_3501(self, server):
        peer = server.peer(needs_pings=False)
        peer.connect()
        peer.say({})
        assert peer.close_code == (3501, "bad request")
