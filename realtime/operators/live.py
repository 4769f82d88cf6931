"""The live figures of the page and of `realtime top`: one snapshot of the server each second.

The supervisor has most of them already (`realtime.supervisor.health_monitor`, `realtime.supervisor.stack_sampler`). For
message rates and loop time, each process is asked for its counters once a second. A process with an unanswered request
is not asked again; its other figures come from its vitals page, which can be read while its loop is blocked.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import islice
from operator import itemgetter
from typing import Any, Protocol

import msgspec
from twisted.internet.defer import Deferred
from twisted.internet.task import LoopingCall
from twisted.logger import Logger
from twisted.python.failure import Failure

from realtime.metrics import NONE, Metrics, Sample
from realtime.operators.exposition import process_labels
from realtime.operators.summary import SUPERVISOR, WATCHED, Failures, HealthSource
from realtime.process import log
from realtime.process.heartbeat import LOOP_SECONDS
from realtime.supervision.incidents import Blocks, Incident, IncidentLog
from realtime.supervision.rates import Rates
from realtime.supervision.slots import BROKER

# Seconds between two snapshots.
INTERVAL = 1.0
# Snapshots whose chart points are kept for new viewers.
KEPT = 300
# Places and incidents in a snapshot; /incidents has all.
MAX_PLACES = 10
MAX_INCIDENTS = 30

# Readings, one a second, over which the shares of loop time are averaged: shares of one second change too fast to read.
SHARE_SPAN = 5
# Shares of loop time in a snapshot, for each worker and for all; /metrics has every one.
MAX_SHARES = 10
# Shares below this are left out.
_MIN_SHARE = 0.0005

# Upper bounds in seconds of the buckets of the processes' largest lags.
LAG_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

# Counters whose rates are in a snapshot, and the names of the rates.
_RATES = {
    "realtime_messages_received": "received",
    "realtime_messages_sent": "sent",
    "realtime_connects": "connects",
}

# Display names of the accounts of the server's own work, by kind.
_SERVER_WORK = {
    "fanout": "fan-out",
    "protocol": "client protocol",
    "http": "HTTP",
    "engine": "link to the broker",
    "timers": "timers",
    "other": "other work",
}

_log = Logger(observer=log.observer)

Account = tuple[str, str]
"""Kind and name of an account of loop time."""

Shares = Mapping[Account, float]
"""Share of a loop's time by account, 0 to 1."""


class MetricsSource(Protocol):
    """A process with counters."""

    @property
    def pid(self) -> int: ...

    def collect(self, names: Collection[str] = ()) -> Deferred[list[Sample]]: ...


class CheckedHealth(HealthSource, Protocol):
    """The health of all processes. after_check: called after each check of them."""

    after_check: list[Callable[[], None]]


class IncidentSource(Protocol):
    """The incidents of all workers."""

    incidents: IncidentLog


class LiveSource(Protocol):
    """The supervisor's state. processes: by slot, the live dictionary. metrics: the supervisor's own series."""

    @property
    def processes(self) -> Mapping[int, MetricsSource]: ...
    @property
    def monitor(self) -> CheckedHealth: ...
    @property
    def sampler(self) -> IncidentSource: ...
    @property
    def metrics(self) -> Metrics: ...


