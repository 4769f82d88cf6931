"""Server-side subscriptions: by credentials, by the connect request, and by order."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import msgspec
import pytest

from realtime.config.settings import ChannelOptions, ChannelSettings, Namespace, PersonalChannelSettings
from realtime.errors import EngineUnavailable
from realtime.protocol.connect import JOINS_AT_ONCE
from realtime.protocol.orders import DisconnectOrder, RefreshOrder, SubscribeOrder, UnsubscribeOrder
from realtime.pubsub.engine import AddPresence, GetHistory, GetPresence, SendOrder, Subscribe
from realtime.types import Credentials, Grant, Position, SubscribeOptions
from tests.protocol.sessions import ALL, BARE_PROTOBUF, KEPT, NOW, Gate, Peer, Server, error_of, token

CHANNELS = ChannelSettings(
    without_namespace=ChannelOptions(force_recovery=True, **KEPT),
    namespaces=(
        Namespace(name="room", presence=True, join_leave=True, force_push_join_leave=True, force_recovery=True, **KEPT),
        Namespace(name="own", presence=True, join_leave=True, force_push_join_leave=True),
        Namespace(name="open", force_recovery=True, **KEPT, **ALL),
        Namespace(name="limited", allow_user_limited_channels=True, **KEPT),
        Namespace(name="tagged", allow_tags_filter=True, allowed_delta_types=("fossil",), force_recovery=True, **KEPT),
        Namespace(name="plain"),
    ),
)


def make(**client: Any) -> Server:
    return Server(CHANNELS, allow_anonymous_connect_without_token=True, **client)


def connect(peer: Peer, **claims: Any) -> dict:
    """Connect with a token; return the result."""
    reply, *rest = peer.say({"id": 1, "connect": {"token": token(**{"sub": "42", **claims})}})
    assert not [message for message in rest if "push" not in message]
    return reply["connect"]


def subs(peer: Peer, claims: dict, **positions: dict) -> dict:
    """Connect with a token and the client's last positions; return the subscriptions."""
    request = {"token": token(sub="42", **claims), "subs": positions}
    return peer.say({"id": 1, "connect": request})[0]["connect"].get("subs", {})


