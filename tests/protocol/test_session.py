"""The session as a table: for every command in every state, what comes back. No reactor, no socket, no clock."""

from __future__ import annotations

import gc
from typing import Any

import jwt
import msgspec
import pytest

from realtime.errors import ClientError, Disconnect, EngineUnavailable
from realtime.protocol.commands import COMMANDS
from realtime.protocol.orders import DisconnectOrder, UnsubscribeOrder, encode_order
from realtime.pubsub.engine import AddPresence, GetHistory, GetPresence, RemovePresence, Subscribe
from realtime.types import Credentials, Grant
from tests.protocol.sessions import NOW, Gate, ImmediateHandler, Peer, Server, error_of, token


@pytest.fixture
def server() -> Server:
    return Server(allow_anonymous_connect_without_token=True)


class TestOrder:
    """What may follow what."""

    @pytest.mark.parametrize("name", [name for name in COMMANDS if name != "connect"])
    def test_nothing_comes_before_connect(self, server, name):
        peer = server.peer()
        assert peer.say({"id": 1, name: {"channel": "a"}}) == []
        assert peer.close_code == (3501, "bad request")

    def test_a_pong_does_not_come_before_connect(self, server):
        peer = server.peer()
        peer.say(b"{}")
        assert peer.close_code == (3501, "bad request")

    def test_connect_comes_once(self, server):
        peer = server.client()
        peer.say({"id": 2, "connect": {}})
        assert peer.close_code == (3501, "bad request")

    @pytest.mark.parametrize(
        "message",
        [
            b"",
            b"not json",
            b"[]",
            b'{"id":2}',
            b'{"id":2,"ping":{}}',
            b'{"id":2,"publish":{"channel":"a","data":1},"history":{"channel":"a"}}',
            b'{"id":-1,"history":{"channel":"a"}}',
            b'{"id":4294967296,"history":{"channel":"a"}}',
            b'{"id":1.0,"history":{"channel":"a"}}',
            b'{"id":true,"history":{"channel":"a"}}',
            b'{"id":0,"history":{"channel":"a"}}',
            b'{"id":2,"history":{"channel":5}}',
            b'{"id":2,"publish":{"channel":"a","data":NaN}}',
            b'{"id":2,"publish":{"channel":"a","data":1e}}',
            b'{"id":2,"publish":{"channel":"a","data":' + b"[" * 60000,
            b'{"id":2,"history":{"channel":""}}',
            b'\xef\xbb\xbf{"id":2,"history":{"channel":"a"}}',
            b"\n" * 60000,
        ],
    )
    def test_what_is_no_command_closes_with_3501(self, server, message):
        peer = server.client()
        peer.session.receive(message)
        assert peer.close_code == (3501, "bad request")
        assert not server.mistakes

    def test_commands_before_a_bad_one_are_acted_on_once(self, server):
        listener, peer = server.client(), server.client()
        listener.say({"id": 2, "subscribe": {"channel": "a"}})
        peer.say({"id": 2, "publish": {"channel": "a", "data": 1}}, b"junk", {"id": 3, "publish": {"channel": "a"}})
        assert [push["push"]["pub"]["data"] for push in listener.heard()] == [1]
        assert peer.close_code == (3501, "bad request")

    def test_unknown_keys_are_ignored(self, server):
        assert server.client().say(b'{"id":2,"x":[1],"unsubscribe":{"channel":"a","y":null}}') == [
            {"id": 2, "unsubscribe": {}}
        ]

    def test_one_newline_at_the_end_is_tolerated(self, server):
        assert server.client().say(b'{"id":2,"unsubscribe":{"channel":"a"}}\n') == [{"id": 2, "unsubscribe": {}}]

    def test_commands_run_one_at_a_time_in_order(self, server):
        gate = Gate()

        async def slow(client, data):
            return await gate

        server.app.procedures["slow"] = slow
        peer = server.client()
        assert peer.say({"id": 2, "rpc": {"method": "slow"}}, {"id": 3, "unsubscribe": {"channel": "a"}}) == []
        assert peer.say({"id": 4, "unsubscribe": {"channel": "a"}}) == []
        gate.open("done")
        assert peer.heard() == [
            {"id": 2, "rpc": {"data": "done"}},
            {"id": 3, "unsubscribe": {}},
            {"id": 4, "unsubscribe": {}},
        ]

    def test_a_client_with_too_many_waiting_commands_is_not_read(self):
        server = Server(allow_anonymous_connect_without_token=True, command_queue=4)
        gate = Gate()

        async def slow(client, data):
            await gate

        server.app.procedures["slow"] = slow
        peer = server.client()
        peer.say({"id": 2, "rpc": {"method": "slow"}})
        peer.say(*({"id": n, "unsubscribe": {"channel": "a"}} for n in range(3, 8)))
        assert peer.paused
        gate.open()
        assert not peer.paused
        assert len(peer.heard()) == 6

    def test_thousands_of_quick_commands_do_not_deepen_the_stack(self):
        peer = Server(allow_anonymous_connect_without_token=True, commands_per_second=0).client()
        assert len(peer.say(*({"id": n, "unsubscribe": {"channel": "a"}} for n in range(2, 5002)))) == 5000


