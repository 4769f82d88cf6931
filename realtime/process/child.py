"""The common start and end of every process that the supervisor starts: `main`.

    python -m MODULE --link FD --settings FD --vitals FD [--stacks FD] [--slot N] [--generation N] [--listen FD,FD]
        [--predecessor FD]

All descriptors are inherited. `link` is one end of a socketpair that speaks AMP (`realtime.process.control`);
`settings` a sealed memfd with `realtime.config.settings.dump`; `vitals` this process's page; `stacks` a pipe for its
stacks (`realtime.process.stack_dumps`); `listen` the slot's listening sockets; `predecessor` a stream to the process
whose place this one takes. So a child reads no file and no environment. It sends Ready when its service's `start` has
returned, or Failed.

A child ends on the command Drain, on SIGTERM, and when the link ends, which means that the supervisor has ended. The
kernel keeps the deadline of a drain (alarm(2)), so that a blocked loop or thread can't outlive it. SIGINT is ignored:
Ctrl-C reaches the whole process group, and the supervisor decides. Exit statuses are those of sysexits.h.
"""

from __future__ import annotations

import asyncio
import ctypes
import faulthandler
import math
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, NoReturn, Protocol

from twisted.internet import unix
from twisted.internet.defer import Deferred, TimeoutError, maybeDeferred
from twisted.internet.main import installReactor
from twisted.internet.protocol import Factory, connectionDone
from twisted.logger import Logger
from twisted.protocols import amp
from twisted.python import threadable
from twisted.python.failure import Failure

from realtime import metrics
from realtime.config import settings
from realtime.config.settings import Settings
from realtime.errors import ApplicationFailed, EngineUnavailable, RealtimeError, TakeoverFailed
from realtime.metrics import Metrics
from realtime.process import control, forks, log, output, stack_dumps
from realtime.process.diagnostics import REPORTS
from realtime.process.gc_tuning import GCTuner
from realtime.process.heartbeat import HandlerMarker, Heartbeat, LoopClock, MeasuredSelector, loop_time
from realtime.process.reactor import Reactor, ServerReactor
from realtime.process.relief import Relief
from realtime.process.server_lock import ReleasingMarker, ServerLock
from realtime.supervision.loop_time import LoopTimeLedger
from realtime.supervision.vitals import ProcessState, VitalsPage

EX_SOFTWARE = 70
EX_TEMPFAIL = 75
EX_CONFIG = 78

# Seconds that a child goes on draining after its supervisor has died.
ORPHAN_DRAIN = 8.0
# Seconds for the supervisor to receive the reason of a failed start.
_FAILED_TIMEOUT = 2.0
# Seconds between two cancellations of a stray alarm; well under the 12 s of that alarm.
_CANCEL_ALARM_INTERVAL = 3.0
# Seconds between two checks whether a whole garbage collection is due.
_GC_INTERVAL = 1.0
_REASON_CHARS = 2000
# Descriptors that a start takes, besides those of the application. A start that ran out of them halfway would write
# tracebacks from several places.
_START_DESCRIPTORS = 24
_TOO_FEW_DESCRIPTORS = (
    f"a process of the server can't start: it has fewer than {_START_DESCRIPTORS} descriptors left; raise the limit of"
    " open files (`ulimit -n`, LimitNOFILE of the unit). The supervisor tries again"
)
_PR_SET_PDEATHSIG = 1

_log = Logger()


class ChildService(Protocol):
    """The work of a child process: a worker's or the broker's."""

    async def start(self) -> None:
        """Serve; returns when the service is ready. May await Deferreds.

        Raises SettingsError, or another RealtimeError, where a restart will not help: the supervisor shows its message.
        Raises ApplicationFailed or EngineUnavailable where a restart may help, and anything else for a bug.
        """

    def link(self, slot: int, stream: int) -> None:
        """Use a fresh data-plane stream between that slot's worker and the broker. Owns the descriptor `stream`."""

    def adopt(self, stream: int) -> None:
        """Adopt connections that another worker could not take from a stream. Owns the descriptor `stream`."""

    def take_over(self, stream: int) -> None:
        """Take over connections of another process from a stream. Owns the descriptor `stream`."""

    async def hand_over(self, stream: int, connections: int, timeout: float) -> dict[str, object]:
        """Hand connections over to another process, or all that the process has. Owns the descriptor `stream`. See
        `control.HandConnectionsOver`."""

    async def drain(self, timeout: float) -> None:
        """Take no more work, tell the clients, and finish within `timeout` seconds. Called once at most."""


