"""The supervisor's side of one child process: its descriptors, control link, vitals page and exit.

A `ChildProcess` reports its events to its owner. `realtime.process.child` is the child's side.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol

from twisted.internet.defer import Deferred
from twisted.internet.error import ProcessExitedAlready
from twisted.internet.interfaces import IDelayedCall
from twisted.internet.protocol import Factory, ProcessProtocol, connectionDone
from twisted.logger import Logger, LogLevel
from twisted.python.failure import Failure

from realtime import metrics
from realtime.config.schema import PREFIX
from realtime.config.values import escape_unprintable
from realtime.metrics import Sample
from realtime.process import control, log
from realtime.process.stack_dumps import IN_C_AFTER, STACK, STACK_IN_C, StackReader
from realtime.supervision.vitals import LatestCalls, RunningHandler, Vitals, VitalsPage
from realtime.supervisor import systemd

# Descriptor numbers in the child; the slot's listening sockets follow.
_LINK, _SETTINGS, _VITALS, _LISTEN = 3, 4, 5, 6
_MAX_LINE = 16384
_MAX_REASON = 2000
_FAILED_STATUSES = {os.EX_CONFIG, os.EX_TEMPFAIL}
# A line of a child's log: `realtime.process.log`, `realtime.process.app_log`.
_LOG_LINE = re.compile(
    r"\d{4}-\d\d-\d\dT\S+ \[(?P<system>(?:worker|broker)[^]]*#(?P<level>debug|info|warn|error|critical))\] (?P<text>.*)"
)

_log = Logger(observer=log.observer)
_output_log = Logger()  # for the children's output: they have already applied `log.level` to it


class ChildProcessOwner(Protocol):
    """Receives the events of its processes. Each event names the process, because its slot may already have another."""

    def process_ready(self, process: ChildProcess) -> None: ...
    def start_failed(self, process: ChildProcess, reason: str, status: int) -> None: ...
    def broker_link_lost(self, process: ChildProcess) -> None: ...
    def control_link_lost(self, process: ChildProcess) -> None: ...
    def process_exited(self, process: ChildProcess, status: int) -> None: ...


class ChildProcess(ProcessProtocol):
    """A running child. Its pid is not reused before the owner's `process_exited`: the kernel keeps the exit status
    until then."""

    def __init__(self, owner: ChildProcessOwner, slot: int) -> None:
        self.slot = slot
        self.pid = 0
        self._owner = owner
        self._link = _Link(self, owner)
        self._page: VitalsPage | None = None
        self._vitals: Vitals | None = None
        self._outputs = {1: _Output(), 2: _Output()}
        self._call_later: Callable[..., IDelayedCall]
        self._dumps: StackReader | None = None

    def start(
        self, reactor: Any, command: Sequence[str], settings: int, listening: Sequence[int], capture: bool
    ) -> None:
        """Spawn `command` with copies of two kinds of descriptors: the settings, and the listening sockets.

        capture: write its standard output and error to our log, instead of letting it inherit both. Raises OSError.
        """
        self._page = VitalsPage.create()
        self._call_later = reactor.callLater
        self._dumps = StackReader(reactor.callLater)
        try:
            self._spawn(reactor, command, settings, listening, capture)
        except OSError:
            self._close_page()
            raise

    def _spawn(
        self, reactor: Any, command: Sequence[str], settings: int, listening: Sequence[int], capture: bool
    ) -> None:
        assert self._page is not None
        sockets = {_LISTEN + index: fd for index, fd in enumerate(listening)}
        stacks = _LISTEN + len(listening)
        arguments = [
            *("--slot", str(self.slot)),
            *("--link", str(_LINK), "--settings", str(_SETTINGS), "--vitals", str(_VITALS)),
            *("--stacks", str(stacks)),
            *(("--listen", ",".join(map(str, sockets))) if sockets else ()),
        ]
        streams: dict[int, int | str] = {**({1: "r", 2: "r"} if capture else {1: 1, 2: 2}), stacks: "r"}
        ours, theirs = socket.socketpair()
        with ours, theirs, open(os.devnull, "rb") as null:
            fds = {0: null.fileno(), _LINK: theirs.fileno(), _SETTINGS: settings, _VITALS: self._page.fd, **sockets}
            transport = reactor.spawnProcess(
                self, command[0], [*command, *arguments], env=_environment(os.environ), childFDs={**streams, **fds}
            )
            self.pid = transport.pid
            ours.setblocking(False)
            reactor.adoptStreamConnection(ours.fileno(), socket.AF_UNIX, Factory.forProtocol(lambda: self._link))

    @property
    def vitals(self) -> Vitals | None:
        """Its latest vital signs; None before the first reading."""
        if self._page is not None:
            self._vitals = self._page.read() or self._vitals
        return self._vitals

    def peek(self) -> tuple[int, float, int]:
        """Return its latest beat, lag and busy_since, see `VitalsPage.peek`; zeros before the first reading."""
        return self._page.peek() if self._page is not None else (0, 0.0, 0)

    @property
    def running(self) -> RunningHandler | None:
        """The handler that runs on its loop now, if any."""
        return self._page.running() if self._page is not None else None

    @property
    def latest_calls(self) -> LatestCalls | None:
        """The calls of the handler that ran last on its loop, if any."""
        return self._page.latest_calls() if self._page is not None else None

    def set_relief(self, available: bool) -> None:
        """Publish on its page whether another worker can take new clients in its place."""
        if self._page is not None:
            self._page.set_relief(available)

    def signal(self, number: int) -> None:
        """Send a signal. Without effect after the process has exited."""
        if self.transport is not None:
            with suppress(ProcessExitedAlready):
                self.transport.signalProcess(number)

    def dump(self, number: int) -> Deferred[str]:
        """Request the stack of its loop's thread (STACK) or of all its threads (STACKS), as faulthandler writes it.

        This also works while its loop is blocked, but not while the process is stopped: give the Deferred a timeout.
        """
        assert self._dumps is not None
        answer = self._dumps.next(number)
        self.signal(number)
        if number == STACK:
            again = self._call_later(IN_C_AFTER, self.signal, STACK_IN_C)
            answer.addBoth(_cancelling, again)
        return answer

    def drain(self, timeout: float) -> None:
        """Order it to finish within `timeout` seconds and exit."""
        self._link.callRemote(control.Drain, timeout=timeout).addErrback(_ignore)

    def send_link(self, slot: int, stream: int) -> Deferred[object]:
        """Send one end of a stream between worker and broker. Keep `stream` open until the answer, because a receiver
        without free descriptors loses it."""
        answer: Deferred[object] = self._link.callRemote(control.AttachStream, slot=slot, stream=stream)
        return answer

    def adopt_from(self, stream: int) -> Deferred[object]:
        """Send the receiving end of `realtime.process.fd_passing`. Keep `stream` open until the answer."""
        answer: Deferred[object] = self._link.callRemote(control.Adopt, stream=stream)
        return answer

    def take_over(self, stream: int) -> Deferred[object]:
        """Send the target's end of a hand-over, see `realtime.worker.handover`. Keep `stream` open until the answer."""
        answer: Deferred[object] = self._link.callRemote(control.TakeOver, stream=stream)
        return answer

    def hand_over(self, stream: int, connections: int, timeout: float) -> Deferred[dict[str, Any]]:
        """Send the source's end of a hand-over, see `control.HandOver`; the answer comes at its end, and fails if the
        process ends before. Keep `stream` open until then."""
        answer: Deferred[dict[str, Any]] = self._link.callRemote(
            control.HandOver, stream=stream, connections=connections, timeout=timeout
        )
        return answer

    def report(self, what: str) -> Deferred[str]:
        """Request a report on its state, see `realtime.process.diagnostics`. Works only while its loop turns."""
        answer: Deferred[dict[str, bytes]] = self._link.callRemote(control.Report, what=what)
        return answer.addCallback(lambda box: box["text"].decode("utf-8", "replace"))

    def collect(self, names: Collection[str] = ()) -> Deferred[list[Sample]]:
        """Request its metrics. names: of the wanted ones; empty for all. Fails on a lost link or unreadable metrics."""
        answer: Deferred[dict[str, bytes]] = self._link.callRemote(control.Collect, names=list(names))
        return answer.addCallback(lambda box: metrics.load(box["metrics"]))

    # Called by Twisted.

    def childDataReceived(self, childFD: int, data: bytes) -> None:
        output = self._outputs.get(childFD)
        if output is not None:
            output.feed(data)
        elif self._dumps is not None:
            self._dumps.feed(data)

    def processExited(self, reason: Failure) -> None:
        ended: Any = reason.value
        self._vitals = self.vitals
        self._close_page()
        self._link.end()
        if self._dumps is not None:
            self._dumps.end()
        for output in self._outputs.values():
            output.flush()
        self._owner.process_exited(self, -ended.signal if ended.signal else ended.exitCode)

    def _close_page(self) -> None:
        if self._page is not None:
            self._page.close()
            self._page = None