class TestConnect:
    def test_anonymous(self, server):
        (reply,) = server.peer().say({"id": 1, "connect": {}})
        assert reply["id"] == 1
        assert reply["connect"].pop("client")
        assert reply["connect"] == {"version": "test", "ping": 25, "pong": True}

    def test_anonymous_is_refused_by_default(self):
        peer = Server().peer()
        peer.say({"id": 1, "connect": {}})
        assert peer.close_code == (3501, "bad request")

    def test_a_token_says_who(self, server):
        peer = server.client("42")
        assert (peer.session.user, peer.session.handle.user) == ("42", "42")

    def test_a_token_that_expires_announces_it(self, server):
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

    @pytest.mark.parametrize("times", [{"exp": NOW}, {"exp": NOW - 5}, {"nbf": NOW + 5}])
    def test_a_token_out_of_its_time_is_109(self, server, times):
        assert error_of(server.peer().say({"id": 1, "connect": {"token": token(sub="42", **times)}})) == 109

    def test_what_follows_a_refused_connect_is_dropped(self, server):
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

    def test_a_client_that_leaves_while_its_connect_is_handled_leaves_nothing_behind(self, server):
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

    def test_a_mistake_of_ours_is_an_internal_error_and_reported_once(self, server):
        async def connecting(request):
            raise ZeroDivisionError

        server.app.connecting = connecting
        assert error_of(server.peer().say({"id": 1, "connect": {}})) == 100
        assert len(server.mistakes) == 1


