"""The live figures: what the operators' page and `realtime top` show, brought up to date once a second.

Everything is known here already (`realtime.server.watch`, `realtime.server.blame`), but for the rates: once a second
each process is asked for its counters. A process that has not answered is not asked again; its figures stay those of
its page, which can be read while its loop is blocked.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from operator import itemgetter
from typing import Any, Protocol

import msgspec
from twisted.internet.defer import Deferred
from twisted.internet.task import LoopingCall
from twisted.logger import Logger
from twisted.python.failure import Failure

from realtime.metrics import Sample
from realtime.server.blame import Blame
from realtime.server.watch import Watch
from realtime.supervision.incidents import Incident
from realtime.supervision.rates import Rates

# Seconds between two snapshots.
INTERVAL = 1.0
# Snapshots whose figures a new viewer is shown as the past.
KEPT = 300
# Places and incidents in a snapshot; /incidents has all.
MOST_PLACES = 10
MOST_INCIDENTS = 30

# Counters, and the names that their rates go by.
_COUNTED = {
    "realtime_messages_received": "received",
    "realtime_messages_sent": "sent",
    "realtime_connects": "connects",
}

_log = Logger()


class Counting(Protocol):
    """A process with counters."""

    pid: int

    def collect(self) -> Deferred[list[Sample]]: ...


class Live:
    """The snapshots. added: called with the JSON of every new one; add your own."""

    def __init__(
        self,
        reactor: Any,
        watch: Watch,
        blame: Blame,
        processes: Mapping[int, Counting],
        summary: Callable[[], dict[str, Any]],
    ) -> None:
        """processes: by slot, the live dictionary. summary: the state of the server, as /health shows it."""
        self.added: list[Callable[[bytes], None]] = []
        self._reactor = reactor
        self._watch = watch
        self._blame = blame
        self._processes = processes
        self._summary = summary
        self._rates = Rates()
        self._asked: dict[int, Counting] = {}
        self._peaks: dict[int, float] = {}  # the worst lag of each worker since the latest snapshot
        self._past: deque[tuple[float, list[tuple[float, float, int]]]] = deque(maxlen=KEPT)
        self._json = b"null"
        self._timer = LoopingCall(self._turn)
        self._timer.clock = reactor
        watch.looks.append(self._look)

    def start(self) -> None:
        """Make the first snapshot, and go on."""
        self._timer.start(INTERVAL).addErrback(lambda failure: _log.failure("no more live figures", failure))

    def stop(self) -> None:
        """Make no more. Idempotent."""
        if self._timer.running:
            self._timer.stop()
        if self._look in self._watch.looks:
            self._watch.looks.remove(self._look)

    @property
    def json(self) -> bytes:
        """The latest snapshot."""
        return self._json

    def past(self) -> bytes:
        """What the charts show, oldest first, as JSON: Unix time, and of each worker lag, utilisation, connections."""
        return msgspec.json.encode(list(self._past))

    def _look(self) -> None:
        """A second is long: a loop that was late in between shows."""
        for slot, health in self._watch.health.items():
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

    def _ask(self, slot: int, process: Counting) -> None:
        def answered(samples: list[Sample]) -> None:
            self._rates.count(slot, process.pid, _totals(samples), self._reactor.seconds())

        def over(_: object) -> None:
            if self._asked.get(slot) is process:
                del self._asked[slot]

        def not_now(failure: Failure) -> None:
            _log.debug("no counters of slot {slot}: {reason}", slot=slot, reason=failure.getErrorMessage())

        self._asked[slot] = process
        process.collect().addCallback(answered).addErrback(not_now).addBoth(over)

    def _snapshot(self) -> dict[str, Any]:
        at, now = time.time(), self._reactor.seconds()
        body = self._summary()
        points = []
        for worker in body["workers"]:
            slot = worker["slot"]
            worker["peak_lag"] = self._peaks.get(slot, 0.0)
            worker["rates"] = self._rates.of(slot, worker["pid"], now)
            points.append((worker["peak_lag"], worker["utilisation"] or 0.0, worker["connections"] or 0))
        self._peaks.clear()
        self._past.append((at, points))
        ledger = self._blame.ledger
        latest = islice(reversed(ledger.recent), MOST_INCIDENTS)
        return {
            "at": at,
            **body,
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


def _totals(samples: Iterable[Sample]) -> dict[str, float]:
    totals = dict.fromkeys(_COUNTED.values(), 0.0)
    for sample in samples:
        if sample.name in _COUNTED:
            totals[_COUNTED[sample.name]] += sample.value
    return totals