class TestAtConnect:
    def test_channels_of_the_token_need_no_permission(self):
        server = make()
        peer = server.peer()
        assert connect(peer, channels=["plain:a", "plain:b"])["subs"] == {"plain:a": {}, "plain:b": {}}
        server.publish("plain:b", 1)
        assert peer.heard() == [{"push": {"channel": "plain:b", "pub": {"data": 1}}}]
        assert set(peer.session.handle.channels) == {"plain:a", "plain:b"}

    def test_without_channels_the_reply_names_none(self):
        assert "subs" not in connect(make().peer())

    def test_options_of_the_token(self):
        server = make()
        peer = server.peer()
        options = {"info": {"role": "x"}, "data": {"topic": 1}, "override": {"presence": {"value": True}}}
        assert connect(peer, subs={"plain:a": options}, channels=["plain:b"])["subs"] == {
            "plain:a": {"data": {"topic": 1}}
        }
        (seen,) = server.engine.execute(GetPresence("plain:a")).values()
        assert (seen.user, seen.chan_info) == ("42", b'{"role":"x"}')

    def test_credentials_of_the_handler(self):
        async def connecting(request):
            return Credentials(
                "7", channels=["plain:a"], subs={"room:b": Grant(data=1, info="x", expire_at=int(NOW) + 5)}
            )

        server = make(pong_timeout=0.0)
        server.app.connecting = connecting
        peer = server.peer()
        result, *joins = peer.say({"id": 1, "connect": {}})
        assert result["connect"]["subs"]["plain:a"] == {}
        assert result["connect"]["subs"]["room:b"]["data"] == 1
        assert joins[0]["push"]["join"]["info"]["chan_info"] == "x"
        server.advance(4)
        assert peer.close_code is None
        server.advance(2)
        assert peer.close_code == (3006, "subscription expired")

    @pytest.mark.parametrize(
        "grant", [Grant(expire_at=datetime(2030, 1, 1)), Grant(expire_at="1"), Grant(override={"presence": 1})]
    )
    def test_a_grant_with_a_value_of_a_wrong_type_is_an_error(self, grant):
        async def connecting(request):
            return Credentials("7", subs={"room:a": grant})

        server = make()
        server.app.connecting = connecting
        assert error_of(server.peer().say({"id": 1, "connect": {}})) == 100
        assert isinstance(server.mistakes.pop(), ValueError)
        server.advance(6)
        assert server.clean()

    def test_an_unknown_override_in_a_grant_is_an_error(self):
        async def connecting(request):
            return Credentials("7", subs={"plain:a": Grant(override={"history_size": True})})

        server = make()
        server.app.connecting = connecting
        assert error_of(server.peer().say({"id": 1, "connect": {}})) == 100
        assert len(server.mistakes) == 1

    def test_an_unknown_namespace_in_the_token_is_102(self):
        server = make()
        peer = server.peer()
        assert error_of(peer.say({"id": 1, "connect": {"token": token(sub="42", channels=["plain:a", "no:b"])}})) == 102
        server.advance(6)
        assert server.clean()

    def test_too_many_close_with_3505(self):
        server = make(channel_limit=2)
        peer = server.peer()
        peer.say({"id": 1, "connect": {"token": token(sub="42", channels=["plain:a", "plain:b", "plain:c"])}})
        assert peer.close_code == (3505, "channel limit")
        assert server.clean() and server.count("realtime_bad_input", kind="channels") == 1

    @pytest.mark.parametrize("form", ["json", "protobuf"])
    def test_joins_come_after_the_reply(self, form):
        server = make()
        peer = server.peer(BARE_PROTOBUF) if form == "protobuf" else server.peer()
        reply, *pushes = peer.say({"id": 1, "connect": {"token": token(sub="42", channels=["room:a", "own:b"])}})
        client = reply["connect"]["client"]
        assert reply["connect"]["subs"].keys() == {"room:a", "own:b"}
        assert pushes == [
            {"push": {"channel": channel, "join": {"info": {"user": "42", "client": client}}}}
            for channel in ("room:a", "own:b")
        ]

    def test_publications_during_a_connect_come_after_the_reply(self):
        server = make()
        gates = {"room:a": Gate(), "room:b": Gate()}

        async def late(query):
            page = await server.engine.carry_out(query)
            await gates[query.channel]
            return page

        server.engine.overrides[GetHistory] = late
        peer = server.peer()
        assert peer.say({"id": 1, "connect": {"token": token(sub="42", channels=list(gates))}}) == []
        server.publish("room:a", 1)
        gates["room:a"].open()
        server.publish("room:a", 2)
        server.publish("room:b", 1)
        assert peer.heard() == []
        gates["room:b"].open()
        reply, *pushes = peer.heard()
        assert {channel: sub.get("offset", 0) for channel, sub in reply["connect"]["subs"].items()} == {
            "room:a": 0,
            "room:b": 0,
        }
        published = [(p["push"]["channel"], p["push"]["pub"]["offset"]) for p in pushes if "pub" in p["push"]]
        assert published == [("room:a", 1), ("room:a", 2), ("room:b", 1)]

    def test_many_channels_cost_few_round_trips_to_the_engine(self):
        server = make()
        asked = server.delay_engine()
        channels = [f"room:{number}" for number in range(2 * JOINS_AT_ONCE)]
        peer = server.peer()
        peer.say({"id": 1, "connect": {"token": token(sub="42", channels=channels)}})
        for _ in range(2):
            assert peer.raw == [] and len(asked) == 3 * JOINS_AT_ONCE
            gates, asked[:] = asked[:], []
            for gate in gates:
                gate.open()
        assert asked == []
        reply, *_ = peer.heard()
        assert list(reply["connect"]["subs"]) == channels

    def test_a_failure_among_many_subscriptions_leaves_none(self):
        server = make()
        gates = {"room:a": Gate(), "room:c": Gate()}

        async def history(query):
            if query.channel not in gates:
                raise EngineUnavailable
            await gates[query.channel]
            return await server.engine.carry_out(query)

        server.engine.overrides[GetHistory] = history
        peer = server.peer()
        assert peer.say({"id": 1, "connect": {"token": token(sub="42", channels=["room:a", "room:b", "room:c"])}}) == []
        gates["room:c"].open()
        assert peer.heard() == []
        gates["room:a"].open()
        assert error_of(peer.heard()) == 100
        server.advance(6)
        assert server.clean()

    def test_recovery(self):
        server = make()
        epoch = subs(server.peer(), {"channels": ["news"]})["news"]["epoch"]
        server.publish("news", 1, 2, 3)
        result = subs(server.peer(), {"channels": ["news"]}, news={"recover": True, "offset": 1, "epoch": epoch})[
            "news"
        ]
        assert [publication["data"] for publication in result.pop("publications")] == [2, 3]
        assert result == {
            "recoverable": True,
            "positioned": True,
            "was_recovering": True,
            "recovered": True,
            "offset": 1,
            "epoch": epoch,
        }
        lost = subs(server.peer(), {"channels": ["news"]}, news={"recover": True, "offset": 1, "epoch": "_"})["news"]
        assert (lost["was_recovering"], lost["offset"], "recovered" in lost, "publications" in lost) == (
            True,
            3,
            False,
            False,
        )

    def test_a_lost_position_closes_with_3010(self):
        server = make()
        peer = server.peer()
        connect(peer, channels=["news"])
        server.hub.on_interruption()
        assert peer.close_code == (3010, "insufficient state")
        assert server.clean()

    @pytest.mark.parametrize("stage", [Subscribe, GetHistory, AddPresence])
    def test_an_engine_that_is_away_is_a_temporary_error_and_leaves_nothing(self, stage):
        server = make()

        async def away(request):
            raise EngineUnavailable

        server.engine.overrides[stage] = away
        (reply,) = server.peer().say({"id": 1, "connect": {"token": token(sub="42", channels=["own:x", "room:a"])}})
        assert reply["error"] == {"code": 100, "message": "internal server error", "temporary": True}
        server.advance(6)
        assert server.clean()

    @pytest.mark.parametrize("stage", [Subscribe, GetHistory, AddPresence])
    def test_a_client_that_leaves_during_a_server_side_subscribe_leaves_nothing_behind(self, stage):
        server = make()
        gate = Gate()

        async def late(request):
            await gate
            return await server.engine.carry_out(request)

        server.engine.overrides[stage] = late
        peer = server.peer()
        peer.say({"id": 1, "connect": {"token": token(sub="42", channels=["room:a", "room:b"])}})
        peer.session.closed()
        gate.open()
        assert peer.heard() == []
        assert server.clean() and peer.session.subscriptions == {}

    def test_the_client_may_unsubscribe_and_not_subscribe_again(self):
        server = make()
        peer = server.peer()
        connect(peer, channels=["plain:a"])
        assert error_of(peer.say({"id": 2, "subscribe": {"channel": "plain:a"}})) == 105
        assert peer.say({"id": 3, "unsubscribe": {"channel": "plain:a"}}) == [{"id": 3, "unsubscribe": {}}]
        server.publish("plain:a", 1)
        assert peer.heard() == []

    def test_a_filter_and_deltas_may_be_asked_for(self):
        server = make()
        peer = server.peer()
        wish = {"tf": {"key": "k", "cmp": "eq", "val": "v"}}
        assert subs(peer, {"channels": ["tagged:a"]}, **{"tagged:a": wish})["tagged:a"]["positioned"]
        server.publish("tagged:a", 1)
        server.publish("tagged:a", 2, tags={"k": "v"})
        assert peer.publications() == [2]

    @pytest.mark.parametrize(
        ("channel", "wish"),
        [
            ("plain:a", {"tf": {"key": "k", "cmp": "ex"}}),
            ("tagged:a", {"tf": {"key": "k", "cmp": "wrong"}}),
            ("news", {"flag": 2, "recover": True, "epoch": "other"}),
        ],
    )
    @pytest.mark.parametrize("by", ["token", "client"])
    def test_a_wish_that_a_subscribe_command_would_refuse_is_left_out(self, channel, wish, by):
        server = make()
        granted = {"channels": [channel]} if by == "token" else {}
        result = subs(server.peer(), granted, **{channel: wish})
        if by == "token":
            assert result[channel].get("was_recovering", False) == ("flag" in wish)
        assert server.count("realtime_bad_input", kind="filter") == (1 if "tf" in wish and channel in result else 0)


