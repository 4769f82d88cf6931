"""The limits of the workers' memory: which workers exceed them, and whether any worker can keep them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from operator import itemgetter
from typing import Protocol

from twisted.logger import Logger

from realtime.config.settings import Settings
from realtime.process import log
from realtime.supervision.pool import Pool
from realtime.supervision.slots import BROKER, SlotState
from realtime.supervision.vitals import Vitals

_log = Logger(observer=log.observer)


class MeasuredProcess(Protocol):
    """A process with vital signs."""

    slot: int

    @property
    def vitals(self) -> Vitals | None: ...


class MemoryLimits:
    """`loop.max_rss` and `workers.max_rss`, 0 for no limit."""

    def __init__(self, pool: Pool, settings: Settings) -> None:
        self._pool = pool
        self._has_warned = False
        self.configure(settings)

    def configure(self, settings: Settings) -> None:
        """Use other limits from now on."""
        limits = {"loop.max_rss": settings.loop.max_rss, "workers.max_rss": settings.workers.max_rss}
        self._limits = {key: limit for key, limit in limits.items() if limit}

    def excesses(self, vitals: Mapping[int, Vitals | None]) -> Iterator[tuple[int, int, str]]:
        """Yield the slot of each worker that uses too much, with its bytes and the key of the limit.

        vitals: by generation.
        """
        for slot in self._pool.workers:
            reading = vitals.get(slot.process.generation)
            for key, limit in self._limits.items():
                if reading is not None and slot.state is SlotState.READY and limit < reading.rss:
                    yield slot.number, reading.rss, key

    def check_footprint(self, process: MeasuredProcess) -> None:
        """Log once that a worker without clients already needs more memory than the limits allow."""
        key, limit = min(self._limits.items(), key=itemgetter(1), default=("", 0))
        vitals = process.vitals
        if process.slot == BROKER or self._has_warned or vitals is None or not 0 < limit < vitals.rss:
            return
        self._has_warned = True
        _log.error(
            "{key} = {limit}: a worker without clients already uses {used} bytes, so the server replaces "
            "workers without end, at growing intervals; set {key} well above that",
            key=key,
            limit=limit,
            used=vitals.rss,
        )