class TestTime:
    def test_silence_after_the_handshake_is_3502(self, server):
        peer = server.peer()
        server.advance(9.5)
        assert peer.close_code is None
        server.advance(1)
        assert peer.close_code == (3502, "stale")

    def test_pings_come_on_schedule_and_are_answered(self, server):
        peer = server.client()
        for _ in range(4):
            server.ping(peer)
            peer.say(b"{}")
        assert peer.close_code is None

    def test_pings_come_on_a_busy_connection_too(self, server):
        peer = server.client()
        pings = 0
        for _ in range(300):
            server.advance(0.25)
            replies = peer.say({"id": 2, "unsubscribe": {"channel": "a"}})
            if {} in replies:
                pings += 1
                peer.say(b"{}")
        assert pings in (2, 3)

    def test_no_pong_is_3012(self, server):
        peer = server.client()
        server.ping(peer)
        server.advance(9)
        assert peer.close_code == (3012, "no pong")

    @pytest.mark.parametrize("pongs", [1, 2])
    def test_a_pong_without_a_ping_is_3501(self, server, pongs):
        peer = server.client()
        if pongs == 2:
            server.ping(peer)
        for _ in range(pongs):
            peer.say(b"{}")
        assert peer.close_code == (3501, "bad request")

    def test_a_pong_does_not_wait_behind_a_slow_command(self, server):
        gate = Gate()

        async def slow(client, data):
            await gate

        server.app.procedures["slow"] = slow
        peer = server.client()
        peer.say({"id": 2, "rpc": {"method": "slow"}})
        server.ping(peer)
        peer.say(b"{}")
        server.advance(9)
        assert peer.close_code is None
        gate.open()
        assert peer.heard() == [{"id": 2, "rpc": {"data": None}}]

    def test_a_client_that_is_not_read_is_not_blamed_for_its_pong(self):
        server = Server(allow_anonymous_connect_without_token=True, command_queue=4)
        gate = Gate()

        async def slow(client, data):
            await gate

        server.app.procedures["slow"] = slow
        peer = server.client()
        peer.say(
            {"id": 2, "rpc": {"method": "slow"}}, *({"id": n, "unsubscribe": {"channel": "a"}} for n in range(3, 9))
        )
        assert peer.paused
        server.ping(peer)
        server.advance(40)
        assert peer.heard() == []
        assert peer.close_code is None
        gate.open()
        assert not peer.paused
        server.advance(7)
        assert peer.close_code is None
        peer.heard()
        peer.say(b"{}")
        server.ping(peer)
        server.advance(9)
        assert peer.close_code == (3012, "no pong")

    def test_a_client_whose_connect_takes_us_too_long_may_come_back(self, server):
        async def connecting(request):
            await Gate()

        server.app.connecting = connecting
        peer = server.peer()
        peer.say({"id": 1, "connect": {}})
        server.advance(11)
        assert peer.close_code == (3004, "internal server error")

    def test_a_stalled_loop_blames_no_client(self, server):
        peer = server.client()
        server.ping(peer)
        server.now += 60
        server.services.deadlines.sweep(server.now)
        assert peer.close_code is None
        peer.say(b"{}")
        server.advance(9)
        assert peer.close_code is None

    def test_without_pings_there_are_none(self):
        server = Server(allow_anonymous_connect_without_token=True, ping_interval=0.0)
        peer = server.peer()
        (reply,) = peer.say({"id": 1, "connect": {}})
        assert "ping" not in reply["connect"] and "pong" not in reply["connect"]
        server.advance(100)
        assert peer.heard() == []

    def test_an_expired_connection_has_a_grace_then_3005(self, server):
        peer = server.peer()
        peer.connect(token=token(sub="42", exp=NOW + 10))
        server.change(pong_timeout=0.0)
        server.advance(30)
        assert peer.close_code is None
        server.advance(10)
        assert peer.close_code == (3005, "connection expired")

    def test_refresh_moves_the_expiry(self, server):
        peer = server.peer()
        peer.connect(token=token(sub="42", exp=NOW + 10))
        reply = peer.say({"id": 2, "refresh": {"token": token(sub="42", exp=NOW + 100)}})
        assert reply == [{"id": 2, "refresh": {"expires": True, "ttl": 100}}]

    @pytest.mark.parametrize(
        ("request_token", "code"),
        [("", 3501), ("junk", 3500), (token(sub="43"), 3500), (token(sub="42", exp=1), 3005)],
    )
    def test_a_refresh_that_fails_closes(self, server, request_token, code):
        peer = server.client("42")
        peer.say({"id": 2, "refresh": {"token": request_token}})
        assert peer.close_code[0] == code


