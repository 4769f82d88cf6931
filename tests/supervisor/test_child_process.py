"""The supervisor's side of one child: what it passes on, reports to its owner, logs, and keeps after the exit."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.logger import LogEvent, capturedLogs
from twisted.protocols import amp
from twisted.python.failure import Failure

from realtime.process import stack_dumps
from realtime.process.zygote import Fork
from realtime.supervision.vitals import ProcessState, RunningHandler, Vitals, VitalsPage
from realtime.supervisor import child_output
from realtime.supervisor.child_process import ChildProcess

READING = Vitals(123, 0.25, 7, 9, ProcessState.READY)


class Owner:
    """Keeps the events of its processes."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []

    def process_ready(self, process: ChildProcess) -> None:
        self.events.append(("ready", process.slot))

    def start_failed(self, process: ChildProcess, reason: str, status: int) -> None:
        self.events.append(("failed", process.slot, reason, status))

    def broker_link_lost(self, process: ChildProcess) -> None:
        self.events.append(("broker link lost", process.slot))

    def control_link_lost(self, process: ChildProcess) -> None:
        self.events.append(("control link lost", process.slot))

    def process_exited(self, process: ChildProcess, status: int) -> None:
        self.events.append(("exited", process.slot, status))


class Zygote:
    """Forks nothing: keeps the request, and duplicates of the child's descriptors."""

    pid = 4321

    def __init__(self) -> None:
        self.fork_request = Fork("", "", (), ())
        self.fds: dict[int, int] = {}
        self.signals: list[int] = []
        self.error: OSError | None = None
        self.exited: Callable[[int], None] | None = None

    def fork(self, fork: Fork, descriptors: Sequence[int], exited: Callable[[int], None]) -> Zygote:
        if self.error:
            raise self.error
        self.fork_request, self.exited = fork, exited
        self.fds = {number: os.dup(fd) for number, fd in zip(fork.descriptors, descriptors, strict=True)}
        return self

    def signal(self, number: int) -> None:
        self.signals.append(number)

    def close(self) -> None:
        while self.fds:
            os.close(self.fds.popitem()[1])


class Reactor:
    """A reactor with the test's clock, whose readable descriptors the test reads."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.callLater = self.clock.callLater
        self.readers: dict[int, Any] = {}

    def adoptStreamConnection(self, fd: int, family: socket.AddressFamily, factory: Any) -> None:
        pass

    def addReader(self, reader: Any) -> None:
        self.readers[reader.fileno()] = reader

    def removeReader(self, reader: Any) -> None:
        del self.readers[reader.fileno()]

    def read(self) -> None:
        for reader in list(self.readers.values()):
            reader.doRead()


class Scene:
    """A child in slot 3, forked with two listening sockets."""

    def __init__(self, capture: bool = False) -> None:
        self.reactor = Reactor()
        self.zygote = Zygote()
        self.owner = Owner()
        self.child = ChildProcess(self.owner, 3)
        self.capture = capture

    def start(self) -> None:
        with open(os.devnull) as null:
            fd = null.fileno()
            zygote: Any = self.zygote
            self.child.start(self.reactor, zygote, "some.worker", fd, [fd, fd], self.capture)

    def page(self) -> VitalsPage:
        """The child's mapping of its page."""
        return VitalsPage.open(os.dup(self.zygote.fds[int(self.argument("--vitals"))]))

    def argument(self, name: str) -> str:
        arguments = self.zygote.fork_request.arguments
        return arguments[arguments.index(name) + 1]

    def write(self, number: int, data: bytes) -> None:
        """Write to a descriptor of the child, and let the supervisor read it."""
        os.write(self.zygote.fds[number], data)
        self.reactor.read()

    def exit(self, status: int) -> None:
        """status: an exit status, or minus a signal."""
        self.zygote.close()
        assert self.zygote.exited is not None
        self.zygote.exited(status)
        self.zygote.exited = None
        self.reactor.read()


@pytest.fixture
def scene() -> Iterator[Scene]:
    scene = Scene()
    scene.start()
    yield scene
    if scene.zygote.exited is not None:
        scene.exit(0)


def output(events: list[LogEvent]) -> list[str]:
    return [event["line"] for event in events if event["log_namespace"] == child_output.__name__]


def test_the_arguments_name_the_descriptors_of_the_child(scene: Scene) -> None:
    request = scene.zygote.fork_request
    assert (request.name, request.module) == ("worker 3", "some.worker")
    assert (scene.argument("--slot"), scene.argument("--listen")) == ("3", "6,7")
    assert int(scene.argument("--stacks")) == 8
    given = {int(scene.argument(name)) for name in ("--link", "--settings", "--vitals")} | {6, 7, 8}
    assert set(scene.zygote.fds) == given
    assert scene.child.pid == Zygote.pid


def test_a_failure_to_fork_leaves_no_descriptor_open() -> None:
    before = os.listdir("/proc/self/fd")
    scene = Scene()
    scene.zygote.error = OSError(11, "Resource temporarily unavailable")
    with pytest.raises(OSError):
        scene.start()
    assert os.listdir("/proc/self/fd") == before
    assert scene.child.vitals is None


@pytest.mark.parametrize("status", [0, 1, 78, -signal.SIGKILL])
def test_the_owner_gets_the_exit_status_or_minus_the_signal(scene: Scene, status: int) -> None:
    scene.exit(status)
    assert scene.owner.events == [("exited", 3, status)]


def test_no_descriptor_stays_open_after_the_exit() -> None:
    counts = []
    for _ in range(3):
        scene = Scene()
        scene.start()
        scene.exit(0)
        counts.append(len(os.listdir("/proc/self/fd")))
    assert counts[1] == counts[2]