class TestByTheClientAtConnect:
    """Channels in the connect request: those that the client could subscribe to without a token."""

    def test_channels_the_client_may_subscribe_to(self):
        server = make()
        assert list(subs(server.peer(), {}, **{"open:a": {}, "limited:x#42": {}})) == ["open:a", "limited:x#42"]

    @pytest.mark.parametrize(
        "channel", ["plain:a", "$open:a", "limited:x#43", "open:" + "a" * 300, "open:\n", "open:ä", ""]
    )
    def test_channels_the_client_may_not_subscribe_to_are_left_out(self, channel):
        server = make()
        assert subs(server.peer(), {}, **{channel: {}, "open:a": {}}).keys() == {"open:a"}

    def test_a_channel_with_a_handler_is_left_out_without_a_call(self):
        async def may(client, channel, data):
            raise AssertionError

        server = make()
        server.app.subscribe_handlers["open:a"] = may
        assert subs(server.peer(), {}, **{"open:a": {}}) == {}

    def test_an_unknown_namespace_closes_with_3501(self):
        peer = make().peer()
        peer.say({"id": 1, "connect": {"subs": {"no:a": {}}}})
        assert peer.close_code == (3501, "bad request")

    def test_an_insecure_server_allows_all_but_private_channels(self):
        server = make(insecure=True)
        assert subs(server.peer(), {}, **{"plain:a": {}, "$plain:a": {}}).keys() == {"plain:a"}

    def test_the_limit_counts_all(self):
        peer = make(channel_limit=2).peer()
        request = {"token": token(sub="42", channels=["plain:a"]), "subs": {"open:a": {}, "open:b": {}}}
        peer.say({"id": 1, "connect": request})
        assert peer.close_code == (3505, "channel limit")

    def test_recovery(self):
        server = make()
        epoch = subs(server.peer(), {}, **{"open:a": {}})["open:a"]["epoch"]
        server.publish("open:a", 1, 2)
        result = subs(server.peer(), {}, **{"open:a": {"recover": True, "offset": 1, "epoch": epoch}})["open:a"]
        assert [publication["data"] for publication in result["publications"]] == [2]


