"""The supervisor connects the two processes of a hand-over with a real socket pair, and passes their result on."""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack
from typing import Any

import pytest
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.error import ConnectionLost

from realtime.metrics import Metrics
from realtime.supervision.effects import LogLine
from realtime.supervisor import handover
from realtime.supervisor.handover import HandOverCounters, HandOverResult, hand_over, hand_state_over


class Process:
    """One end. end: its copy of the stream."""

    def __init__(self, answer: Any = None) -> None:
        self.answer: Deferred[Any] = Deferred()
        if answer is not None:
            self.answer = answer
        self.calls: list[tuple[int, float]] = []
        self.end: socket.socket | None = None

    def _keep(self, stream: int) -> None:
        self.end = socket.socket(fileno=os.dup(stream))

    def take_over(self, stream: int) -> Deferred[object]:
        self._keep(stream)
        return self.answer

    def hand_over(self, stream: int, connections: int, timeout: float) -> Deferred[dict[str, Any]]:
        self._keep(stream)
        self.calls.append((connections, timeout))
        return self.answer

    def close(self) -> None:
        if self.end is not None:
            self.end.close()


def test_both_ends_are_connected_and_the_result_is_that_of_the_source() -> None:
    source, target = Process(), Process(succeed(None))
    results: list[HandOverResult] = []
    hand_over(source, target, -1, 7.5).addCallback(results.append)
    assert source.calls == [(-1, 7.5)]
    assert source.end is not None and target.end is not None
    source.end.send(b"hello")
    assert target.end.recv(10) == b"hello"
    failures = [{"reason": "busy", "count": 2}, {"reason": "refused", "count": 1}]
    source.answer.callback({"moved": 3, "closed": 1, "left": 2, "reason": "", "bytes": 900, "failures": failures})
    assert results == [HandOverResult(3, 1, 2, bytes=900, failures={"busy": 2, "refused": 1})]
    metrics = Metrics()
    counters = HandOverCounters(metrics)
    counters.count(results[0])
    counters.count(results[0])
    counted = {(sample.name, *dict(sample.labels).values()): sample.value for sample in metrics.snapshot()}
    assert counted == {
        ("realtime_handed_over_connections",): 6,
        ("realtime_handed_over_bytes",): 1800,
        ("realtime_handover_failures", "busy"): 4,
        ("realtime_handover_failures", "refused"): 2,
    }
    source.close()
    assert target.end.recv(10) == b""  # the supervisor has no copy any more
    target.close()


def test_a_process_that_ends_ends_the_hand_over() -> None:
    results: list[HandOverResult] = []
    source, target = Process(), Process(fail(ConnectionLost()))
    hand_over(source, target, 5, 1.0).addCallback(results.append)
    assert source.calls == []
    target.close()

    source, target = Process(), Process(succeed(None))
    hand_over(source, target, 5, 1.0).addCallback(results.append)
    source.close()
    source.answer.errback(ConnectionLost())
    assert target.end is not None
    assert target.end.recv(10) == b""
    target.close()
    assert [(result.moved, "ended" in result.reason) for result in results] == [(0, True), (0, True)]


def test_a_supervisor_without_descriptors_hands_nothing_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(handover, "stream_pair", refuse)
    results: list[HandOverResult] = []
    hand_over(Process(), Process(), 5, 1.0).addCallback(results.append)
    assert "ulimit -n" in results[0].reason


@pytest.mark.parametrize(
    ("result", "line", "is_error"),
    [
        ({"moved": 2, "reason": ""}, "the broker has handed its state over, and the streams of 2 workers", False),
        ({"moved": 2, "reason": "too large"}, "the broker goes on with its state: too large", True),
    ],
)
def test_the_state_of_a_broker_goes_to_a_process_that_gets_the_other_end(
    result: dict[str, Any], line: str, is_error: bool
) -> None:
    source, lines = Process(), []
    with ExitStack() as sent:
        theirs = os.dup(hand_state_over(source, 7.5, sent, lines.append))
    assert source.calls == [(-1, 7.5)]
    with socket.socket(fileno=theirs) as end:
        end.send(b"hello")
        assert source.end is not None and source.end.recv(10) == b"hello"
        source.answer.callback(result)
        source.close()
        assert end.recv(10) == b"", "the supervisor has closed its copies"
    assert lines == [LogLine(line, is_error)]
