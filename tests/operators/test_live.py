"""The live figures: rates, loop time, peak lags, chart points, and processes that do not answer."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from realtime.metrics import Metrics, Sample
from realtime.operators.exposition import exposition, supervisor_samples
from realtime.operators.live import KEPT, MAX_INCIDENTS, MAX_PLACES, MAX_SHARES, LiveFigures
from realtime.operators.summary import Failures
from realtime.supervision.health import Condition, Health
from realtime.supervision.incidents import Incident, IncidentLog
from realtime.supervision.vitals import ProcessState, Vitals

VITALS = Vitals(int(1e9), 0.0, 0, 0, ProcessState.READY)


class Child:
    """Stands for a process; the test gives its answers."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.asked: list[Deferred[list[Sample]]] = []

    def collect(self, names: Collection[str] = ()) -> Deferred[list[Sample]]:
        assert set(names) >= {"realtime_messages_sent", "realtime_loop_seconds"}
        self.asked.append(Deferred())
        return self.asked[-1]

    def answer(self, sent: float, **seconds: float) -> None:
        """Answer the latest request. seconds: of loop time, by kind and name, as in handler_f or timers."""
        samples = [Sample("realtime_messages_sent", "counter", "Messages.", [], sent)]
        for account, spent in seconds.items():
            kind, _, name = account.partition("_")
            labels = [("kind", kind), ("name", name or "none")]
            samples.append(Sample("realtime_loop_seconds", "counter", "Time.", labels, spent))
        self.asked[-1].callback(samples)


class Watched:
    """Stands for the supervisor's `HealthMonitor` and `StackSampler`."""

    def __init__(self) -> None:
        self.after_check: list[Any] = []
        self.health: dict[int, Health] = {}
        self.broker: Health | None = None
        self.incidents = IncidentLog()

    def check(self, lag: float) -> None:
        self.health[0] = Health(0, Condition.HEALTHY, 0.0, lag, vitals=VITALS)
        for listener in self.after_check:
            listener()


