"""The summary of the server: its problems, worst first, from processes and from counters of failures."""

from __future__ import annotations

from typing import Any

import pytest

from realtime.config.settings import LoopSettings, WorkersSettings
from realtime.metrics import Sample
from realtime.operators.summary import MAX_INTERNAL_ERRORS, SPAN, WATCHED, Failures, Summary
from realtime.supervision.health import Condition, Health
from realtime.supervision.pool import Pool
from realtime.supervision.slots import BROKER
from realtime.supervision.vitals import ProcessState, Vitals
from tests.operators.test_exposition import ROOT


def counter(name: str, value: float, **labels: str) -> Sample:
    return Sample(name, "counter", "Help.", list(labels.items()), value)


class Server:
    """Stands for the supervisor: a broker and `workers` workers, ready since time 0."""

    port, operator_port, steering = 8000, 8001, None

    def __init__(self, workers: int = 2) -> None:
        self.pool = Pool(workers, WorkersSettings(), LoopSettings(), 30.0)
        self.pool.start(0.0)
        self.processes: dict[int, Any] = {}
        self.children: dict[int, Any] = {}
        for number in self.pool.slots:
            self.pool.process_ready(self.pool.slots[number].process.generation, 0.0)
        self.monitor: Any = self
        self.health = {slot.number: Health(slot.number, Condition.HEALTHY, 0.0) for slot in self.pool.workers}
        self.broker = Health(BROKER, Condition.HEALTHY, 0.0)
        self.failures = Failures()
        self.summary = Summary(self, self.failures)

    def stop_turning(self, *slots: int) -> None:
        """Let 4 seconds pass in which these slots' loops do not turn."""
        for tick in range(41):
            now = tick / 10
            self.pool.tick(
                now, {slot.process.generation: now for slot in self.pool.slots.values() if slot.number not in slots}
            )

    def problems(self, now: float = 4.0) -> list[tuple[str, str]]:
        return [(problem.tone, problem.text) for problem in self.summary.read(now)["problems"]]


def test_a_healthy_server_has_no_problems() -> None:
    server = Server()
    assert server.problems() == []
    assert server.summary.read(0.0)["status"] == "ok"


def test_a_lost_redis_is_a_bad_problem_and_a_slow_one_a_warning() -> None:
    server = Server()
    gauges = [Sample(name, "gauge", "Help.", [], 1) for name in ("realtime_redis_away", "realtime_redis_lagging")]
    server.failures.record(BROKER, server, gauges, 4.0)
    assert server.problems() == [
        ("bad", "Redis servers or Clusters that can't be used: 1; see the log"),
        ("warn", "Redis servers that take more than a second to answer: 1"),
    ]


def test_a_stopped_broker_is_the_worst_problem() -> None:
    server = Server()
    server.broker = Health(BROKER, Condition.PRESSED, 0.0, 4.2)
    server.health[1] = Health(1, Condition.LAGGING, 0.0, 0.1)
    server.stop_turning(BROKER)
    assert server.problems() == [
        ("bad", "the broker is not turning its loop for 4 s: stopped or blocked"),
        ("warn", "worker 1 is lagging"),
    ]
    assert server.summary.read(4.0)["status"] == "the broker is not turning its loop for 4 s: stopped or blocked"


def test_a_broker_that_is_late_is_a_warning() -> None:
    server = Server()
    server.broker = Health(BROKER, Condition.LAGGING, 0.0, 0.1)
    assert server.problems(0.0) == [("warn", "the broker is lagging")]


def test_a_dead_a_restarting_and_a_crashing_broker_are_problems() -> None:
    server = Server()
    server.pool.process_exited(server.pool.slots[BROKER].process.generation, -9, 1.0)
    assert server.problems() == [("bad", "the broker is dead; it is restarted in a moment")]
    server.pool.tick(30.0, {})
    assert server.problems() == [("bad", "the broker is starting")]
    for death in range(2):
        server.pool.process_exited(server.pool.slots[BROKER].process.generation, 1, 31.0 + 100 * death)
        server.pool.tick(100.0 + 100 * death, {})
    assert server.problems() == [("bad", "the broker is crashing: 3 deaths in a row; see its errors in the log")]
    server.pool.process_ready(server.pool.slots[BROKER].process.generation, 201.0)
    assert server.problems() == [("warn", "the broker is crashing: 3 deaths in a row; see its errors in the log")]


