"""Stack sampler: requests stacks from a worker while its loop is blocked, and logs the code that blocks it.

`realtime.supervision.incidents` decides when to request a stack and which code to blame; this module has the signals,
pipes and clocks.
"""

from __future__ import annotations

import os
import site
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
from realtime.supervision.slots import BROKER
from realtime.supervision.stacks import CodeOrigin
from realtime.supervisor.child_process import ChildProcess
from realtime.supervisor.health_monitor import HealthMonitor

# Seconds for a process to write its stack. A stopped process (SIGSTOP) does not write it.
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
        """processes: the running ones by slot, a live dictionary. monitor: calls `check` after each of its checks."""
        self.incidents = IncidentLog()
        self._reactor = reactor
        self._monitor = monitor
        self.configure(loop, app)
        self._processes = processes
        self._investigations: dict[int, tuple[ChildProcess, LoopInvestigation]] = {}
        monitor.after_check.append(self.check)

    def configure(self, loop: LoopSettings, app: AppSettings) -> None:
        """Use other limits, and another application, for processes that start from now on."""
        self._loop = loop
        self._origin = CodeOrigin(_application_paths(app), _foreign_paths())

    def check(self) -> None:
        """Update the investigation of every worker. Cheap while all loops turn."""
        for slot, health in self._monitor.health.items():
            process, investigation = self._current(slot)
            if process is None or investigation is None or health.vitals is None:
                continue
            if investigation.incident is None and health.blocked < self._loop.lagging:
                continue
            request, line = investigation.update(
                health.vitals,
                health.blocked,
                process.running,
                self._reactor.seconds(),
                time.time(),
                process.latest_calls,
            )
            self._warn(line)
            if request is not None:
                self._request_stack(process, investigation, request)

    def log_all_stacks(self, process: ChildProcess) -> None:
        """Log the stacks of all threads of a process that is stuck and about to be killed."""
        current, investigation = self._current(process.slot)
        if current is not process:  # it does not serve its slot yet, or no longer
            investigation = None
        name = "the broker" if process.slot == BROKER else f"worker {process.slot}"

        def answered(text: str) -> None:
            _log.error("{name} is stuck; all its threads:\n{text}", name=name, text=text.rstrip())
            if investigation is not None:
                investigation.record_final_stacks(text)

        def timed_out(_: Failure) -> None:
            _log.error("{name} is stuck and wrote no stacks: it is stopped, or deep in the kernel", name=name)
            if investigation is not None:
                investigation.record_final_stacks("")

        answer: Deferred[str] = process.dump(stack_dumps.STACKS)
        answer.addTimeout(DUMP_TIMEOUT, self._reactor)
        answer.addCallbacks(answered, timed_out)

    def _current(self, slot: int) -> tuple[ChildProcess | None, LoopInvestigation | None]:
        """Return the slot's process and its investigation. A new process in the slot closes the previous one."""
        process = self._processes.get(slot)
        before, investigation = self._investigations.get(slot, (None, None))
        if before is process:
            return process, investigation
        if investigation is not None:
            del self._investigations[slot]
            self._warn(investigation.close("the process ended", self._reactor.seconds()))
        if process is None:
            return None, None
        investigation = LoopInvestigation(slot, process.pid, self._loop, self._origin, self.incidents)
        self._investigations[slot] = process, investigation
        return process, investigation

    def _request_stack(self, process: ChildProcess, investigation: LoopInvestigation, request: StackRequest) -> None:
        def answered(text: str) -> None:
            vitals = process.vitals
            if vitals is not None:
                investigation.record_stacks(stacks.parse(text), vitals, process.running)

        answer: Deferred[str] = process.dump(_SIGNALS[request])
        answer.addTimeout(DUMP_TIMEOUT, self._reactor)
        answer.addCallback(answered).addErrback(_log_no_stack)

    def _warn(self, line: str) -> None:
        if line:
            _log.warn("{line}", line=line)


def _log_no_stack(failure: Failure) -> None:
    _log.debug("a blocked worker wrote no stack: {reason}", reason=failure.getErrorMessage())


def _foreign_paths() -> Iterator[str]:
    """Yield the folders of Python, of installed packages, and of this server."""
    # Not from `sysconfig`, which reads the whole configuration of Python's build for the same.
    yield str(Path(os.__file__).parent)
    yield from site.getsitepackages()
    yield str(Path(__file__).parent.parent)


def _application_paths(app: AppSettings) -> Iterator[str]:
    """Yield the folder of the application, and the folder or file of its package if it is installed."""
    if app.path:
        yield app.path
    package = app.module.partition(":")[0].partition(".")[0]
    spec = PathFinder.find_spec(package, [app.path] if app.path else None) if package else None
    if spec is not None:
        yield from spec.submodule_search_locations or ([spec.origin] if spec.origin else [])