class TestSubscribe:
    def test_a_plain_channel(self, server):
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

    def test_twice_is_105(self, server):
        peer = server.client()
        replies = peer.say({"id": 2, "subscribe": {"channel": "a"}}, {"id": 3, "subscribe": {"channel": "a"}})
        assert replies[0] == {"id": 2, "subscribe": {}} and replies[1]["error"]["code"] == 105

    def test_too_many_is_106(self):
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

    def test_a_token_admits_where_the_options_do_not(self, server):
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
    def test_a_token_that_does_not_fit(self, server, claims, answer):
        peer = server.client("42")
        replies = peer.say({"id": 2, "subscribe": {"channel": "$p", "token": token(**claims)}})
        assert (peer.close_code or error_of(replies)) == answer

    def test_fresh_tokens_change_what_others_see(self, server):
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

    def test_a_client_that_leaves_while_it_is_admitted_leaves_nothing_behind(self, server):
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
    def test_it_reaches_everybody_with_the_publisher_s_name(self, server):
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
    def test_data_that_would_hurt_its_readers_is_107(self, server, data):
        peer = server.client()
        peer.session.receive(b'{"id":2,"publish":{"channel":"a","data":%b}}' % data)
        assert peer.close_code == (3501, "bad request") or error_of(peer.heard()) == 107

    def test_deep_but_not_too_deep(self, server):
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

    def test_a_subscriber_may_where_others_may_not(self, server):
        peer = server.client("42")
        peer.say({"id": 2, "subscribe": {"channel": "users:a"}})
        assert {"id": 3, "publish": {}} in peer.say({"id": 3, "publish": {"channel": "users:a", "data": 1}})

    def test_the_handler_may_change_or_refuse(self, server):
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
    def test_who_is_here(self, server):
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

    def test_the_joiner_hears_its_own_join_after_its_reply_and_not_its_leave(self, server):
        peer = server.client("ann")
        replies = peer.say({"id": 2, "subscribe": {"channel": "room:a"}})
        assert replies[0]["id"] == 2
        assert replies[1]["push"]["join"]["info"] == {"user": "ann", "client": peer.session.client}
        assert peer.say({"id": 3, "unsubscribe": {"channel": "room:a"}}) == [{"id": 3, "unsubscribe": {}}]

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

    def test_limits_are_cut(self):
        server = Server(allow_anonymous_connect_without_token=True, history_max_publication_limit=4)
        peer = self.publish(server, 8)
        assert self.ask(peer, limit=-1) == [1, 2, 3, 4]
        assert self.ask(peer, limit=1000) == [1, 2, 3, 4]

    @pytest.mark.parametrize(
        ("request_", "code"),
        [
            ({"channel": "a", "limit": 1}, 108),
            ({"channel": "unknown:a"}, 102),
            ({"channel": "kept:a", "limit": -5}, 107),
            ({"channel": "kept:a", "reverse": True, "since": {"offset": 0, "epoch": ""}}, 107),
            ({"channel": "kept:a", "limit": 1, "since": {"offset": 1, "epoch": "other"}}, 112),
        ],
    )
    def test_refusals(self, server, request_, code):
        assert error_of(self.publish(server, 1).say({"id": 9, "history": request_})) == code


