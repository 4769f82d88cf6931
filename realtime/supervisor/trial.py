"""The trial of a new configuration: reads it and imports the application, in a process of its own.

So a mistake in either, or a hang, does not touch the running server. `realtime.app.trial` is the other side.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import Any

import msgspec
from msgspec.structs import replace
from twisted.internet.defer import Deferred, succeed
from twisted.internet.error import ProcessExitedAlready
from twisted.internet.protocol import ProcessProtocol
from twisted.python.failure import Failure

from realtime._version import __version__
from realtime.config.schema import PREFIX
from realtime.config.settings import Settings
from realtime.config.sources import Sources
from realtime.supervisor import systemd

MODULE = "realtime.app.trial"
# The descriptor of the result, in the process.
_RESULT = 3


class TrialResult(msgspec.Struct, frozen=True):
    """settings: the new ones; None if there is a problem. problems, warnings: one line each. version: of the package
    that the process has loaded."""

    settings: Settings | None = None
    problems: list[str] = []
    warnings: list[str] = []
    version: str = __version__


class Trial:
    """Tries out the configuration that the sources have at the time.

    pids: of the processes that run, which no one else may wait for.
    """

    def __init__(self, reactor: Any, sources: Sources | None) -> None:
        """sources: None for a server whose settings come from elsewhere; there is nothing to try out then."""
        self.pids: set[int] = set()
        self._reactor = reactor
        self._sources = sources

    def run(self, timeout: float) -> Deferred[TrialResult]:
        """Try it out within `timeout` seconds. The Deferred never fails."""
        if self._sources is None:
            return succeed(TrialResult(problems=["this server was started without a configuration to read again"]))
        process = _Process(self._reactor, timeout, self.pids)
        # -P: as for the children, see `realtime.supervisor.service`.
        command = [sys.executable, "-P", "-m", MODULE]
        environment = {
            name: value
            for name, value in os.environ.items()
            if name not in systemd.VARIABLES and not name.startswith(PREFIX)
        }
        try:
            started = self._reactor.spawnProcess(
                process, command[0], command, env=environment, childFDs={0: "w", 1: 1, 2: 2, _RESULT: "r"}
            )
        except OSError as error:
            process.end([f"no process can be started to try out the configuration: {error.strerror}"])
        else:
            process.pid = started.pid
            self.pids.add(started.pid)
            started.write(msgspec.msgpack.encode(self._sources))
            started.closeStdin()
        return process.result


class _Process(ProcessProtocol):
    """The process. result: fires once."""

    def __init__(self, reactor: Any, timeout: float, pids: set[int]) -> None:
        self.pids = pids
        self.pid = 0
        self.result: Deferred[TrialResult] = Deferred()
        self._timeout = timeout
        self._received = b""
        self._timer = reactor.callLater(timeout, self._kill)

    def _kill(self) -> None:
        transport: Any = self.transport
        # Even if it has exited: processes that the application has forked may keep its pipe open.
        with suppress(ProcessExitedAlready):
            transport.signalProcess("KILL")
        advice = "find the line that hangs"
        self.end(
            [f"the import of the application takes more than {self._timeout:g} s (workers.start_timeout); {advice}"]
        )

    def childDataReceived(self, childFD: int, data: bytes) -> None:
        """Called by Twisted."""
        self._received += data
        # The end of the stream may never come: processes that the application has forked may have it open.
        with suppress(msgspec.MsgspecError):
            result = msgspec.msgpack.decode(self._received, type=TrialResult)
            self._finish(_with_version(result))

    def processExited(self, reason: Failure) -> None:
        """Called by Twisted."""
        self.pids.discard(self.pid)

    def processEnded(self, reason: Failure) -> None:
        """Called by Twisted."""
        ended: Any = reason.value
        if ended.exitCode == 0:
            self.end(["another version of the package is installed, with other settings; restart the server"])
            return
        how = f"signal {ended.signal}" if ended.signal else f"status {ended.exitCode}"
        self.end([f"the import of the application ended its process with {how}"])

    def end(self, problems: list[str]) -> None:
        """Finish with problems."""
        self._finish(TrialResult(problems=problems))

    def _finish(self, result: TrialResult) -> None:
        if self._timer.active():
            self._timer.cancel()
        if not self.result.called:
            self.result.callback(result)


def _with_version(result: TrialResult) -> TrialResult:
    """Add a warning about another version of the package. Whether workers of it understand the running broker shows in
    the zygote."""
    if result.version == __version__:
        return result
    line = (
        f"version {result.version} of the package is installed: new workers run it; the supervisor and the broker go "
        f"on with version {__version__} until a restart"
    )
    return replace(result, warnings=[*result.warnings, line])