class TestPersonalChannel:
    def server(self, **personal: Any) -> Server:
        return make(subscribe_to_user_personal_channel=PersonalChannelSettings(enabled=True, **personal))

    def test_every_user_has_a_personal_channel(self):
        server = self.server()
        peer = server.peer()
        assert connect(peer)["subs"].keys() == {"#42"}
        server.publish("#42", "hi")
        assert peer.publications() == ["hi"]
        assert "subs" not in server.peer().say({"id": 1, "connect": {}})[0]["connect"]

    def test_in_a_namespace(self):
        assert connect(self.server(personal_channel_namespace="own").peer())["subs"] == {"own:#42": {}}

    def test_a_user_id_with_a_namespace_boundary(self):
        server = make(subscribe_to_user_personal_channel=PersonalChannelSettings(enabled=True))
        reply = server.peer().say({"id": 1, "connect": {"token": token(sub="user:42")}})[0]
        assert list(reply["connect"]["subs"]) == ["#user:42"]

    def test_a_user_id_that_names_several_users_has_none(self):
        server = make(subscribe_to_user_personal_channel=PersonalChannelSettings(enabled=True))
        reply = server.peer().say({"id": 1, "connect": {"token": token(sub="alice,bob")}})[0]
        assert "subs" not in reply["connect"]
        assert "'alice,bob'" in server.info[0] and "channel.user_separator" in server.info[0]

    def test_a_new_connection_ends_the_older_ones_of_the_user(self):
        server = self.server(personal_channel_namespace="own", single_connection=True)
        old, other, anonymous = server.client("42"), server.client("43"), server.client()
        new = server.peer()
        connect(new)
        assert old.close_code == (3504, "connection limit")
        assert (new.close_code, other.close_code, anonymous.close_code) == (None, None, None)

    def test_one_of_two_simultaneous_connections_stays(self):
        server = self.server(single_connection=True)
        orders = []

        async def send_order(request):
            orders.append(request.order)
            return 1

        server.engine.overrides[SendOrder] = send_order
        one, two = server.client("42"), server.client("42")
        for order in orders:
            server.sessions.apply(order)
        assert (one.close_code, two.close_code) == ((3504, "connection limit"), None)
        three = server.client("42")
        server.sessions.apply(orders[-1])
        assert (two.close_code, three.close_code) == ((3504, "connection limit"), None)

    def test_the_new_connection_reconnects_when_the_order_can_not_be_sent(self):
        async def away(request):
            raise EngineUnavailable

        server = self.server(single_connection=True)
        server.engine.overrides[SendOrder] = away
        new = server.peer()
        connect(new)
        assert new.close_code == (3004, "internal server error")
        assert server.clean()


class TestRefresh:
    def test_the_same_channels(self):
        peer = make().peer()
        connect(peer, channels=["plain:a", "plain:b"])
        again = token(sub="42", channels=["plain:b", "plain:a"])
        assert peer.say({"id": 2, "refresh": {"token": again}}) == [{"id": 2, "refresh": {}}]

    @pytest.mark.parametrize("claims", [{}, {"channels": ["plain:a"]}, {"subs": {"plain:a": {}, "plain:c": {}}}])
    def test_other_channels_close_with_3010(self, claims):
        server = make()
        peer = server.peer()
        connect(peer, channels=["plain:a", "plain:b"])
        peer.say({"id": 2, "refresh": {"token": token(sub="42", **claims)}})
        assert peer.close_code == (3010, "insufficient state")
        assert server.clean()

    @pytest.mark.parametrize(("name", "judge"), [("refresh", "connection"), ("sub_refresh", "subscription")])
    def test_a_client_that_leaves_while_its_token_is_verified_leaves_nothing_behind(self, name, judge):
        server = make()
        peer = server.peer()
        connect(peer, exp=NOW + 10)
        own = token(sub="42", channel="open:a", exp=NOW + 10)
        peer.subscribe("open:a", token=own)
        gate, judged = Gate(), getattr(server.services.tokens, judge)

        async def late(text):
            claims = await judged(text)
            await gate
            return claims

        setattr(server.services.tokens, judge, late)
        fresh = own if name == "sub_refresh" else token(sub="42", exp=NOW + 1000)
        peer.say({"id": 3, name: {"channel": "open:a", "token": fresh}})
        peer.session.closed()
        gate.open()
        assert peer.heard() == [] and server.clean()

    def test_channels_that_the_client_has_by_other_means(self):
        server = make()
        peer = server.peer()
        subs(peer, {"channels": ["plain:a"]}, **{"open:a": {}})
        server.order(SubscribeOrder("42", "plain:b"))
        peer.say({"id": 2, "subscribe": {"channel": "open:b"}})
        peer.heard()
        named = ["plain:a", "plain:b", "open:a", "open:b"]
        assert peer.say({"id": 3, "refresh": {"token": token(sub="42", channels=named)}}) == [{"id": 3, "refresh": {}}]

    def test_an_unknown_namespace_in_the_token_is_102(self):
        peer = make().peer()
        connect(peer)
        assert error_of(peer.say({"id": 2, "refresh": {"token": token(sub="42", channels=["nope:a"])}})) == 102

    def test_a_token_without_info_leaves_the_info(self):
        server = make()
        peer = server.peer()
        connect(peer, info={"n": 1})
        peer.say({"id": 2, "subscribe": {"channel": "open:a"}})
        peer.say({"id": 3, "refresh": {"token": token(sub="42")}})
        assert peer.session.info.conn_info == b'{"n":1}'
        peer.say({"id": 4, "refresh": {"token": token(sub="42", info={"n": 2})}})
        assert peer.session.info.conn_info == b'{"n":2}'

    def test_subscriptions_of_other_origins_do_not_count(self):
        server = make(subscribe_to_user_personal_channel=PersonalChannelSettings(enabled=True))
        peer = server.peer()
        subs(peer, {"channels": ["plain:a"]}, **{"open:a": {}})
        server.order(SubscribeOrder("42", "plain:b"))
        peer.say({"id": 2, "subscribe": {"channel": "open:b"}})
        peer.heard()
        reply = peer.say({"id": 3, "refresh": {"token": token(sub="42", channels=["plain:a"])}})
        assert reply == [{"id": 3, "refresh": {}}]


