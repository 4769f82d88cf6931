"""Leases: one worker computes, the others receive its value; every end of a worker or a lease frees them."""

from __future__ import annotations

import random
from collections.abc import Collection

import msgspec
import pytest

from realtime.pubsub import leases
from realtime.pubsub.engine import TakeLease
from realtime.pubsub.leases import Leases, LeasesState


class Log:
    """Leases of the peers 1, 2, …, and the orders that each peer has received."""

    def __init__(self) -> None:
        self.received: list[tuple[int, bytes]] = []
        self.leases: Leases[int] = Leases(self._deliver)
        self.flights = 0

    def _deliver(self, peers: Collection[int], order: bytes) -> None:
        self.received += [(peer, order) for peer in sorted(peers)]

    def take(self, peer: int, now: float = 0.0, key: bytes = b"k") -> str:
        self.flights += 1
        flight = f"{peer}/{self.flights}"
        return self.leases.take(peer, now, TakeLease("cache", key, flight, 10.0, flight.encode()))


def test_the_first_worker_has_the_lease_and_the_others_receive_its_end() -> None:
    log = Log()
    assert log.take(1) == "1/1"
    assert [log.take(peer) for peer in (2, 3, 2)] == ["1/1"] * 3
    assert log.take(4, key=b"other") == "4/5"
    log.leases.end(2, "1/1", b"not mine")
    log.leases.end(1, "1/1", b"value")
    log.leases.end(1, "1/1", b"again")
    assert log.received == [(2, b"value"), (3, b"value")]
    assert log.take(2) == "2/6"


def test_the_end_of_a_worker_and_of_the_time_is_the_end_of_its_leases() -> None:
    log = Log()
    log.take(1)
    log.take(2)
    log.leases.drop(1)
    assert log.received == [(2, b"1/1")]
    assert log.take(2, now=5.0) == "2/3"
    log.take(3, now=5.0)
    log.leases.sweep(14.9)
    assert len(log.received) == 1
    log.leases.sweep(15.0)
    assert log.received[1:] == [(3, b"2/3")]
    assert len(log.leases) == 0


def test_a_worker_that_ends_waits_no_longer() -> None:
    log = Log()
    log.take(1)
    log.take(2)
    log.leases.drop(2)
    log.leases.end(1, "1/1", b"value")
    assert log.received == []


def test_a_value_under_way_during_an_order_to_all_is_not_for_those_who_ask_later() -> None:
    log = Log()
    log.take(1)
    log.take(2)
    log.leases.note_order()
    assert log.take(3) == "3/3"
    assert log.take(2) == "3/3"
    log.leases.end(1, "1/1", b"before")
    log.leases.end(3, "3/3", b"after")
    assert log.received == [(2, b"before"), (2, b"after")]


def test_a_returning_worker_still_has_and_awaits_its_leases() -> None:
    log = Log()
    log.take(1)
    log.take(2, key=b"other")
    log.take(1, key=b"other")
    log.leases.move(1, 11)
    log.leases.end(2, "2/2", b"value")
    log.leases.end(11, "1/1", b"mine")
    assert log.received == [(11, b"value")]
    assert len(log.leases) == 0


def test_beyond_the_limit_there_is_no_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "MAX_LEASES", 2)
    log = Log()
    assert [log.take(1, key=key) for key in (b"a", b"b", b"c")] == ["1/1", "1/2", ""]
    assert log.take(2, key=b"a") == "1/1"


@pytest.mark.parametrize("seed", range(10))
def test_another_process_goes_on_with_all_leases(seed: int) -> None:
    chance, log, peers = random.Random(seed), Log(), [1, 2, 3]
    for _ in range(50):
        peer, key = chance.choice(peers), chance.choice((b"a", b"b"))
        match chance.randrange(4):
            case 0:
                log.leases.note_order()
            case 1:
                log.leases.end(peer, f"{peer}/{chance.randrange(1, 1 + log.flights or 2)}", b"value")
            case _:
                log.take(peer, key=key)
    other = Log()
    other.flights, log.received = log.flights, []
    for part in log.leases.export(peers):
        assert isinstance(part, LeasesState)
        other.leases.import_part(msgspec.msgpack.decode(msgspec.msgpack.encode(part), type=LeasesState), peers)
    for both in (log, other):
        assert both.take(3, key=b"a") is not None
        both.take(2, key=b"b")
        both.leases.drop(1)
        both.leases.sweep(10.0)
    assert sorted(log.received) == sorted(other.received)
    assert len(log.leases) == len(other.leases) == 0
