"""The supervisor's side of the zygote: it has all children forked, and watches each until its exit.

`realtime.process.zygote` is the other side. The zygote holds no state: where it has ended, the next one serves, and no
child notices.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from twisted.internet.defer import Deferred, succeed
from twisted.logger import Logger
from twisted.python.failure import Failure

from realtime.config.schema import PREFIX
from realtime.process import log, zygote
from realtime.process.zygote import Fork, Forked, NotForked, ZygoteStarted
from realtime.supervision.slots import NOT_FORKED
from realtime.supervisor import orphans, systemd
from realtime.supervisor.child_output import ChildOutput
from realtime.supervisor.inheritance import HELD_SIGNALS
from realtime.supervisor.readable import Readable, read_pipe

EX_OSERR = 71
_MAX_PACKET = 4096
# Seconds between two looks for the exit of a child where the kernel has no pidfd_open(2), before Linux 5.3.
_EXIT_INTERVAL = 0.05

_OTHER_VERSION = (
    "the installed version of the package has other messages than the running processes; restart the server to use it"
)

_log = Logger(observer=log.observer)


class ZygoteUnusable(Exception):
    """A zygote can't serve. The text is the reason, for a line of the log."""


class ForkedChild:
    """A child that was requested from the zygote: its pid, 0 until it is known, its signals and its exit.

    The kernel keeps the pid for it until its exit is reported.
    """

    def __init__(self, reactor: Any, exited: Callable[[int], None], abort: Callable[[], None]) -> None:
        """exited: called with the exit status, or minus the signal that has killed it; with EX_OSERR or NOT_FORKED if
        it was not forked. abort: ends the zygote that forks it."""
        self.pid = 0
        self._reactor = reactor
        self._exited = exited
        self._abort = abort
        self._early: list[int] = []
        self._has_exited = False

    def signal(self, number: int) -> None:
        """Send a signal, at once or as soon as it is forked. Without effect after its exit."""
        if self._has_exited:
            return
        if self.pid:
            os.kill(self.pid, number)
        elif number == signal.SIGKILL:
            self._abort()  # which hangs, as a fork takes milliseconds
        else:
            self._early.append(number)

    def forked(self, pid: int) -> None:
        """It runs from now on."""
        self.pid = pid
        for number in self._early:
            os.kill(pid, number)
        _ExitWatch(self._reactor, pid, self._reap)

    def failed(self, reason: str, status: int = EX_OSERR) -> None:
        """It was not forked."""
        _log.error("can't fork a process: {reason}", reason=reason)
        self._end(status)

    def _reap(self) -> None:
        with suppress(OSError):  # programs that the application has started end with it; before its pid can be reused
            os.killpg(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        self._end(os.waitstatus_to_exitcode(status))

    def _end(self, status: int) -> None:
        self._has_exited = True
        self._exited(status)


class _ExitWatch:
    """Calls a function once a child of this process has exited, before it is reaped."""

    def __init__(self, reactor: Any, pid: int, exited: Callable[[], None]) -> None:
        self._reactor = reactor
        self._pid = pid
        self._exited = exited
        try:
            self._pidfd = Readable(reactor, os.pidfd_open(pid), self._ready)
        except OSError:  # before Linux 5.3, or in a sandbox
            self._look()

    def _ready(self) -> None:
        self._pidfd.close()
        self._exited()

    def _look(self) -> None:
        if os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            self._reactor.callLater(_EXIT_INTERVAL, self._look)
        else:
            self._exited()


class EarlyZygote(NamedTuple):
    """The process that `fork_early` has forked. link: our end, see `realtime.process.zygote`. files: those that it has
    imported, with what changes where one is written or replaced."""

    pid: int
    link: socket.socket
    files: dict[str, tuple[int, ...]]

    @property
    def is_up_to_date(self) -> bool:
        """Whether another process would import the same."""
        return _versions(self.files) == self.files

    def kill(self) -> None:
        """Kill it. To be called before `wait` has returned."""
        os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        """Wait for its end. Returns the exit status, or minus the signal that has killed it."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def fork_early(modules: Sequence[str]) -> EarlyZygote:
    """Import the modules of the children, and fork the first process that forks them from this one.

    All processes so share the memory of the modules, and one that is executed later shares none of it with this
    process. It must have no reactor and no thread yet, and keep its user, its directory and its parent, since the
    children have the same. Raises OSError; and SystemExit in the new process and in each child, at their end: all
    callers in the stack must let that pass.
    """
    loaded = zygote.load(modules)
    found = (getattr(module, "__file__", None) for module in tuple(sys.modules.values()))
    files = _versions([sys.executable, *filter(None, found)])
    link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        try:
            pid = os.fork()
        except OSError:
            link.close()
            raise
        if pid:
            return EarlyZygote(pid, link, files)
        link.close()
        _leave_the_supervisor(theirs.fileno())
        raise SystemExit(zygote.serve(theirs, loaded))


def _versions(files: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Return what distinguishes each file from the one at the same path before."""
    versions: dict[str, tuple[int, ...]] = {}
    for file in files:
        with suppress(OSError):
            stat = os.stat(file)
            versions[file] = stat.st_ino, stat.st_size, stat.st_mtime_ns
    return versions


def _leave_the_supervisor(link: int) -> None:
    """Make a fork of this process what an executed zygote is. link: the only descriptor to keep, besides the output."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_SIGNALS)
    zygote.ignore_signals()
    os.setpgid(0, 0)  # see `orphans.reap`
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.closerange(3, link)
    os.closerange(link + 1, os.sysconf("SC_OPEN_MAX"))
    for name in set(os.environ) - set(_environment(os.environ)):
        del os.environ[name]
    if sys.path[0] in _unsafe_paths():
        del sys.path[0]
    sys.modules["__main__"] = zygote


def _unsafe_paths() -> set[str]:
    """Return the folders of which Python searches one first for modules, unless it is started with -P."""
    program = getattr(sys.modules["__main__"], "__file__", None) or sys.executable
    return {"", os.getcwd(), os.path.dirname(os.path.realpath(program))}


class Zygote:
    """Has all children forked, by a process that it starts when needed, and replaces when that has ended.

    formats: of the messages of the children, as their modules say; "" before the first one.
    """

    def __init__(
        self,
        reactor: Any,
        modules: Sequence[str],
        *,
        early: EarlyZygote | None = None,
        capture: bool = False,
        formats: str = "",
    ) -> None:
        """modules: those that children may run. early: the first process that forks them, if it was forked early.
        capture: write the output of the others to our log, instead of letting them inherit ours. formats: of children
        that run already; "" without any."""
        self._reactor = reactor
        self._modules = modules
        self._early = early
        self._capture = capture
        self._current: _ZygoteProcess | None = None
        self._processes: set[_ZygoteProcess] = set()
        self._is_closed = False
        self.formats = formats

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
            self._current.when_started().addCallbacks(self._note_formats, _ignore)
        return self._current.fork(fork, descriptors, exited)

    def renew(self) -> Deferred[None]:
        """Have another process fork from now on, which imports all modules anew, unless no file of them has changed.

        The Deferred fires when it has imported them. It fails with ZygoteUnusable where they can't be imported, or are
        of a version whose messages the running processes do not understand; the present process goes on then. Raises
        OSError.
        """
        if self._current is not None and self._current.is_up_to_date:
            return succeed(None)
        process = self._start()
        return process.when_started().addCallback(self._check_formats, process).addCallback(self._replace_by, process)

    def check(self) -> Deferred[None]:
        """Have a process import all modules anew, and end it. Fails and raises as `renew`."""
        process = self._start()
        return process.when_started().addCallback(self._check_formats, process).addCallback(lambda _: process.end())

    def close(self) -> None:
        """Kill the processes that fork. Children live on."""
        self._is_closed = True
        for process in self._processes:
            process.kill()

    def _start(self) -> _ZygoteProcess:
        orphans.adopt_all()
        early, self._early = self._early, None
        started, link = (early, early.link) if early is not None else _execute(self._modules, self._capture)
        process = _ZygoteProcess(self._reactor, started, link, self._ended)
        self._processes.add(process)
        return process

    def _note_formats(self, formats: str) -> None:
        self.formats = self.formats or formats
        if formats != self.formats:
            _log.error("{reason}", reason=_OTHER_VERSION)

    def _check_formats(self, formats: str, process: _ZygoteProcess) -> None:
        if formats != self.formats:
            process.is_ending = True
            process.kill()
            raise ZygoteUnusable(_OTHER_VERSION)

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
                self._current.when_started().addCallbacks(self._note_formats, _ignore)


class _ZygoteProcess:
    """One process that forks. pending: children whose forks it has not answered, in order."""

    def __init__(
        self,
        reactor: Any,
        process: EarlyZygote | subprocess.Popen[bytes],
        link: socket.socket,
        ended: Callable[[_ZygoteProcess, str], None],
    ) -> None:
        self.pending: deque[ForkedChild] = deque()
        self.has_started = False
        self.is_ending = False
        self._reactor = reactor
        self._ended = ended
        self._start_waiters: list[Deferred[str]] = []
        self._process, self._link = process, link
        self.pid = process.pid
        link.setblocking(False)
        self._reader = Readable(reactor, os.dup(link.fileno()), self._read)
        if isinstance(process, subprocess.Popen) and process.stdout is not None:
            with process.stdout as pipe:
                read_pipe(reactor, os.dup(pipe.fileno()), ChildOutput().feed)
        _ExitWatch(reactor, self.pid, self._exited)

    @property
    def is_up_to_date(self) -> bool:
        """Whether it is known that another process would import the same."""
        return isinstance(self._process, EarlyZygote) and self._process.is_up_to_date

    def fork(self, fork: Fork, descriptors: Sequence[int], exited: Callable[[int], None]) -> ForkedChild:
        """See `Zygote.fork`."""
        socket.send_fds(self._link, [zygote.encode(fork)], descriptors)
        child = ForkedChild(self._reactor, exited, self.kill)
        self.pending.append(child)
        return child

    def when_started(self) -> Deferred[str]:
        """Wait until it has imported its modules, and return their formats. Fails with ZygoteUnusable."""
        waiter: Deferred[str] = Deferred()
        self._start_waiters.append(waiter)
        return waiter

    def end(self) -> None:
        """Let it end once it has answered."""
        self.is_ending = True
        if not self.pending:
            self._close()

    def kill(self) -> None:
        """Kill it: its pending forks fail."""
        self._process.kill()

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
            case ZygoteStarted(formats):
                self.has_started = True
                self._call_waiters(formats)
        if self.is_ending and not self.pending:
            self._close()

    def _close(self) -> None:
        self._reader.close()
        self._link.close()

    def _call_waiters(self, result: ZygoteUnusable | str) -> None:
        waiters, self._start_waiters = self._start_waiters, []
        for waiter in waiters:
            waiter.callback(result) if isinstance(result, str) else waiter.errback(result)

    def _exited(self) -> None:
        status = self._process.wait()
        how = f"was killed by signal {-status}" if status < 0 else f"exited with status {status}"
        self._close()
        self._ended(self, how)
        while self.pending:
            self.pending.popleft().failed(f"the zygote {how}", NOT_FORKED if self.has_started else EX_OSERR)
        self._call_waiters(ZygoteUnusable(f"the zygote {how}"))


def _execute(modules: Sequence[str], capture: bool) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start a process that imports the modules for itself. Returns it with our end of its link. Raises OSError."""
    link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        try:
            process = subprocess.Popen(
                # -P: files of the working directory, such as a queue.py, must not stand in for modules of Python.
                [sys.executable, "-P", "-m", zygote.__name__, "--link", str(theirs.fileno()), ",".join(modules)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if capture else None,
                stderr=subprocess.STDOUT if capture else None,
                pass_fds=[theirs.fileno()],
                env=_environment(os.environ),
                process_group=0,  # see `orphans.reap`
            )
        except OSError:
            link.close()
            raise
    return process, link


def _ignore(_: Failure) -> None:
    return None


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
