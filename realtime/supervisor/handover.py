"""The supervisor's part in a hand-over: it connects the two processes, and waits for the result.

`realtime.worker.handover` has both ends.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Protocol

from msgspec import Struct
from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from realtime.metrics import Metrics
from realtime.process.fd_stream import stream_pair
from realtime.supervision.effects import LogLine

ALL = -1
"""The number of connections to hand over: all of them."""


class HandOverProcess(Protocol):
    """A process at one end of a hand-over: a `ChildProcess`."""

    def take_over(self, stream: int) -> Deferred[object]: ...
    def hand_over(self, stream: int, connections: int, timeout: float) -> Deferred[dict[str, Any]]: ...


class HandOverResult(Struct, frozen=True):
    """The number of connections by their outcome. left: still at the source, and served.

    reason: why the hand-over ended early, "" if it did not. If the source has ended, the numbers are 0. bytes: of state
    sent. failures: numbers of connections that could not move, by reason.
    """

    moved: int = 0
    closed: int = 0
    left: int = 0
    reason: str = ""
    bytes: int = 0
    failures: dict[str, int] = {}


class HandOverCounters:
    """Counts moved connections and failed moves. The workers' own counters end with them."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._moved = metrics.counter(
            "realtime_handed_over_connections", "Connections that moved to another process, without an end."
        )
        self._bytes = metrics.counter("realtime_handed_over_bytes", "State of connections that moved.")

    def count(self, result: HandOverResult) -> None:
        """Count the connections of one hand-over."""
        self._moved.value += result.moved
        self._bytes.value += result.bytes
        help = "Connections that could not move to another process, by reason."
        for reason, count in result.failures.items():
            self._metrics.counter("realtime_handover_failures", help, reason=reason).value += count


def hand_over(
    source: HandOverProcess, target: HandOverProcess, connections: int, timeout: float
) -> Deferred[HandOverResult]:
    """Have `source` hand connections over to `target`, which serves already. The Deferred never fails.

    connections: their number; ALL for all, and then the source accepts no further ones. timeout: seconds after which
    the source starts to move no more. Connections whose commands take longer stay there.
    """
    outcome: Deferred[HandOverResult] = Deferred()
    try:
        ours, theirs = stream_pair()
    except OSError as error:
        outcome.callback(HandOverResult(reason=f"no socket pair: {error}; check `ulimit -n`"))
        return outcome

    def taking(_: object) -> Deferred[dict[str, Any]]:
        theirs.close()
        return source.hand_over(ours.fileno(), connections, timeout)

    def ended(result: dict[str, Any] | Failure) -> None:
        ours.close()
        theirs.close()
        if isinstance(result, Failure):
            reason = f"a process ended, or its control link: {result.getErrorMessage()}"
            outcome.callback(HandOverResult(reason=reason))
        else:
            failures = {failure["reason"]: failure["count"] for failure in result.pop("failures")}
            outcome.callback(HandOverResult(**result, failures=failures))

    target.take_over(theirs.fileno()).addCallback(taking).addBoth(ended)
    return outcome


def hand_state_over(
    source: HandOverProcess, timeout: float, sent: ExitStack, write_log: Callable[[LogLine], None]
) -> int:
    """Have the broker hand its state over to its successor, and return the successor's end of the stream.

    timeout: seconds until the successor must have begun. sent: closes the end. Raises OSError.
    """
    ours, theirs = stream_pair()
    sent.enter_context(theirs)

    def ended(result: dict[str, Any]) -> None:
        if reason := result["reason"]:
            write_log(LogLine(f"the broker goes on with its state: {reason}", is_error=True))
        else:
            count = result["moved"]
            write_log(LogLine(f"the broker has handed its state over, and the streams of {count} workers"))

    handed = source.hand_over(ours.fileno(), ALL, timeout)
    handed.addCallbacks(ended, lambda failure: None)  # the end of the source is reported otherwise
    handed.addBoth(lambda _: ours.close())
    return theirs.fileno()
