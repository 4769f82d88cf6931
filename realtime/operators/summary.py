"""The state of the server: the one source of /health, the live page and `realtime top`.

A *problem* is a condition that an operator should know: a process that does not serve, or a counter of failures that
has grown in the last minute. `Failures` has the counters: each process is asked for them once a second.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from msgspec import Struct

from realtime.metrics import Sample
from realtime.operators.exposition import VitalProcess, beat_age
from realtime.supervision.health import Condition, Health
from realtime.supervision.pool import Pool
from realtime.supervision.rates import Growth
from realtime.supervision.slots import BROKER, Slot, SlotState
from realtime.supervision.vitals import RunningHandler

# Seconds for which a failure stays a problem, and over which failures are counted.
SPAN = 60.0
# Exceptions in the server's own code within SPAN seconds that make the server unhealthy.
MAX_INTERNAL_ERRORS = 100
# More unhealthy workers share one problem.
_MAX_WORKERS = 3

HANDLER_ERRORS = "realtime_handler_errors"
INTERNAL_ERRORS = "realtime_internal_errors"
SUPERVISOR = -2
"""The place of the supervisor beside the slots of its processes."""

Series = tuple[str, tuple[tuple[str, str], ...]]


class _Watched(Struct, frozen=True):
    """A metric that tells of failures. text: its problem, before the number; remedy: after it. labels: of the series
    that count. limit: of the number; beyond it the server does not do its work."""

    text: str
    remedy: str = ""
    labels: Mapping[str, Collection[str]] = {}
    limit: float = math.inf


_WATCHED = {
    INTERNAL_ERRORS: _Watched(
        "exceptions in the server's own code in the last minute", "see the log", limit=MAX_INTERNAL_ERRORS
    ),
    "realtime_redis_away": _Watched("Redis servers or Clusters that can't be used", "see the log", limit=0),
    "realtime_redis_lagging": _Watched("Redis servers that take more than a second to answer"),
    "realtime_redis_errors": _Watched("commands that Redis refused in the last minute", "see the log"),
    HANDLER_ERRORS: _Watched("errors of handlers in the last minute"),
    "realtime_handler_calls": _Watched(
        "calls of handlers that ran past their time limit or found every thread or process taken in the last minute",
        labels={"outcome": ("timeout", "full")},
    ),
    "realtime_handler_process_failed_starts": _Watched(
        "handler processes that did not start in the last minute", "see the log"
    ),
    "realtime_handler_process_replacements": _Watched(
        "handler processes that ended before their time in the last minute", "see the log"
    ),
    "realtime_handler_threads_overdue": _Watched("threads that run a handler past its time limit"),
    "realtime_engine_timeouts": _Watched("requests to the broker without an answer in time in the last minute"),
    "realtime_broker_storage_suspended": _Watched(
        "broker with its channels in memory alone: engine.memory.path can't be written", "see the log"
    ),
    "realtime_messages_dropped": _Watched("publications, joins and leaves dropped in the last minute"),
    "realtime_key_set_fetches": _Watched(
        "failed attempts to fetch the keys of tokens in the last minute", "see the log", {"outcome": ("failed",)}
    ),
    "realtime_shed_requests": _Watched("calls refused under pressure in the last minute"),
    "realtime_rescue_refusals": _Watched("clients refused in the last minute because no worker could take them"),
    "realtime_log_lines_dropped": _Watched("lines of the log dropped in the last minute", "its reader is slow"),
}

WATCHED: Collection[str] = _WATCHED
"""The metrics that `Failures` reads."""


class Problem(Struct, frozen=True):
    """text: one line. tone: "bad" if the server does not do its work, else "warn"."""

    text: str
    tone: str = "warn"


class Failures:
    """The failures that all processes have counted."""

    def __init__(self) -> None:
        self._growth = Growth[Series](SPAN)
        self._levels: dict[int, dict[str, float]] = {}  # by slot, the gauges among the watched metrics
        self._last_error_at: float | None = None

    def record(self, slot: int, owner: object, samples: Iterable[Sample], now: float) -> None:
        """Take the WATCHED metrics of one process. owner: the process. now: seconds of a monotonic clock."""
        counts: dict[Series, float] = {}
        levels = self._levels[slot] = {}
        for sample in samples:
            watched = _WATCHED.get(sample.name)
            labels = dict(sample.labels)
            if watched is None or any(labels.get(name) not in values for name, values in watched.labels.items()):
                continue
            if sample.kind == "gauge":
                levels[sample.name] = sample.value
            else:
                counts[sample.name, tuple(sample.labels)] = sample.value
        before = self._errors()
        self._growth.record(slot, owner, counts, now)
        if self._errors() > before:
            self._last_error_at = time.time()

    def forget(self, slots: Collection[int]) -> None:
        """Forget the gauges of all processes but those in `slots`."""
        self._levels = {slot: levels for slot, levels in self._levels.items() if slot in slots}

    def recent(self, now: float) -> dict[str, float]:
        """Each watched metric's growth in the last SPAN seconds, or its value, where that is not 0."""
        found: dict[str, float] = {}
        for (name, _), grown in self._growth.recent(now).items():
            found[name] = found.get(name, 0.0) + grown
        for levels in self._levels.values():
            for name, value in levels.items():
                found[name] = found.get(name, 0.0) + value
        return {name: value for name, value in found.items() if value}

    def handler_errors(self, now: float) -> dict[str, Any]:
        """The errors of handlers as JSON values: their number, that of the last minute, and the latest error."""
        latest: dict[str, str] = {}
        for name, labels in self._growth.totals():
            if name == HANDLER_ERRORS:
                latest = dict(labels)
        return {
            "count": round(self._errors()),
            "last_minute": round(self.recent(now).get(HANDLER_ERRORS, 0)),
            "handler": latest.get("handler"),
            "exception": latest.get("exception"),
            "at": self._last_error_at,
        }

    def _errors(self) -> float:
        return sum(count for (name, _), count in self._growth.totals().items() if name == HANDLER_ERRORS)


