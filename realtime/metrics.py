"""Counters and gauges of one process, cheap to bump, and their way to the supervisor.

A process counts into one `Metrics`; the supervisor gathers the snapshots of all and writes Prometheus text with a
label `worker` (see `realtime.operators.port`). Label values come from closed sets, never from a client's input.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

import msgspec

Series = tuple[str, tuple[tuple[str, str], ...]]


class Counter:
    """A number that only grows. Bump `value` in place: `counter.value += 1`."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0


class Sample(msgspec.Struct, frozen=True, array_like=True):
    """One series at one moment. kind: "counter" or "gauge". labels: name, value pairs."""

    name: str
    kind: str
    help: str
    labels: list[tuple[str, str]]
    value: float


class Metrics:
    """The series of one process. Ask for a counter once, keep it, and bump it.

    sources: called at each snapshot, for the samples of what somebody else counts; add your own.
    """

    def __init__(self) -> None:
        self.sources: list[Callable[[], Iterable[Sample]]] = []
        self._counters: dict[Series, tuple[str, Counter]] = {}
        self._gauges: dict[Series, tuple[str, Callable[[], float]]] = {}

    def counter(self, name: str, help: str, **labels: str) -> Counter:
        """The counter of this name and these labels; the same object at every call.

        name: without the `_total` that the text form appends.
        """
        series = (name, tuple(sorted(labels.items())))
        _, counter = self._counters.setdefault(series, (help, Counter()))
        return counter

    def gauge(self, name: str, help: str, read: Callable[[], float], **labels: str) -> None:
        """A number that is read when a snapshot is taken."""
        self._gauges[(name, tuple(sorted(labels.items())))] = (help, read)

    def snapshot(self, names: Collection[str] = ()) -> list[Sample]:
        """Every series with its value now. names: only those of these names; empty for all."""
        counters = [
            Sample(name, "counter", help, list(labels), counter.value)
            for (name, labels), (help, counter) in self._counters.items()
            if not names or name in names
        ]
        gauges = [
            Sample(name, "gauge", help, list(labels), read())
            for (name, labels), (help, read) in self._gauges.items()
            if not names or name in names
        ]
        others = [sample for source in self.sources for sample in source() if not names or sample.name in names]
        return counters + gauges + others


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(list[Sample])


def dump(samples: list[Sample]) -> bytes:
    """The bytes that carry a snapshot over the control plane."""
    return _encoder.encode(samples)


def load(data: bytes) -> list[Sample]:
    """The inverse of `dump`. Raises msgspec.MsgspecError on anything else."""
    return _decoder.decode(data)