class _NotMade:
    """The service of a child before its own is made: refuses streams, and has nothing to drain."""

    def __init__(self, link_lost: Callable[[], None]) -> None:
        self._link_lost = link_lost

    async def start(self) -> None:
        return None

    def link(self, slot: int, stream: int) -> None:
        os.close(stream)
        self._link_lost()  # the supervisor sends another one

    def adopt(self, stream: int) -> None:
        os.close(stream)

    def take_over(self, stream: int) -> None:
        os.close(stream)

    async def hand_over(self, stream: int, connections: int, timeout: float) -> dict[str, object]:
        return hand_nothing_over(stream, "the process has not started yet")

    async def drain(self, timeout: float) -> None:
        return None


def hand_nothing_over(stream: int, reason: str) -> dict[str, object]:
    """Close the stream of a hand-over, and return its result: nothing was moved."""
    os.close(stream)
    return handed_over(0, reason)


def handed_over(moved: int, reason: str) -> dict[str, object]:
    """Return the result of a hand-over without other details. See `control.HandConnectionsOver`."""
    return {"moved": moved, "closed": 0, "left": 0, "reason": reason, "bytes": 0, "failures": []}


class Child:
    """This process, as its service uses it.

    name: "worker 0" or "broker", for the log. slot: -1 for the broker. generation: its serial number among all
    processes of the server. supervisor: its process id. listen: descriptors of listening sockets, owned by the service
    (see `realtime.worker.listening.adopt`). predecessor: a stream to the process whose place this one takes, owned by
    the service; None for none. page: its vital signs. reactor: for the server's own code. loop_reactor: the
    application's, for libraries that need one; it runs on the loop's own thread alone. metrics: the process's series.
    heartbeat: give it the process's load by `observe`, and periodic tasks.
    accounts: of the loop's time. marker: to be called around each handler on the loop. turn_number: returns the number
    of the loop's current turn; None where turns are not counted. lock: see `realtime.process.server_lock`.
    """

    def __init__(
        self,
        slot: int,
        settings: Settings,
        listen: tuple[int, ...],
        page: VitalsPage,
        reactor: Any,
        heartbeat: Heartbeat | None = None,
        accounts: LoopTimeLedger | None = None,
        turn_number: Callable[[], int] | None = None,
        owns_process: bool = False,
        lock: ServerLock | None = None,
        loop_reactor: Any = None,
        generation: int = 0,
        predecessor: int | None = None,
    ) -> None:
        """heartbeat, accounts: of the reactor's loop. owns_process: whether the process is this child's alone, which
        then tunes the garbage collector, and ends all tasks of the loop in a drain. lock: if handlers release it.
        loop_reactor: see the class; None for `reactor`."""
        self.name = "broker" if slot < 0 else f"worker {slot}"
        self.slot = slot
        self.generation = generation
        self.supervisor = os.getppid()
        self.settings = settings
        self.listen = listen
        self.predecessor = predecessor
        self.page = page
        self.reactor = reactor
        self.loop_reactor = loop_reactor or reactor
        self.metrics = Metrics()
        self.heartbeat = heartbeat or Heartbeat(page, reactor, settings.loop)
        self.accounts = accounts or LoopTimeLedger(time.monotonic_ns)
        self.lock = lock or ServerLock()
        self.marker = HandlerMarker(page, self.accounts) if lock is None else ReleasingMarker(page, self.accounts, lock)
        self.relief: Relief | None = None  # started once the process is ready
        self.turn_number = turn_number
        self.metrics.sources.append(lambda: loop_time(self.accounts))
        self.control = Control(self)
        self.service: ChildService = _NotMade(self.link_lost)
        self.draining = False
        self.status = 0
        self._owns_process = owns_process
        self._gc_tuner = GCTuner(self.metrics) if owns_process else None

    def link_lost(self) -> None:
        """Ask the supervisor for a fresh stream to the broker. Never fails: without a supervisor the process ends."""
        self.control.callRemote(control.LinkLost).addErrback(_ignore)

    def drain(self, timeout: float) -> None:
        """End the process within `timeout` seconds. A second call can only bring the deadline nearer."""
        _alarm_at_most(timeout + 1.0)
        if self.draining:
            return
        self.draining = True
        self.lock.call_on_loop(self.heartbeat.enter, ProcessState.DRAINING)
        drained = Deferred.fromCoroutine(self.service.drain(timeout))
        drained.addTimeout(timeout, self.reactor)
        drained.addErrback(self._log_failed_drain, timeout).addBoth(lambda _: self.lock.call_on_loop(self.stop))

    async def end_relief(self) -> None:
        """Go on in the loop's own thread, and have no relief from now on."""
        if self.lock.is_relieving:
            await self.lock.back_on_loop()
        if self.relief is not None:
            self.relief.stop()

    async def cancel_tasks(self, timeout: float) -> None:
        """Cancel all asyncio tasks, which are the application's, and wait for their end for `timeout` seconds at most.

        Then close the asynchronous generators. As at the end of `asyncio.run`, so that `finally` blocks run.
        """
        if not self._owns_process:
            return
        loop = asyncio.get_running_loop()
        tasks = asyncio.all_tasks()
        for task in tasks:
            task.cancel()
        tasks.add(loop.create_task(loop.shutdown_asyncgens()))
        ended, left = await Deferred.fromFuture(loop.create_task(asyncio.wait(tasks, timeout=timeout)))
        for task in ended:
            if not task.cancelled() and (error := task.exception()) is not None:
                _log.failure("a task of the application raised at the end of {name}", Failure(error), name=self.name)
        if left:
            _log.warn(
                "{count} tasks of the application did not end within {timeout:g} s and are left behind; set "
                "shutdown.timeout higher if they need longer",
                count=len(left),
                timeout=timeout,
            )

    def stop(self, status: int = 0) -> None:
        """Leave the reactor. `main` returns the first status that is not 0."""
        self.draining = True  # no end of the control link is a surprise from now on
        if self.relief is not None:
            self.relief.stop()
        self.status = self.status or status
        self.heartbeat.stop()
        if self.reactor.running:
            self.reactor.stop()

    def end_gc_tuning_in_fork(self) -> None:
        """Leave collections to Python's defaults in a fork of the process."""
        if self._gc_tuner is not None:
            self._gc_tuner.end_in_fork()

    def _log_failed_drain(self, failure: Failure, timeout: float) -> None:
        if failure.check(TimeoutError):
            _log.error(
                "{name} did not finish its drain in {timeout:g} s and exits now; "
                "set shutdown.timeout higher if its handlers need longer",
                name=self.name,
                timeout=timeout,
            )
        else:
            _log.failure("{name} raised while it drained and exits now", failure, name=self.name)

    # The start

    def begin(self, make_service: Callable[[Child], ChildService]) -> None:
        """Make and start the service in the running loop, and report the outcome to the supervisor."""
        # Twisted has set its own handler by now. It would stop the reactor with clients still connected.
        signal.signal(signal.SIGTERM, self._on_sigterm)
        self.heartbeat.tasks.add(_CANCEL_ALARM_INTERVAL, self._cancel_stray_alarm)
        self.heartbeat.start()
        maybeDeferred(self._start, make_service).addCallback(self._on_started).addErrback(self._on_failed)

    def _start(self, make_service: Callable[[Child], ChildService]) -> Deferred[None]:
        self.service = make_service(self)
        return Deferred.fromCoroutine(self.service.start())

    def _on_sigterm(self, number: int, frame: object) -> None:
        # In the loop's thread: a drain ends with the application's own code.
        asyncio.get_running_loop().call_soon_threadsafe(self.drain, self.settings.shutdown.timeout)

    def _cancel_stray_alarm(self) -> None:
        """Cancel the alarm of a SIGUSR2 from another process: were the supervisor dead, this process would drain."""
        if not self.draining:
            signal.alarm(0)

    def _on_started(self, _: object) -> None:
        if self.draining:
            return
        if self._gc_tuner is not None:
            self._gc_tuner.begin()
            self.heartbeat.tasks.add(_GC_INTERVAL, self._gc_tuner.collect_all, is_needed=self._gc_tuner.is_due)
        self.heartbeat.enter(ProcessState.READY)
        if self.relief is not None:
            self.relief.start()
        self.control.callRemote(control.Ready).addErrback(_ignore)

    def _on_failed(self, failure: Failure) -> None:
        if failure.check(EngineUnavailable):
            reason = failure.getErrorMessage()
            _log.error("{name} can't start yet; the supervisor starts another: {reason}", name=self.name, reason=reason)
            self.stop(EX_TEMPFAIL)
        elif failure.check(RealtimeError):
            reason = failure.getErrorMessage().replace("\n", "; ")[:_REASON_CHARS]
            status = EX_TEMPFAIL if failure.check(ApplicationFailed, TakeoverFailed) else EX_CONFIG
            sent = self.control.callRemote(control.Failed, reason=reason, status=status)
            sent.addTimeout(_FAILED_TIMEOUT, self.reactor).addErrback(_ignore).addBoth(lambda _: self.stop(status))
        else:
            _log.failure("{name} raised while it started", failure, name=self.name)
            self.stop(EX_SOFTWARE)


