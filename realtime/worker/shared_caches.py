"""The caches of this worker among those of all workers: invalidations, and one computation for all.

Invalidations travel as orders (`realtime.protocol.orders`). A computation begins with a lease of the broker
(`realtime.pubsub.leases`); its value goes to the waiting workers as an order, too. The broker gives orders one
sequence, so a value that was invalidated under way is not taken for a new one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from itertools import count
from typing import Any

from twisted.logger import Logger
from twisted.python.failure import Failure

from realtime.cache import (
    Flight,
    Host,
    Invalidation,
    Landing,
    StoredComputation,
    decode_key,
    pack_value,
    shared_key,
    unpack_value,
)
from realtime.errors import ClientError, EngineUnavailable
from realtime.protocol.orders import InvalidateOrder, LandOrder, encode_order
from realtime.pubsub.engine import (
    DropValues,
    EndLease,
    Engine,
    FetchValue,
    SendOrder,
    StoreValue,
    TakeLease,
    ValueState,
)

LEASE = 10.0
"""Seconds of a computation for all nodes, if each worker of this machine computes on its own."""

POLL_MIN, POLL_MAX = 0.02, 0.25
"""Seconds between two questions whether another node has computed a value: they double."""

PATIENCE = 2.0
"""Seconds for which the end of another worker's lease is awaited beyond the lease's time; then nothing will come."""

_log = Logger()


class SharedCaches:
    """Sends and receives for the caches of this worker."""

    def __init__(self, host: Host, engine: Engine, address: str, lease: float) -> None:
        """host: of the caches; its invalidations go to the other workers from now on. address: of this worker.
        lease: seconds for which other workers wait for a computation; 0: each worker computes on its own."""
        self._host = host
        self._engine = engine
        self._address = address
        self._lease = lease
        self._numbers = count(1)
        self._waiting: dict[str, list[asyncio.Future[Flight | Landing | None]]] = {}  # by flight
        host.broadcast = self._broadcast
        if lease:
            host.take_off = self._take_off
        host.obtain = self._obtain
        self._is_away = False  # the store of values, as far as we know

    async def _broadcast(self, invalidation: Invalidation) -> None:
        if invalidation.kept:
            await self._drop(invalidation)
        order = InvalidateOrder(self._address, invalidation.cache, invalidation.keys, invalidation.tags)
        await self._engine.ask(SendOrder(encode_order(order)))

    async def _drop(self, invalidation: Invalidation) -> None:
        keys = invalidation.keys
        shared = None if keys is None else [key for key in map(shared_key, map(decode_key, keys)) if key is not None]
        # A mark has to outlive the values that were made before it, and the computations.
        kept = 2 * invalidation.kept + 2 * (self._lease or LEASE)
        try:
            await self._engine.ask(DropValues(invalidation.cache, shared, invalidation.tags, kept))
        except ClientError:
            self._note_away("this engine has no store for them: engine.type is not redis")

    def on_order(self, order: InvalidateOrder) -> None:
        """Carry out the invalidation of another worker."""
        if order.address != self._address:
            self._start(self._host.invalidate_here(Invalidation(order.cache, order.keys, order.tags)))

    def on_interruption(self) -> None:
        """Clear all caches of this worker: invalidations of others may have been lost with the stream to the broker.

        So may the ends of computations of others.
        """
        self._start(self._host.clear_here())
        waiting, self._waiting = self._waiting, {}
        for waiters in waiting.values():
            for waiter in waiters:
                _end_wait(waiter, Landing(is_void=True))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        self._host.start(work, _log_error)

    async def _take_off(self, cache: str, key: bytes) -> Flight | Landing | None:
        """See `Host.take_off`."""
        flight = f"{self._address}/{next(self._numbers)}"
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[Flight | Landing | None] = loop.create_future()

        joined = ""

        def answered(leased: str, error: BaseException | None) -> None:
            nonlocal joined
            if error is None and leased not in ("", flight):
                # At once: the end may be the next frame of the broker.
                joined = leased
                self._waiting.setdefault(leased, []).append(waiter)
            elif not waiter.done():
                waiter.set_result(_LeasedFlight(self._engine, flight) if error is None and leased else None)

        lost = encode_order(LandOrder(flight, is_void=True))
        self._engine.ask_then(TakeLease(cache, key, flight, self._lease, lost), answered)
        timer = loop.call_later(self._lease + PATIENCE, _end_wait, waiter, None)
        try:
            return await waiter
        finally:
            timer.cancel()
            self._waiting.pop(joined, None)  # its waiters all end at once

    def on_landing(self, order: LandOrder) -> None:
        """Handle the end of another worker's computation."""
        for waiter in self._waiting.pop(order.flight, ()):
            _end_wait(waiter, Landing(order.value, order.made, order.is_void))

    async def _obtain(self, wanted: StoredComputation, compute: Callable[[], Awaitable[Any]]) -> tuple[Any, float]:
        """See `Host.obtain`."""
        clock, token, lease = self._host.clock, f"{self._address}/{next(self._numbers)}", self._lease or LEASE
        until, pause = clock() + lease, POLL_MIN
        names = wanted.cache, wanted.key, wanted.tags
        while True:
            try:
                found = await self._engine.ask(FetchValue(*names, token, lease, time.time() - wanted.ttl))
            except (EngineUnavailable, ClientError) as error:
                self._note_away(str(error))
                return await compute(), clock()
            self._is_away = False
            if found.state is ValueState.FOUND:
                try:
                    return unpack_value(found.value), clock() - max(0.0, time.time() - found.made)
                except (ValueError, KeyError):  # of another version of the application
                    return await compute(), clock()
            if found.state is ValueState.GRANTED:
                break
            if clock() >= until:
                return await compute(), clock()
            await asyncio.sleep(pause)
            pause = min(2 * pause, POLL_MAX)
        packed = b""
        try:
            value = await compute()
            with suppress(TypeError):
                packed = pack_value(value)
        finally:
            made = time.time()
            self._engine.ask_then(StoreValue(*names, token, found.stamp, packed, made, wanted.kept), _ignore)
        return value, clock()

    def _note_away(self, reason: str) -> None:
        if not self._is_away:
            self._is_away = True
            _log.warn('caches with storage="redis" compute their values on this machine alone: {reason}', reason=reason)


def _end_wait(waiter: asyncio.Future[Flight | Landing | None], landing: Landing | None) -> None:
    if not waiter.done():
        waiter.set_result(landing)


class _LeasedFlight:
    """A computation of this worker."""

    def __init__(self, engine: Engine, flight: str) -> None:
        self._engine = engine
        self._flight = flight

    def land(self, landing: Landing) -> None:
        order = LandOrder(self._flight, landing.value, landing.made, landing.is_void)
        end = EndLease(self._flight, encode_order(order))

        def ended(result: None, error: BaseException | None) -> None:
            if error is not None:  # the stream to the broker broke, perhaps; without a broker, there is no lease
                self._engine.ask_then(end, _ignore)

        self._engine.ask_then(end, ended)


def _ignore(result: Any, error: BaseException | None) -> None:
    """Take note of an answer that changes nothing."""


def _log_error(result: Any, error: BaseException | None) -> None:
    if error is not None:
        _log.failure(
            "an invalidation of a cache raised; the cache may serve old values until they expire", Failure(error)
        )
