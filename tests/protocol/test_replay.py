"""Replays: missed publications that a reply has no room for follow as the socket takes them."""

from __future__ import annotations

from typing import Any

import pytest
from centrifuge.fossil import apply_delta

from realtime.config.settings import ChannelOptions, ChannelSettings, Namespace
from realtime.errors import EngineUnavailable
from realtime.protocol.orders import SubscribeOrder
from realtime.protocol.wire_formats import WireFormat
from realtime.pubsub.engine import GetHistory, RemoveHistory
from realtime.types import Position
from tests.protocol.sessions import ALL, BARE, BARE_PROTOBUF, BARE_PUSHES, Peer, Server, token

LONG = {"history_size": 1000, "history_ttl": 300.0, "force_recovery": True}
CHANNELS = ChannelSettings(
    without_namespace=ChannelOptions(**LONG, **ALL),
    namespaces=(
        Namespace(name="room", presence=True, join_leave=True, force_push_join_leave=True, **LONG, **ALL),
        Namespace(name="delta", allowed_delta_types=("fossil",), delta_publish=True, **LONG, **ALL),
        Namespace(name="tags", allow_tags_filter=True, **LONG, **ALL),
        Namespace(name="short", history_size=4, history_ttl=300.0, force_recovery=True, **ALL),
        Namespace(name="cache", force_recovery_mode="cache", **LONG, **ALL),
    ),
)
TEXT = "x" * 1000
ROOM = 3000  # bytes, for two publications of 1000


def make(**client: Any) -> Server:
    return Server(
        CHANNELS, allow_anonymous_connect_without_token=True, recovery_reply_size=ROOM, channel_limit=0, **client
    )


@pytest.fixture
def server() -> Server:
    return make()


def publish(server: Server, channel: str, count: int) -> None:
    server.publish(channel, *[TEXT] * count)


def slow(server: Server, form: WireFormat = BARE) -> Peer:
    """A connected client whose socket is full after each message, until the test drains it."""
    peer = server.peer(form)
    peer.connect()
    peer.fills = True
    return peer


def recover(peer: Peer, channel: str, offset: int = 0, **features: Any) -> dict:
    return peer.subscribe(channel, recover=True, offset=offset, **features)


def offsets(result: dict) -> list[int]:
    return [publication["offset"] for publication in result.get("publications", [])]


def pushed(peer: Peer, channel: str | None = None) -> list[int]:
    """Return the offsets of the publications received since the last call, which drained the socket."""
    peer.drain()
    pushes = [message["push"] for message in peer.heard()]
    return [push["pub"]["offset"] for push in pushes if channel in (None, push["channel"])]


class TestPages:
    @pytest.mark.parametrize("form", [BARE, BARE_PROTOBUF], ids=["json", "protobuf"])
    def test_pages_follow_the_reply_as_the_socket_takes_them(self, server: Server, form: WireFormat) -> None:
        publish(server, "c", 7)
        peer = slow(server, form)
        result = recover(peer, "c")
        # The client counts on from its own offset with each publication, in the reply and behind it.
        assert result["recovered"] and result.get("offset", 0) == 0 and offsets(result) == [1, 2]
        assert peer.is_paced
        assert pushed(peer) == [3, 4]
        publish(server, "c", 1)
        assert peer.heard() == []
        assert pushed(peer) == [5, 6]
        assert pushed(peer) == [7, 8]
        assert not peer.is_paced
        publish(server, "c", 2)
        assert [message["push"]["pub"]["offset"] for message in peer.heard()] == [9, 10]
        assert pushed(peer) == []
        assert [server.count("realtime_recovery_replays", event=event) for event in ("begun", "completed")] == [1, 1]

    def test_a_fast_client_gets_all_pages_at_once(self, server: Server) -> None:
        publish(server, "c", 300)
        peer = server.client()
        reply, *pushes = peer.say({"id": 2, "subscribe": {"channel": "c", "recover": True}})
        assert offsets(reply["subscribe"]) + [push["push"]["pub"]["offset"] for push in pushes] == list(range(1, 301))

    def test_what_fits_comes_with_the_reply_alone(self, server: Server) -> None:
        publish(server, "c", 2)
        peer = slow(server)
        assert offsets(recover(peer, "c")) == [1, 2]
        assert not peer.is_paced
        publish(server, "c", 1)
        assert pushed(peer) == [3]
        assert server.count("realtime_recovery_replays", event="begun") == 0

    def test_a_publication_larger_than_the_room_follows_the_reply(self, server: Server) -> None:
        server.publish("c", "x" * 10_000, 2)
        peer = slow(server)
        assert recover(peer, "c")["recovered"]
        assert pushed(peer) == [1]
        assert pushed(peer) == [2]

    def test_more_than_the_limit_of_publications_is_not_recovered(self) -> None:
        server = make(recovery_max_publication_limit=5)
        publish(server, "c", 6)
        result = recover(slow(server), "c")
        assert "recovered" not in result and result["offset"] == 6 and offsets(result) == []
        assert offsets(recover(slow(server), "c", 1)) == [2, 3]

    def test_replies_on_their_way_leave_less_room(self, server: Server) -> None:
        publish(server, "c", 3)
        peer = slow(server)
        peer.unsent_bytes = 2000
        result = recover(peer, "c")
        assert result["recovered"] and offsets(result) == []
        assert pushed(peer) == [1, 2]
        assert pushed(peer) == [3]

    def test_replays_take_turns(self, server: Server) -> None:
        publish(server, "a", 6)
        publish(server, "b", 6)
        peer = slow(server)
        recover(peer, "a")
        recover(peer, "b")
        turns = [pushed(peer) for _ in range(4)]
        assert turns == [[3, 4], [3, 4], [5, 6], [5, 6]]

    def test_in_cache_mode_the_newest_comes_with_the_reply(self, server: Server) -> None:
        server.publish("cache:c", 1, "x" * 10_000)
        peer = slow(server)
        assert offsets(recover(peer, "cache:c")) == [2]
        assert not peer.is_paced