class LiveFigures:
    """The snapshots, and the chart points of the last KEPT of them."""

    def __init__(
        self, reactor: Any, source: LiveSource, failures: Failures, summary: Callable[[float], dict[str, Any]]
    ) -> None:
        """failures: takes the counters of failures of all processes, once each INTERVAL. summary: the state of the
        server at a time of the reactor, as /health shows it."""
        self._reactor = reactor
        self._monitor = source.monitor
        self._sampler = source.sampler
        self._processes = source.processes
        self._metrics = source.metrics
        self._failures = failures
        self._summary = summary
        self._listeners: list[Callable[[bytes], None]] = []
        self._rates = Rates[str]()
        self._shares = Rates[Account](SHARE_SPAN)
        self._requests: dict[int, MetricsSource] = {}  # by slot: processes with an unanswered request
        self._peak_lags: dict[int, float] = {}  # by slot, since the latest snapshot
        self._past: deque[tuple[float, list[tuple[float, float, int]]]] = deque(maxlen=KEPT)
        self._json = b"null"
        self._timer = LoopingCall(self._update)
        self._timer.clock = reactor
        self._monitor.after_check.append(self._note_lags)

    def add_listener(self, listener: Callable[[bytes], None]) -> None:
        """Have `listener` called with the JSON of each new snapshot."""
        self._listeners.append(listener)

    def start(self) -> None:
        """Take the first snapshot, and one each INTERVAL from then on."""
        message = "live figures stopped for good: restart the server to have the page and `realtime top` updated again"
        self._timer.start(INTERVAL).addErrback(lambda failure: _log.failure(message, failure))

    def stop(self) -> None:
        """Take no more snapshots. Idempotent."""
        if self._timer.running:
            self._timer.stop()
        if self._note_lags in self._monitor.after_check:
            self._monitor.after_check.remove(self._note_lags)

    @property
    def json(self) -> bytes:
        """The latest snapshot; `null` before the first."""
        return self._json

    def past(self) -> bytes:
        """The chart points as JSON, oldest first: Unix time, and of each worker lag, utilization and connections."""
        return msgspec.json.encode(list(self._past))

    def _note_lags(self) -> None:
        """Keep each process's largest lag: the processes are checked many times between two snapshots."""
        for health in (*self._monitor.health.values(), self._monitor.broker):
            if health is not None and health.vitals is not None:
                self._peak_lags[health.slot] = max(health.lag, self._peak_lags.get(health.slot, 0.0))

    def _observe_lags(self) -> None:
        """Count the largest lag of each process since the latest snapshot: spikes between two scrapes are kept."""
        for slot, lag in self._peak_lags.items():
            if lag == math.inf:  # of an unreadable page, which would spoil the sum
                continue
            help = "The largest lag of the process's loop in each second."
            labels = process_labels(slot)
            self._metrics.histogram("realtime_loop_peak_lag_seconds", help, LAG_BOUNDS, **labels).observe(lag)

    def _update(self) -> None:
        self._observe_lags()
        now = self._reactor.seconds()
        self._failures.forget((SUPERVISOR, *self._processes))
        self._failures.record(SUPERVISOR, None, self._metrics.snapshot(WATCHED), now)
        for slot, process in self._processes.items():
            if self._requests.get(slot) is not process:
                self._request_counters(slot, process)
        self._json = msgspec.json.encode(self._snapshot())
        for listener in self._listeners:
            try:
                listener(self._json)
            except Exception:
                _log.failure("sending a snapshot of the live figures failed; the next one follows in a second")

    def _request_counters(self, slot: int, process: MetricsSource) -> None:
        def count(samples: list[Sample]) -> None:
            now = self._reactor.seconds()
            self._rates.record(slot, process.pid, _counter_totals(samples), now)
            self._shares.record(slot, process.pid, _loop_seconds(samples), now)
            self._failures.record(slot, process.pid, samples, now)

        def log_failure(failure: Failure) -> None:
            reason = failure.getErrorMessage()
            _log.debug("slot {slot} sent no counters for the live figures: {reason}", slot=slot, reason=reason)

        def finish(_: object) -> None:
            if self._requests.get(slot) is process:
                del self._requests[slot]

        self._requests[slot] = process
        process.collect([*_RATES, LOOP_SECONDS, *WATCHED]).addCallback(count).addErrback(log_failure).addBoth(finish)

    def _snapshot(self) -> dict[str, Any]:
        at, now = time.time(), self._reactor.seconds()
        body = self._summary(now)
        points = []
        shares = {}
        for worker in body["workers"]:
            slot = worker["slot"]
            worker["peak_lag"] = self._peak_lags.get(slot, 0.0)
            worker["rates"] = self._rates.of(slot, worker["pid"], now)
            share = self._shares.of(slot, worker["pid"], now)
            worker["loop"] = None if share is None else _largest_shares(share)
            if share is not None:
                shares[slot] = share
            points.append((worker["peak_lag"], worker["utilization"] or 0.0, worker["connections"] or 0))
        if body["broker"]:
            body["broker"] |= {"peak_lag": self._peak_lags.get(BROKER, 0.0), "rates": None, "loop": None}
        self._peak_lags.clear()
        self._past.append((at, points))
        incident_log = self._sampler.incidents
        latest = islice(reversed(incident_log.recent), MAX_INCIDENTS)
        return {
            "at": at,
            **body,
            "loop": _mean_shares(shares),
            "places": worst_places(incident_log.blocks)[:MAX_PLACES],
            "incidents": [incident_json(incident, stacks=False) for incident in latest],
        }


