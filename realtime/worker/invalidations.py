"""Carries the invalidations of caches from worker to worker, as orders (`realtime.protocol.orders`)."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

from twisted.logger import Logger
from twisted.python.failure import Failure

from realtime.cache import Host, Invalidation
from realtime.protocol.orders import InvalidateOrder, encode_order
from realtime.pubsub.engine import Engine, SendOrder

_log = Logger()


class CacheInvalidations:
    """The invalidations that the caches of this worker send and receive."""

    def __init__(self, host: Host, engine: Engine, address: str) -> None:
        """host: of the caches; its invalidations go to the other workers from now on. address: of this worker."""
        self._host = host
        self._engine = engine
        self._address = address
        host.broadcast = self._broadcast

    async def _broadcast(self, invalidation: Invalidation) -> None:
        order = InvalidateOrder(self._address, invalidation.cache, invalidation.keys, invalidation.tags)
        await self._engine.ask(SendOrder(encode_order(order)))

    def on_order(self, order: InvalidateOrder) -> None:
        """Carry out the invalidation of another worker."""
        if order.address != self._address:
            self._start(self._host.invalidate_here(Invalidation(order.cache, order.keys, order.tags)))

    def on_interruption(self) -> None:
        """Clear all caches of this worker: invalidations of others may have been lost with the stream to the broker."""
        self._start(self._host.clear_here())

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        self._host.start(work, _log_error)


def _log_error(result: Any, error: BaseException | None) -> None:
    if error is not None:
        _log.failure(
            "an invalidation of a cache raised; the cache may serve old values until they expire", Failure(error)
        )