class TestRecovery:
    """A client that comes back gets exactly what it missed, or is told that it did not."""

    def missed(self, server: Server, before: int, after: int) -> dict[str, Any]:
        """Publish `before`, note the position, publish `after` more; the position."""
        peer = server.client()
        for n in range(1, before + 1):
            peer.say({"id": n + 1, "publish": {"channel": "room:a", "data": n}})
        (reply,) = peer.say({"id": 900, "history": {"channel": "room:a"}})
        for n in range(before + 1, before + after + 1):
            peer.say({"id": n + 1, "publish": {"channel": "room:a", "data": n}})
        return {"offset": reply["history"]["offset"], "epoch": reply["history"]["epoch"]}

    def back(self, server: Server, **request: Any) -> dict[str, Any]:
        reply = server.client().say({"id": 2, "subscribe": {"channel": "room:a", "recover": True, **request}})[0]
        assert reply["subscribe"]["was_recovering"] is True
        return reply["subscribe"]

    @pytest.mark.parametrize(("before", "after"), [(0, 0), (0, 3), (5, 0), (5, 1), (5, 10)])
    def test_recovered(self, server, before, after):
        position = self.missed(server, before, after)
        result = self.back(server, **position)
        assert result["recovered"] is True
        assert [pub["data"] for pub in result.get("publications", [])] == list(range(before + 1, before + after + 1))
        assert result.get("offset", 0) == position["offset"]

    def test_an_empty_epoch_matches(self, server):
        position = self.missed(server, 2, 2)
        assert self.back(server, offset=position["offset"])["recovered"] is True

    @pytest.mark.parametrize(
        "wrong",
        [{"epoch": "other"}, {"epoch": "_", "offset": 0}, {"offset": 99}],
    )
    def test_not_recovered_says_so_and_gives_the_top(self, server, wrong):
        result = self.back(server, **{**self.missed(server, 3, 2), **wrong})
        assert "recovered" not in result and "publications" not in result
        assert result["offset"] == 5

    def test_more_than_was_kept_is_not_recovered(self, server):
        assert "recovered" not in self.back(server, **self.missed(server, 3, 11))

    def test_more_than_the_limit_is_not_recovered(self):
        server = Server(allow_anonymous_connect_without_token=True, recovery_max_publication_limit=4)
        assert self.back(server, **self.missed(server, 1, 4))["recovered"] is True
        server = Server(allow_anonymous_connect_without_token=True, recovery_max_publication_limit=4)
        assert "recovered" not in self.back(server, **self.missed(server, 1, 5))

    def test_all_that_a_subscription_asks_of_the_engine_is_one_round_trip(self, server):
        ann, asked = server.client("ann"), server.delay_engine()
        assert ann.say({"id": 2, "subscribe": {"channel": "room:b"}}) == []
        assert len(asked) == 3
        assert ann.say({"id": 3, "unsubscribe": {"channel": "room:a"}}) == []
        for gate in asked:
            gate.open()
        assert [message.get("id") for message in ann.heard()] == [2, None, 3]

    def test_who_wants_no_unrecovered_subscription_is_not_announced_before_it_is_recovered(self, server):
        watcher, ann = server.client("watcher"), server.client("ann")
        at = watcher.say({"id": 2, "subscribe": {"channel": "room:a"}})[0]["subscribe"]
        request = {"channel": "room:a", "recover": True, "epoch": "other", "offset": 1, "flag": 2}
        assert error_of(ann.say({"id": 2, "subscribe": request})) == 112
        assert watcher.heard() == []
        ann.say({"id": 3, "subscribe": {**request, "epoch": at["epoch"], "offset": 0}})
        assert [message["push"]["join"]["info"]["user"] for message in watcher.heard()] == ["ann"]

    def test_flag_2_turns_not_recovered_into_112(self, server):
        position = self.missed(server, 3, 2)
        request = {"channel": "room:a", "recover": True, "offset": position["offset"], "epoch": "other", "flag": 3}
        peer = server.client()
        assert error_of(peer.say({"id": 2, "subscribe": request})) == 112
        assert server.hub.subscribers("room:a") == 0
        good = {"channel": "room:a", "recover": True, "flag": 3, **position}
        assert peer.say({"id": 3, "subscribe": good})[0]["subscribe"]["recovered"] is True

    def test_what_is_published_meanwhile_comes_after_the_reply_without_hole_or_repeat(self, server):
        position = self.missed(server, 2, 2)
        publisher = server.client()

        async def enter_late(request):
            publisher.say({"id": 7, "publish": {"channel": "room:a", "data": 5}})
            await server.engine.carry_out(request)
            publisher.say({"id": 8, "publish": {"channel": "room:a", "data": 6}})

        server.engine.overrides[AddPresence] = enter_late
        peer = server.client()
        replies = peer.say({"id": 2, "subscribe": {"channel": "room:a", "recover": True, **position}})
        assert [pub["data"] for pub in replies[0]["subscribe"]["publications"]] == [3, 4]
        assert [r["push"]["pub"]["data"] for r in replies[1:] if "pub" in r["push"]] == [5, 6]

    def test_continuity_lost_tells_positioned_subscribers_alone(self, server):
        peer = server.client()
        peer.say({"id": 2, "subscribe": {"channel": "room:a"}}, {"id": 3, "subscribe": {"channel": "a"}})
        server.hub.on_interruption()
        assert peer.heard()[-1] == {
            "push": {"channel": "room:a", "unsubscribe": {"code": 2500, "reason": "insufficient state"}}
        }
        assert peer.session.channels() == ["a"]

    def test_asked_for_positioning_and_recovery_need_leave(self, server):
        peer = server.client("42")
        wish = {"positioned": True, "recoverable": True}
        (reply,) = peer.say({"id": 2, "subscribe": {"channel": "kept:a", **wish}})
        assert reply["subscribe"]["recoverable"] and reply["subscribe"]["positioned"] and reply["subscribe"]["epoch"]
        assert peer.say({"id": 3, "subscribe": {"channel": "users:a", **wish}}) == [{"id": 3, "subscribe": {}}]