class _Link(control.Peer):
    """The supervisor's end of the control plane."""

    def __init__(self, process: ChildProcess, owner: ChildProcessOwner) -> None:
        super().__init__()
        self._process = process
        self._owner = owner

    @control.Ready.responder
    def _ready(self) -> dict[str, object]:
        self._owner.process_ready(self._process)
        return {}

    @control.Failed.responder
    def _failed(self, reason: str, status: int) -> dict[str, object]:
        # The status becomes that of the server, and the reason a line of the log.
        status = status if status in _FAILED_STATUSES else os.EX_CONFIG
        self._owner.start_failed(self._process, escape_unprintable(reason[:_MAX_REASON]), status)
        return {}

    @control.LinkLost.responder
    def _link_lost(self) -> dict[str, object]:
        self._owner.broker_link_lost(self._process)
        return {}

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        super().connectionLost(reason)
        self._owner.control_link_lost(self._process)

    def end(self) -> None:
        """Close the link. Requests without an answer fail."""
        transport: Any = self.transport
        if transport is not None:
            transport.abortConnection()


class _Output:
    """Copies a child's output to our log, where the lines of its log keep their process, logger and level."""

    def __init__(self) -> None:
        self._partial = b""

    def feed(self, data: bytes) -> None:
        """Log the lines that `data` completes. A line longer than _MAX_LINE is logged in parts."""
        *lines, self._partial = (self._partial + data).split(b"\n")
        for line in lines:
            self._log(line.decode("utf-8", "backslashreplace"))
        if len(self._partial) > _MAX_LINE:
            self.flush()

    def _log(self, line: str) -> None:
        found = _LOG_LINE.match(line)
        if found is None:
            _output_log.info("{line}", line=line)
        else:
            level = LogLevel.lookupByName(found["level"])
            _output_log.emit(level, "{line}", line=found["text"], log_system=found["system"])

    def flush(self) -> None:
        """Log an incomplete line."""
        if self._partial:
            self.feed(b"\n")


def _environment(inherited: Mapping[str, str]) -> dict[str, str]:
    """Return our environment without the service manager's variables for this process alone, and without settings.

    The children get the settings through a descriptor. In the environment their secrets would reach every program that
    a handler starts.
    """
    return {
        name: value
        for name, value in inherited.items()
        if name not in systemd.VARIABLES and not name.startswith(PREFIX)
    }


def _cancelling(result: Any, call: IDelayedCall) -> Any:
    """Pass a result on; the call is no longer needed."""
    if call.active():
        call.cancel()
    return result


def _ignore(_: Failure) -> None:
    return None
