"""The eye on the workers: reads their pages many times a second, and tells whose condition has changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from twisted.internet.interfaces import IDelayedCall
from twisted.logger import Logger

from realtime.config.settings import LoopSettings
from realtime.process import log
from realtime.process.periodic import PeriodicTasks
from realtime.supervision.health import CHECK_INTERVAL, Condition, Health, HealthTracker
from realtime.supervision.pool import Pool, Slot, SlotState
from realtime.supervision.vitals import Vitals

Listener = Callable[[int, Health], None]

# Seconds between two after_check at everything, while every process is ready and every worker is calm: in between there are
# glances alone.
FULL_CHECK_INTERVAL = 0.25

_log = Logger(observer=log.observer)


class MonitoredProcess(Protocol):
    """A process with vital signs."""

    @property
    def vitals(self) -> Vitals | None: ...
    def peek(self) -> tuple[int, float, int]: ...


class HealthMonitor:
    """The health of every worker's slot, judged whenever a loop could be found lagging, and every CHECK_INTERVAL while one is.

    health: of all slots, by number, from the first look on. listeners: called with (slot, health) at each change of
    condition, after `health` has been brought up to date; add your own. after_check: called after each look, a few times a
    second while all are calm. tasks: done after a look, too, when they are due.
    """

    def __init__(self, reactor: Any, loop: LoopSettings, pool: Pool, processes: Mapping[int, MonitoredProcess]) -> None:
        """reactor: with CLOCK_MONOTONIC's seconds. processes: by slot, the live dictionary of those that run."""
        self.health: dict[int, Health] = {}
        self.listeners: list[Listener] = []
        self.after_check: list[Callable[[], None]] = []
        self.tasks = PeriodicTasks(_log)
        self._reactor = reactor
        self._tracker = HealthTracker(loop)
        self._pool = pool
        self._processes = processes
        self._running = False
        self._checked = 0.0
        self._call: IDelayedCall | None = None

    def start(self) -> None:
        """Look now, and go on."""
        self._running = True
        now = self._reactor.seconds()
        due = 0.0
        try:
            due = self._quick_check(now)
            if not due:
                self.check()
                self.tasks.do(now)
                due = min(health.due for health in self.health.values())
        finally:
            if self._running:
                self._call = self._reactor.callLater(due - now if due > now else CHECK_INTERVAL, self.start)

    def stop(self) -> None:
        """Look no more. Idempotent."""
        self._running = False
        if self._call is not None and self._call.active():
            self._call.cancel()

    def _quick_check(self, now: float) -> float:
        """When to look again; 0.0: now, at everything."""
        if now - self._checked >= FULL_CHECK_INTERVAL or not self._pool.ready:
            return 0.0
        due = math.inf
        for slot, health in self.health.items():
            process = self._processes.get(slot)
            if process is None or health.condition is not Condition.HEALTHY:
                return 0.0
            due = min(due, self._tracker.quick_check(slot, *process.peek(), now))
        return due

    def check(self) -> None:
        """HealthTracker every slot."""
        now = self._checked = self._reactor.seconds()
        changed = []
        for slot in self._pool.workers:
            before = self.health.get(slot.number)
            health = self._tracker.assess(slot.number, self._vitals(slot), now, slot.state is SlotState.LEAVING)
            self.health[slot.number] = health
            if before is None or before.condition is not health.condition:
                changed.append(health)
        for health in changed:
            self._tell(health)
        for look in self.after_check:
            try:
                look()
            except Exception:
                _log.failure("a look at the workers was not acted on")

    def _vitals(self, slot: Slot) -> Vitals | None:
        """Of a process that serves or still finishes its work."""
        process = self._processes.get(slot.number)
        return process.vitals if process is not None and slot.state in (SlotState.READY, SlotState.LEAVING) else None

    def _tell(self, health: Health) -> None:
        for listener in self.listeners:
            try:
                listener(health.slot, health)
            except Exception:
                # One listener's mistake leaves the others their news.
                _log.failure("a change of condition was not acted on")
