"""The trial of a new configuration: reads it and imports the application, in a process of its own.

So a mistake in either, or a hang, does not touch the running server. `realtime.app.trial` is the other side. The trial
of the installed program comes before the upgrade to it: `realtime.tap` is its other side.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import msgspec
from twisted.internet.defer import Deferred, succeed
from twisted.internet.error import ProcessExitedAlready
from twisted.internet.protocol import ProcessProtocol
from twisted.python.failure import Failure

from realtime._version import __version__
from realtime.config.schema import PREFIX
from realtime.config.settings import Settings
from realtime.config.sources import Sources
from realtime.config.values import escape_unprintable
from realtime.supervisor import systemd

MODULE = "realtime.app.trial"
# The descriptors of the result and of the inheritance, in the process.
_RESULT, _INHERITANCE = 3, 4
# The most of a process's last output that is kept.
_MAX_OUTPUT = 4096

_OTHER_SETTINGS = "another version of the package is installed, with other settings; use `realtime upgrade`"


class TrialResult(msgspec.Struct, frozen=True):
    """settings: the new ones; None if there is a problem. problems, warnings: one line each. version: of the package
    that the process has loaded."""

    settings: Settings | None = None
    problems: list[str] = []
    warnings: list[str] = []
    version: str = __version__


class ProgramResult(msgspec.Struct, frozen=True):
    """As `TrialResult`. settings: their bytes, which only that version of the package has to understand."""

    settings: msgspec.Raw = msgspec.Raw(b"")
    problems: list[str] = []
    warnings: list[str] = []
    version: str = __version__


class Trial:
    """Tries out the configuration that the sources have at the time, and the program that is installed.

    pids: of the processes that run, which no one else may wait for.
    """

    def __init__(self, reactor: Any, sources: Sources | None) -> None:
        """sources: None for a server whose settings come from elsewhere; there is nothing to try out then."""
        self.pids: set[int] = set()
        self._reactor = reactor
        self._sources = sources

    def run(self, timeout: float) -> Deferred[TrialResult]:
        """Try the configuration and the application out within `timeout` seconds. The Deferred never fails."""
        return self.run_application(timeout).addCallback(_with_settings)

    def run_application(self, timeout: float) -> Deferred[ProgramResult]:
        """As `run`, but for settings of any version."""
        if self._sources is None:
            return succeed(ProgramResult(problems=["this server was started without a configuration to read again"]))
        environment = {name: value for name, value in _environment().items() if not name.startswith(PREFIX)}
        # -P: as for the children, see `realtime.supervisor.service`.
        command = [sys.executable, "-P", "-m", MODULE]
        process = _Process(self._reactor, timeout, self.pids, "the import of the application")
        descriptors: dict[int, int | str] = {0: "w", 1: 1, 2: 2, _RESULT: "r"}
        process.start(command, environment, descriptors, msgspec.msgpack.encode(self._sources))
        return process.result

    def run_program(self, command: Sequence[str], inheritance: int, timeout: float) -> Deferred[ProgramResult]:
        """Have the installed program make a supervisor, without a start, within `timeout` seconds.

        inheritance: descriptor of an `Inheritance`. The Deferred never fails.
        """
        process = _Process(self._reactor, timeout, self.pids, "the start of the installed version")
        descriptors: dict[int, int | str] = {0: "w", 1: "r", 2: "r", _RESULT: "r", _INHERITANCE: inheritance}
        process.start([*command, f"--resume={_INHERITANCE}"], _environment(), descriptors, b"")
        return process.result


class _Process(ProcessProtocol):
    """The process. result: fires once."""

    def __init__(self, reactor: Any, timeout: float, pids: set[int], name: str) -> None:
        """name: of what the process does."""
        self.pids = pids
        self.pid = 0
        self.result: Deferred[ProgramResult] = Deferred()
        self._name = name
        self._reactor = reactor
        self._timeout = timeout
        self._received = b""
        self._output = b""
        self._timer = reactor.callLater(timeout, self._kill)

    def start(
        self, command: list[str], environment: dict[str, str], descriptors: dict[int, int | str], given: bytes
    ) -> None:
        """Start it. given: its input."""
        try:
            started = self._reactor.spawnProcess(self, command[0], command, env=environment, childFDs=descriptors)
        except OSError as error:
            self.end([f"no process can be started for {self._name}: {error.strerror}"])
            return
        self.pid = started.pid
        self.pids.add(started.pid)
        started.write(given)
        started.closeStdin()

    def _kill(self) -> None:
        transport: Any = self.transport
        # Even if it has exited: processes that the application has forked may keep its pipe open.
        with suppress(ProcessExitedAlready):
            transport.signalProcess("KILL")
        advice = "find the line that hangs"
        self.end([f"{self._name} takes more than {self._timeout:g} s (workers.start_timeout); {advice}"])

    def childDataReceived(self, childFD: int, data: bytes) -> None:
        """Called by Twisted."""
        if childFD != _RESULT:
            self._output = (self._output + data)[-_MAX_OUTPUT:]
            return
        self._received += data
        # The end of the stream may never come: processes that the application has forked may have it open.
        with suppress(msgspec.MsgspecError):
            self._finish(msgspec.msgpack.decode(self._received, type=ProgramResult))

    def processExited(self, reason: Failure) -> None:
        """Called by Twisted."""
        self.pids.discard(self.pid)

    def processEnded(self, reason: Failure) -> None:
        """Called by Twisted."""
        ended: Any = reason.value
        how = f"signal {ended.signal}" if ended.signal else f"status {ended.exitCode}"
        lines = self._output.decode("utf-8", "replace").strip().splitlines()
        last = f": {escape_unprintable(lines[-1])}" if lines else ""
        self.end([f"{self._name} ended its process with {how}{last}"])

    def end(self, problems: list[str]) -> None:
        """Finish with problems."""
        self._finish(ProgramResult(problems=problems))

    def _finish(self, result: ProgramResult) -> None:
        if self._timer.active():
            self._timer.cancel()
        if not self.result.called:
            self.result.callback(result)


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in systemd.VARIABLES}


def _with_settings(result: ProgramResult) -> TrialResult:
    """Decode the settings, and add a warning about another version of the package.

    Whether workers of it understand the running broker shows in the zygote.
    """
    if result.problems:
        return TrialResult(problems=result.problems)
    try:
        settings = msgspec.msgpack.decode(result.settings, type=Settings)
    except msgspec.MsgspecError:
        return TrialResult(problems=[_OTHER_SETTINGS])
    lines = list(result.warnings)
    if result.version != __version__:
        lines.append(
            f"version {result.version} of the package is installed: new workers run it; the supervisor and the broker "
            f"go on with version {__version__} until `realtime upgrade`"
        )
    return TrialResult(settings, warnings=lines, version=result.version)