def test_vitals_come_from_the_childs_page_and_the_last_ones_outlive_it(scene: Scene) -> None:
    assert (scene.child.vitals, scene.child.peek(), scene.child.running) == (None, (0, 0.0, 0), None)
    page = scene.page()
    page.write(READING)
    page.mark(b"rpc report", b"report")
    assert scene.child.vitals == READING
    assert scene.child.peek() == (123, 0.25, 0)
    assert scene.child.running == RunningHandler("rpc report", "report")
    page.close()
    scene.exit(1)
    assert (scene.child.vitals, scene.child.running) == (READING, None)


def test_a_substitute_reaches_the_childs_page(scene: Scene) -> None:
    page = scene.page()
    scene.child.set_substitute(True)
    assert page.has_substitute()
    page.close()
    scene.exit(0)
    scene.child.set_substitute(False)  # without a page: no error


def test_a_dump_is_requested_by_signal_and_comes_over_its_pipe(scene: Scene) -> None:
    texts: list[str] = []
    answer: Deferred[str] = scene.child.dump(stack_dumps.STACK)
    answer.addCallback(texts.append)
    assert scene.zygote.signals == [stack_dumps.STACK]
    text = 'Stack (most recent call first):\n  File "<frozen runpy>", line 198 in _run_module_as_main\n'
    scene.write(int(scene.argument("--stacks")), text.encode())
    assert texts == [text]
    scene.reactor.clock.advance(stack_dumps.IN_C_AFTER)
    assert scene.zygote.signals == [stack_dumps.STACK]


def test_a_process_that_runs_no_python_is_asked_for_its_stack_in_c(scene: Scene) -> None:
    scene.child.dump(stack_dumps.STACK).addErrback(lambda _: None)
    scene.reactor.clock.advance(stack_dumps.IN_C_AFTER)
    assert scene.zygote.signals == [stack_dumps.STACK, stack_dumps.STACK_IN_C]


def test_a_dump_in_progress_fails_at_the_exit(scene: Scene) -> None:
    failures: list[Failure] = []
    scene.child.dump(stack_dumps.STACKS).addErrback(failures.append)
    scene.exit(-signal.SIGKILL)
    assert len(failures) == 1


def test_output_is_logged_line_by_line_and_an_incomplete_line_at_the_exit() -> None:
    scene = Scene(capture=True)
    scene.start()
    with capturedLogs() as events:
        scene.write(1, b"first\nsec")
        scene.write(2, b"error\n")
        scene.write(1, b"ond\n{braces} \xff")
        assert output(events) == ["first", "error", "second"]
        scene.exit(1)
    assert output(events) == ["first", "error", "second", "{braces} \\xff"]


# Control messages of a child that is broken, or of another version.


class Pipe(StringTransport):
    """The transport of a control link. ended: whether our side has ended it."""

    ended = False

    def loseConnection(self) -> None:
        self.ended = True

    abortConnection = loseConnection


def box(**fields: bytes) -> bytes:
    return bytes(amp.Box({name.encode(): value for name, value in fields.items()}).serialize())


def received(scene: Scene, data: bytes) -> Pipe:
    """Deliver data of the child; no exception may leave the link."""
    pipe = Pipe()
    scene.child._link.makeConnection(pipe)
    with capturedLogs():
        scene.child._link.dataReceived(data)
    return pipe


@pytest.mark.parametrize(
    "data",
    [
        b"\xff" * 300,
        b"\0\0",
        box(no=b"command"),
        box(_ask=b"1", _command=b"CommandOfALaterVersion"),
        box(_ask=b"1", _command=b"StartTLS"),
        box(_ask=b"1", _command=b"Failed"),
        box(_ask=b"1", _command=b"Failed", reason=b"x", status=b"many"),
        box(_ask=b"1", _command=b"Failed", reason=b"\xff", status=b"78"),
        box(_answer=b"77"),
        box(_error=b"77", _error_code=b"x", _error_description=b"y"),
    ],
)
def test_an_invalid_control_message_ends_the_link_of_that_child(scene: Scene, data: bytes) -> None:
    assert received(scene, data).ended
    assert scene.owner.events == []


@pytest.mark.parametrize(
    ("status", "expected"), [(b"75", 75), (b"78", 78), (b"0", 78), (b"-9", 78), (b"1" + b"0" * 30, 78)]
)
def test_a_failed_start_has_a_status_and_a_line_that_can_be_passed_on(
    scene: Scene, status: bytes, expected: int
) -> None:
    received(scene, box(_ask=b"1", _command=b"Failed", reason=b"a\n\x1b[2J" * 2000, status=status))
    ((event, slot, reason, passed),) = scene.owner.events
    assert (event, slot, passed) == ("failed", 3, expected)
    assert reason.startswith("a\\n\\x1b[2J") and len(reason) < 10_000


FIELDS = st.dictionaries(
    st.sampled_from([b"_ask", b"_answer", b"_error", b"_command", b"reason", b"status", b"slot"])
    | st.binary(min_size=1, max_size=20),
    st.sampled_from([b"1", b"Ready", b"Failed", b"LinkLost", b"AttachStream"]) | st.binary(max_size=50),
    min_size=1,
    max_size=5,
)


@given(st.lists(FIELDS.map(lambda fields: amp.Box(fields).serialize()) | st.binary(max_size=100), max_size=4))
def test_arbitrary_control_messages_raise_nothing_and_call_only_our_commands(messages: list[bytes]) -> None:
    scene = Scene()
    scene.start()
    try:
        received(scene, b"".join(messages))
        assert {event for event, *_ in scene.owner.events} <= {"ready", "failed", "broker link lost"}
    finally:
        scene.exit(0)
