"""The supervisor's side of one child process: its descriptors, control link, vitals page and exit.

A `ChildProcess` reports its events to its owner. `realtime.process.child` is the child's side.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import ExitStack
from typing import Any, Protocol

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall
from twisted.internet.protocol import Factory, connectionDone
from twisted.python.failure import Failure

from realtime import metrics
from realtime.config.values import escape_unprintable
from realtime.metrics import Sample
from realtime.process import control
from realtime.process.stack_dumps import IN_C_AFTER, STACK, STACK_IN_C, StackReader
from realtime.process.zygote import Fork
from realtime.supervision.slots import SlotRecord
from realtime.supervision.vitals import LatestCalls, RunningHandler, Vitals, VitalsPage
from realtime.supervisor.child_output import ChildOutput
from realtime.supervisor.inheritance import InheritedProcess
from realtime.supervisor.readable import Readable, read_pipe
from realtime.supervisor.zygote import ForkedChild, Zygote

# Descriptor numbers in the child; the slot's listening sockets follow.
_LINK, _SETTINGS, _VITALS, _LISTEN = 3, 4, 5, 6
_MAX_REASON = 2000
_FAILED_STATUSES = {os.EX_CONFIG, os.EX_TEMPFAIL}


class ChildProcessOwner(Protocol):
    """Receives the events of its processes. Each event names the process, because its slot may already have another."""

    def process_ready(self, process: ChildProcess) -> None: ...
    def start_failed(self, process: ChildProcess, reason: str, status: int) -> None: ...
    def broker_link_lost(self, process: ChildProcess) -> None: ...
    def control_link_lost(self, process: ChildProcess) -> None: ...
    def process_exited(self, process: ChildProcess, status: int) -> None: ...


class ChildProcess:
    """A running child. Its pid, 0 until it is forked, is not reused before the owner's `process_exited`: the kernel
    keeps the exit status until then."""

    def __init__(self, owner: ChildProcessOwner, slot: int, generation: int = 0) -> None:
        """generation: its serial number among all processes of the server."""
        self.slot = slot
        self.generation = generation
        self.has_exited = False
        self._owner = owner
        self._link = _Link(self, owner)
        self._page: VitalsPage | None = None
        self._vitals: Vitals | None = None
        self._outputs: list[ChildOutput] = []
        self._pipes: list[Readable] = []  # of its outputs
        self._stacks: Readable | None = None
        self._child: ForkedChild | None = None
        self._call_later: Callable[..., IDelayedCall]
        self._dumps: StackReader | None = None

    def start(
        self,
        reactor: Any,
        zygote: Zygote,
        module: str,
        settings: int,
        listening: Sequence[int],
        capture: bool,
        predecessor: int | None = None,
    ) -> None:
        """Have it forked with copies of these descriptors: the settings, the listening sockets, and its end of a stream
        to the process whose place it takes.

        module: to run in it. capture: write its standard output and error to our log, instead of letting it inherit
        both. Raises OSError.
        """
        self._page = VitalsPage.create()
        self._call_later = reactor.callLater
        self._dumps = StackReader(reactor.callLater)
        try:
            self._fork(reactor, zygote, module, settings, listening, capture, predecessor)
        except OSError:
            self._close_page()
            raise

    def _fork(
        self,
        reactor: Any,
        zygote: Zygote,
        module: str,
        settings: int,
        listening: Sequence[int],
        capture: bool,
        predecessor: int | None,
    ) -> None:
        assert self._page is not None
        sockets = {_LISTEN + index: fd for index, fd in enumerate(listening)}
        stacks = _LISTEN + len(listening)
        streams = {} if predecessor is None else {stacks + 1: predecessor}
        arguments = (
            *("--slot", str(self.slot), "--generation", str(self.generation)),
            *("--link", str(_LINK), "--settings", str(_SETTINGS), "--vitals", str(_VITALS)),
            *("--stacks", str(stacks)),
            *(("--listen", ",".join(map(str, sockets))) if sockets else ()),
            *(("--predecessor", str(stacks + 1)) if streams else ()),
        )
        name = "broker" if self.slot < 0 else f"worker {self.slot}"
        with ExitStack() as theirs, ExitStack() as unused:
            ours: dict[int, int] = {}
            given: dict[int, int] = {_SETTINGS: settings, _VITALS: self._page.fd, **sockets, **streams}
            for number in (stacks, 1, 2) if capture else (stacks,):
                ours[number], given[number] = os.pipe()
                theirs.callback(os.close, given[number])
                unused.callback(os.close, ours[number])
            link, end = socket.socketpair()
            theirs.enter_context(end)
            unused.enter_context(link)
            given[_LINK] = end.fileno()
            fork = Fork(name, module, arguments, tuple(given))
            self._child = zygote.fork(fork, tuple(given.values()), self._exited)
            unused.pop_all()
        self._serve(reactor, link)
        assert self._dumps is not None
        self._stacks = read_pipe(reactor, ours.pop(stacks), self._dumps.feed)
        self._read_outputs(reactor, ours.values())

    @property
    def is_quiet(self) -> bool:
        """Whether its control link is between two messages, as `inheritance` needs it."""
        return self._link.is_quiet

    def inheritance(self, record: SlotRecord) -> InheritedProcess:
        """Return what another program needs to go on with the process."""
        assert self._page is not None and self._stacks is not None
        link: Any = self._link.transport
        return InheritedProcess(
            record,
            self.pid,
            link.fileno(),
            self._link.sent_descriptors,
            self._page.fd,
            self._stacks.fileno(),
            [pipe.fileno() for pipe in self._pipes],
        )

    def resume(self, reactor: Any, inherited: InheritedProcess) -> None:
        """Go on with a process that this program has inherited, in place of `start`."""
        self._page = VitalsPage.open(inherited.page)
        self._call_later = reactor.callLater
        self._dumps = StackReader(reactor.callLater)
        self._stacks = read_pipe(reactor, inherited.stacks, self._dumps.feed)
        self._read_outputs(reactor, inherited.outputs)
        self._link.sent_descriptors = inherited.sent_descriptors
        self._serve(reactor, socket.socket(fileno=inherited.link))
        self._child = ForkedChild(reactor, self._exited, lambda: None)
        self._child.forked(inherited.pid)

    def _serve(self, reactor: Any, link: socket.socket) -> None:
        """Serve the control link, and close our copy of it."""
        link.setblocking(False)
        with link:
            reactor.adoptStreamConnection(link.fileno(), socket.AF_UNIX, Factory.forProtocol(lambda: self._link))

    def _read_outputs(self, reactor: Any, pipes: Iterable[int]) -> None:
        for fd in pipes:
            self._outputs.append(ChildOutput())
            self._pipes.append(read_pipe(reactor, fd, self._outputs[-1].feed))

    @property
    def pid(self) -> int:
        """Its pid; 0 until it is forked."""
        return self._child.pid if self._child is not None else 0

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

    def set_substitute(self, available: bool) -> None:
        """Publish on its page whether another worker can take new clients in its place."""
        if self._page is not None:
            self._page.set_substitute(available)

    def signal(self, number: int) -> None:
        """Send a signal. Without effect after the process has exited."""
        if self._child is not None:
            self._child.signal(number)

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
        answer: Deferred[object] = self._link.callRemote(control.TakeConnectionsOver, stream=stream)
        return answer

    def hand_over(self, stream: int, connections: int, timeout: float) -> Deferred[dict[str, Any]]:
        """Send the source's end of a hand-over, see `control.HandConnectionsOver`. Keep `stream` open until the answer.

        It comes at the end of the hand-over, and fails if the process ends before.
        """
        answer: Deferred[dict[str, Any]] = self._link.callRemote(
            control.HandConnectionsOver, stream=stream, connections=connections, timeout=timeout
        )
        return answer

    def limit_log(self, level: str) -> None:
        """Have it log events of `level` or above from now on. level: as `log.level`."""
        self._link.callRemote(control.LimitLog, level=level).addErrback(_ignore)

    def report(self, what: str) -> Deferred[str]:
        """Request a report on its state, see `realtime.process.diagnostics`. Works only while its loop turns."""
        answer: Deferred[dict[str, bytes]] = self._link.callRemote(control.Report, what=what)
        return answer.addCallback(lambda box: box["text"].decode("utf-8", "replace"))

    def collect(self, names: Collection[str] = ()) -> Deferred[list[Sample]]:
        """Request its metrics. names: of the wanted ones; empty for all. Fails on a lost link or unreadable metrics."""
        answer: Deferred[dict[str, bytes]] = self._link.callRemote(control.Collect, names=list(names))
        return answer.addCallback(lambda box: metrics.load(box["metrics"]))

    def _exited(self, status: int) -> None:
        self.has_exited = True
        self._vitals = self.vitals
        self._close_page()
        self._link.end()
        if self._stacks is not None:
            self._stacks.close()
        if self._dumps is not None:
            self._dumps.end()
        for output in self._outputs:
            output.flush()
        self._owner.process_exited(self, status)

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


def _cancelling(result: Any, call: IDelayedCall) -> Any:
    """Pass a result on; the call is no longer needed."""
    if call.active():
        call.cancel()
    return result


def _ignore(_: Failure) -> None:
    return None
