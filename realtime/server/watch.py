"""The eye on the workers: reads their pages every few milliseconds, and tells whose condition has changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from twisted.internet.interfaces import IDelayedCall
from twisted.logger import Logger

from realtime.server import log
from realtime.settings import Loop
from realtime.supervision.health import CALM_TICK, TICK, Health, Judge
from realtime.supervision.pool import Pool, Slot, State
from realtime.supervision.vitals import Vitals

Listener = Callable[[int, Health], None]

_log = Logger(observer=log.observer)


class Watched(Protocol):
    """A process with vital signs."""

    @property
    def vitals(self) -> Vitals | None: ...


class Watch:
    """The health of every worker's slot, judged every few milliseconds while it runs: less often while all are calm.

    health: of all slots, by number, from the first look on. listeners: called with (slot, health) at each change of
    condition, after `health` has been brought up to date; add your own. looks: called after each
    look, many times a second.
    """

    def __init__(self, reactor: Any, loop: Loop, pool: Pool, processes: Mapping[int, Watched]) -> None:
        """reactor: with CLOCK_MONOTONIC's seconds. processes: by slot, the live dictionary of those that run."""
        self.health: dict[int, Health] = {}
        self.listeners: list[Listener] = []
        self.looks: list[Callable[[], None]] = []
        self._reactor = reactor
        self._judge = Judge(loop)
        self._pool = pool
        self._processes = processes
        self._watching = False
        self._call: IDelayedCall | None = None

    def start(self) -> None:
        """Look now, and go on."""
        self._watching = True
        try:
            self.look()
        finally:
            if self._watching:
                calm = all(health.calm for health in self.health.values())
                self._call = self._reactor.callLater(CALM_TICK if calm else TICK, self.start)

    def stop(self) -> None:
        """Look no more. Idempotent."""
        self._watching = False
        if self._call is not None and self._call.active():
            self._call.cancel()

    def look(self) -> None:
        """Judge every slot."""
        now = self._reactor.seconds()
        changed = []
        for slot in self._pool.workers:
            before = self.health.get(slot.number)
            health = self._judge.judge(slot.number, self._vitals(slot), now, slot.state is State.LEAVING)
            self.health[slot.number] = health
            if before is None or before.condition is not health.condition:
                changed.append(health)
        for health in changed:
            self._tell(health)
        for look in self.looks:
            try:
                look()
            except Exception:
                _log.failure("a look at the workers was not acted on")

    def _vitals(self, slot: Slot) -> Vitals | None:
        """Of a process that serves or still finishes its work."""
        process = self._processes.get(slot.number)
        return process.vitals if process is not None and slot.state in (State.READY, State.LEAVING) else None

    def _tell(self, health: Health) -> None:
        for listener in self.listeners:
            try:
                listener(health.slot, health)
            except Exception:
                # One listener's mistake leaves the others their news.
                _log.failure("a change of condition was not acted on")
