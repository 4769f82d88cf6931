"""The state of a broker goes to another one in parts, and the other one continues in every respect."""

from __future__ import annotations

import random
from collections.abc import Collection
from typing import Any, Union

import msgspec
import pytest

from realtime.errors import ClientError
from realtime.pubsub.broker_core import STATE_PARTS, BrokerCore
from realtime.pubsub.broker_state import PART_BYTES, StatePart, chunks
from realtime.pubsub.engine import (
    AddClient,
    AddPresence,
    AdmitClient,
    Cut,
    GetHistory,
    GetPresence,
    GetPresenceStats,
    GetStats,
    Publish,
    RemoveClient,
    RemoveHistory,
    RemovePresence,
    ReportSubscriptions,
    SendOrder,
    Subscribe,
    TakeLostClients,
    Unsubscribe,
    worker_address,
)
from realtime.pubsub.presence import COUNT_FROM
from realtime.types import ClientInfo, HistoryOptions, Position, Publication

encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(Union[STATE_PARTS]).decode  # noqa: UP007 (a union of a tuple)

CHANNELS = ("plain", "kept", "long", "brief")
OPTIONS = {
    "plain": HistoryOptions(),
    "kept": HistoryOptions(5, 100.0, 1000.0),
    "long": HistoryOptions(400, 100.0, 1000.0),
    "brief": HistoryOptions(3, 2.0, 6.0),
}
PEERS = ("one", "two", "three")


class Log:
    """Delivers into a list."""

    def __init__(self) -> None:
        self.entries: list[Any] = []

    def deliver_publication(self, peers: Collection[str], channel: str, publication: Publication, epoch: str) -> None:
        self.entries.append(("published", sorted(peers), channel, publication, epoch))

    def deliver_join(self, peers: Collection[str], channel: str, info: ClientInfo) -> None:
        self.entries.append(("joined", sorted(peers), channel, info))

    def deliver_leave(self, peers: Collection[str], channel: str, info: ClientInfo) -> None:
        self.entries.append(("left", sorted(peers), channel, info))

    def deliver_order(self, peers: Collection[str], order: bytes) -> None:
        self.entries.append(("order", sorted(peers), order))

    def deliver_cut(self, peer: str, request: Cut, clients: list[ClientInfo]) -> None:
        self.entries.append(("cut", peer, request, clients))


class Side:
    """A core and what it has delivered."""

    def __init__(self) -> None:
        self.log = Log()
        self.core: BrokerCore[str] = BrokerCore(self.log, 1000)

    def attach(self, peer: str, slot: str) -> None:
        self.core.attach(peer, peer, slot)
        self.core.introduce(peer, takes_lost=True, is_returning=False)

    def do(self, peer: str, now: float, request: Any) -> Any:
        """Carry out a request, and return the answer or the error."""
        try:
            return self.core.operations[type(request)](peer, now, request)
        except ClientError as error:
            return error.code

    def sweep(self, now: float) -> None:
        while self.core.sweep(now, 10):
            pass


def copy(side: Side, peers: Collection[str] = PEERS) -> Side:
    """Export the state as bytes, and return another core that has imported it."""
    other = Side()
    for part in side.core.export(list(peers)):
        other.core.import_part(decode(encode(part)), list(peers))
    return other