class TestServerSide:
    def test_a_connect_reply_has_one_room_for_all_channels(self, server: Server) -> None:
        channels = [f"c{number}" for number in range(40)]
        for channel in channels:
            publish(server, channel, 2)
        peer = server.peer()
        peer.fills = True
        request = {
            "token": token(sub="42", channels=channels),
            "subs": {channel: {"recover": True} for channel in channels},
        }
        ((reply),) = peer.say({"id": 1, "connect": request})
        subs = reply["connect"]["subs"]
        assert all(result["recovered"] for result in subs.values())
        assert [channel for channel, result in subs.items() if offsets(result)] == ["c0"]
        while peer.is_paced:
            peer.drain()
        assert [push["push"]["channel"] for push in peer.heard()] == [name for name in channels[1:] for _ in range(2)]

    def test_a_unidirectional_client_gets_the_rest_too(self, server: Server) -> None:
        publish(server, "c", 5)
        peer = server.peer(BARE_PUSHES)
        connected, *pushes = peer.say({"token": token(sub="42", channels=["c"]), "subs": {"c": {"recover": True}}})
        assert offsets(connected["connect"]["subs"]["c"]) == [1, 2]
        assert [push["pub"]["offset"] for push in pushes] == [3, 4, 5]

    def test_a_trimmed_history_closes_with_3010(self, server: Server) -> None:
        publish(server, "c", 5)
        peer = server.peer()
        peer.fills = True
        peer.connect(token=token(sub="42", channels=["c"]), subs={"c": {"recover": True}})
        server.engine.execute(RemoveHistory("c"))
        peer.drain()
        assert peer.close_code is not None and peer.close_code[0] == 3010

    def test_an_order_to_subscribe_replays_too_and_a_renewal_states_what_was_sent(self, server: Server) -> None:
        publish(server, "c", 7)
        peer = server.peer()
        peer.connect(token=token(sub="42"))
        peer.fills = True
        epoch = server.engine.execute(
            GetHistory("c", server.services.rules.options("c").history_options)
        ).position.epoch
        server.order(SubscribeOrder("42", "c", since=Position(0, epoch)))
        begun, *pushes = peer.heard()
        assert begun["push"]["subscribe"].get("offset", 0) == 0
        assert [push["push"]["pub"]["offset"] for push in pushes] == [1, 2]
        server.order(SubscribeOrder("42", "c"))
        (renewed,) = peer.heard()
        assert renewed["push"]["subscribe"]["offset"] == 2
        assert pushed(peer) == [3, 4]