def test_many_unhealthy_workers_are_one_problem() -> None:
    server = Server(8)
    for slot in range(5):
        server.health[slot] = Health(slot, Condition.PRESSED, 0.0, 0.3)
    assert server.problems(0.0) == [("warn", "5 of 8 workers are not healthy")]


def test_no_turning_worker_is_worse_than_all_else() -> None:
    server = Server()
    server.stop_turning(0, 1)
    assert server.problems()[0] == ("bad", "no worker's loop turns")


def test_errors_of_handlers_are_counted_over_workers_and_restarts_and_the_latest_is_named() -> None:
    server, name = Server(), "realtime_handler_errors"
    server.failures.record(0, 100, [counter(name, 3, handler="rpc a", exception="KeyError")], 10.0)
    server.failures.record(1, 101, [counter(name, 2, handler="rpc b", exception="OSError")], 40.0)
    server.failures.record(1, 102, [counter(name, 1, handler="rpc b", exception="OSError")], 50.0)
    shown = server.summary.read(60.0)["handler_errors"]
    assert (shown["count"], shown["last_minute"]) == (6, 6)
    assert server.problems(60.0) == [("warn", "errors of handlers in the last minute: 6; the latest: OSError in rpc b")]
    server.failures.record(0, 100, [counter(name, 4, handler="rpc a", exception="KeyError")], 61.0)
    shown = server.summary.read(10.0 + SPAN)["handler_errors"]
    assert (shown["count"], shown["last_minute"]) == (7, 4)
    assert (shown["handler"], shown["exception"]) == ("rpc a", "KeyError")
    assert server.problems(61.0 + SPAN) == []


def test_exceptions_in_the_servers_own_code_make_it_unhealthy_above_a_number_in_a_minute() -> None:
    server = Server()
    for count, tone in ((MAX_INTERNAL_ERRORS, "warn"), (MAX_INTERNAL_ERRORS + 1, "bad")):
        server.failures.record(0, 100, [counter("realtime_internal_errors", count)], 10.0)
        expected = f"exceptions in the server's own code in the last minute: {count}; see the log"
        assert server.problems(10.0) == [(tone, expected)]


@pytest.mark.parametrize(("outcome", "shown"), [("timeout", 1), ("full", 1), ("ok", 0), ("refused", 0)])
def test_only_failures_among_outcomes_are_problems(outcome: str, shown: int) -> None:
    server = Server()
    server.failures.record(0, 100, [counter("realtime_handler_calls", 5, handler="rpc f", outcome=outcome)], 1.0)
    assert len(server.problems(1.0)) == shown


def test_a_gauge_is_a_problem_while_its_process_lives() -> None:
    server = Server()
    server.failures.record(0, 100, [Sample("realtime_handler_threads_overdue", "gauge", "Threads.", [], 16)], 1.0)
    assert server.problems(500.0) == [("warn", "threads that run a handler past its time limit: 16")]
    server.failures.forget([1])
    assert server.problems(500.0) == []


def test_every_watched_metric_exists() -> None:
    code = "".join(path.read_text() for path in ROOT.glob("realtime/**/*.py") if path.name != "summary.py")
    assert [name for name in WATCHED if f'"{name}"' not in code] == []


def test_a_worker_that_is_being_replaced_shows_both_processes() -> None:
    server = Server()
    server.pool.reload(1.0)
    slot = server.pool.slots[0]
    assert slot.successor is not None
    assert server.problems() == [], "a replacement is no problem"
    [worker, other] = server.summary.read(2.0)["workers"]
    starting = {"role": "successor", "state": "preparing", "pid": None, "connections": None}
    assert (worker["state"], worker["replacement"], other["replacement"]) == ("ready", starting, None)
    server.children[slot.process.generation] = Old()
    server.pool.process_ready(slot.successor.generation, 2.0)
    handing = {"role": "predecessor", "state": "handing over", "pid": 4321, "connections": 40}
    assert server.summary.read(3.0)["workers"][0]["replacement"] == handing


class Old:
    """A process that hands over."""

    pid = 4321
    running = None
    vitals = Vitals(1, 0.0, 40, 0, ProcessState.READY)