class Control(control.Peer):
    """A child's end of the control plane."""

    def __init__(self, child: Child) -> None:
        super().__init__()
        self._child = child

    @control.AttachStream.responder
    def _link(self, slot: int, stream: int) -> dict[str, object]:
        self._child.service.link(slot, stream)
        return {}

    @control.Adopt.responder
    def _adopt(self, stream: int) -> dict[str, object]:
        self._child.service.adopt(stream)
        return {}

    @control.TakeConnectionsOver.responder
    def _take_over(self, stream: int) -> dict[str, object]:
        self._child.service.take_over(stream)
        return {}

    @control.HandConnectionsOver.responder
    def _hand_over(self, stream: int, connections: int, timeout: float) -> Deferred[dict[str, object]]:
        return Deferred.fromCoroutine(self._child.service.hand_over(stream, connections, timeout))

    @control.LimitLog.responder
    def _limit_log(self, level: str) -> dict[str, object]:
        log.limit(level)
        return {}

    @control.Collect.responder
    def _collect(self, names: list[str]) -> dict[str, object]:
        return {"metrics": metrics.dump(self._child.metrics.snapshot(names))}

    @control.Report.responder
    def _report(self, what: str) -> dict[str, object]:
        try:
            text = REPORTS[what]()
        except Exception as error:  # AMP would end the link, and with it this process
            text = f"the report of {what} raised {error!r}\n"
        if self._child.lock.is_relieving:
            text = f"The loop does not turn; the relief thread, which reports, serves its clients:\n{text}"
        return {"text": text.encode("utf-8", "replace")}

    @control.Drain.responder
    def _drain(self, timeout: float) -> dict[str, object]:
        # After the answer has been written: a drain with nothing to do stops the reactor at once.
        self._child.reactor.callLater(0, self._child.drain, timeout)
        return {}

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """Called by twisted: the supervisor has ended, or has dropped this process."""
        super().connectionLost(reason)
        if not self._child.draining:
            cause = "its control link has failed" if self.has_failed else "the supervisor has ended"
            _log.warn("{cause}; {name} drains and exits", cause=cause, name=self._child.name)
        timeout = min(ORPHAN_DRAIN, self._child.settings.shutdown.timeout)
        self._child.drain(timeout)


