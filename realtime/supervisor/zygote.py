"""The supervisor's side of the zygote: it has all children forked, and watches each until its exit.

`realtime.process.zygote` is the other side. The zygote holds no state: where it has ended, the next one serves, and no
child notices.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.error import ProcessExitedAlready
from twisted.internet.interfaces import IDelayedCall
from twisted.internet.protocol import ProcessProtocol
from twisted.logger import Logger
from twisted.python.failure import Failure

from realtime.config.schema import PREFIX
from realtime.process import log, zygote
from realtime.process.zygote import Fork, Forked, NotForked
from realtime.supervisor import orphans, systemd
from realtime.supervisor.child_output import ChildOutput
from realtime.supervisor.readable import Readable

EX_OSERR = 71
_LINK = 3
_MAX_PACKET = 4096
# Seconds between two looks for the exit of a child where the kernel has no pidfd_open(2), before Linux 5.3.
_EXIT_INTERVAL = 0.05

_log = Logger(observer=log.observer)


class ZygoteEnded(Exception):
    """A zygote has ended before it could serve."""


class ForkedChild:
    """A child that was requested from the zygote: its pid, 0 until it is known, its signals and its exit.

    The kernel keeps the pid for it until its exit is reported.
    """

    def __init__(self, reactor: Any, exited: Callable[[int], None], abort: Callable[[], None]) -> None:
        """exited: called with the exit status, or minus the signal that has killed it; with EX_OSERR if it was not
        forked. abort: ends the zygote that forks it."""
        self.pid = 0
        self._reactor = reactor
        self._exited = exited
        self._abort = abort
        self._early: list[int] = []
        self._watch: Readable | None = None
        self._check: IDelayedCall | None = None
        self._has_exited = False

    def signal(self, number: int) -> None:
        """Send a signal, at once or as soon as it is forked. Without effect after its exit."""
        if self._has_exited:
            return
        if self.pid:
            os.kill(self.pid, number)  # after an exit the pid stays taken until we wait for it
        elif number == signal.SIGKILL:
            self._abort()
        else:
            self._early.append(number)

    def forked(self, pid: int) -> None:
        """It runs from now on."""
        self.pid = pid
        for number in self._early:
            os.kill(pid, number)
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            self._look()
        else:
            self._watch = Readable(self._reactor, pidfd, self._reap)

    def failed(self, reason: str) -> None:
        """It was not forked."""
        _log.error("can't fork a process: {reason}", reason=reason)
        self._end(EX_OSERR)

    def _look(self) -> None:
        if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            self._reap()
        else:
            self._check = self._reactor.callLater(_EXIT_INTERVAL, self._look)

    def _reap(self) -> None:
        # Processes of its group, which the application has started, end with it. Before its own pid can be reused.
        with suppress(OSError):
            os.killpg(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        if self._watch is not None:
            self._watch.close()
        self._end(os.waitstatus_to_exitcode(status))

    def _end(self, status: int) -> None:
        self._has_exited = True
        self._exited(status)


class Zygote:
    """Has all children forked, by a process that it starts when needed, and replaces when that has ended."""

    def __init__(self, reactor: Any, modules: Sequence[str], *, capture: bool = False) -> None:
        """modules: those that children may run. capture: write its output to our log, instead of letting it inherit
        ours."""
        self._reactor = reactor
        self._modules = modules
        self._capture = capture
        self._current: _ZygoteProcess | None = None
        self._processes: set[_ZygoteProcess] = set()
        self._is_closed = False

    @property
    def pids(self) -> list[int]:
        """The pids of the processes that fork: more than one during `renew`."""
        return [process.pid for process in self._processes]

    @property
    def is_forking(self) -> bool:
        """Whether a child may run whose pid is not known yet."""
        return any(process.pending for process in self._processes)

    def fork(self, fork: Fork, descriptors: Sequence[int], exited: Callable[[int], None]) -> ForkedChild:
        """Have a child forked, with copies of `descriptors` as `fork.descriptors`. exited: see `ForkedChild`.

        Raises OSError.
        """
        if self._current is None:
            self._current = self._start()
        return self._current.fork(fork, descriptors, exited)

    def renew(self) -> Deferred[None]:
        """Have another process fork from now on, which imports all modules anew: their files may have changed.

        The Deferred fires when it has imported them. It fails with ZygoteEnded where they can't be imported; the
        present process goes on then. Raises OSError.
        """
        process = self._start()
        return process.when_started().addCallback(self._replace_by, process)

    def close(self) -> None:
        """Kill the processes that fork. Children live on."""
        self._is_closed = True
        for process in self._processes:
            process.kill()

    def _start(self) -> _ZygoteProcess:
        orphans.adopt_all()
        process = _ZygoteProcess(self._reactor, self._ended, self._capture)
        process.start(self._modules)
        self._processes.add(process)
        return process

    def _replace_by(self, _: object, process: _ZygoteProcess) -> None:
        old, self._current = self._current, process
        if old is not None:
            old.end()

    def _ended(self, process: _ZygoteProcess, status: str) -> None:
        self._processes.discard(process)
        is_current = process is self._current
        if is_current:
            self._current = None
        if self._is_closed or process.is_ending:
            return
        _log.error("the zygote, which forks the processes of this server, {status}", status=status)
        if is_current and process.has_started:  # another one is tried at the next fork: the pool has its delays
            with suppress(OSError):
                self._current = self._start()


class _ZygoteProcess(ProcessProtocol):
    """One process that forks. pending: children whose forks it has not answered, in order."""

    def __init__(self, reactor: Any, ended: Callable[[_ZygoteProcess, str], None], capture: bool) -> None:
        self.pid = 0
        self.pending: deque[ForkedChild] = deque()
        self.has_started = False
        self.is_ending = False
        self._reactor = reactor
        self._ended = ended
        self._outputs = {1: ChildOutput(), 2: ChildOutput()} if capture else {}
        self._start_waiters: list[Deferred[None]] = []

    def start(self, modules: Sequence[str]) -> None:
        """Start it. Raises OSError."""
        # -P: files of the working directory, such as a queue.py, must not stand in for modules of Python or of ours.
        command = [sys.executable, "-P", "-m", zygote.__name__, "--link", str(_LINK), *modules, *zygote.ROOM]
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, open(os.devnull, "rb") as null:
            streams: dict[int, int | str] = {1: "r", 2: "r"} if self._outputs else {1: 1, 2: 2}
            fds = {0: null.fileno(), **streams, _LINK: theirs.fileno()}
            try:
                transport = self._reactor.spawnProcess(
                    self, command[0], command, env=_environment(os.environ), childFDs=fds
                )
            except OSError:
                ours.close()
                raise
        self.pid = transport.pid
        ours.setblocking(False)
        self._link = ours
        self._reader = Readable(self._reactor, os.dup(ours.fileno()), self._read)

    def fork(self, fork: Fork, descriptors: Sequence[int], exited: Callable[[int], None]) -> ForkedChild:
        """See `Zygote.fork`."""
        socket.send_fds(self._link, [zygote.encode(fork)], descriptors)
        child = ForkedChild(self._reactor, exited, self.kill)
        self.pending.append(child)
        return child

    def when_started(self) -> Deferred[None]:
        """Wait until it has imported its modules. Fails with ZygoteEnded."""
        waiter: Deferred[None] = Deferred()
        self._start_waiters.append(waiter)
        return waiter

    def end(self) -> None:
        """Let it end once it has answered."""
        self.is_ending = True
        if not self.pending:
            self._close()

    def kill(self) -> None:
        """Kill it: its pending forks fail."""
        if self.transport is not None:
            with suppress(ProcessExitedAlready):
                self.transport.signalProcess(signal.SIGKILL)

    def _read(self) -> None:
        try:
            packet = self._link.recv(_MAX_PACKET)
        except BlockingIOError:
            return
        except OSError:
            packet = b""
        if not packet:
            self._reader.close()  # its exit is reported in a moment
            return
        match zygote.decode(packet):
            case Forked(pid):
                self.pending.popleft().forked(pid)
            case NotForked(error):
                self.pending.popleft().failed(f"{os.strerror(error)}; check `ulimit -u`, `ulimit -n` and free memory")
            case _:
                self.has_started = True
                self._call_waiters(None)
        if self.is_ending and not self.pending:
            self._close()

    def _close(self) -> None:
        self._reader.close()
        self._link.close()

    def _call_waiters(self, result: ZygoteEnded | None) -> None:
        waiters, self._start_waiters = self._start_waiters, []
        for waiter in waiters:
            waiter.callback(None) if result is None else waiter.errback(result)

    # Called by Twisted.

    def childDataReceived(self, childFD: int, data: bytes) -> None:
        self._outputs[childFD].feed(data)

    def processExited(self, reason: Failure) -> None:
        for output in self._outputs.values():
            output.flush()
        ended: Any = reason.value
        how = f"was killed by signal {ended.signal}" if ended.signal else f"exited with status {ended.exitCode}"
        self._close()
        self._ended(self, how)
        while self.pending:
            self.pending.popleft().failed(f"the zygote {how}")
        self._call_waiters(ZygoteEnded(f"the zygote {how}"))


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