class TestEnds:
    def test_a_trimmed_history_has_the_client_subscribe_again_and_then_learn_of_the_gap(self, server: Server) -> None:
        publish(server, "short:c", 4)
        peer = slow(server)
        assert offsets(recover(peer, "short:c")) == [1, 2]
        publish(server, "short:c", 3)  # history keeps 4 to 7
        peer.drain()
        assert peer.heard() == [
            {"push": {"channel": "short:c", "unsubscribe": {"code": 2500, "reason": "insufficient state"}}}
        ]
        assert server.count("realtime_recovery_replays", event="lost") == 1
        assert "recovered" not in recover(peer, "short:c", 2)

    def test_an_engine_that_is_away_has_the_client_subscribe_again(self, server: Server) -> None:
        publish(server, "c", 5)
        peer = slow(server)
        recover(peer, "c")

        async def fail(request: Any) -> None:
            raise EngineUnavailable("away")

        server.engine.overrides[GetHistory] = fail
        peer.drain()
        (message,) = peer.heard()
        assert message["push"]["unsubscribe"]["code"] == 2500
        del server.engine.overrides[GetHistory]
        assert offsets(recover(peer, "c", 2)) == [3, 4]

    def test_after_an_unsubscribe_nothing_follows(self, server: Server) -> None:
        publish(server, "c", 5)
        peer = slow(server)
        recover(peer, "c")
        (gate,) = self._read_late(server, peer)
        assert peer.say({"id": 3, "unsubscribe": {"channel": "c"}}) == [{"id": 3, "unsubscribe": {}}]
        gate.open()
        publish(server, "c", 1)
        assert pushed(peer) == []
        peer.session.closed()
        assert server.clean()

    def test_a_client_that_goes_during_a_page_leaves_nothing_behind(self, server: Server) -> None:
        publish(server, "c", 5)
        publish(server, "d", 5)
        peer = slow(server)
        recover(peer, "c")
        recover(peer, "d")
        (gate,) = self._read_late(server, peer)
        peer.session.closed()
        gate.open()
        assert peer.heard() == []
        assert server.clean()

    @staticmethod
    def _read_late(server: Server, peer: Peer) -> list[Any]:
        """Begin to read a page; return the gate of the engine's answer."""
        gates = server.delay_engine()
        peer.drain()
        return gates

    def test_publications_between_the_last_page_and_its_encoding_follow_it(self, server: Server) -> None:
        publish(server, "c", 4)
        peer = slow(server)
        recover(peer, "c")
        subscription = peer.session.subscriptions["c"]
        encode = subscription.form.encoding.make_pub

        class Late:
            """An encoding in which a publication arrives during the last page."""

            def __getattr__(self, name: str) -> Any:
                return getattr(BARE.encoding, name)

            def make_pub(self, publication: Any, epoch: str = "") -> Any:
                if publication.offset == 4:
                    publish(server, "c", 1)
                return encode(publication, epoch)

        subscription.form = WireFormat(Late(), BARE.frame)  # type: ignore[arg-type]
        assert pushed(peer) == [3, 4, 5]

    def test_a_bug_in_a_replay_ends_the_connection_and_leaves_no_client_waiting(self, server: Server) -> None:
        publish(server, "c", 5)
        peer = slow(server)
        recover(peer, "c")

        async def fail(request: Any) -> None:
            raise ZeroDivisionError

        server.engine.overrides[GetHistory] = fail
        peer.drain()
        assert peer.close_code == (3004, "internal server error")
        assert [type(mistake) for mistake in server.mistakes] == [ZeroDivisionError]

    def test_a_publication_that_the_encoding_cant_carry_is_a_gap_once(self, server: Server) -> None:
        publish(server, "c", 3)
        server.publish("c", b"\xff", binary=True)
        peer = slow(server)
        assert offsets(recover(peer, "c")) == [1, 2]
        assert pushed(peer) == [3]
        peer.drain()
        (message,) = peer.heard()
        assert message["push"]["unsubscribe"]["code"] == 2500
        # Even if the reply has no room for it, the client does not recover in vain again and again.
        peer.unsent_bytes = ROOM
        assert "recovered" not in recover(peer, "c", 3)


class TestFeatures:
    def test_joins_and_leaves_arrive_during_a_replay_once(self, server: Server) -> None:
        publish(server, "room:c", 5)
        peer = slow(server)
        reply, *_ = peer.say({"id": 2, "subscribe": {"channel": "room:c", "recover": True}})
        assert offsets(reply["subscribe"]) == [1, 2]
        others = [server.client() for _ in range(2)]
        for other in others:
            other.say({"id": 2, "subscribe": {"channel": "room:c"}})
        others[0].session.closed()
        names = [other.session.client for other in others]
        seen = [
            (kind, push["push"][kind]["info"]["client"])
            for push in peer.heard()
            for kind in ("join", "leave")
            if kind in push["push"]
        ]
        assert seen == [("join", names[0]), ("join", names[1]), ("leave", names[0])]
        assert pushed(peer, "room:c") == [3, 4]
        assert pushed(peer) == [5]
        others[1].session.closed()
        (left,) = peer.heard()
        assert left["push"]["leave"]["info"]["client"] == names[1]

    def test_deltas_go_on_over_all_pages_and_behind_them(self, server: Server) -> None:
        common = "as in most publications much of it is always the same " * 20
        server.publish("delta:c", *[f"{common}{number}" for number in range(1, 8)], delta=True)
        peer = slow(server)
        result = recover(peer, "delta:c", delta="fossil")
        publications = list(result["publications"])
        while peer.is_paced:
            peer.drain()
        server.publish("delta:c", f"{common}8", delta=True)
        publications += [message["push"]["pub"] for message in peer.heard()]
        assert [publication["offset"] for publication in publications] == list(range(1, 9))
        assert [publication.get("delta", False) for publication in publications] == [False] + 7 * [True]
        data = b""
        for number, publication in enumerate(publications, 1):
            encoded = publication["data"].encode()
            data = apply_delta(data, encoded) if publication.get("delta") else encoded
            assert data.decode() == f'"{common}{number}"'

    def test_publications_that_do_not_pass_the_filter_take_no_room(self, server: Server) -> None:
        for number in range(1, 21):
            server.publish("tags:c", TEXT, tags={"kind": "gold" if number % 5 == 0 else "lead"})
        peer = slow(server)
        result = recover(peer, "tags:c", tf={"key": "kind", "cmp": "eq", "val": "gold"})
        seen = offsets(result)
        while peer.is_paced:
            seen += pushed(peer)
        assert result["recovered"] and seen == [5, 10, 15, 20]
        server.publish("tags:c", 21, tags={"kind": "gold"})
        assert pushed(peer) == [21]