def main(argv: Sequence[str], make_service: Callable[[Child], ChildService]) -> int:
    """Run a child process. Returns its exit status.

    argv: without the program's name. make_service: called in the running loop; raises as `ChildService.start` does.
    """
    options = _parse(argv)
    if not _detach(options):
        return EX_TEMPFAIL
    page = VitalsPage.open(options.vitals)
    selector = MeasuredSelector(page)
    loop = asyncio.SelectorEventLoop(selector)
    asyncio_reactor = Reactor(loop, selector)
    # Modules of Twisted that import the reactor are imported after this line.
    installReactor(asyncio_reactor)
    selector.attach(loop)
    tree = settings.load(_read(options.settings))
    heartbeat = Heartbeat(page, LoopClock(loop), tree.loop, selector, beats_idle=True)
    child = Child(
        options.slot,
        tree,
        options.listen,
        page,
        asyncio_reactor.server,
        heartbeat,
        selector.accounts,
        lambda: selector.turns,
        owns_process=True,
        lock=ServerLock() if tree.loop.relief and options.slot >= 0 else None,
        loop_reactor=asyncio_reactor,
        generation=options.generation,
        predecessor=options.predecessor,
    )
    child.relief = _make_relief(child, selector, asyncio_reactor.server)
    output.install(tree.log.max_queued_bytes)
    child.metrics.sources.append(output.samples)
    log.begin(child.name, tree.log, sys.stdout)
    log.count_internal_errors(child.metrics)
    loop.set_exception_handler(log.log_loop_error)
    _adopt(asyncio_reactor.server, options.link, child.control)
    kill_forks = _release_in_forks(child, asyncio_reactor.server, loop, selector, (options.vitals, *options.stacks))
    loop.call_soon(child.begin, make_service)  # in the running loop, after Twisted has started
    asyncio_reactor.run()
    kill_forks()
    return child.status


