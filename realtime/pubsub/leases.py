"""Leases: of the workers of this machine, one computes a cached value, and the others receive it.

A worker asks with `engine.TakeLease`. The first one has the lease, and ends it with an order that the others receive,
which brings the value (`engine.EndLease`). A lease also ends at its time, and when its worker ends: then the others
receive the order that came with the request, and one of them takes the next lease.

An order to all workers may invalidate the value under way. So no worker joins a lease that was taken before the latest
such order: the next worker gets a lease of its own, beside the other one. Without I/O.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Generic, TypeVar

from msgspec import Struct

from realtime.pubsub.broker_state import StatePart, chunks
from realtime.pubsub.engine import TakeLease

MAX_LEASES = 10_000
"""Values under way. A worker that gets no lease computes its value all the same, beside the others."""

P = TypeVar("P")

Deliver = Callable[[Collection[P], bytes], None]


class _Lease(Struct, Generic[P], eq=False):
    """flight: identifies it. ends: its time. orders: the number of orders to all workers before it."""

    name: tuple[str, bytes]
    flight: str
    peer: P
    ends: float
    orders: int
    lost: bytes
    waiting: set[P]


class LeasesState(StatePart, tag=31, frozen=True, gc=False):
    """Some leases: name, flight, number of the peer, end, whether it can be joined, order, and waiting peers."""

    leases: list[tuple[str, bytes, str, int, float, bool, bytes, list[int]]]


class Leases(Generic[P]):
    """All leases, MAX_LEASES at most. deliver: sends an order to peers."""

    def __init__(self, deliver: Deliver[P]) -> None:
        self._deliver = deliver
        self._orders = 0
        self._by_name: dict[tuple[str, bytes], _Lease[P]] = {}  # those that can be joined, and some that can't any more
        self._by_flight: dict[str, _Lease[P]] = {}

    def __len__(self) -> int:
        return len(self._by_flight)

    def take(self, peer: P, now: float, request: TakeLease) -> str:
        """Return the flight of the lease that this peer has or joins; "" if there is no room for a lease."""
        name = request.cache, request.key
        lease = self._by_name.get(name)
        if lease is not None and lease.ends > now and lease.orders == self._orders and lease.peer != peer:
            lease.waiting.add(peer)
            return lease.flight
        if len(self._by_flight) >= MAX_LEASES or request.flight in self._by_flight:
            return ""
        lease = _Lease(name, request.flight, peer, now + request.seconds, self._orders, request.lost, set())
        self._by_name[name] = self._by_flight[lease.flight] = lease
        return lease.flight

    def end(self, peer: P, flight: str, order: bytes) -> None:
        """End a lease of this peer; the waiting peers receive the order. Without effect for any other lease."""
        lease = self._by_flight.get(flight)
        if lease is not None and lease.peer == peer:
            self._end(lease, order)

    def _end(self, lease: _Lease[P], order: bytes) -> None:
        del self._by_flight[lease.flight]
        if self._by_name.get(lease.name) is lease:
            del self._by_name[lease.name]
        if lease.waiting:
            self._deliver(lease.waiting, order)

    def note_order(self) -> None:
        """Note that all workers receive an order now."""
        self._orders += 1

    def move(self, earlier: P, peer: P) -> None:
        """Give a peer the leases of an earlier one."""
        for lease in self._by_flight.values():
            if lease.peer == earlier:
                lease.peer = peer
            if earlier in lease.waiting:
                lease.waiting.discard(earlier)
                lease.waiting.add(peer)

    def drop(self, peer: P) -> None:
        """End the leases of a peer that has ended."""
        for lease in tuple(self._by_flight.values()):
            lease.waiting.discard(peer)
            if lease.peer == peer:
                self._end(lease, lease.lost)

    def sweep(self, now: float) -> None:
        """End the leases whose time has come."""
        for lease in tuple(self._by_flight.values()):
            if lease.ends <= now:
                self._end(lease, lease.lost)

    def export(self, peers: Sequence[P]) -> Iterator[StatePart]:
        """Yield the state in parts. Nothing may change meanwhile. peers: all of them, by number."""
        numbers = {peer: number for number, peer in enumerate(peers)}
        leases = (
            (
                *(*lease.name, lease.flight, numbers[lease.peer], lease.ends),
                self._by_name.get(lease.name) is lease and lease.orders == self._orders,
                *(lease.lost, [numbers[peer] for peer in lease.waiting]),
            )
            for lease in self._by_flight.values()
        )
        yield from map(LeasesState, chunks(leases, lambda one: len(one[6])))

    def import_part(self, part: LeasesState, peers: Sequence[P]) -> None:
        """Add leases of another object, whatever the limit."""
        for cache, key, flight, number, ends, can_be_joined, lost, waiting in part.leases:
            orders = self._orders - (not can_be_joined)
            lease = _Lease((cache, key), flight, peers[number], ends, orders, lost, {peers[one] for one in waiting})
            self._by_flight[flight] = lease
            if can_be_joined:
                self._by_name[lease.name] = lease
