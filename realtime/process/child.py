"""The common beginning and end of every process that the supervisor starts: `main`.

    python -m MODULE --link FD --settings FD --vitals FD [--stacks FD] [--slot N] [--listen FD,FD]

All descriptors are inherited. `link` is one end of a socketpair that speaks AMP (`realtime.process.control`);
`settings` a sealed memfd with `realtime.config.settings.dump`; `vitals` this process's page; `stacks` a pipe for its
stacks (`realtime.process.stack_dumps`); `listen` the slot's listening sockets. So a child reads no file and no
environment. It sends Ready when its `start` has returned, or Failed.

A child ends when it is told to drain, on SIGTERM, and when the link ends: then the supervisor is gone. The deadline
of a drain is kept by the kernel (alarm(2)), so a loop or a thread that is blocked can't outlive it. SIGINT is
ignored: Ctrl-C reaches the whole process group, and the supervisor decides. Exit statuses are those of sysexits.h.
"""

from __future__ import annotations

import argparse
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
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.main import installReactor
from twisted.internet.protocol import Factory, connectionDone
from twisted.logger import Logger
from twisted.protocols import amp
from twisted.python.failure import Failure

from realtime import metrics
from realtime.config import settings
from realtime.config.settings import Settings
from realtime.errors import EngineUnavailable, RealtimeError
from realtime.metrics import Metrics
from realtime.process import control, log, stack_dumps
from realtime.process.diagnostics import REPORTS
from realtime.process.gc_tuning import GCTuner
from realtime.process.heartbeat import HandlerMarker, Heartbeat, LoopClock, MeasuredSelector, loop_time
from realtime.process.reactor import Reactor
from realtime.supervision.loop_time import LoopTimeLedger
from realtime.supervision.vitals import ProcessState, VitalsPage

EX_SOFTWARE = 70
EX_TEMPFAIL = 75
EX_CONFIG = 78

# Seconds that a child goes on draining after its supervisor has died.
ORPHAN_DRAIN = 8.0
# Seconds that the supervisor has to take the reason for a failed start.
_FAREWELL = 2.0
# Seconds; well under the 12 of the alarm that it looks for.
_FORGIVE_INTERVAL = 3.0
# Seconds from when all garbage should be looked for until it is.
_GARBAGE_INTERVAL = 1.0
_REASON_CHARS = 2000
_PR_SET_PDEATHSIG = 1

_log = Logger()


