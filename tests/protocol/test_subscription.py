"""Joining a channel: recovery, positions and gaps."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from realtime.config.settings import ChannelOptions, ChannelSettings, Namespace
from realtime.protocol.channel_rules import ChannelRules
from realtime.pubsub.engine import AddPresence
from tests.protocol.sessions import KEPT, Server, error_of, token


@pytest.fixture
def server() -> Server:
    return Server(allow_anonymous_connect_without_token=True)


class TestRecovery:
    """A client that reconnects receives exactly the missed publications, or learns of the gap."""

    def missed(self, server: Server, before: int, after: int) -> dict[str, Any]:
        """Publish `before`, note the position, publish `after` more; return the position."""
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
    def test_an_unrecovered_reply_says_so_and_gives_the_newest_position(self, server, wrong):
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

    def test_a_subscription_costs_one_round_trip_to_the_engine(self, server):
        ann, asked = server.client("ann"), server.delay_engine()
        assert ann.say({"id": 2, "subscribe": {"channel": "room:b"}}) == []
        assert len(asked) == 3
        assert ann.say({"id": 3, "unsubscribe": {"channel": "room:a"}}) == []
        for gate in asked:
            gate.open()
        assert [message.get("id") for message in ann.heard()] == [2, None, 3]

    def test_with_flag_2_a_client_enters_presence_after_its_recovery(self, server):
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

    def test_publications_during_a_recovery_come_after_the_reply_without_gap_or_repeat(self, server):
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

    def test_only_positioned_subscribers_are_notified_of_a_gap(self, server):
        peer = server.client()
        peer.say({"id": 2, "subscribe": {"channel": "room:a"}}, {"id": 3, "subscribe": {"channel": "a"}})
        server.hub.on_interruption()
        assert peer.heard()[-1] == {
            "push": {"channel": "room:a", "unsubscribe": {"code": 2500, "reason": "insufficient state"}}
        }
        assert peer.session.channels() == ["a"]

    def test_requested_positioning_and_recovery_need_permission(self, server):
        peer = server.client("42")
        wish = {"positioned": True, "recoverable": True}
        (reply,) = peer.say({"id": 2, "subscribe": {"channel": "kept:a", **wish}})
        assert reply["subscribe"]["recoverable"] and reply["subscribe"]["positioned"] and reply["subscribe"]["epoch"]
        assert peer.say({"id": 3, "subscribe": {"channel": "users:a", **wish}}) == [{"id": 3, "subscribe": {}}]


class TestGrants:
    CHANNELS = ChannelSettings(
        without_namespace=ChannelOptions(allow_subscribe_for_client=True),
        namespaces=(
            Namespace(
                name="subs",
                allow_subscribe_for_client=True,
                allow_history_for_subscriber=True,
                allow_presence_for_subscriber=True,
                presence=True,
                join_leave=True,
                **KEPT,
            ),
        ),
    )

    @pytest.fixture
    def server(self) -> Server:
        return Server(self.CHANNELS)

    def test_permissions_of_subscribers_count_in_the_subscribe_itself(self, server):
        peer = server.client("ann")
        wish = {"recoverable": True, "positioned": True, "join_leave": True}
        reply, push = peer.say({"id": 2, "subscribe": {"channel": "subs:a", **wish}})
        assert reply["subscribe"]["recoverable"] and reply["subscribe"]["positioned"]
        assert push["push"]["join"]["info"]["user"] == "ann"

    def test_a_recovery_is_reported_as_asked_for_where_there_is_none(self, server):
        assert server.client("ann").subscribe("a", recover=True, offset=3, epoch="x") == {"was_recovering": True}
        assert server.count("realtime_bad_input", kind="recovery_ahead") == 0

    def test_flag_2_where_the_token_alone_makes_a_channel_recoverable_that_has_no_history(self, server):
        peer = server.client("ann")
        claims = {"sub": "ann", "channel": "a", "override": {"force_recovery": {"value": True}}}
        request = {"channel": "a", "token": token(**claims), "recover": True}
        assert error_of(peer.say({"id": 2, "subscribe": {**request, "flag": 2}})) == 112
        assert server.hub.subscriptions == 0
        assert peer.subscribe(**request) == {"was_recovering": True}

    def test_a_refused_filter_is_logged(self, server):
        channels = ChannelSettings(
            without_namespace=ChannelOptions(allow_subscribe_for_client=True, allow_tags_filter=True)
        )
        server.services = msgspec.structs.replace(server.services, rules=ChannelRules(channels))
        filter = {"op": "and", "nodes": [{"key": "k", "cmp": "ex"}] * 256}
        assert error_of(server.client("ann").say({"id": 2, "subscribe": {"channel": "a", "tf": filter}})) == 107
        assert "'a'" in server.info[0]
        assert "256 nodes (client.max_filter_nodes) or 32 levels (client.max_filter_depth)" in server.info[0]

    def test_the_levels_of_a_filter_are_limited_by_the_configuration(self):
        options = ChannelOptions(allow_subscribe_for_client=True, allow_tags_filter=True)
        server = Server(ChannelSettings(without_namespace=options), max_filter_depth=2)
        peer, leaf = server.client("ann"), {"key": "k", "cmp": "ex"}
        [reply] = peer.say({"id": 2, "subscribe": {"channel": "a", "tf": {"op": "not", "nodes": [leaf]}}})
        assert "error" not in reply
        deeper = {"op": "not", "nodes": [{"op": "not", "nodes": [leaf]}]}
        assert error_of(peer.say({"id": 3, "subscribe": {"channel": "b", "tf": deeper}})) == 107

    def test_the_nodes_of_a_filter_are_limited_by_the_configuration(self):
        options = ChannelOptions(allow_subscribe_for_client=True, allow_tags_filter=True)
        server = Server(ChannelSettings(without_namespace=options), max_filter_nodes=3)
        peer = server.client("ann")
        for number, refused in ((2, False), (3, True)):
            filter = {"op": "and", "nodes": [{"key": "k", "cmp": "ex"}] * number}
            reply = peer.say({"id": number, "subscribe": {"channel": f"a{number}", "tf": filter}})
            assert ("error" in reply[0]) is refused
        assert server.count("realtime_command_errors", command="subscribe", code="107") == 1


def test_a_client_that_comes_back_in_the_same_message_does_not_hear_its_own_leave(server):
    ann, bob = server.client("ann"), server.client("bob")
    for peer in (bob, ann):
        peer.say({"id": 2, "subscribe": {"channel": "room:a"}})
    bob.heard()
    again = ann.say({"id": 3, "unsubscribe": {"channel": "room:a"}}, {"id": 4, "subscribe": {"channel": "room:a"}})
    pushes = [next(iter(message["push"].keys() - {"channel"})) for message in again if "push" in message]
    assert pushes == ["join"]
    assert [next(iter(message["push"].keys() - {"channel"})) for message in bob.heard()] == ["leave", "join"]