class TestOrders:
    @pytest.fixture
    def server(self) -> Server:
        return make()

    def test_subscribe(self, server):
        ann, other = server.client("ann"), server.client("bob")
        server.publish("news", 1)
        terms = SubscribeOptions(b'{"role":"x"}', b'{"topic":1}', 0.0, {"presence": True})
        server.order(SubscribeOrder("ann", "news", terms))
        (push,) = ann.heard()
        assert push["push"].pop("subscribe").pop("epoch")
        assert push == {"push": {"channel": "news"}}
        server.publish("news", 2)
        assert ann.publications() == [2]
        assert other.heard() == []
        (seen,) = server.engine.execute(GetPresence("news")).values()
        assert seen.chan_info == b'{"role":"x"}'

    def test_the_push_carries_the_position(self, server):
        ann = server.client("ann")
        server.publish("news", 1, 2)
        server.order(SubscribeOrder("ann", "news", SubscribeOptions(data=b"7")))
        (push,) = ann.heard()
        body = push["push"]["subscribe"]
        assert body.pop("epoch")
        assert body == {"recoverable": True, "positioned": True, "offset": 2, "data": 7}

    def test_after_a_position(self, server):
        ann = server.client("ann")
        server.publish("news", 1, 2, 3)
        server.order(SubscribeOrder("ann", "news", since=Position(1, "")))
        begin, *rest = ann.heard()
        assert begin["push"]["subscribe"]["offset"] == 1
        assert [(one["push"]["pub"]["offset"], one["push"]["pub"]["data"]) for one in rest] == [(2, 2), (3, 3)]
        server.publish("news", 4)
        assert ann.publications() == [4]

    def test_a_subscription_of_the_client_stays_its_own(self, server):
        ann = server.client("ann")
        ann.subscribe("open:a")
        server.publish("open:a", 1)
        server.order(SubscribeOrder("ann", "open:a", SubscribeOptions(data=b"7")))
        publication, push = ann.heard()
        assert push["push"]["subscribe"].pop("epoch")
        body = {"recoverable": True, "positioned": True, "offset": 1, "data": 7}
        assert (push["push"]["subscribe"], publication["push"]["pub"]["offset"]) == (body, 1)
        server.publish("open:a", 2)
        assert ann.publications() == [2]
        server.hub.on_interruption()
        assert ann.heard()[0]["push"]["unsubscribe"]["code"] == 2500

    def test_a_subscribed_client_gets_the_new_terms_without_leave_and_join(self, server):
        ann, bob = server.client("ann"), server.client("bob")
        for peer, user in ((ann, "ann"), (bob, "bob")):
            server.order(SubscribeOrder(user, "room:a", SubscribeOptions(b"1")))
            peer.heard()
        bob.heard(), ann.heard()
        server.order(SubscribeOrder("ann", "room:a", SubscribeOptions(b"2", b'"new"')))
        (push,) = ann.heard()
        assert push["push"]["subscribe"]["data"] == "new"
        assert bob.heard() == []
        infos = server.engine.execute(GetPresence("room:a"))
        assert infos[ann.session.client].chan_info == b"2"

    def test_new_overrides_hold(self, server):
        ann = server.client("ann")
        server.order(SubscribeOrder("ann", "plain:a"))
        assert ann.heard()[0]["push"]["subscribe"] == {}
        named = {"join_leave": True, "force_push_join_leave": True, "presence": True}
        server.order(SubscribeOrder("ann", "plain:a", SubscribeOptions(override=named)))
        assert {next(iter(message["push"].keys() - {"channel"})) for message in ann.heard()} == {"subscribe", "join"}
        assert list(server.engine.execute(GetPresence("plain:a"))) == [ann.session.client]
        server.order(SubscribeOrder("bob", "plain:a"))
        bob = server.client("bob")
        server.order(SubscribeOrder("bob", "plain:a", SubscribeOptions(override=named)))
        assert ann.heard()[0]["push"]["join"]["info"]["user"] == "bob"
        server.order(SubscribeOrder("ann", "plain:a"))
        assert list(server.engine.execute(GetPresence("plain:a"))) == [bob.session.client]
        assert "subscribe" in ann.heard()[-1]["push"]
        bob.session.closed()
        assert ann.heard() == []

    @pytest.mark.parametrize(("later", "ends_after"), [(NOW + 2, 27), (NOW + 100, 125), (0.0, None)])
    def test_a_new_expiry_holds(self, later, ends_after):
        server = make(pong_timeout=0.0)
        ann = server.client("ann")
        server.order(SubscribeOrder("ann", "plain:a", SubscribeOptions(expire_at=NOW + 10)))
        server.order(SubscribeOrder("ann", "plain:a", SubscribeOptions(expire_at=later)))
        assert len([message for message in ann.heard() if "push" in message]) == 2
        server.advance((ends_after or 300) - 1)
        assert ann.close_code is None
        server.advance(2)
        assert ann.close_code == ((3006, "subscription expired") if ends_after else None)

    def test_terms_that_arrive_during_a_subscribe_hold(self, server):
        ann = server.client("ann")
        gates = server.delay_engine()
        ann.say({"id": 2, "subscribe": {"channel": "open:a"}})
        server.order(SubscribeOrder("ann", "open:a", SubscribeOptions(data=b"7")))
        server.engine.overrides.clear()
        while gates:
            gates.pop().open()
        reply, push = ann.heard()
        assert (reply["id"], push["push"]["subscribe"]["data"]) == (2, 7)

    def test_the_subscribe_push_comes_before_the_join(self, server):
        ann = server.client("ann")
        server.order(SubscribeOrder("ann", "room:a"))
        assert [next(iter(message["push"].keys() - {"channel"})) for message in ann.heard()] == ["subscribe", "join"]

    def test_by_client_and_by_session(self, server):
        one, two, stream = server.client("ann"), server.client("ann"), server.peer(secret="s3cret")
        stream.say({"id": 1, "connect": {"token": token(sub="ann")}})
        server.order(SubscribeOrder("ann", "plain:a", client=one.session.client))
        server.order(SubscribeOrder("ann", "plain:b", session="s3cret"))
        assert [peer.session.channels() for peer in (one, two, stream)] == [["plain:a"], [], ["plain:b"]]
        server.order(UnsubscribeOrder("ann", "plain:a", client=two.session.client))
        server.order(UnsubscribeOrder("ann", "plain:b", session="s3cret"))
        assert [peer.session.channels() for peer in (one, two, stream)] == [["plain:a"], [], []]
        server.order(RefreshOrder("ann", expired=True, session="s3cret"))
        assert (stream.close_code, one.close_code) == ((3005, "connection expired"), None)
        server.order(DisconnectOrder("ann", client=two.session.client))
        assert (two.close_code, one.close_code) == ((3503, "force disconnect"), None)

    def test_an_empty_user_means_the_anonymous(self, server):
        ann, anonymous = server.client("ann"), server.client()
        server.order(SubscribeOrder("", "plain:a"))
        assert (ann.session.channels(), anonymous.session.channels()) == ([], ["plain:a"])

    def test_expiry(self):
        server = make(pong_timeout=0.0)
        ann = server.client("ann")
        server.order(SubscribeOrder("ann", "plain:a", SubscribeOptions(expire_at=NOW - 1)))
        assert ann.heard() == []
        server.order(SubscribeOrder("ann", "plain:a", SubscribeOptions(expire_at=NOW + 3)))
        server.advance(27)
        assert ann.close_code is None
        server.advance(2)
        assert ann.close_code == (3006, "subscription expired")
        assert server.clean()

    def test_a_subscription_over_the_limit_closes_with_3505(self):
        server = make(channel_limit=1)
        ann = server.client("ann")
        server.order(SubscribeOrder("ann", "plain:a"))
        server.order(SubscribeOrder("ann", "plain:b"))
        assert ann.close_code == (3505, "channel limit")
        assert server.clean()

    @pytest.mark.parametrize("how", ["order", "command", "closed"])
    @pytest.mark.parametrize("stage", [Subscribe, GetHistory, AddPresence])
    def test_a_subscription_ended_during_its_subscribe(self, server, stage, how):
        gate = Gate()

        async def late(request):
            result = await server.engine.carry_out(request)
            await gate
            return result

        server.engine.overrides[stage] = late
        ann = server.client("ann")
        server.order(SubscribeOrder("ann", "room:a"))
        if how == "order":
            server.order(UnsubscribeOrder("ann", "room:a"))
        elif how == "command":
            assert ann.say({"id": 2, "unsubscribe": {"channel": "room:a"}}) == [{"id": 2, "unsubscribe": {}}]
        else:
            ann.session.closed()
        gate.open()
        assert ann.heard() == []
        assert server.hub.subscriptions == 0 and server.engine.execute(GetPresence("room:a")) == {}
        assert not server.mistakes

    @pytest.mark.parametrize("stage", [Subscribe, GetHistory, AddPresence])
    def test_a_subscription_ended_and_begun_again_during_its_subscribe(self, server, stage):
        gates = []

        async def late(request):
            result = await server.engine.carry_out(request)
            gates.append(Gate())
            await gates[-1]
            return result

        server.engine.overrides[stage] = late
        watcher, _ = server.client("watcher"), server.client("ann")
        server.order(SubscribeOrder("watcher", "room:a"))
        server.order(SubscribeOrder("ann", "room:a"))
        server.order(UnsubscribeOrder("ann", "room:a"))
        server.order(SubscribeOrder("ann", "room:a"))
        for gate in gates:  # including those added meanwhile
            gate.open()
        pushes = [message["push"] for message in watcher.heard()]
        assert len(server.engine.execute(GetPresence("room:a"))) == 2
        assert server.hub.subscriptions == 2
        of_ann = [
            name
            for push in pushes
            for name in ("join", "leave")
            if push.get(name, {}).get("info", {}).get("user") == "ann"
        ]
        assert of_ann in (["join"], ["join", "leave", "join"])

    def test_a_subscribe_command_that_an_order_overtakes_is_refused(self, server):
        gate = Gate()

        async def late(query):
            await gate
            return await server.engine.carry_out(query)

        server.engine.overrides[GetHistory] = late
        ann = server.client("ann")
        assert ann.say({"id": 2, "subscribe": {"channel": "open:a"}}) == []
        server.order(UnsubscribeOrder("ann", "open:a"))
        gate.open()
        assert error_of(ann.heard()) == 103
        assert server.hub.subscriptions == 0

    def test_an_order_during_a_handler_takes_effect_first(self, server):
        gate = Gate()

        async def may(client, channel, data):
            await gate

        server.app.subscribe_handlers["plain:a"] = may
        ann = server.client("ann")
        ann.say({"id": 2, "subscribe": {"channel": "plain:a"}})
        server.order(SubscribeOrder("ann", "plain:a"))
        gate.open()
        push, reply = ann.heard()
        assert push == {"push": {"channel": "plain:a", "subscribe": {}}}
        assert error_of([reply]) == 105
        assert server.hub.subscriptions == 1

    @pytest.mark.parametrize(
        ("order", "code"),
        [
            (UnsubscribeOrder("ann", "plain:a"), 103),
            (UnsubscribeOrder("ann", "plain:b"), None),
            (DisconnectOrder("ann"), 3503),
            (RefreshOrder("ann", expired=True), 3005),
        ],
    )
    def test_an_order_applies_to_a_subscribe_that_a_handler_decides(self, server, order, code):
        gate = Gate()

        async def may(client, channel, data):
            await gate

        server.app.subscribe_handlers["plain:a"] = may
        ann = server.client("ann")
        ann.say({"id": 2, "subscribe": {"channel": "plain:a"}})
        server.order(order)
        gate.open()
        if code is None:
            assert ann.heard() == [{"id": 2, "subscribe": {}}]
        elif code < 1000:
            assert error_of(ann.heard()) == code
        else:
            assert ann.close_code[0] == code
        assert server.hub.subscriptions == (code is None)
        assert not ann.session.subscribing

    @pytest.mark.parametrize(
        ("order", "code"),
        [
            (DisconnectOrder("ann"), 3503),
            (DisconnectOrder("bob"), None),
            (RefreshOrder("ann", expired=True), 3005),
            (UnsubscribeOrder("ann", "room:a"), None),
        ],
    )
    def test_an_order_applies_to_a_connect_that_is_under_way(self, server, order, code):
        gates = server.delay_engine()
        peer = server.peer()
        peer.say({"id": 1, "connect": {"token": token(sub="ann", channels=["room:a"])}})
        server.order(order)
        server.engine.overrides.clear()
        while gates:
            gates.pop().open()
        assert (peer.close_code or (None,))[0] == code
        if code is None:
            subs = peer.heard()[0]["connect"].get("subs", {})
            assert list(subs) == ([] if isinstance(order, UnsubscribeOrder) else ["room:a"])
            peer.session.closed()
        assert server.clean() and not server.sessions._connecting

    def test_new_info_applies_to_a_subscribe_that_a_handler_decides(self, server):
        gate = Gate()

        async def may(client, channel, data):
            await gate

        server.app.subscribe_handlers["room:a"] = may
        ann = server.client("ann")
        ann.say({"id": 2, "subscribe": {"channel": "room:a"}})
        server.order(RefreshOrder("ann", info=b"7"))
        gate.open()
        assert server.engine.execute(GetPresence("room:a"))[ann.session.client].conn_info == b"7"

    def test_codes_of_an_unsubscribe(self, server):
        ann = server.client("ann")
        ann.subscribe("open:a")
        server.order(UnsubscribeOrder("ann", "open:a", code=2502, reason="state invalidated"))
        assert ann.heard() == [
            {"push": {"channel": "open:a", "unsubscribe": {"code": 2502, "reason": "state invalidated"}}}
        ]

    def test_refresh(self):
        server = make(pong_timeout=0.0)
        bob, ann = server.client("bob"), server.client("ann")
        for peer in (bob, ann):
            server.order(SubscribeOrder(peer.session.user, "room:a"))
            bob.heard()
        ann.heard()
        server.order(RefreshOrder("ann", NOW + 10, info=b'"new"'))
        assert ann.heard() == [{"push": {"refresh": {"expires": True, "ttl": 10}}}]
        presence = server.engine.execute(GetPresence("room:a"))
        assert presence[ann.session.client].conn_info == b'"new"'
        server.order(RefreshOrder("ann"))
        assert ann.heard() == [{"push": {"refresh": {}}}]
        assert ann.session.handle.info == "new"
        server.order(RefreshOrder("ann", NOW + 10))
        server.advance(60)
        assert (ann.close_code, bob.close_code) == ((3005, "connection expired"), None)

    @pytest.mark.parametrize("order", [RefreshOrder("ann", expired=True), RefreshOrder("ann", NOW - 1)])
    def test_an_expiry_that_has_passed_closes_with_3005(self, server, order):
        ann = server.client("ann")
        server.order(order)
        assert ann.close_code == (3005, "connection expired")


