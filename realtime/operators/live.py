"""The live figures: what the operators' page and `realtime top` show, brought up to date once a second.

Everything is known here already (`realtime.supervisor.health_monitor`, `realtime.supervisor.stack_sampler`), but for
the rates and for what the loops spend their time on: once a second each process is asked for those counters. A process
that has not answered is not asked again; its figures stay those of its page, which can be read while its loop is
blocked.
"""

from __future__ import annotations

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

from realtime.metrics import Sample
from realtime.process import log
from realtime.process.heartbeat import LOOP_SECONDS
from realtime.supervision.incidents import Incident
from realtime.supervision.rates import Rates
from realtime.supervisor.health_monitor import HealthMonitor
from realtime.supervisor.stack_sampler import StackSampler

# Seconds between two snapshots.
INTERVAL = 1.0
# Snapshots whose figures a new viewer is shown as the past.
KEPT = 300
# Places and incidents in a snapshot; /incidents has all.
MOST_PLACES = 10
MOST_INCIDENTS = 30

# Seconds over which the shares of the loops are averaged, so that their order can be read.
SHARE_SPAN = 5
# Shares in a snapshot, of each worker and of all; /metrics has every one.
MOST_SHARES = 10
# A share that is not worth a line.
_LEAST_SHARE = 0.0005

# Counters, and the names that their rates go by.
_COUNTED = {
    "realtime_messages_received": "received",
    "realtime_messages_sent": "sent",
    "realtime_connects": "connects",
}

# What accounts of the server's own work are called, by kind.
_OWN = {
    "fanout": "fan-out",
    "protocol": "client protocol",
    "http": "HTTP",
    "engine": "link to the broker",
    "timers": "timers",
    "other": "other work",
}

_log = Logger(observer=log.observer)


class MetricsSource(Protocol):
    """A process with counters."""

    pid: int

    def collect(self, names: Collection[str] = ()) -> Deferred[list[Sample]]: ...


class LiveFigures:
    """The snapshots. added: called with the JSON of every new one; add your own."""

    def __init__(
        self,
        reactor: Any,
        monitor: HealthMonitor,
        sampler: StackSampler,
        processes: Mapping[int, MetricsSource],
        summary: Callable[[], dict[str, Any]],
    ) -> None:
        """processes: by slot, the live dictionary. summary: the state of the server, as /health shows it."""
        self.added: list[Callable[[bytes], None]] = []
        self._reactor = reactor
        self._monitor = monitor
        self._sampler = sampler
        self._processes = processes
        self._summary = summary
        self._rates = Rates[str]()
        self._shares = Rates[tuple[str, str]](SHARE_SPAN)  # of the loop, by kind and name of an account
        self._asked: dict[int, MetricsSource] = {}
        self._peaks: dict[int, float] = {}  # the worst lag of each worker since the latest snapshot
        self._past: deque[tuple[float, list[tuple[float, float, int]]]] = deque(maxlen=KEPT)
        self._json = b"null"
        self._timer = LoopingCall(self._turn)
        self._timer.clock = reactor
        monitor.after_check.append(self._look)

    def start(self) -> None:
        """Make the first snapshot, and go on."""
        self._timer.start(INTERVAL).addErrback(lambda failure: _log.failure("no more live figures", failure))

    def stop(self) -> None:
        """Make no more. Idempotent."""
        if self._timer.running:
            self._timer.stop()
        if self._look in self._monitor.after_check:
            self._monitor.after_check.remove(self._look)

    @property
    def json(self) -> bytes:
        """The latest snapshot."""
        return self._json

    def past(self) -> bytes:
        """What the charts show, oldest first, as JSON: Unix time, and of each worker lag, utilization, connections."""
        return msgspec.json.encode(list(self._past))

    def _look(self) -> None:
        """A second is long: a loop that was late in between shows."""
        for slot, health in self._monitor.health.items():
            if health.lag > self._peaks.get(slot, 0.0):
                self._peaks[slot] = health.lag

    def _turn(self) -> None:
        for slot, process in self._processes.items():
            if self._asked.get(slot) is not process:
                self._ask(slot, process)
        self._json = msgspec.json.encode(self._snapshot())
        for tell in self.added:
            try:
                tell(self._json)
            except Exception:
                _log.failure("a snapshot was not told")

    def _ask(self, slot: int, process: MetricsSource) -> None:
        def answered(samples: list[Sample]) -> None:
            now = self._reactor.seconds()
            self._rates.record(slot, process.pid, _totals(samples), now)
            self._shares.record(slot, process.pid, _charged(samples), now)

        def over(_: object) -> None:
            if self._asked.get(slot) is process:
                del self._asked[slot]

        def not_now(failure: Failure) -> None:
            _log.debug("no counters of slot {slot}: {reason}", slot=slot, reason=failure.getErrorMessage())

        self._asked[slot] = process
        process.collect([*_COUNTED, LOOP_SECONDS]).addCallback(answered).addErrback(not_now).addBoth(over)

    def _snapshot(self) -> dict[str, Any]:
        at, now = time.time(), self._reactor.seconds()
        body = self._summary()
        points = []
        shares = {}
        for worker in body["workers"]:
            slot = worker["slot"]
            worker["peak_lag"] = self._peaks.get(slot, 0.0)
            worker["rates"] = self._rates.of(slot, worker["pid"], now)
            share = self._shares.of(slot, worker["pid"], now)
            worker["loop"] = None if share is None else _most(share)
            if share is not None:
                shares[slot] = share
            points.append((worker["peak_lag"], worker["utilization"] or 0.0, worker["connections"] or 0))
        self._peaks.clear()
        self._past.append((at, points))
        ledger = self._sampler.incidents
        latest = islice(reversed(ledger.recent), MOST_INCIDENTS)
        return {
            "at": at,
            **body,
            "loop": _together(shares),
            "places": worst_places(ledger.blocks)[:MOST_PLACES],
            "incidents": [_brief(incident) for incident in latest],
        }