class SummarizedProcess(VitalProcess, Protocol):
    """A child process. running: None while no handler runs."""

    @property
    def pid(self) -> int: ...
    @property
    def running(self) -> RunningHandler | None: ...


class AcceptQueues(Protocol):
    """The distribution of new connections. weights: by slot. accept_queue: a slot's length and limit."""

    @property
    def weights(self) -> Sequence[int]: ...
    def accept_queue(self, slot: int) -> tuple[int, int]: ...


class HealthSource(Protocol):
    """The health of the workers, by slot, and of the broker."""

    @property
    def health(self) -> Mapping[int, Health]: ...
    @property
    def broker(self) -> Health | None: ...


class SummarySource(Protocol):
    """The supervisor's state. processes: those that serve, by slot. children: all, by generation. steering: None until
    the clients' port is open."""

    @property
    def pool(self) -> Pool: ...
    @property
    def processes(self) -> Mapping[int, SummarizedProcess]: ...
    @property
    def children(self) -> Mapping[int, SummarizedProcess]: ...
    @property
    def monitor(self) -> HealthSource: ...
    @property
    def steering(self) -> AcceptQueues | None: ...
    @property
    def port(self) -> int: ...
    @property
    def operator_port(self) -> int: ...


class Summary:
    """Summarizes the server."""

    def __init__(self, source: SummarySource, failures: Failures) -> None:
        self._source = source
        self._failures = failures

    def read(self, now: float) -> dict[str, Any]:
        """The server and each of its processes, as JSON values. now: seconds of CLOCK_MONOTONIC."""
        pool = self._source.pool
        problems = list(self._problems(now))
        broker = pool.slots.get(BROKER)
        return {
            "status": problems[0].text if problems else "ok",
            "problems": problems,
            "stopping": pool.stopping,
            "port": self._source.port,
            "operator_port": self._source.operator_port,
            "handler_errors": self._failures.handler_errors(now),
            "workers": [self._describe(slot, now) for slot in pool.workers],
            "broker": broker and self._describe(broker, now),
        }

    # Problems, worst first

    def _problems(self, now: float) -> Iterator[Problem]:
        found = [*self._process_problems(now), *self._failure_problems(now)]
        return iter(sorted(found, key=lambda problem: problem.tone != "bad"))

    def _process_problems(self, now: float) -> Iterator[Problem]:
        pool = self._source.pool
        if not any(slot.state is SlotState.READY for slot in pool.workers):
            yield Problem("no worker is ready", "bad")
        elif not any(pool.is_up(slot) for slot in pool.workers):
            yield Problem("no worker's loop turns", "bad")
        if pool.stopping:
            yield Problem("the server is stopping")
            return
        broker = pool.slots.get(BROKER)
        if broker is not None and (condition := self._condition(broker, now)):
            yield Problem(f"the broker is {condition}", "warn" if pool.is_up(broker) else "bad")
        ill = [(slot, condition) for slot in pool.workers if (condition := self._condition(slot, now))]
        if len(ill) > _MAX_WORKERS:
            yield Problem(f"{len(ill)} of {len(pool.workers)} workers are not healthy")
        else:
            for slot, condition in ill:
                yield Problem(f"worker {slot.number} is {condition}")

    def _condition(self, slot: Slot, now: float) -> str:
        """What is wrong with a slot's process, to follow "is"; "" for nothing."""
        if slot.in_crash_loop:  # also while it is ready: it has not been for long
            return f"crashing: {slot.deaths} deaths in a row; see its errors in the log"
        if slot.state is not SlotState.READY:
            return "dead; it is restarted in a moment" if slot.state is SlotState.WAITING else str(slot.state.value)
        health = self._health(slot)
        if health is None or health.condition in (Condition.HEALTHY, Condition.ABSENT):
            return ""
        if not self._source.pool.is_up(slot):
            return f"not turning its loop for {health.lag:.0f} s: stopped or blocked"
        return str(health.condition.value)

    def _failure_problems(self, now: float) -> Iterator[Problem]:
        recent = self._failures.recent(now)
        for name, watched in _WATCHED.items():
            if not (count := round(recent.get(name, 0))):
                continue
            remedy = watched.remedy
            if name == HANDLER_ERRORS:
                latest = self._failures.handler_errors(now)
                remedy = f"the latest: {latest['exception']} in {latest['handler']}"
            text = f"{watched.text}: {count}" + (f"; {remedy}" if remedy else "")
            yield Problem(text, "bad" if count > watched.limit else "warn")

    # Processes

    def _health(self, slot: Slot) -> Health | None:
        monitor = self._source.monitor
        return monitor.broker if slot.number == BROKER else monitor.health.get(slot.number)

    def _describe(self, slot: Slot, now: float) -> dict[str, object]:
        """One slot and its process, as JSON values; null for all figures that a missing process does not have."""
        process = self._source.processes.get(slot.number)
        vitals = process.vitals if process else None
        running = process.running if process else None
        health = self._health(slot)
        return {
            "slot": slot.number,
            "state": slot.state.value,
            "condition": health and health.condition.value,
            "since": round(now - slot.since, 3),
            "pid": process.pid if process else None,
            "beat_age": vitals and round(beat_age(vitals, now), 3),
            "lag": vitals and round(health.lag if health else vitals.lag, 6),
            "connections": vitals and vitals.connections,
            "subscriptions": vitals and vitals.subscriptions,
            "utilization": vitals and round(vitals.utilization, 4),
            "queued_bytes": vitals and vitals.queued_bytes,
            "threads_busy": vitals and vitals.threads_busy,
            "threads_waiting": vitals and vitals.threads_waiting,
            "rss": vitals and vitals.rss,
            "handler": (running and running.handler) or None,
            "subject": (running and running.subject) or None,
            "restarts": sum(slot.restarts.values()),
            "crash_loop": slot.in_crash_loop,
            "replacement": self._describe_replacement(slot),
            **self._describe_queue(slot.number),
        }

    def _describe_replacement(self, slot: Slot) -> dict[str, object] | None:
        """The second process of a slot whose worker is being replaced: its role, state, pid and connections."""
        second = slot.successor or slot.predecessor
        if second is None:
            return None
        process = self._source.children.get(second.generation)
        vitals = process.vitals if process else None
        return {
            "role": "successor" if second is slot.successor else "predecessor",
            "state": second.state.value,
            "pid": process.pid if process else None,
            "connections": vitals and vitals.connections,
        }

    def _describe_queue(self, slot: int) -> dict[str, object]:
        """The share of new connections that a worker is given, and its accept queue."""
        steering = self._source.steering
        if steering is None or slot == BROKER:
            return {}
        depth, limit = steering.accept_queue(slot)
        return {"weight": steering.weights[slot], "accept_queue": depth, "accept_queue_limit": limit}
