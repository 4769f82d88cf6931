"""The connect command: the client's identity by token, handler or header, and its refusals."""

from __future__ import annotations

import jwt
import pytest

from realtime.errors import ClientError, Disconnect
from realtime.types import Credentials
from tests.protocol.sessions import BARE, BARE_PROTOBUF, NOW, Gate, Server, error_of, token


@pytest.fixture
def server() -> Server:
    return Server(allow_anonymous_connect_without_token=True)


class TestConnect:
    def test_an_anonymous_client(self, server):
        (reply,) = server.peer().say({"id": 1, "connect": {}})
        assert reply["id"] == 1
        assert reply["connect"].pop("client")
        assert reply["connect"] == {"version": "test", "ping": 25, "pong": True}

    def test_anonymous_clients_are_refused_by_default(self):
        peer = Server().peer()
        peer.say({"id": 1, "connect": {}})
        assert peer.close_code == (3501, "bad request")

    def test_info_and_data_that_are_not_json_are_for_protobuf_clients(self, server):
        options = {"b64info": "/w==", "b64data": "/g=="}
        credentials = token(sub="42", b64info="/w==", subs={"room:a": options})
        json_client, protobuf_client = server.peer(BARE), server.peer(BARE_PROTOBUF)
        (reply, *_) = protobuf_client.say({"id": 1, "connect": {"token": credentials}})
        assert reply["connect"]["subs"]["room:a"]["data"] == b"\xfe"
        assert protobuf_client.session.handle.info == b"\xff"
        protobuf_client.heard()
        (reply, *_) = json_client.say({"id": 1, "connect": {"token": credentials}})
        assert "data" not in reply["connect"]["subs"]["room:a"]
        seen = {"user": "42", "client": json_client.session.client}
        (join,) = protobuf_client.heard()
        assert join["push"]["join"]["info"] == seen | {"conn_info": b"\xff", "chan_info": b"\xff"}
        json_client.heard()
        present, _ = [
            peer.say({"id": 2, "presence": {"channel": "room:a"}})[0]["presence"]["presence"]
            for peer in (json_client, protobuf_client)
        ]
        assert present[json_client.session.client] == seen
        json_client.say({"id": 3, "publish": {"channel": "room:a", "data": 1}})
        (pushed,) = [message for message in protobuf_client.heard() if "pub" in message.get("push", {})]
        assert pushed["push"]["pub"]["info"] == seen | {"conn_info": b"\xff", "chan_info": b"\xff"}
        pages = [
            peer.say({"id": 4, "history": {"channel": "room:a", "limit": -1}})[-1]["history"]["publications"]
            for peer in (json_client, protobuf_client)
        ]
        assert [page[0]["info"] for page in pages] == [seen, pushed["push"]["pub"]["info"]]
        assert (json_client.close_code, protobuf_client.close_code) == (None, None)

    def test_a_token_names_the_user(self, server):
        peer = server.client("42")
        assert (peer.session.user, peer.session.handle.user) == ("42", "42")

    def test_the_reply_announces_the_expiry_of_the_token(self, server):
        (reply,) = server.peer().say({"id": 1, "connect": {"token": token(sub="42", exp=NOW + 60)}})
        assert (reply["connect"]["expires"], reply["connect"]["ttl"]) == (True, 60)

    @pytest.mark.parametrize(
        "bad",
        [
            "junk",
            "a.b.c",
            token(sub=42),
            token(sub="42", channel="news"),
            token(sub="42", exp="soon"),
            token(sub="42", exp=-1),
            jwt.encode({"sub": "42"}, "another secret of enough characters!", algorithm="HS256"),
            jwt.encode({"sub": "42"}, None, algorithm="none"),
            "x" * 9000,
        ],
    )
    def test_an_invalid_token_closes_with_3500(self, server, bad):
        peer = server.peer()
        peer.say({"id": 1, "connect": {"token": bad}})
        assert peer.close_code == (3500, "invalid token")

    @pytest.mark.parametrize("times", [{"exp": NOW}, {"exp": NOW - 5}, {"nbf": NOW + 6}])
    def test_an_expired_or_early_token_is_109(self, server, times):
        assert error_of(server.peer().say({"id": 1, "connect": {"token": token(sub="42", **times)}})) == 109

    def test_commands_behind_a_refused_connect_are_dropped(self, server):
        peer = server.peer()
        expired = {"id": 1, "connect": {"token": token(sub="42", exp=1)}}
        assert error_of(peer.say(expired, {"id": 2, "subscribe": {"channel": "a"}})) == 109
        assert peer.say({"id": 3, "subscribe": {"channel": "a"}}) == []
        server.advance(6)
        assert peer.close_code == (3000, "connection closed")

    def test_subscribes_behind_connect_wait_for_it(self, server):
        gate = Gate()

        async def connecting(request):
            await gate
            return Credentials(user="7")

        server.app.connecting = connecting
        peer = server.peer()
        assert peer.say({"id": 1, "connect": {}}, {"id": 2, "subscribe": {"channel": "a"}}) == []
        gate.open()
        assert [reply["id"] for reply in peer.heard()] == [1, 2]

    def test_the_handler_decides(self, server):
        async def connecting(request):
            assert request.data == {"nick": "ann"}
            return Credentials(user="ann", info={"nick": "ann"}, data={"hello": 1})

        server.app.connecting = connecting
        peer = server.peer()
        (reply,) = peer.say({"id": 1, "connect": {"data": {"nick": "ann"}}})
        assert reply["connect"]["data"] == {"hello": 1}
        assert peer.session.handle.info == {"nick": "ann"}

    def test_a_handler_that_returns_none_leaves_it_to_the_token(self, server):
        async def connecting(request):
            return None

        server.app.connecting = connecting
        assert server.client("42").session.user == "42"

    @pytest.mark.parametrize(
        ("raised", "answer"),
        [(ClientError(1000, "no"), 1000), (Disconnect(4500, "never"), (4500, "never"))],
    )
    def test_a_handler_may_refuse(self, server, raised, answer):
        async def connecting(request):
            raise raised

        server.app.connecting = connecting
        peer = server.peer()
        replies = peer.say({"id": 1, "connect": {}})
        assert (peer.close_code or error_of(replies)) == answer

    def test_a_client_that_leaves_during_the_connect_handler_leaves_nothing_behind(self, server):
        gate = Gate()

        async def connecting(request):
            await gate
            return Credentials(user="7")

        server.app.connecting = connecting
        peer = server.peer()
        peer.say({"id": 1, "connect": {}})
        peer.session.closed()
        gate.open()
        assert peer.heard() == []
        assert len(server.sessions) == 0

    def test_an_exception_in_a_handler_is_an_internal_error_and_reported_once(self, server):
        async def connecting(request):
            raise ZeroDivisionError

        server.app.connecting = connecting
        assert error_of(server.peer().say({"id": 1, "connect": {}})) == 100
        assert len(server.mistakes) == 1