def worst_places(blocks: Mapping[tuple[str, str], Any]) -> list[dict[str, Any]]:
    """What blocked the loops, by handler and place, the longest together first."""
    places = [
        {"handler": handler, "place": place, "count": one.count, "seconds": round(one.seconds, 6)}
        for (handler, place), one in blocks.items()
    ]
    places.sort(key=itemgetter("seconds"), reverse=True)
    return places


def _brief(incident: Incident) -> dict[str, Any]:
    """An incident without its stacks, which /incidents has."""
    left_out = ("stack", "stacks")
    return {name: getattr(incident, name) for name in incident.__struct_fields__ if name not in left_out}


def _charged(samples: Iterable[Sample]) -> dict[tuple[str, str], float]:
    charged = {}
    for sample in samples:
        if sample.name == LOOP_SECONDS:
            labels = dict(sample.labels)
            charged[labels.get("kind", ""), labels.get("name", "")] = sample.value
    return charged


def _most(shares: Mapping[tuple[str, str], float]) -> list[dict[str, Any]]:
    """What takes most of a loop: the largest shares first."""
    most = sorted(shares.items(), key=itemgetter(1), reverse=True)[:MOST_SHARES]
    return [{**_account(*key), "share": round(share, 4)} for key, share in most if share >= _LEAST_SHARE]


def _together(shares: Mapping[int, Mapping[tuple[str, str], float]]) -> list[dict[str, Any]]:
    """What takes most of all loops that tell, the largest mean share first. most, slot: the largest of one loop."""
    keys = {key for each in shares.values() for key in each}
    means = {key: sum(each.get(key, 0.0) for each in shares.values()) / len(shares) for key in keys}
    together = []
    for key in sorted(keys, key=lambda key: (-means[key], key))[:MOST_SHARES]:
        slot = max(shares, key=lambda slot: shares[slot].get(key, 0.0))
        most = round(shares[slot].get(key, 0.0), 4)
        if means[key] >= _LEAST_SHARE:
            together.append({**_account(*key), "share": round(means[key], 4), "most": most, "slot": slot})
    return together


def _account(kind: str, name: str) -> dict[str, str]:
    return {"kind": kind, "account": " ".join(filter(None, (_OWN.get(kind), name)))}


def _totals(samples: Iterable[Sample]) -> dict[str, float]:
    totals = dict.fromkeys(_COUNTED.values(), 0.0)
    for sample in samples:
        if sample.name in _COUNTED:
            totals[_COUNTED[sample.name]] += sample.value
    return totals