def _make_relief(child: Child, selector: MeasuredSelector, reactor: ServerReactor) -> Relief | None:
    """Make the relief thread of a process whose handlers release the server lock."""
    if not isinstance(child.marker, ReleasingMarker):
        return None
    after = child.settings.loop.relief_after
    tasks, page = child.heartbeat.tasks, child.page
    return Relief(child.lock, after, selector, reactor, child.marker, tasks, page, child.metrics)


def _detach(options: _Options) -> bool:
    """Give this process its own group, signals, stacks and end. Returns whether it can start."""
    given = (options.link, options.settings, options.vitals, *options.stacks, *options.listen, options.predecessor)
    for fd in filter(None, given):
        os.set_inheritable(fd, False)  # processes that user code starts must not inherit them
    with suppress(PermissionError):  # it leads a session already
        os.setpgid(0, 0)  # the supervisor ends the group with this process: programs that handlers have started
    _set_signals()
    faulthandler.enable()
    for fd in options.stacks:
        stack_dumps.register(fd)
    _die_with_the_supervisor()
    if _has_hung_up(options.link):
        return False
    if not _has_descriptors(options.link):
        sys.stderr.write(f"{_TOO_FEW_DESCRIPTORS}\n")
        return False
    return True


def _release_in_forks(
    child: Child,
    reactor: ServerReactor,
    loop: asyncio.AbstractEventLoop,
    selector: MeasuredSelector,
    descriptors: Sequence[int],
) -> Callable[[], None]:
    """Have processes that the application forks release the server's part. Returns a function that kills them.

    descriptors: those without an event.
    """

    def forget() -> None:
        # No thread of the fork is the loop's, so calls of the App go through `callFromThread` in each.
        threadable.ioThread = None
        loop.call_soon_threadsafe = _refuse_in_fork  # type: ignore[method-assign]
        reactor.callFromThread = _refuse_in_fork  # type: ignore[method-assign]
        output.forget_threads()
        child.end_gc_tuning_in_fork()

    return forks.release_in_forks(
        lambda: [*selector.descriptors(), *descriptors], {_port(fd) for fd in child.listen}, forget
    )


def _refuse_in_fork(*_: object, **__: object) -> NoReturn:
    raise RuntimeError("this process was forked from the server's: only the latter can call the methods of the App")