class TestOnConnected:
    def test_the_next_command_waits_for_it(self, server):
        gate, seen = Gate(), []

        async def connected(client):
            await gate
            client.state["name"] = "Ann"

        async def rpc(client, data):
            seen.append(dict(client.state))

        server.app.connected = connected
        server.app.procedures["f"] = rpc
        peer = server.peer()
        (reply,) = peer.say({"id": 1, "connect": {}})
        assert "connect" in reply
        assert peer.say({"id": 2, "rpc": {"method": "f", "data": 1}}) == []
        gate.open()
        assert peer.heard() == [{"id": 2, "rpc": {"data": None}}]
        assert seen == [{"name": "Ann"}]

    def test_it_may_close_the_connection(self, server):
        async def connected(client):
            raise Disconnect(4500, "not today")

        server.app.connected = connected
        peer = server.peer()
        (reply,) = peer.say({"id": 1, "connect": {}})
        assert "connect" in reply
        assert peer.close_code == (4500, "not today")

    def test_its_failure_leaves_the_client_connected(self, server):
        async def connected(client):
            raise ClientError(100, "internal server error")

        server.app.connected = connected
        peer = server.peer()
        (reply,) = peer.say({"id": 1, "connect": {}})
        assert "connect" in reply
        assert (peer.heard(), peer.close_code) == ([], None)

    def test_it_is_not_called_for_a_client_that_is_refused(self):
        server, called = Server(), []

        async def connected(client):
            called.append(client)

        server.app.connected = connected
        server.peer().say({"id": 1, "connect": {}})
        assert called == []


def test_credentials_have_information_for_handlers_alone(server):
    async def connecting(request):
        return Credentials(user="7", meta={"plan": "gold"})

    server.app.connecting = connecting
    peer = server.peer()
    (reply,) = peer.say({"id": 1, "connect": {}})
    assert "gold" not in str(reply)
    assert peer.session.handle.meta == {"plan": "gold"}