class TestLeaving:
    """Whenever a client leaves, and whatever the engine does then, nothing of it stays on this worker."""

    def test_its_session_is_in_no_cycle_that_only_the_garbage_collector_could_free(self, server):
        peer = server.client("ann")
        peer.subscribe("a")
        kept = peer.session.handle
        peer.session.closed()
        assert peer.session not in gc.get_referents(kept)
        assert (kept.user, kept.channels) == ("ann", [])
        for say in (lambda: kept.send(1), kept.disconnect, kept.refresh):
            say()
        kept.subscribe("a")
        kept.unsubscribe("a")

    @pytest.fixture
    def leaves(self, server) -> list[str]:
        """The channels that the engine was told of, and has not answered for."""
        channels = []

        async def leave(request):
            channels.append(request.channel)
            await Gate()

        server.engine.overrides[RemovePresence] = leave
        return channels

    def test_an_engine_that_does_not_answer_keeps_no_subscription(self, server, leaves):
        gone = []

        async def disconnected(client):
            gone.append(client.user)

        server.app.disconnected = disconnected
        peer = server.client("ann")
        for n, channel in enumerate(("room:a", "room:b", "kept:c"), 2):
            peer.say({"id": n, "subscribe": {"channel": channel}})
        peer.session.closed()
        assert leaves == ["room:a", "room:b"]
        assert server.hub.subscriptions == 0
        assert gone == ["ann"]

    def test_an_unsubscribe_is_answered_at_once(self, server, leaves):
        peer, other = server.client("ann"), server.client("bob")
        peer.say({"id": 2, "subscribe": {"channel": "room:a"}})
        peer.heard()
        assert peer.say({"id": 3, "unsubscribe": {"channel": "room:a"}}) == [{"id": 3, "unsubscribe": {}}]
        assert (leaves, peer.session.channels(), server.hub.subscriptions) == (["room:a"], [], 0)
        other.say({"id": 2, "subscribe": {"channel": "room:a"}})
        assert peer.heard() == []
        assert "subscribe" in peer.say({"id": 4, "subscribe": {"channel": "room:a"}})[0]

    def test_a_subscribe_that_fails_is_answered_at_once(self, server, leaves):
        async def enter(request):
            raise EngineUnavailable("away")

        server.engine.overrides[AddPresence] = enter
        peer = server.client()
        assert error_of(peer.say({"id": 2, "subscribe": {"channel": "room:a"}})) == 100
        assert peer.say({"id": 3, "subscribe": {"channel": "a"}}) == [{"id": 3, "subscribe": {}}]
        assert (leaves, peer.session.channels()) == (["room:a"], ["a"])

    @pytest.mark.parametrize("how", ["closed", "kicked"])
    @pytest.mark.parametrize("stage", [Subscribe, GetHistory, AddPresence])
    def test_in_the_middle_of_a_subscribe(self, server, stage, how):
        gate = Gate()

        async def late(request):
            await gate
            return await server.engine.carry_out(request)

        server.engine.overrides[stage] = late
        peer = server.client("ann")
        assert peer.say({"id": 2, "subscribe": {"channel": "room:a"}}, {"id": 3, "history": {"channel": "a"}}) == []
        if how == "closed":
            peer.session.closed()
        else:
            peer.session.handle.disconnect()
        gate.open()
        assert peer.heard() == []
        assert (server.hub.subscriptions, len(server.sessions), peer.session.subscriptions) == (0, 0, {})
        assert server.engine.execute(GetPresence("room:a")) == {}
        assert server.engine.core.channels == 0
        assert server.services.deadlines._buckets == {}
        assert not server.mistakes