def _port(listening: int) -> int:
    """Return the port of a listening socket."""
    with socket.socket(fileno=os.dup(listening)) as copy:
        return int(copy.getsockname()[1])


def _set_signals() -> None:
    """Set the dispositions that a child needs, for it inherits any: the supervisor acts on SIGINT and SIGHUP."""
    # SIGTTOU: a terminal stops a process in the background that writes to it, if it is set so.
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTTOU, stack_dumps.STACK, stack_dumps.STACK_IN_C):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    dumps = {stack_dumps.STACK, stack_dumps.STACK_IN_C, stack_dumps.STACKS}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGALRM, signal.SIGUSR2, *dumps})


class _Options(NamedTuple):
    """The command line. All but slot and generation are descriptors."""

    link: int
    settings: int
    vitals: int
    slot: int = -1
    generation: int = 0
    predecessor: int | None = None
    stacks: tuple[int, ...] = ()
    listen: tuple[int, ...] = ()


def _parse(argv: Sequence[str]) -> _Options:
    """Parse the command line. Not by argparse, which would write to a megabyte of the memory that children share."""
    options: dict[str, Any] = {}
    for name, value in zip(argv[::2], argv[1::2], strict=True):
        numbers = tuple(map(int, value.split(",")))
        options[name.removeprefix("--")] = numbers if name in ("--stacks", "--listen") else numbers[0]
    return _Options(**options)


def _read(fd: int) -> bytes:
    """Return the whole file, and close `fd`. All children share the file's offset, and may read at the same time."""
    parts, size = [], 0
    while part := os.pread(fd, 1 << 20, size):
        parts.append(part)
        size += len(part)
    os.close(fd)
    return b"".join(parts)


def _adopt(reactor: Any, fd: int, protocol: amp.AMP) -> None:
    """Serve `protocol` over the connected UNIX socket `fd`. Closes `fd`: the reactor keeps its own copy."""
    os.set_blocking(fd, False)
    _ControlStream._fromConnectedSocket(fd, Factory.forProtocol(lambda: protocol), reactor)
    os.close(fd)


class _ControlStream(unix.Server):
    """The link to the supervisor; the relief thread serves it too."""


def _ignore(_: Failure) -> None:
    return None


# The last resorts, which end this process when its own loop can't


def _alarm_at_most(seconds: float) -> None:
    """Have the kernel end this process `seconds` from now at the latest, even if all its threads are blocked."""
    left, _ = signal.getitimer(signal.ITIMER_REAL)
    if not 0 < left <= seconds:
        signal.alarm(max(1, math.ceil(seconds)))


def _die_with_the_supervisor() -> None:
    """End this process seconds after the supervisor's death, also when its loop is blocked with the GIL held.

    The kernel sends SIGUSR2 when the supervisor dies (prctl(2), PR_SET_PDEATHSIG). Its handler is libc's own alarm():
    a handler gets the signal's number and alarm takes seconds, so it arms an alarm in 12 seconds (SIGUSR2 is 12 on
    x86, ARM and RISC-V), whose default action ends the process. No Python runs, no shim process is needed, and alarm
    is async-signal-safe (signal-safety(7)). A child whose loop turns has seen the link's end, drained and exited by
    then. Only a stopped process (SIGSTOP) stays, until it is continued. On systems other than Linux the link's end is
    the only sign.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    libc.signal.restype = ctypes.c_void_p
    libc.signal(signal.SIGUSR2, ctypes.cast(libc.alarm, ctypes.c_void_p))
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGUSR2, 0, 0, 0)


def _has_descriptors(fd: int) -> bool:
    """Return whether this process can open as many descriptors as its start takes. fd: any open one."""
    copies: list[int] = []
    try:
        copies.extend(os.dup(fd) for _ in range(_START_DESCRIPTORS))
    except OSError:
        return False
    finally:
        for copy in copies:
            os.close(copy)
    return True


def _has_hung_up(link: int) -> bool:
    """Whether the supervisor had already ended when this process asked the kernel for the signal of its death."""
    poll = select.poll()
    poll.register(link, select.POLLHUP)
    return bool(poll.poll(0))
