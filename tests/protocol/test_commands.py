"""The commands of the client protocol, and their replies, for a connected client."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from realtime.config.settings import RPCPingSettings
from realtime.errors import ClientError, EngineUnavailable
from realtime.pubsub.engine import GetHistory
from realtime.types import Credentials, Grant
from tests.protocol.sessions import NOW, Gate, Peer, Server, error_of, token


@pytest.fixture
def server() -> Server:
    return Server(allow_anonymous_connect_without_token=True)


class TestSubscribe:
    def test_a_channel_without_options(self, server):
        assert server.client().say({"id": 2, "subscribe": {"channel": "a"}}) == [{"id": 2, "subscribe": {}}]

    @pytest.mark.parametrize(
        ("channel", "code"),
        [
            ("a" * 256, 107),
            ("ch\u00e4nnel", 107),
            ("a\nb", 107),
            ("unknown:a", 102),
            ("nothing:a", 103),
            ("users:a", 103),
            ("$private", 103),
            ("limited:a#42", 103),
            ("limited:a#", 103),
        ],
    )
    def test_refusals(self, server, channel, code):
        peer = server.client()
        assert error_of(peer.say({"id": 2, "subscribe": {"channel": channel}})) == code
        assert peer.close_code is None
        assert server.hub.subscriptions == 0

    def test_user_limited_channels(self, server):
        peer = server.client("42")
        assert peer.say({"id": 2, "subscribe": {"channel": "limited:a#41,42"}}) == [{"id": 2, "subscribe": {}}]
        assert error_of(peer.say({"id": 3, "subscribe": {"channel": "limited:a#4"}})) == 103

    def test_a_second_subscribe_is_105(self, server):
        peer = server.client()
        replies = peer.say({"id": 2, "subscribe": {"channel": "a"}}, {"id": 3, "subscribe": {"channel": "a"}})
        assert replies[0] == {"id": 2, "subscribe": {}} and replies[1]["error"]["code"] == 105

    def test_a_subscription_over_the_limit_is_106(self):
        server = Server(allow_anonymous_connect_without_token=True, channel_limit=3)
        replies = server.client().say(*({"id": n, "subscribe": {"channel": f"a{n}"}} for n in range(1, 5)))
        assert [reply.get("error", {}).get("code") for reply in replies] == [None, None, None, 106]

    def test_unsubscribe_never_fails_and_stops_the_channel(self, server):
        peer, other = server.client(), server.client()
        peer.say({"id": 2, "subscribe": {"channel": "a"}})
        assert peer.say({"id": 3, "unsubscribe": {"channel": "a"}}) == [{"id": 3, "unsubscribe": {}}]
        assert peer.say({"id": 4, "unsubscribe": {"channel": "nosuchns:x"}}) == [{"id": 4, "unsubscribe": {}}]
        other.say({"id": 2, "publish": {"channel": "a", "data": 1}})
        assert peer.heard() == []

    def test_subscribe_unsubscribe_subscribe_in_one_message(self, server):
        peer = server.client()
        replies = peer.say(
            {"id": 2, "subscribe": {"channel": "room:a"}},
            {"id": 3, "unsubscribe": {"channel": "room:a"}},
            {"id": 4, "subscribe": {"channel": "room:a"}},
        )
        assert [reply["id"] for reply in replies if "id" in reply] == [2, 3, 4]
        assert server.hub.subscribers("room:a") == 1

    def test_a_token_grants_access_that_the_options_do_not(self, server):
        peer = server.client("42")
        good = token(sub="42", channel="$private", info={"role": "x"})
        assert peer.say({"id": 2, "subscribe": {"channel": "$private", "token": good}}) == [{"id": 2, "subscribe": {}}]
        assert peer.session.subscriptions["$private"].info.chan_info == b'{"role":"x"}'

    @pytest.mark.parametrize(
        ("claims", "answer"),
        [
            ({"sub": "42", "channel": "$p", "exp": 1}, 109),
            ({"sub": "42"}, 103),
            ({"sub": "42", "channel": "$other"}, (3500, "invalid token")),
            ({"sub": "43", "channel": "$p"}, (3500, "invalid token")),
            ({"sub": "42", "channel": "$p", "client": "x"}, (3500, "invalid token")),
        ],
    )
    def test_a_token_for_another_channel_user_or_client(self, server, claims, answer):
        peer = server.client("42")
        replies = peer.say({"id": 2, "subscribe": {"channel": "$p", "token": token(**claims)}})
        assert (peer.close_code or error_of(replies)) == answer

    def test_fresh_tokens_change_the_info_that_others_see(self, server):
        bob, peer = server.client("bob"), server.peer()
        bob.say({"id": 2, "subscribe": {"channel": "room:a"}})
        peer.connect(token=token(sub="42", info="old"))
        admission = {"sub": "42", "channel": "room:a"}
        peer.say({"id": 2, "subscribe": {"channel": "room:a", "token": token(**admission, info="here")}})
        bob.heard()
        peer.say({"id": 3, "refresh": {"token": token(sub="42", info="new")}})
        peer.say({"id": 4, "sub_refresh": {"channel": "room:a", "token": token(**admission, info="there")}})
        assert bob.heard() == []
        seen = {"user": "42", "client": peer.session.client, "conn_info": "new", "chan_info": "there"}
        (reply,) = bob.say({"id": 3, "presence": {"channel": "room:a"}})
        assert reply["presence"]["presence"][peer.session.client] == seen
        peer.say({"id": 5, "publish": {"channel": "room:a", "data": 1}})
        assert bob.heard()[0]["push"]["pub"]["info"] == seen
        peer.session.closed()
        assert bob.heard()[0]["push"]["leave"]["info"] == seen

    def test_a_subscription_expires(self):
        server = Server(expired_sub_close_delay=2.0, pong_timeout=0.0)
        peer = server.client("42")
        (reply,) = peer.say(
            {"id": 2, "subscribe": {"channel": "a", "token": token(sub="42", channel="a", exp=NOW + 3)}}
        )
        assert reply["subscribe"] == {"expires": True, "ttl": 3}
        server.advance(5.5)
        assert peer.heard() == [
            {"push": {"channel": "a", "unsubscribe": {"code": 2501, "reason": "subscription expired"}}}
        ]

    def test_sub_refresh_names_a_channel(self, server):
        peer = server.client("42")
        peer.say({"id": 2, "sub_refresh": {"token": "x"}})
        assert peer.close_code == (3501, "bad request")

    def test_sub_refresh(self, server):
        peer = server.client("42")
        peer.say({"id": 2, "subscribe": {"channel": "a", "token": token(sub="42", channel="a", exp=NOW + 3)}})
        refresh = {"channel": "a", "token": token(sub="42", channel="a", exp=NOW + 300)}
        assert peer.say({"id": 3, "sub_refresh": refresh}) == [{"id": 3, "sub_refresh": {"expires": True, "ttl": 300}}]
        late = {"channel": "a", "token": token(sub="42", channel="a", exp=1)}
        (reply,) = peer.say({"id": 4, "sub_refresh": late})
        assert reply["error"] == {"code": 109, "message": "token expired", "temporary": True}
        assert error_of(peer.say({"id": 5, "sub_refresh": {"channel": "b", "token": "x"}})) == 103

    def test_the_handler_decides(self, server):
        async def may(client, channel, data):
            if data == "no":
                raise ClientError(103, "permission denied")
            return Grant(data={"topic": "x"}, info={"role": "mod"})

        server.app.subscribe_handlers["nothing:a"] = may
        peer = server.client("42")
        assert error_of(peer.say({"id": 2, "subscribe": {"channel": "nothing:a", "data": "no"}})) == 103
        assert peer.say({"id": 3, "subscribe": {"channel": "nothing:a"}}) == [
            {"id": 3, "subscribe": {"data": {"topic": "x"}}}
        ]

    def test_a_client_that_leaves_during_the_subscribe_handler_leaves_nothing_behind(self, server):
        gate = Gate()

        async def may(client, channel, data):
            await gate

        server.app.subscribe_handlers["room:a"] = may
        peer = server.client("42")
        peer.say({"id": 2, "subscribe": {"channel": "room:a"}})
        peer.session.closed()
        gate.open()
        assert server.hub.subscriptions == 0

    def test_an_engine_that_is_away_is_a_temporary_error(self, server):
        async def away(request):
            raise EngineUnavailable

        peer = server.client()
        server.engine.overrides[GetHistory] = away
        (reply,) = peer.say({"id": 2, "subscribe": {"channel": "room:a"}})
        assert reply["error"] == {"code": 100, "message": "internal server error", "temporary": True}
        assert server.hub.subscriptions == 0
        assert peer.session.subscriptions == {}


class TestPublish:
    def test_it_reaches_all_subscribers_with_the_publisher_s_info(self, server):
        publisher, listener = server.client("42"), server.client()
        for peer in (publisher, listener):
            peer.say({"id": 2, "subscribe": {"channel": "room:a"}})
            peer.heard()
        listener.heard()
        replies = publisher.say(b'{"id":3,"publish":{"channel":"room:a","data":{"n": 12345678901234567890}}}')
        push = next(r["push"] for r in replies if "pub" in r.get("push", {}))
        assert {"id": 3, "publish": {}} in replies
        assert push["pub"]["info"] == {"user": "42", "client": publisher.session.client}
        assert push["pub"]["offset"] == 1 and push["pub"]["epoch"]
        assert listener.heard() == [{"push": push}]

    def test_data_passes_byte_for_byte_but_for_line_ends(self, server):
        peer = server.client()
        peer.say({"id": 2, "subscribe": {"channel": "a"}})
        peer.session.receive(b'{"id":3,"publish":{"channel":"a","data":{"b":1e400,\r "a":[0.10,"\\u0000"]}}}')
        assert any(b'"data":{"b":1e400, "a":[0.10,"\\u0000"]}' in line for line in peer.raw)

    @pytest.mark.parametrize(
        "data",
        [b"[" * 129 + b"]" * 129, b'"\\ud800 lone"', b'{"a":"\\udc00 "}', b'"\\ud800\\u0041"'],
    )
    def test_data_that_readers_could_not_parse_is_107(self, server, data):
        peer = server.client()
        peer.session.receive(b'{"id":2,"publish":{"channel":"a","data":%b}}' % data)
        assert peer.close_code == (3501, "bad request") or error_of(peer.heard()) == 107

    def test_data_of_the_greatest_allowed_depth(self, server):
        peer = server.client()
        peer.session.receive(b'{"id":2,"publish":{"channel":"a","data":%b}}' % (b"[" * 128 + b"]" * 128))
        assert peer.heard() == [{"id": 2, "publish": {}}]

    @pytest.mark.parametrize(
        ("request_", "code"),
        [
            ({"channel": "a"}, 107),
            ({"channel": "unknown:a", "data": 1}, 102),
            ({"channel": "nothing:a", "data": 1}, 103),
            ({"channel": "users:a", "data": 1}, 103),
        ],
    )
    def test_refusals(self, server, request_, code):
        assert error_of(server.client("42").say({"id": 2, "publish": request_})) == code

    def test_options_may_allow_publishing_to_subscribers_only(self, server):
        peer = server.client("42")
        peer.say({"id": 2, "subscribe": {"channel": "users:a"}})
        assert {"id": 3, "publish": {}} in peer.say({"id": 3, "publish": {"channel": "users:a", "data": 1}})

    def test_the_handler_may_change_or_refuse_data(self, server):
        async def moderate(client, channel, data):
            if data == "bad":
                raise ClientError(1001, "mind your words")
            return {"text": data, "by": client.user}

        server.app.publish_handlers["nothing:a"] = moderate
        listener, peer = server.client(), server.client("42")
        server.change(insecure=True)
        listener.say({"id": 2, "subscribe": {"channel": "nothing:a"}})
        assert error_of(peer.say({"id": 2, "publish": {"channel": "nothing:a", "data": "bad"}})) == 1001
        peer.say({"id": 3, "publish": {"channel": "nothing:a", "data": "hi"}})
        assert listener.heard()[0]["push"]["pub"]["data"] == {"text": "hi", "by": "42"}


class TestPresence:
    def test_present_clients(self, server):
        ann, bob = server.client("ann"), server.client("bob")
        for peer in (ann, bob):
            peer.say({"id": 2, "subscribe": {"channel": "room:a"}})
        (reply,) = bob.say({"id": 3, "presence": {"channel": "room:a"}})
        assert {info["user"] for info in reply["presence"]["presence"].values()} == {"ann", "bob"}
        assert bob.say({"id": 4, "presence_stats": {"channel": "room:a"}}) == [
            {"id": 4, "presence_stats": {"num_clients": 2, "num_users": 2}}
        ]
        ann.session.closed()
        assert bob.heard()[-1]["push"]["leave"]["info"]["user"] == "ann"
        (reply,) = bob.say({"id": 5, "presence": {"channel": "room:a"}})
        assert list(reply["presence"]["presence"]) == [bob.session.client]

    def test_a_client_receives_its_own_join_after_its_reply_but_not_its_leave(self, server):
        peer = server.client("ann")
        replies = peer.say({"id": 2, "subscribe": {"channel": "room:a"}})
        assert replies[0]["id"] == 2
        assert replies[1]["push"]["join"]["info"] == {"user": "ann", "client": peer.session.client}
        assert peer.say({"id": 3, "unsubscribe": {"channel": "room:a"}}) == [{"id": 3, "unsubscribe": {}}]

    def test_the_end_of_a_grant_shows_neither_leave_nor_join_of_a_client_that_stays(self, server):
        async def allow(client, channel, data):
            return Grant(expire_at=int(server.wall) + 3) if client.user == "ann" else Grant()

        server.app.subscribe_handlers["room:a"] = allow
        ann, bob = server.client("ann"), server.client("bob")
        bob.say({"id": 2, "subscribe": {"channel": "room:a"}})
        ann.say({"id": 2, "subscribe": {"channel": "room:a"}})
        bob.heard()
        server.advance(4.0)
        assert ann.heard()[-1]["push"]["unsubscribe"]["code"] == 2501
        ann.say({"id": 3, "subscribe": {"channel": "room:a"}})
        server.advance(1.0)
        assert bob.heard() == []
        ann.say({"id": 4, "unsubscribe": {"channel": "room:a"}})
        assert bob.heard()[-1]["push"]["leave"]["info"]["user"] == "ann"

    @pytest.mark.parametrize("name", ["presence", "presence_stats"])
    @pytest.mark.parametrize(("channel", "code"), [("a", 108), ("unknown:a", 102), ("nothing:a", 108)])
    def test_refusals(self, server, name, channel, code):
        assert error_of(server.client().say({"id": 2, name: {"channel": channel}})) == code


class TestHistory:
    def publish(self, server: Server, count: int, channel: str = "kept:a") -> Peer:
        peer = server.client()
        for n in range(1, count + 1):
            peer.say({"id": n + 1, "publish": {"channel": channel, "data": n}})
        return peer

    def ask(self, peer: Peer, **request: Any) -> list[int]:
        (reply,) = peer.say({"id": 99, "history": {"channel": "kept:a", **request}})
        assert reply["history"]["epoch"] and "offset" in reply["history"]
        return [pub["data"] for pub in reply["history"]["publications"]]

    def test_pages(self, server):
        peer = self.publish(server, 12)
        assert self.ask(peer) == []
        assert self.ask(peer, limit=3) == [3, 4, 5]
        assert self.ask(peer, limit=2, reverse=True) == [12, 11]
        assert self.ask(peer, limit=2, since={"offset": 10}) == [11, 12]
        assert self.ask(peer, limit=2, since={"offset": 5}, reverse=True) == [4, 3]
        assert self.ask(peer, limit=-1) == list(range(3, 13))
        assert self.ask(peer, limit=5, since={"offset": 99}) == []

    def test_limits_are_reduced_to_the_maximum(self):
        server = Server(allow_anonymous_connect_without_token=True, history_max_publication_limit=4)
        peer = self.publish(server, 8)
        assert self.ask(peer, limit=-1) == [1, 2, 3, 4]
        assert self.ask(peer, limit=1000) == [1, 2, 3, 4]

    @pytest.mark.parametrize(
        ("request_", "code"),
        [
            ({"channel": "a", "limit": 1}, 108),
            ({"channel": "unknown:a"}, 102),
            ({"channel": "kept:a", "reverse": True, "since": {"offset": 0, "epoch": ""}}, 107),
            ({"channel": "kept:a", "limit": 1, "since": {"offset": 1, "epoch": "other"}}, 112),
        ],
    )
    def test_refusals(self, server, request_, code):
        assert error_of(self.publish(server, 1).say({"id": 9, "history": request_})) == code


class TestRPC:
    def test_replies(self, server):
        async def add(client, data):
            return sum(data)

        server.app.procedures["sum"] = add
        peer = server.client()
        assert peer.say({"id": 2, "rpc": {"method": "sum", "data": [1, 2]}}) == [{"id": 2, "rpc": {"data": 3}}]
        assert error_of(peer.say({"id": 3, "rpc": {"method": "other"}})) == 104

    def test_without_any_procedure_rpc_is_not_available(self, server):
        server.settings = msgspec.structs.replace(server.settings, rpc_ping=RPCPingSettings(enabled=False))
        assert error_of(server.client().say({"id": 2, "rpc": {"method": "sum"}})) == 108

    def test_beside_the_ping_procedure_another_one_is_unknown(self, server):
        assert error_of(server.client().say({"id": 2, "rpc": {"method": "sum"}})) == 104

    def test_a_number_that_python_can_not_hold_is_107(self, server):
        async def echo(client, data):
            return data

        server.app.procedures["echo"] = echo
        assert error_of(server.client().say(b'{"id":2,"rpc":{"method":"echo","data":%b}}' % (b"9" * 5000))) == 107

    def test_a_result_that_is_no_json_is_an_internal_error(self, server):
        async def junk(client, data):
            return object()

        server.app.procedures["junk"] = junk
        peer = server.client()
        assert error_of(peer.say({"id": 2, "rpc": {"method": "junk"}})) == 100
        assert len(server.mistakes) == 1
        assert peer.say({"id": 3, "unsubscribe": {"channel": "a"}}) == [{"id": 3, "unsubscribe": {}}]

    def test_send(self, server):
        got = []

        async def message(client, data):
            got.append(data)
            client.send({"echo": data})

        peer = server.client()
        server.app.on_message = message
        assert peer.say({"send": {"data": 5}}) == [{"push": {"message": {"data": {"echo": 5}}}}]
        assert got == [5]

    def test_raw_json_of_the_application_does_not_split_a_message(self, server):
        pretty = msgspec.Raw(b'{\n  "a": 1\r\n}')

        async def connecting(request):
            return Credentials(user="ann", info=pretty, data=pretty)

        async def moderate(client, channel, data):
            return pretty

        async def answer(client, data):
            client.send(pretty)
            return pretty

        server.app.connecting = connecting
        server.app.publish_handlers["room:a"] = moderate
        server.app.procedures["pretty"] = answer
        peer = server.peer()
        peer.say({"id": 1, "connect": {}}, {"id": 2, "subscribe": {"channel": "room:a"}})
        peer.session.receive(b'{"id":3,"publish":{"channel":"room:a","data":1}}\n{"id":4,"rpc":{"method":"pretty"}}')
        assert len(peer.raw) == 4
        assert not any(b"\n" in message or b"\r" in message for message in peer.raw)

    def test_send_without_a_handler_is_3508(self, server):
        peer = server.client()
        peer.say({"send": {"data": 5}})
        assert peer.close_code == (3508, "not available")