class Child:
    """This process, as its own `start` sees it. `start` sets the hooks; each has a default that does little.

    name: "worker 0" or "broker", for the log. slot: -1 for the broker. listen: descriptors, owned by `start` from
    then on (see `realtime.worker.listening.adopt`). metrics: the process's series. pulse: give it the
    load of the process with `pulse.observe`. marks: for whoever runs handlers. accounts: of the loop's time, for
    whoever takes much of it. turn: tells the number of the loop's turn, None if nobody counts. reactor: asyncio's, with
    monotonic seconds.
    """

    def __init__(
        self,
        slot: int,
        settings: Settings,
        listen: tuple[int, ...],
        page: VitalsPage,
        reactor: Any,
        pulse: Heartbeat | None = None,
        accounts: LoopTimeLedger | None = None,
        turn: Callable[[], int] | None = None,
    ) -> None:
        """pulse, accounts: of the reactor's loop. turn: tells the number of its turn."""
        self.name = "broker" if slot < 0 else f"worker {slot}"
        self.slot = slot
        self.settings = settings
        self.listen = listen
        self.page = page
        self.reactor = reactor
        self.metrics = Metrics()
        self.pulse = pulse or Heartbeat(page, reactor, settings.loop)
        self.accounts = accounts or LoopTimeLedger(time.monotonic_ns)
        self.marks = HandlerMarker(page, self.accounts)
        self.turn = turn
        self.metrics.sources.append(lambda: loop_time(self.accounts))
        self.garbage: GCTuner | None = None  # of a process that is this child's alone
        self.control = Control(self)
        # (slot, descriptor): a fresh data-plane stream between that slot's worker and the broker. Takes ownership. One
        # that comes before this hook is set is refused, and comes again.
        self.on_link: Callable[[int, int], None] = self._refuse_link
        # Descriptor: a stream over which connections come that another worker could not take. Takes ownership.
        self.on_adopt: Callable[[int], None] = os.close
        # Seconds -> when it is over: stop taking work, tell the clients, finish. Called once at most.
        self.on_drain: Callable[[float], Awaitable[None]] = _nothing_to_drain
        self.draining = False
        self.status = 0

    def link_lost(self) -> None:
        """Ask the supervisor for a fresh stream to the broker. Never fails: without a supervisor we are ending."""
        self.control.callRemote(control.LinkLost).addErrback(_ignore)

    def drain(self, timeout: float) -> None:
        """Begin to end; `on_drain` has `timeout` seconds. Again: no effect but that a nearer deadline counts."""
        _alarm_at_most(timeout + 1.0)
        if self.draining:
            return
        self.draining = True
        self.pulse.enter(ProcessState.DRAINING)
        drained = maybeDeferred(_deferred, self.on_drain, timeout)
        drained.addTimeout(timeout, self.reactor)
        drained.addErrback(self._drain_failed).addBoth(lambda _: self.stop())

    def stop(self, status: int = 0) -> None:
        """Leave the reactor; `main` returns `status`, or the first one that was not 0."""
        self.status = self.status or status
        self.pulse.stop()
        if self.reactor.running:
            self.reactor.stop()

    def _refuse_link(self, slot: int, stream: int) -> None:
        os.close(stream)
        self.link_lost()

    def _drain_failed(self, failure: Failure) -> None:
        _log.failure("draining did not finish", failure)

    # The beginning.

    def begin(self, start: Callable[[Child], Awaitable[None]]) -> None:
        """Run `start` in the turning loop, and report how it went."""
        # Twisted has set its own handler by now. It would stop the reactor with clients still connected.
        signal.signal(signal.SIGTERM, self._on_sigterm)
        self.pulse.chores.add(_FORGIVE_INTERVAL, self._forgive_strays)
        self.pulse.start()
        maybeDeferred(_deferred, start, self).addCallbacks(self._started, self._failed)

    def _on_sigterm(self, number: int, frame: object) -> None:
        self.reactor.callFromThread(self.drain, self.settings.shutdown.timeout)

    def _forgive_strays(self) -> None:
        """Undo the alarm of a SIGUSR2 that a stranger sent: the supervisor lives, or we would be draining."""
        if not self.draining:
            signal.alarm(0)

    def _started(self, _: object) -> None:
        if self.draining:
            return
        if self.garbage is not None:
            self.garbage.begin()
            self.pulse.chores.add(_GARBAGE_INTERVAL, self.garbage.look_through, wanted=self.garbage.due)
        self.pulse.enter(ProcessState.READY)
        self.control.callRemote(control.Ready).addErrback(_ignore)

    def _failed(self, failure: Failure) -> None:
        if failure.check(EngineUnavailable):
            _log.error("can't start just now: {reason}", reason=failure.getErrorMessage())
            self.stop(EX_TEMPFAIL)
        elif failure.check(RealtimeError):
            reason = failure.getErrorMessage().replace("\n", "; ")[:_REASON_CHARS]
            told = self.control.callRemote(control.Failed, reason=reason).addTimeout(_FAREWELL, self.reactor)
            told.addErrback(_ignore).addBoth(lambda _: self.stop(EX_CONFIG))
        else:
            _log.failure("can't start", failure)
            self.stop(EX_SOFTWARE)


class Control(control.Peer):
    """A child's end of the control plane."""

    def __init__(self, child: Child) -> None:
        super().__init__()
        self._child = child

    @control.Link.responder
    def _link(self, slot: int, stream: int) -> dict[str, object]:
        self._child.on_link(slot, stream)
        return {}

    @control.Adopt.responder
    def _adopt(self, stream: int) -> dict[str, object]:
        self._child.on_adopt(stream)
        return {}

    @control.Collect.responder
    def _collect(self, names: list[str]) -> dict[str, object]:
        return {"metrics": metrics.dump(self._child.metrics.snapshot(names))}

    @control.Report.responder
    def _report(self, what: str) -> dict[str, object]:
        try:
            text = REPORTS[what]()
        except Exception as error:  # which would end the link, and with it this process
            text = f"{what} can't be told: {error!r}\n"
        return {"text": text.encode("utf-8", "replace")}

    @control.Drain.responder
    def _drain(self, timeout: float) -> dict[str, object]:
        # After the answer is on its way: a drain with nothing to do stops the reactor at once.
        self._child.reactor.callLater(0, self._child.drain, timeout)
        return {}

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """The supervisor is gone, or has given us up."""
        super().connectionLost(reason)
        if not self._child.draining:
            _log.warn("the supervisor is gone: draining")
        self._child.drain(min(ORPHAN_DRAIN, self._child.settings.shutdown.timeout))