class Stage:
    """The live figures of a server with one worker."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.child = Child(100)
        self.processes = {0: self.child}
        self.watched: Any = Watched()
        self.metrics = Metrics()
        self.failures = Failures()
        self.monitor = self.sampler = self.watched
        self.live = LiveFigures(self.clock, self, self.failures, self.summary)
        self.live.start()

    def summary(self, now: float) -> dict[str, Any]:
        figures = {"utilization": 0.5, "connections": 7}
        workers = [{"slot": slot, "pid": child.pid, **figures} for slot, child in self.processes.items()]
        return {"workers": workers, "broker": None}

    @property
    def snapshot(self) -> dict[str, Any]:
        return json.loads(self.live.json)

    @property
    def worker(self) -> dict[str, Any]:
        return self.snapshot["workers"][0]


def test_rates_need_two_answers() -> None:
    stage = Stage()
    stage.child.answer(10)
    stage.clock.advance(1)
    assert stage.worker["rates"] is None
    stage.child.answer(40)
    stage.clock.advance(1)
    assert stage.worker["rates"] == {"received": 0.0, "sent": 30.0, "connects": 0.0}


def test_a_silent_process_is_not_asked_again_and_its_successor_is() -> None:
    stage = Stage()
    for _ in range(5):
        stage.clock.advance(1)
    assert len(stage.child.asked) == 1
    stage.processes[0] = Child(101)
    stage.clock.advance(1)
    assert len(stage.processes[0].asked) == 1
    stage.child.answer(1)
    stage.processes[0].asked[0].errback(ConnectionError("gone"))
    stage.clock.advance(1)
    assert len(stage.processes[0].asked) == 2
    assert stage.worker["rates"] is None


def test_loop_time_is_shown_as_shares_largest_first() -> None:
    stage = Stage()
    stage.child.answer(0, handler_f=1.0, timers=5.0, other=9.0)
    stage.clock.advance(1)
    assert stage.worker["loop"] is None
    assert stage.snapshot["loop"] == []
    stage.child.answer(0, handler_f=1.25, timers=5.01, other=9.0001, fanout_chat=0.5)
    stage.clock.advance(1)
    assert stage.worker["loop"] == [
        {"kind": "fanout", "account": "fan-out chat", "share": 0.5},
        {"kind": "handler", "account": "f", "share": 0.25},
        {"kind": "timers", "account": "timers", "share": 0.01},
    ]


def test_shares_cover_the_last_seconds() -> None:
    stage = Stage()
    for spent in (0.0, 0.5, 0.5, 0.5, 0.5, 0.5):
        stage.child.answer(0, handler_f=spent)
        stage.clock.advance(1)
    assert stage.worker["loop"] == [{"kind": "handler", "account": "f", "share": 0.1}]
    stage.child.answer(0, handler_f=0.5)
    stage.clock.advance(1)
    assert stage.worker["loop"] == []


def test_mean_shares_name_the_worker_with_the_largest_share() -> None:
    stage = Stage()
    stage.processes[1] = other = Child(101)
    stage.processes[2] = Child(102)  # does not answer, and is left out
    stage.clock.advance(1)
    stage.child.answer(0, handler_f=0.0, other=0.0)
    other.answer(0, handler_f=0.0, other=0.0)
    stage.clock.advance(1)
    stage.child.answer(0, handler_f=0.2, other=0.5)
    other.answer(0, handler_f=0.8, other=0.3)
    stage.clock.advance(1)
    assert stage.snapshot["loop"] == [
        {"kind": "handler", "account": "f", "share": 0.5, "most": 0.8, "slot": 1},
        {"kind": "other", "account": "other work", "share": 0.4, "most": 0.5, "slot": 0},
    ]


def test_the_number_of_shares_is_bounded() -> None:
    stage = Stage()
    stage.child.answer(0)
    stage.clock.advance(1)
    stage.child.answer(0, **{f"handler_{number}": number / 100 for number in range(1, 40)})
    stage.clock.advance(1)
    shares = [account["share"] for account in stage.worker["loop"]]
    assert shares == [number / 100 for number in range(39, 39 - MAX_SHARES, -1)]
    assert [account["share"] for account in stage.snapshot["loop"]] == shares


def test_the_peak_lag_of_each_second_is_in_one_snapshot() -> None:
    stage = Stage()
    for lag in (0.01, 0.7, 0.02):
        stage.watched.check(lag)
    stage.clock.advance(1)
    assert stage.worker["peak_lag"] == 0.7
    stage.watched.check(0.03)
    stage.clock.advance(1)
    assert stage.worker["peak_lag"] == 0.03


def test_spikes_of_lag_are_kept_for_the_next_scrape() -> None:
    stage = Stage()
    for lag in (0.002, 1.5, 0.3):
        stage.watched.check(lag)
        stage.watched.check(0.001)
        stage.clock.advance(1)
    lines = exposition(supervisor_samples(stage.metrics)).decode().splitlines()
    name, labels = "realtime_loop_peak_lag_seconds", 'process="worker",worker="0"'
    assert f"# TYPE {name} histogram" in lines
    assert f'{name}_bucket{{le="0.005",{labels}}} 1.0' in lines
    assert f'{name}_bucket{{le="1.0",{labels}}} 2.0' in lines
    assert f'{name}_bucket{{le="2.5",{labels}}} 3.0' in lines
    assert f"{name}_count{{{labels}}} 3.0" in lines


def test_chart_points_are_bounded_and_end_with_the_latest() -> None:
    stage = Stage()
    for _ in range(KEPT + 20):
        stage.clock.advance(1)
    stage.watched.check(0.2)
    stage.clock.advance(1)
    past = json.loads(stage.live.past())
    assert len(past) == KEPT
    assert past[-1][1] == [[0.2, 0.5, 7]]


def test_places_are_worst_first_and_incidents_newest_first_without_stacks() -> None:
    stage = Stage()
    for number in range(50):
        incident = Incident(slot=0, pid=1, at=number, duration=number, lasts=False, place=f"a.py:{number}", stack=["x"])
        stage.watched.incidents.recent.append(incident)
        stage.watched.incidents.count(incident)
    stage.clock.advance(1)
    snapshot = json.loads(stage.live.json)
    assert [place["place"] for place in snapshot["places"]] == [f"a.py:{49 - n}" for n in range(MAX_PLACES)]
    assert [incident["at"] for incident in snapshot["incidents"]] == [49 - n for n in range(MAX_INCIDENTS)]
    assert not {"stack", "stacks"} & set(snapshot["incidents"][0])


def test_listeners_get_each_snapshot_until_stop() -> None:
    stage = Stage()
    received: list[bytes] = []
    stage.live.add_listener(lambda _: print(1 / 0))
    stage.live.add_listener(received.append)
    stage.clock.advance(1)
    assert received == [stage.live.json]
    stage.live.stop()
    stage.clock.advance(5)
    assert len(received) == 1
    assert stage.watched.after_check == []


def test_a_handler_that_is_none_is_null() -> None:
    stage = Stage()
    incident = Incident(slot=0, pid=1, at=1.0, duration=0.1, lasts=False, place="a.py:1")
    stage.watched.incidents.recent.append(incident)
    stage.watched.incidents.count(incident)
    stage.clock.advance(1)
    assert stage.snapshot["places"][0]["handler"] is None
    shown = stage.snapshot["incidents"][0]
    assert (shown["handler"], shown["subject"], shown["function"]) == (None, None, None)
