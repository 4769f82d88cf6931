"""Publishes to each worker whether it has a substitute: another worker that can take new clients in its place.

A worker under pressure refuses a handshake only while no other worker can accept the client. It can't see the others;
the supervisor writes the answer to the worker's vitals page.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from realtime.config.settings import LoopSettings
from realtime.supervision.health import Condition, Health
from realtime.supervision.pressure import find_exceeded


class ReplaceableProcess(Protocol):
    """A worker process."""

    def set_substitute(self, available: bool) -> None: ...


class Substitutes:
    """The substitutes of all workers of one shared port. Call `update` after each health check."""

    def __init__(
        self, loop: LoopSettings, health: Mapping[int, Health], processes: Mapping[int, ReplaceableProcess]
    ) -> None:
        """health, processes: by slot, live mappings."""
        self._loop = loop
        self._health = health
        self._processes = processes

    def configure(self, loop: LoopSettings) -> None:
        """Use other limits of load from now on."""
        self._loop = loop

    def update(self) -> None:
        """Publish the present answer to every worker."""
        able = {slot for slot, health in self._health.items() if self._can_accept(health)}
        for slot in self._health:
            process = self._processes.get(slot)
            if process is not None:
                process.set_substitute(bool(able - {slot}))

    def condition_changed(self, slot: int, health: Health) -> None:
        """Publish at once: a worker that was just blocked is no substitute."""
        self.update()

    def _can_accept(self, health: Health) -> bool:
        """Return whether the worker accepts new clients, and is not under pressure by a limit of its own."""
        return (
            health.condition in (Condition.HEALTHY, Condition.LAGGING)
            and health.vitals is not None
            and not find_exceeded(self._loop, health.vitals)
        )
