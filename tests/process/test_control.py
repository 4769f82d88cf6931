"""The control plane's commands over a real socketpair: values longer than AMP's own limit, and descriptors."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_twisted
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionAborted
from twisted.internet.protocol import Factory
from twisted.logger import capturedLogs
from twisted.protocols import amp

from realtime import metrics
from realtime.metrics import Sample
from realtime.process import control
from tests.transports.stage import eventually


class Process(control.Peer):
    """A process that answers with the test's values."""

    def __init__(self) -> None:
        super().__init__()
        self.text = b""
        self.samples: list[Sample] = []
        self.streams: Deferred[tuple[int, int]] = Deferred()

    @control.Report.responder
    def report(self, what: str) -> dict[str, object]:
        return {"text": self.text}

    @control.Collect.responder
    def collect(self, names: list[str]) -> dict[str, object]:
        return {"metrics": metrics.dump([sample for sample in self.samples if not names or sample.name in names])}

    @control.AttachStream.responder
    def link(self, slot: int, stream: int) -> dict[str, object]:
        self.streams.callback((slot, stream))
        return {}


class Ends:
    """The two ends of a link."""

    def __init__(self, reactor: Any) -> None:
        self.supervisor, self.process = control.Peer(), Process()
        for end, protocol in zip(socket.socketpair(), (self.supervisor, self.process), strict=True):
            end.setblocking(False)
            reactor.adoptStreamConnection(end.fileno(), socket.AF_UNIX, Factory.forProtocol(lambda made=protocol: made))
            end.close()

    def close(self) -> None:
        for protocol in (self.supervisor, self.process):
            transport: Any = protocol.transport
            if transport is not None:
                transport.abortConnection()


@pytest_twisted.async_yield_fixture
async def ends() -> AsyncIterator[Ends]:
    from twisted.internet import reactor

    ends = Ends(reactor)
    yield ends
    ends.close()


@pytest.mark.parametrize(
    "text", [b"", b"x" * 65_535, b"x" * 65_536, b"x" * 131_070, "".join(map(str, range(100_000))).encode()]
)
async def test_a_report_of_any_length_arrives_whole(ends: Ends, text: bytes) -> None:
    ends.process.text = text
    assert (await ends.supervisor.callRemote(control.Report, what="tasks"))["text"] == text


async def test_a_report_over_the_limit_is_cut(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control.Long, "LONGEST", 100_000)
    ends.process.text = b"ab" * 100_000
    assert (await ends.supervisor.callRemote(control.Report, what="tasks"))["text"] == b"ab" * 50_000


@pytest.mark.parametrize("count", [0, 600, 2_000, 20_000])
async def test_any_number_of_metrics_arrives_whole(ends: Ends, count: int) -> None:
    samples = [Sample(f"realtime_{number}", "counter", "x" * 100, [], number) for number in range(count)]
    ends.process.samples = samples
    answer = await ends.supervisor.callRemote(control.Collect, names=[])
    assert metrics.load(answer["metrics"]) == samples


async def test_a_descriptor_arrives_with_its_command(ends: Ends) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        await ends.supervisor.callRemote(control.AttachStream, slot=3, stream=theirs.fileno())
        theirs.close()
        slot, stream = await ends.process.streams
        os.write(stream, b"hello")
        os.close(stream)
        assert (slot, ours.recv(10)) == (3, b"hello")


async def test_a_descriptor_that_the_receiver_has_no_room_for_ends_the_link_with_one_line(ends: Ends) -> None:
    ends.process.fileDescriptorReceived = os.close  # type: ignore[method-assign]  # as if it had not arrived
    stream, other = socket.socketpair()
    with capturedLogs() as events, stream, other:
        with pytest.raises(amp.UnknownRemoteError, match="no room for a descriptor"):
            await ends.supervisor.callRemote(control.AttachStream, slot=1, stream=stream.fileno())
        await eventually(lambda: ends.process.transport is None)
    assert ends.process.has_failed
    assert ["raise the limit of open files" in event["log_format"] for event in events] == [True]


async def test_requests_fail_at_the_end_of_the_link_and_nothing_is_logged(ends: Ends) -> None:
    with capturedLogs() as events:
        answer = ends.supervisor.callRemote(control.Report, what="tasks")
        ends.close()
        with pytest.raises(ConnectionAborted):
            await answer
    assert [event for event in events if event["log_namespace"].startswith(amp.__name__)] == []
