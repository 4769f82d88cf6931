"""Publications in a subscribe reply: in cache mode, with deltas, with a filter, and within limits."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from centrifuge.fossil import apply_delta

from realtime.config.settings import ChannelOptions, ChannelSettings, Namespace
from realtime.pubsub.engine import GetHistory, RemoveHistory
from tests.protocol.sessions import ALL, BARE_PROTOBUF, KEPT, Peer, Server, error_of

CACHE = {"force_recovery": True, "force_recovery_mode": "cache"}
CHANNELS = ChannelSettings(
    without_namespace=ChannelOptions(**ALL),
    namespaces=(
        Namespace(name="cache", **CACHE, **KEPT, **ALL),
        Namespace(name="auto", auto_cache_recover=True, **CACHE, **KEPT, **ALL),
        Namespace(
            name="delta", allowed_delta_types=("fossil",), delta_publish=True, force_recovery=True, **KEPT, **ALL
        ),
        Namespace(name="unkept", allowed_delta_types=("fossil",), delta_publish=True, **ALL),
        Namespace(name="cached", allowed_delta_types=("fossil",), auto_cache_recover=True, **CACHE, **KEPT, **ALL),
        Namespace(name="tagged_cache", allow_tags_filter=True, **CACHE, **KEPT, **ALL),
        Namespace(name="tags", allow_tags_filter=True, force_recovery=True, **KEPT, **ALL),
    ),
)


@pytest.fixture
def server() -> Server:
    return Server(CHANNELS, allow_anonymous_connect_without_token=True)


def data_of(result: dict) -> list[Any]:
    return [publication["data"] for publication in result.get("publications", [])]


class TestCache:
    """Only the newest publication matters (client protocol, section 7.5)."""

    @pytest.mark.parametrize(
        ("published", "trimmed", "offset", "epoch", "recovered", "sent"),
        [
            # clients with the newest publication and the right epoch
            (3, False, 3, "same", True, []),
            (3, False, 3, "", True, [3]),
            (3, False, 3, "other", True, [3]),
            (3, False, 1, "same", True, [3]),
            (3, False, 0, "", True, [3]),
            (3, False, 9, "same", True, [3]),
            (20, False, 1, "same", True, [20]),
            # no publication is stored
            (3, True, 3, "same", True, []),
            (3, True, 2, "same", False, []),
            (3, True, 3, "", False, []),
            (0, False, 0, "", False, []),
            (0, False, 0, "same", False, []),
        ],
    )
    def test_table(self, server, published, trimmed, offset, epoch, recovered, sent):
        same = server.client().subscribe("cache:a")["epoch"]
        server.publish("cache:a", *range(1, published + 1))
        if trimmed:
            server.engine.execute(RemoveHistory("cache:a"))
        result = server.client().subscribe(
            "cache:a", recover=True, offset=offset, epoch=same if epoch == "same" else epoch
        )
        assert result["was_recovering"] is True
        assert result.get("recovered", False) is recovered
        assert data_of(result) == sent
        assert result.get("offset", 0) == (offset if recovered else published)
        assert result["epoch"] == same

    def test_it_is_not_sent_unless_requested(self, server):
        server.publish("cache:a", 1)
        result = server.client().subscribe("cache:a")
        assert "publications" not in result and "was_recovering" not in result

    def test_deltas_of_a_namespace_that_enables_them(self, server):
        server.publish("auto:a", 1, 2)
        result = server.client().subscribe("auto:a")
        assert (data_of(result), result["was_recovering"], result["recovered"]) == ([2], True, True)
        assert "offset" not in result

    def test_at_connect_too(self, server):
        server.publish("auto:a", 1, 2)
        (reply,) = server.peer().say({"id": 1, "connect": {"subs": {"auto:a": {}}}})
        assert data_of(reply["connect"]["subs"]["auto:a"]) == [2]

    @pytest.mark.parametrize("channel", ["cache:a", "auto:a"])
    @pytest.mark.parametrize("flag", [2, 3, -1])
    @pytest.mark.parametrize("asked", [{}, {"epoch": "other", "offset": 3}, {"delta": "fossil"}])
    def test_flag_2_refuses_nothing_in_cache_mode(self, server, channel, flag, asked):
        request = {"channel": channel, "recover": True, "flag": flag, **asked}
        result = server.client().subscribe(**request)
        assert result["was_recovering"] and "recovered" not in result
        server.publish(channel, 1)
        assert server.client().subscribe(**request)["recovered"]

    def test_with_a_filter_the_newest_publication_that_passes_is_the_state(self, server):
        for n, tags in enumerate(({"k": "1"}, {"k": "1"}, {"k": "2"}, None), 1):
            server.publish("tagged_cache:a", n, tags=tags)
        request = {"channel": "tagged_cache:a", "recover": True}
        result = server.client().subscribe(**request, tf={"key": "k", "cmp": "eq", "val": "1"})
        assert (data_of(result), result["recovered"], result["publications"][0]["offset"]) == ([2], True, 2)
        none = server.client().subscribe(**request, tf={"key": "k", "cmp": "eq", "val": "3"})
        assert (data_of(none), none["recovered"]) == ([], True)

    def test_publications_during_a_recovery_come_after_the_reply(self, server):
        server.publish("auto:a", 1)

        async def and_another(query):
            page = await server.engine.carry_out(query)
            server.publish("auto:a", 2)
            return page

        server.engine.overrides[GetHistory] = and_another
        reply, push = server.client().say({"id": 2, "subscribe": {"channel": "auto:a"}})
        assert (data_of(reply["subscribe"]), push["push"]["pub"]["data"]) == ([1], 2)


class Reader:
    """Apply deltas as an SDK does; return the data."""

    def __init__(self, peer: Peer) -> None:
        self.binary = peer.form is BARE_PROTOBUF
        self.base = b""
        self.deltas = 0

    def read(self, publication: dict) -> Any:
        data = publication["data"]
        data = data if self.binary else data.encode()
        if publication.get("delta"):
            self.deltas += 1
            data = apply_delta(self.base, data)
        self.base = data
        return msgspec.json.decode(data)


def text(n: int) -> dict:
    return {"n": n, "text": "so much that it is worth saying only once, and the difference ever after"}


class TestDeltas:
    def test_deltas_are_agreed_where_allowed(self, server):
        peer = server.client()
        assert peer.subscribe("delta:a", delta="fossil")["delta"] is True
        assert "delta" not in peer.subscribe("delta:b")
        assert "delta" not in peer.subscribe("plain", delta="fossil")
        peer.say({"id": 5, "subscribe": {"channel": "delta:c", "delta": "xdelta"}})
        assert peer.close_code == (3501, "bad request")

    def test_the_first_is_full_and_the_others_are_deltas(self, server):
        peer = server.client()
        reader = Reader(peer)
        peer.subscribe("delta:a", delta="fossil")
        publisher = server.client()
        for n in range(5):
            publisher.say({"id": 2, "publish": {"channel": "delta:a", "data": text(n)}})
        assert [reader.read(push["push"]["pub"]) for push in peer.heard()] == [text(n) for n in range(5)]
        assert reader.deltas == 4

    def test_the_first_publication_of_a_reply_is_full_and_deltas_continue_from_the_last(self, server):
        epoch = server.client().subscribe("delta:a")["epoch"]
        server.publish("delta:a", *(text(n) for n in range(1, 6)), delta=True)
        peer = server.client()
        result = peer.subscribe("delta:a", delta="fossil", recover=True, offset=1, epoch=epoch)
        reader = Reader(peer)
        assert [reader.read(one) for one in result["publications"]] == [text(n) for n in range(2, 6)]
        assert reader.deltas == 3
        server.publish("delta:a", text(6), delta=True)
        (push,) = peer.heard()
        assert reader.read(push["push"]["pub"]) == text(6)
        assert reader.deltas == 4

    def test_after_a_reply_without_publications_the_next_is_full(self, server):
        server.publish("delta:a", text(1), delta=True)
        peer = server.client()
        position = server.client().subscribe("delta:a")
        wish = {"recover": True, "offset": 1, "epoch": position["epoch"]}
        assert peer.subscribe("delta:a", delta="fossil", **wish)["recovered"] is True
        server.publish("delta:a", text(2), delta=True)
        (push,) = peer.heard()
        assert Reader(peer).read(push["push"]["pub"]) == text(2)

    def test_a_publication_without_delta_is_full_and_still_a_string(self, server):
        server.publish("delta:a", text(1), delta=True)
        server.publish("delta:a", text(2))
        peer = server.client()
        result = peer.subscribe("delta:a", delta="fossil", recover=True)
        reader = Reader(peer)
        assert [reader.read(one) for one in result["publications"]] == [text(1), text(2)]
        assert reader.deltas == 0

    def test_a_delta_that_is_not_shorter_is_replaced_by_the_full_data(self, server):
        server.publish("delta:a", 1, 2, 3, delta=True)
        peer = server.client()
        reader = Reader(peer)
        result = peer.subscribe("delta:a", delta="fossil", recover=True)
        assert [reader.read(one) for one in result["publications"]] == [1, 2, 3]
        assert reader.deltas == 0

    def test_text_that_is_not_ascii(self, server):
        texts = [{"text": f"{n}ü€😀" * 20} for n in range(4)]
        server.publish("delta:a", *texts, delta=True)
        peer = server.client()
        reader = Reader(peer)
        result = peer.subscribe("delta:a", delta="fossil", recover=True)
        assert [reader.read(one) for one in result["publications"]] == texts

    def test_history_is_sent_in_full(self, server):
        server.publish("delta:a", text(1), text(2), delta=True)
        peer = server.client()
        peer.subscribe("delta:a", delta="fossil")
        (reply,) = peer.say({"id": 3, "history": {"channel": "delta:a", "limit": 5}})
        assert reply["history"]["publications"] == [{"data": text(1), "offset": 1}, {"data": text(2), "offset": 2}]

    def test_in_cache_mode(self, server):
        server.publish("cached:a", text(1), text(2), delta=True)
        peer = server.client()
        reader = Reader(peer)
        result = peer.subscribe("cached:a", delta="fossil")
        assert [reader.read(one) for one in result["publications"]] == [text(2)]
        server.publish("cached:a", text(3), delta=True)
        assert [reader.read(push["push"]["pub"]) for push in peer.heard()] == [text(3)]
        assert reader.deltas == 1


class TestFilters:
    WISH = {"key": "kind", "cmp": "eq", "val": "news"}

    def test_it_applies_to_recovered_and_new_publications(self, server):
        epoch = server.client().subscribe("tags:a")["epoch"]
        for n, kind in enumerate(("news", "ads", "news", "ads"), 1):
            server.publish("tags:a", n, tags={"kind": kind})
        peer = server.client()
        result = peer.subscribe("tags:a", recover=True, epoch=epoch, tf=self.WISH)
        assert (data_of(result), result["recovered"]) == ([1, 3], True)
        server.publish("tags:a", 5)
        server.publish("tags:a", 6, tags={"kind": "news"})
        assert peer.publications() == [6]
        assert peer.close_code is None

    def test_a_filter_that_nothing_passes_omits_the_list(self, server):
        server.publish("tags:a", 1)
        result = server.client().subscribe("tags:a", recover=True, tf=self.WISH)
        assert result["recovered"] is True and "publications" not in result

    @pytest.mark.parametrize(
        "bad",
        [
            {"op": "xor", "nodes": [WISH]},
            {"op": "and"},
            {"op": "not", "nodes": [WISH, WISH]},
            {"key": "a", "cmp": "like", "val": "b"},
            {"key": "a", "cmp": "in"},
            {"key": "a", "cmp": "eq", "vals": ["b"]},
            {"op": "or", "nodes": [WISH] * 2000},
        ],
    )
    def test_an_invalid_filter_is_107(self, server, bad):
        peer = server.client()
        assert error_of(peer.say({"id": 2, "subscribe": {"channel": "tags:a", "tf": bad}})) == 107
        assert server.hub.subscriptions == 0

    def test_a_filter_that_is_too_deep_is_an_invalid_message(self, server):
        peer = server.client()
        deep = b'{"op":"not","nodes":[' * 3000 + b"]}" * 3000
        peer.session.receive(b'{"id":2,"subscribe":{"channel":"tags:a","tf":%b}}' % deep)
        assert peer.close_code == (3501, "bad request") or error_of(peer.heard()) == 107

    def test_a_filter_where_none_is_allowed_is_107(self, server):
        assert error_of(server.client().say({"id": 2, "subscribe": {"channel": "plain", "tf": self.WISH}})) == 107


class TestLimits:
    def test_a_position_ahead_of_the_store_is_counted(self, server):
        epoch = server.client().subscribe("tags:a")["epoch"]
        server.publish("tags:a", 1, 2)
        for offset, other in ((9, epoch), (9, "other"), (1, epoch)):
            server.client().subscribe("tags:a", recover=True, offset=offset, epoch=other)
        assert server.count("realtime_bad_input", kind="recovery_ahead") == 1

    def test_a_page_of_history_fits_the_clients_outbox(self):
        server = Server(CHANNELS, allow_anonymous_connect_without_token=True, queue_max_size=65536)
        server.publish("tags:a", *("x" * 10_000 for _ in range(5)))
        peer = server.client()
        (reply,) = peer.say({"id": 3, "history": {"channel": "tags:a", "limit": 5}})
        assert 0 < len(reply["history"]["publications"]) < 5