class TestByHandlers:
    """Calls of handlers on a client."""

    def test_subscribe_and_refresh(self):
        async def upgrade(client, data):
            client.subscribe("plain:a", Grant(data={"topic": 1}))
            client.refresh(int(NOW) + 60, info="vip")

        server = make()
        server.app.procedures["upgrade"] = upgrade
        peer = server.client("ann")
        assert peer.say({"id": 2, "rpc": {"method": "upgrade"}}) == [
            {"push": {"channel": "plain:a", "subscribe": {"data": {"topic": 1}}}},
            {"push": {"refresh": {"expires": True, "ttl": 60}}},
            {"id": 2, "rpc": {"data": None}},
        ]
        assert (peer.session.handle.info, peer.session.handle.channels) == ("vip", ["plain:a"])

    def test_an_unknown_override_is_refused_at_once(self):
        peer = make().client("ann")
        with pytest.raises(ValueError):
            peer.session.handle.subscribe("plain:a", Grant(override={"history_size": True}))

    def test_meta_of_the_token(self):
        peer = make().peer()
        reply = connect(peer, meta={"plan": "gold"})
        assert peer.session.handle.meta == {"plan": "gold"}
        assert "plan" not in msgspec.json.encode(reply).decode()

    def test_an_expired_grant_is_requested_again(self):
        async def may(client, channel, data):
            return Grant(expire_at=int(NOW) + 5, override={"presence": True})

        server = make(pong_timeout=0.0)
        server.app.subscribe_handlers["plain:a"] = may
        peer = server.client("ann")
        assert peer.subscribe("plain:a") == {}
        assert len(server.engine.execute(GetPresence("plain:a"))) == 1
        server.advance(6)
        assert peer.heard() == [
            {"push": {"channel": "plain:a", "unsubscribe": {"code": 2501, "reason": "subscription expired"}}}
        ]

    @pytest.mark.parametrize("credentials", [Credentials("7", channels="news"), Credentials("7", channels=["a\ud800"])])
    def test_invalid_credentials_are_an_error_and_leave_nothing_behind(self, credentials):
        async def connecting(request):
            return credentials

        server = make()
        server.app.connecting = connecting
        assert error_of(server.peer().say({"id": 1, "connect": {}})) == 100
        assert len(server.mistakes) == 1
        server.advance(6)
        server.mistakes.clear()
        assert server.clean()
