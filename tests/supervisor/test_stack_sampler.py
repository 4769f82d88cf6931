"""Stack sampler: the stacks it requests, the lines it logs, and the files it counts as the application's."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.logger import LogEvent, capturedLogs, formatEvent

import realtime
import twisted
from realtime.config.settings import AppSettings, LoopSettings
from realtime.process import stack_dumps
from realtime.supervision.health import Condition, Health
from realtime.supervision.stacks import CodeOrigin
from realtime.supervision.vitals import LatestCalls, ProcessState, RunningHandler, Vitals
from realtime.supervisor.stack_sampler import DUMP_TIMEOUT, StackSampler, _application_paths, _foreign_paths


def origin(module: str = "", path: str = "") -> CodeOrigin:
    return CodeOrigin(_application_paths(AppSettings(module, path)), _foreign_paths())


def test_python_installed_packages_and_this_server_are_foreign_code() -> None:
    for module in (asyncio, json, msgspec, twisted, realtime):
        assert not origin().is_application_code(str(module.__file__))


def test_files_of_the_application_are_application_code_in_any_folder(tmp_path: Path) -> None:
    (tmp_path / "chat.py").touch()
    assert origin("chat:app", str(tmp_path)).is_application_code(str(tmp_path / "chat.py"))
    assert origin("chat:app", str(tmp_path)).is_application_code(str(tmp_path / "rooms" / "names.py"))
    assert origin().is_application_code(str(tmp_path / "elsewhere.py"))


def test_an_installed_application_is_application_code() -> None:
    # Stands for any installed package; finding it does not import it.
    assert origin("twisted.web:app").is_application_code(str(twisted.__file__))
    assert not origin("twisted.web:app").is_application_code(str(msgspec.__file__))


def test_an_application_inside_the_servers_folder_is_application_code() -> None:
    folder = Path(realtime.__file__).parent
    assert origin("demo:app", str(folder / "demo")).is_application_code(str(folder / "demo" / "demo.py"))
    assert not origin("demo:app", str(folder / "demo")).is_application_code(str(folder / "app.py"))


def test_a_missing_application_module_is_no_error() -> None:
    assert not origin("no_such_module_anywhere:app").is_application_code(str(json.__file__))


STACK = """\
Stack (most recent call first):
  File "/app/chat.py", line 7 in report
  File "<frozen runpy>", line 198 in _run_module_as_main
"""


class Process:
    """A worker process whose dumps the test writes."""

    pid = 4321
    slot = 0

    def __init__(self) -> None:
        self.vitals = Vitals(1, 0.0, 0, 0, ProcessState.READY)
        self.running: RunningHandler | None = RunningHandler("rpc report", "report")
        self.latest_calls: LatestCalls | None = None
        self.dumps: list[tuple[int, Deferred[str]]] = []

    def dump(self, number: int) -> Deferred[str]:
        self.dumps.append((number, Deferred()))
        return self.dumps[-1][1]


class Scene:
    """A sampler of one worker, on a clock that the test sets."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.clock.advance(100)
        self.process = Process()
        self.processes: dict[int, Any] = {0: self.process}
        self.monitor: Any = SimpleNamespace(health={}, after_check=[])
        self.sampler = StackSampler(
            self.clock, self.monitor, LoopSettings(), AppSettings("chat:app", "/app"), self.processes
        )

    def check(self, blocked: float) -> None:
        """Advance the clock by 10 ms, and check the worker, whose loop has been blocked for `blocked` seconds."""
        self.clock.advance(0.01)
        vitals = self.process.vitals
        self.monitor.health[0] = Health(0, Condition.LAGGING, 0.0, blocked=blocked, vitals=vitals)
        [after_check] = self.monitor.after_check
        after_check()

    def block(self) -> None:
        """Begin a turn of the loop, and check it after 60 ms."""
        since = int(self.clock.seconds() * 1e9)
        self.process.vitals = Vitals(1, 0.0, 0, 0, ProcessState.READY, busy_since=since)
        self.clock.advance(0.05)
        self.check(0.06)

    def end_turn(self) -> None:
        self.process.vitals = Vitals(2, 0.0, 0, 0, ProcessState.READY)
        self.check(0.0)


def lines(events: list[LogEvent]) -> list[str | None]:
    return [formatEvent(event) for event in events]


def test_a_blocked_worker_is_asked_for_its_stack_and_the_block_is_logged() -> None:
    scene = Scene()
    scene.check(0.0)
    assert scene.process.dumps == []
    scene.block()
    [(number, answer)] = scene.process.dumps
    assert number == stack_dumps.STACK
    answer.callback(STACK)
    with capturedLogs() as events:
        scene.end_turn()
    [line] = lines(events)
    assert line is not None and line.startswith("worker 0 was blocked for 0.07")
    assert line.endswith(" s at /app/chat.py:7 in report (rpc report for report)")
    assert [incident.place for incident in scene.sampler.incidents.recent] == ["/app/chat.py:7"]


def test_a_new_process_in_the_slot_closes_the_incident_of_its_predecessor() -> None:
    scene = Scene()
    scene.block()
    scene.processes[0] = Process()
    with capturedLogs() as events:
        scene.check(0.0)
    assert len(events) == 1
    [incident] = scene.sampler.incidents.recent
    assert (incident.lasts, incident.ending) == (False, "the process ended")


def test_all_stacks_of_a_stuck_process_are_logged_and_kept() -> None:
    scene = Scene()
    scene.block()
    with capturedLogs() as events:
        scene.sampler.log_all_stacks(scene.process)  # type: ignore[arg-type]
        number, answer = scene.process.dumps[-1]
        answer.callback("Thread 1\n")
    assert number == stack_dumps.STACKS
    assert lines(events) == ["worker 0 is stuck; all its threads:\nThread 1"]
    assert scene.sampler.incidents.recent[-1].stacks == "Thread 1\n"


def test_a_stopped_process_writes_no_stacks_and_the_log_says_so() -> None:
    scene = Scene()
    with capturedLogs() as events:
        scene.sampler.log_all_stacks(scene.process)  # type: ignore[arg-type]
        scene.clock.advance(DUMP_TIMEOUT)
    assert lines(events) == ["worker 0 is stuck and wrote no stacks: it is stopped, or deep in the kernel"]