def main(argv: Sequence[str], start: Callable[[Child], Awaitable[None]]) -> int:
    """Be a child: returns the exit status when the process has ended its work.

    argv: without the program's name. start: sets the child up and returns when it serves; it may await Deferreds. It
    raises SettingsError, or another RealtimeError, for what a restart will not mend (the supervisor then shows its
    message), EngineUnavailable for what it may, and anything else for a bug.
    """
    options = _arguments().parse_args(argv)
    for fd in (options.link, options.settings, options.vitals, *options.stacks, *options.listen):
        os.set_inheritable(fd, False)  # not for the processes that user code starts
    _settle_signals()
    faulthandler.enable()
    for fd in options.stacks:
        stack_dumps.answer(fd)
    _die_with_the_supervisor()
    if _has_hung_up(options.link):
        return EX_TEMPFAIL
    # Importing anything of Twisted that wants the reactor comes after this line.
    page = VitalsPage.open(options.vitals)
    turns = MeasuredSelector(page)
    loop = asyncio.SelectorEventLoop(turns)
    clock = Reactor(loop, turns)
    installReactor(clock)
    from twisted.internet import reactor

    turns.ready = getattr(loop, "_ready", ())  # asyncio shows its queue to nobody
    tree = settings.load(_read(options.settings))
    pulse = Heartbeat(page, LoopClock(loop), tree.loop, turns)
    pulse.rests = True
    child = Child(options.slot, tree, options.listen, page, reactor, pulse, turns.accounts, lambda: turns.turns)
    child.garbage = GCTuner(child.metrics)
    log.begin(child.name, tree.log.level, sys.stdout)
    _adopt(clock, options.link, child.control)
    clock.callWhenRunning(child.begin, start)
    clock.run()
    return child.status


def _settle_signals() -> None:
    """Ignore what is the supervisor's to judge or does not concern us, whatever dispositions were inherited."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(
        signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGALRM, signal.SIGUSR2, stack_dumps.STACK, stack_dumps.STACKS}
    )


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="A process of a realtime server; its supervisor starts it.")
    parser.add_argument("--slot", type=int, default=-1)
    for name in ("--link", "--settings", "--vitals"):
        parser.add_argument(name, type=int, required=True, metavar="FD")
    parser.add_argument("--stacks", type=_descriptors, default=(), metavar="FD")
    parser.add_argument("--listen", type=_descriptors, default=(), metavar="FD[,FD]")
    return parser


def _descriptors(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _read(fd: int) -> bytes:
    with open(fd, "rb") as file:
        file.seek(0)  # the offset is shared with every other child
        return file.read()


def _adopt(reactor: Any, fd: int, protocol: amp.AMP) -> None:
    """Speak `protocol` over the connected UNIX socket `fd`, which is closed here: the reactor keeps its own copy."""
    os.set_blocking(fd, False)
    reactor.adoptStreamConnection(fd, socket.AF_UNIX, Factory.forProtocol(lambda: protocol))
    os.close(fd)


def _deferred(function: Callable[..., Awaitable[None]], *arguments: object) -> Any:
    result = function(*arguments)
    return Deferred.fromCoroutine(result) if isinstance(result, Coroutine) else result


async def _nothing_to_drain(timeout: float) -> None:
    return None


def _ignore(_: Failure) -> None:
    return None


# The last resorts: what ends this process when its own loop can't.


def _alarm_at_most(seconds: float) -> None:
    """Have the kernel end this process `seconds` from now at the latest, whatever its threads are doing."""
    left, _ = signal.getitimer(signal.ITIMER_REAL)
    if not 0 < left <= seconds:
        signal.alarm(max(1, math.ceil(seconds)))


def _die_with_the_supervisor() -> None:
    """End this process seconds after the supervisor's death, also when its loop is blocked with the GIL held.

    The kernel sends SIGUSR2 when the supervisor dies (prctl(2), PR_SET_PDEATHSIG). Its handler is libc's own alarm():
    a handler gets the signal's number and alarm takes seconds, so it arms an alarm in 12 seconds (SIGUSR2 is 12 on
    x86, ARM and RISC-V), whose default action ends the process. No Python runs, no shim process is needed, and alarm
    is async-signal-safe (signal-safety(7)). A child that is well has seen the link's end, drained and left by then.
    Only a process that was stopped (SIGSTOP) stays, until it is continued. Elsewhere than on Linux the link's end
    is the only sign.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    libc.signal.restype = ctypes.c_void_p
    libc.signal(signal.SIGUSR2, ctypes.cast(libc.alarm, ctypes.c_void_p))
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGUSR2, 0, 0, 0)


def _has_hung_up(link: int) -> bool:
    """Whether the supervisor was gone before we asked the kernel to tell us of its death."""
    look = select.poll()
    look.register(link, select.POLLHUP)
    return bool(look.poll(0))