def worst_places(blocks: Mapping[tuple[str, str], Blocks]) -> list[dict[str, Any]]:
    """Blocks of the loops by handler and place, as JSON values; largest total time first."""
    places = [
        {
            "handler": handler or None,
            "place": place,
            "count": block.count,
            "seconds": round(block.seconds, 6),
            "relieved": round(block.relieved, 6),
        }
        for (handler, place), block in blocks.items()
    ]
    places.sort(key=itemgetter("seconds"), reverse=True)
    return places


def incident_json(incident: Incident, stacks: bool) -> dict[str, Any]:
    """An incident as JSON values: null for no function, handler or subject. stacks: with its stacks."""
    left_out = () if stacks else ("stack", "stacks")
    fields = {name: getattr(incident, name) for name in incident.__struct_fields__ if name not in left_out}
    return {**fields, **{name: fields[name] or None for name in ("function", "handler", "subject")}}


def _counter_totals(samples: Iterable[Sample]) -> dict[str, float]:
    """The counters of `_RATES`, each summed over its labels."""
    totals = dict.fromkeys(_RATES.values(), 0.0)
    for sample in samples:
        if sample.name in _RATES:
            totals[_RATES[sample.name]] += sample.value
    return totals


def _loop_seconds(samples: Iterable[Sample]) -> dict[Account, float]:
    """The seconds that each account of the loop was charged."""
    seconds = {}
    for sample in samples:
        if sample.name == LOOP_SECONDS:
            labels = dict(sample.labels)
            seconds[labels.get("kind", NONE), labels.get("name", NONE)] = sample.value
    return seconds


def _largest_shares(shares: Shares) -> list[dict[str, Any]]:
    """The largest shares of one loop as JSON values, largest first."""
    largest = sorted(shares.items(), key=itemgetter(1), reverse=True)[:MAX_SHARES]
    return [{**_account_json(*account), "share": round(share, 4)} for account, share in largest if share >= _MIN_SHARE]


def _mean_shares(shares: Mapping[int, Shares]) -> list[dict[str, Any]]:
    """The largest mean shares over the loops in `shares`, by slot, as JSON values, largest first.

    most, slot of each: the largest share in one loop, and that loop's slot.
    """
    accounts = {account for share in shares.values() for account in share}
    means = {account: sum(share.get(account, 0.0) for share in shares.values()) / len(shares) for account in accounts}
    largest = []
    for account in sorted(accounts, key=lambda account: (-means[account], account))[:MAX_SHARES]:
        slot = max(shares, key=lambda slot: shares[slot].get(account, 0.0))
        most = round(shares[slot].get(account, 0.0), 4)
        if means[account] >= _MIN_SHARE:
            largest.append({**_account_json(*account), "share": round(means[account], 4), "most": most, "slot": slot})
    return largest


def _account_json(kind: str, name: str) -> dict[str, str]:
    """Kind and display name of an account."""
    words = _SERVER_WORK.get(kind), None if name == NONE else name
    return {"kind": kind, "account": " ".join(filter(None, words))}