class Workers:
    """Requests of workers, of which each has clients of its own."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.owners = {f"client-{number}": PEERS[number % len(PEERS)] for number in range(15)}
        self.published = 0

    def request(self) -> tuple[str, Any]:
        """Any request, and the peer that sends it."""
        chance = self.chance
        if chance.random() < 0.5:
            return chance.choice(PEERS), self.of_any_peer(chance.choice(CHANNELS))
        client = chance.choice(list(self.owners))
        peer = self.owners[client]
        request = self.about_a_client(chance.choice(CHANNELS), client)
        if isinstance(request, Cut):
            self.owners[client] = request.worker
        return peer, request

    def of_any_peer(self, channel: str) -> Any:
        chance, options = self.chance, OPTIONS[channel]
        self.published += 1
        publish = Publish(channel, b"%d" % self.published, options)
        return chance.choice(
            [
                publish,
                publish,
                msgspec.structs.replace(publish, idempotency_key=f"key-{chance.randrange(6)}"),
                msgspec.structs.replace(
                    publish, version=chance.randrange(1, 9), version_epoch=chance.choice(("", "a"))
                ),
                msgspec.structs.replace(publish, info=ClientInfo("u", "c"), tags={"a": "b"}),
                GetHistory(channel, options, limit=chance.choice((0, 3, 1000)), reverse=chance.random() < 0.3),
                GetHistory(channel, options, since=Position(chance.randrange(20), ""), limit=5),
                RemoveHistory(channel),
                Subscribe(channel),
                Unsubscribe(channel),
                GetPresence(channel),
                GetPresenceStats(channel),
                GetStats(),
                SendOrder(b"order"),
                SendOrder(b"order", chance.choice(PEERS), f"secret-client-{chance.randrange(15)}"),
                TakeLostClients(3),
                ReportSubscriptions(chance.randrange(9)),
            ]
        )

    def about_a_client(self, channel: str, client: str) -> Any:
        chance = self.chance
        info = ClientInfo(f"user-{int(client[7:]) % 4}", client, b"{}" if chance.random() < 0.5 else b"")
        target = chance.choice([peer for peer in PEERS if peer != self.owners[client]])
        return chance.choice(
            [
                AddClient(info),
                AdmitClient(info, 2),
                RemoveClient(client),
                AddPresence(channel, info, True, True, chance.choice((0.0, 0.0, 3.0))),
                AddPresence(channel, info, False, True),
                RemovePresence(channel, client, chance.random() < 0.4),
                Cut("batch", target, [client], {client: f"secret-{client}"}, {name: [client] for name in CHANNELS}),
            ]
        )


@pytest.mark.parametrize("seed", range(12))
def test_after_a_copy_both_brokers_answer_and_deliver_the_same(seed: int) -> None:
    workers, old, now = Workers(seed), Side(), 1000.0
    chance = workers.chance
    for number, peer in enumerate(PEERS):
        old.attach(peer, str(number))
    for _ in range(600):
        now += chance.choice((0.0, 0.0, 0.01, 0.4))
        peer, request = workers.request()
        old.do(peer, now, request)
        if chance.random() < 0.02:
            peer = chance.choice(PEERS)
            old.core.detach(peer, now)
            old.attach(peer, str(PEERS.index(peer)))
        if chance.random() < 0.1:
            old.sweep(now)
    assert old.core.is_settled
    new = copy(old)
    old.log.entries.clear()
    assert new.log.entries == [], "nothing is delivered for a second time"
    for _ in range(600):
        now += chance.choice((0.0, 0.0, 0.01, 0.4))
        peer, request = workers.request()
        assert new.do(peer, now, request) == old.do(peer, now, request), request
        if chance.random() < 0.1:
            old.sweep(now)
            new.sweep(now)
    now += 10_000.0
    for side in (old, new):
        side.sweep(now)
    assert sorted(map(repr, new.log.entries)) == sorted(map(repr, old.log.entries))
    assert (new.core.channels, new.core.streams) == (old.core.channels, old.core.streams)
    assert new.core.has_expirable() == old.core.has_expirable()


def test_a_long_history_and_a_full_room_go_over_in_short_parts() -> None:
    old, now = Side(), 1.0
    old.attach("one", "0")
    options = HistoryOptions(3000, 100.0)
    for number in range(4000):
        old.do("one", now, Publish("news", b"x" * 1000, options))
        old.do("one", now, AddPresence("room", ClientInfo("u", f"c{number}"), True, True))
    parts: list[StatePart] = list(old.core.export(["one"]))
    assert max(len(encode(part)) for part in parts) < 2 * PART_BYTES
    new = copy(old, ["one"])
    page = GetHistory("news", options, limit=4000)
    assert new.do("one", now, page) == old.do("one", now, page)
    assert new.do("one", now, Publish("news", b"x", options)) == Position(4001, old.do("one", now, page).position.epoch)
    assert COUNT_FROM < 4000
    assert new.do("one", now, GetPresenceStats("room")) == (4000, 1)


def test_an_unlinked_peer_keeps_the_state_from_going_over() -> None:
    old = Side()
    old.attach(worker_address(0, 1), "0")
    for _ in old.core.unlink_steps(worker_address(0, 1), 1.0):
        pass
    assert not old.core.is_settled
    for _ in old.core.leave_steps(worker_address(0, 1), 1.0):
        pass
    assert old.core.is_settled


def test_chunks_hold_all_entries_in_order_and_at_least_one() -> None:
    entries = [b"x" * size for size in (10, 5000, 1, 1, 900_000, 2)]
    split = list(chunks(entries, len, 6000))
    assert [entry for chunk in split for entry in chunk] == entries
    assert [len(chunk) for chunk in split] == [3, 1, 1, 1]
