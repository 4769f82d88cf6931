"""The exchange with several peers: who is told what, and what goes when a peer goes."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pytest

from realtime.errors import ClientError
from realtime.pubsub.broker_core import BrokerCore
from realtime.types import ClientInfo, EngineStats, HistoryOptions, Publication

ALICE = ClientInfo("alice", "client-a")
BOB = ClientInfo("bob", "client-b")


class Deliveries:
    """What went out: the peers of each delivery, and the thing."""

    def __init__(self) -> None:
        self.made: list[tuple[Any, ...]] = []

    def published(self, peers: Collection[str], channel: str, publication: Publication, epoch: str) -> None:
        self.made.append((sorted(peers), channel, publication.data))

    def joined(self, peers: Collection[str], channel: str, info: ClientInfo) -> None:
        self.made.append((sorted(peers), "joined", channel, info))

    def left(self, peers: Collection[str], channel: str, info: ClientInfo) -> None:
        self.made.append((sorted(peers), "left", channel, info))

    def instructed(self, peers: Collection[str], order: bytes) -> None:
        self.made.append((sorted(peers), order))


@pytest.fixture
def deliveries() -> Deliveries:
    return Deliveries()


@pytest.fixture
def exchange(deliveries: Deliveries) -> BrokerCore[str]:
    exchange = BrokerCore[str](deliveries, max_channels=2)
    for peer in ("one", "two", "three"):
        exchange.attach(peer, f"at {peer}")
    return exchange


def test_one_delivery_names_all_its_peers(exchange: BrokerCore[str], deliveries: Deliveries) -> None:
    exchange.subscribe("one", "c")
    exchange.subscribe("three", "c")
    exchange.publish(0.0, "c", b"1", HistoryOptions())
    exchange.publish(0.0, "elsewhere", b"2", HistoryOptions())
    assert exchange.instruct(b"order") == 3
    assert deliveries.made == [(["one", "three"], "c", b"1"), (["one", "three", "two"], b"order")]


def test_an_order_may_be_for_one_peer(exchange: BrokerCore[str], deliveries: Deliveries) -> None:
    exchange.attach("another two", "at two")
    assert exchange.instruct(b"order", "at two") == 1
    exchange.detach("two")
    assert exchange.instruct(b"again", "at two") == 1
    exchange.detach("another two")
    assert (exchange.instruct(b"late", "at two"), exchange.instruct(b"lost", "nowhere")) == (0, 0)
    assert deliveries.made == [(["another two"], b"order"), (["another two"], b"again")]


def test_a_peer_that_goes_makes_room_for_its_users(exchange: BrokerCore[str]) -> None:
    assert exchange.admit("one", ALICE, 1)
    assert not exchange.admit("two", ClientInfo("alice", "client-c"), 1)
    exchange.detach("one")
    assert exchange.admit("two", ClientInfo("alice", "client-c"), 1)


def test_a_peer_that_goes_takes_all_it_held_along(exchange: BrokerCore[str], deliveries: Deliveries) -> None:
    for peer in ("one", "two"):
        exchange.subscribe(peer, "c")
    exchange.subscribe("one", "own")
    exchange.enter("one", "c", ALICE, present=True, announce=True, quiet=True)
    exchange.enter("one", "c", BOB, present=True, announce=False)
    exchange.connected("one", ALICE)
    exchange.connected("two", ClientInfo("alice", "client-c"))
    exchange.tally("one", 5)
    exchange.detach("one")
    exchange.detach("one")
    assert deliveries.made == [(["two"], "left", "c", ALICE)]
    assert exchange.presence("c") == {}
    assert exchange.census() == EngineStats(clients=1, users=1, channels=1, subscriptions=0)
    exchange.detach("two")
    assert (exchange.census(), exchange.channels) == (EngineStats(), 0)


def test_what_was_promised_before_is_kept_beyond_the_limit(exchange: BrokerCore[str]) -> None:
    for channel in ("a", "b"):
        exchange.subscribe("one", channel)
        exchange.enter("one", channel, ALICE, present=True, announce=False)
    with pytest.raises(ClientError):
        exchange.subscribe("one", "c")
    with pytest.raises(ClientError):
        exchange.enter("one", "c", ALICE, present=True, announce=False)
    exchange.subscribe("one", "c", again=True)
    exchange.enter("one", "c", ALICE, present=True, announce=False, again=True)
    assert (exchange.channels, exchange.presence("c")) == (3, {"client-a": ALICE})


def test_new_facts_about_a_client_replace_the_old(exchange: BrokerCore[str], deliveries: Deliveries) -> None:
    exchange.subscribe("one", "c")
    exchange.enter("one", "c", ALICE, present=True, announce=True)
    renamed = ClientInfo("alice", "client-a", b'"A."')
    exchange.enter("one", "c", renamed, present=True, announce=True)
    exchange.leave("one", "c", "client-a")
    assert [delivery[1:] for delivery in deliveries.made] == [
        ("joined", "c", ALICE),
        ("left", "c", renamed),
    ]


def test_a_refused_publication_leaves_no_key_behind(exchange: BrokerCore[str]) -> None:
    keep = HistoryOptions(1, 60.0)
    for channel in ("a", "b"):
        exchange.publish(0.0, channel, b"1", keep)
    with pytest.raises(ClientError):
        exchange.publish(0.0, "c", b"1", keep, idempotency_key="key")
    exchange.remove_history("a")
    exchange.sweep(10_000_000.0)
    assert exchange.streams == 0
    assert exchange.publish(10_000_000.0, "c", b"1", keep, idempotency_key="key").offset == 1