class TestRPC:
    def test_answers(self, server):
        async def add(client, data):
            return sum(data)

        server.app.procedures["sum"] = add
        peer = server.client()
        assert peer.say({"id": 2, "rpc": {"method": "sum", "data": [1, 2]}}) == [{"id": 2, "rpc": {"data": 3}}]
        assert error_of(peer.say({"id": 3, "rpc": {"method": "other"}})) == 104

    def test_without_any_procedure_it_is_not_available(self, server):
        assert error_of(server.client().say({"id": 2, "rpc": {"method": "sum"}})) == 108

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

    def test_raw_text_of_the_application_parts_no_message(self, server):
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


class TestOrders:
    """What the server API does to connections."""

    def test_disconnect(self, server):
        ann, ann2, bob = server.client("ann"), server.client("ann"), server.client("bob")
        order = DisconnectOrder("ann", whitelist=(ann2.session.client,), code=4001, reason="tidy up")
        server.sessions.apply(encode_order(order))
        assert ann.close_code == (4001, "tidy up")
        assert ann2.close_code is None and bob.close_code is None
        server.sessions.apply(encode_order(DisconnectOrder("ann")))
        assert ann2.close_code == (3503, "force disconnect")
        assert len(server.sessions) == 1

    def test_unsubscribe(self, server):
        peer = server.client("ann")
        peer.say({"id": 2, "subscribe": {"channel": "a"}})
        server.sessions.apply(encode_order(UnsubscribeOrder("ann", "a")))
        assert peer.heard() == [
            {"push": {"channel": "a", "unsubscribe": {"code": 2000, "reason": "server unsubscribe"}}}
        ]
        assert server.hub.subscriptions == 0

    def test_what_is_no_order_is_refused_where_it_is_given(self):
        for order in (DisconnectOrder(42), DisconnectOrder("42", whitelist=[1]), UnsubscribeOrder("42", None)):
            with pytest.raises(msgspec.ValidationError):
                encode_order(order)

    def test_handlers_hear_of_the_end_once(self, server):
        gone = []

        async def disconnected(client):
            gone.append(client.user)

        server.app.disconnected = disconnected
        peer = server.client("ann")
        peer.session.handle.disconnect()
        peer.session.closed()
        assert gone == ["ann"]
        assert peer.close_code == (3503, "force disconnect")


def test_an_answer_at_once_comes_behind_those_that_wait(server: Server) -> None:
    gate = Gate()

    async def slow(client: Any, data: Any) -> Any:
        return await gate

    def fails(client: Any, data: Any) -> Any:
        raise ClientError(400, "not that")

    server.app.procedures = {
        "slow": slow,
        "quick": ImmediateHandler(lambda client, data: [data]),
        "no": ImmediateHandler(fails),
    }
    peer = server.client("ada")
    assert peer.say({"id": 2, "rpc": {"method": "quick", "data": 1}}) == [{"id": 2, "rpc": {"data": [1]}}]
    assert peer.say({"id": 3, "rpc": {"method": "slow"}}, {"id": 4, "rpc": {"method": "quick", "data": 2}}) == []
    assert peer.say({"id": 5, "rpc": {"method": "no"}}) == []
    gate.open("done")
    third, fourth, fifth = peer.heard()
    assert (third, fourth) == ({"id": 3, "rpc": {"data": "done"}}, {"id": 4, "rpc": {"data": [2]}})
    assert fifth == {"id": 5, "error": {"code": 400, "message": "not that"}}
