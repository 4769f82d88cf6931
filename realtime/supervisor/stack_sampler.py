"""Finds out what blocks a worker's loop, while it does: asks the blocked process for its stack, and tells the log.

When to ask and whom to blame is decided by `realtime.supervision.incidents`; here are the signals, pipes and clocks.
"""

from __future__ import annotations

import sysconfig
import time
from collections.abc import Iterator, Mapping
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure

from realtime.config.settings import AppSettings, LoopSettings
from realtime.process import log, stack_dumps
from realtime.supervision import stacks
from realtime.supervision.incidents import IncidentLog, LoopInvestigation, StackRequest
from realtime.supervision.pool import BROKER
from realtime.supervision.stacks import CodeOrigin
from realtime.supervisor.child_process import ChildProcess
from realtime.supervisor.health_monitor import HealthMonitor

# Seconds for a process to write its stack. One that is stopped does not.
DUMP_TIMEOUT = 5.0
_SIGNALS = {StackRequest.STACK: stack_dumps.STACK, StackRequest.STACKS: stack_dumps.STACKS}

_log = Logger(observer=log.observer)


class StackSampler:
    """An investigation into each worker's process that is there; `incidents` has what they found."""

    def __init__(
        self,
        reactor: Any,
        monitor: HealthMonitor,
        loop: LoopSettings,
        app: AppSettings,
        processes: Mapping[int, ChildProcess],
    ) -> None:
        """processes: by slot, the live dictionary of those that run."""
        self.incidents = IncidentLog()
        self._reactor = reactor
        self._monitor = monitor
        self._loop = loop
        self._origin = CodeOrigin(_own(app), _foreign())
        self._processes = processes
        self._investigations: dict[int, tuple[ChildProcess, LoopInvestigation]] = {}
        monitor.after_check.append(self.check)

    def check(self) -> None:
        """Look after every worker. Called by the monitor, and cheap while all is well."""
        for slot, health in self._monitor.health.items():
            process, investigation = self._current(slot)
            if process is None or investigation is None or health.vitals is None:
                continue
            if investigation.incident is None and health.blocked < self._loop.lagging:
                continue
            wanted, line = investigation.update(
                health.vitals, health.blocked, process.running, self._reactor.seconds(), time.time()
            )
            self._tell(line)
            if wanted is not None:
                self._ask(process, investigation, wanted)

    def log_all_stacks(self, slot: int) -> None:
        """The slot's process is stuck and is killed in a moment: put the stacks of all its threads into the log."""
        process, investigation = self._current(slot)
        if process is None:
            return

        name = "the broker" if slot == BROKER else f"worker {slot}"

        def answered(text: str) -> None:
            _log.error("{name} is stuck; all its threads:\n{text}", name=name, text=text.rstrip())
            if investigation is not None:
                investigation.record_final_stacks(text)

        def silent(_: Failure) -> None:
            _log.error("{name} is stuck and wrote no stacks: it is stopped, or deep in the kernel", name=name)
            if investigation is not None:
                investigation.record_final_stacks("")

        answer: Deferred[str] = process.dump(stack_dumps.STACKS)
        answer.addTimeout(DUMP_TIMEOUT, self._reactor)
        answer.addCallbacks(answered, silent)

    def _current(self, slot: int) -> tuple[ChildProcess | None, LoopInvestigation | None]:
        """The slot's process, and the investigation into it."""
        process = self._processes.get(slot)
        before, investigation = self._investigations.get(slot, (None, None))
        if before is process:
            return process, investigation
        if investigation is not None:
            del self._investigations[slot]
            self._tell(investigation.close("the process ended", self._reactor.seconds()))
        if process is None:
            return None, None
        investigation = LoopInvestigation(slot, process.pid, self._loop, self._origin, self.incidents)
        self._investigations[slot] = process, investigation
        return process, investigation

    def _ask(self, process: ChildProcess, investigation: LoopInvestigation, wanted: StackRequest) -> None:
        def answered(text: str) -> None:
            vitals = process.vitals
            if vitals is not None:
                investigation.record_stacks(stacks.parse(text), vitals, process.running)

        answer: Deferred[str] = process.dump(_SIGNALS[wanted])
        answer.addTimeout(DUMP_TIMEOUT, self._reactor)
        answer.addCallback(answered).addErrback(_no_answer)

    def _tell(self, line: str) -> None:
        if line:
            _log.warn("{line}", line=line)


def _no_answer(failure: Failure) -> None:
    _log.debug("no stack: {reason}", reason=failure.getErrorMessage())


def _foreign() -> Iterator[str]:
    """The folders of Python, of what is installed, and of this server."""
    paths = sysconfig.get_paths()
    for name in ("stdlib", "platstdlib", "purelib", "platlib"):
        yield paths[name]
    # In a virtual environment the standard library is elsewhere.
    yield str(Path(sysconfig.__file__).parent)
    yield str(Path(__file__).parent.parent)


def _own(app: AppSettings) -> Iterator[str]:
    """The folder of the application, and where it is installed as a package, that package's."""
    if app.path:
        yield app.path
    package = app.module.partition(":")[0].partition(".")[0]
    spec = PathFinder.find_spec(package, [app.path] if app.path else None) if package else None
    if spec is not None:
        yield from spec.submodule_search_locations or ([spec.origin] if spec.origin else [])
