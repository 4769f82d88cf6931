"""Counters, gauges and histograms of one process, cheap to increment, and their form on the way to the supervisor.

Each process counts into one `Metrics`. The supervisor collects the snapshots of all processes and writes them as
Prometheus text with the labels `process` and `worker` (see `realtime.operators.exposition`). Label values come from
closed sets, never from a client's input.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

import msgspec

Series = tuple[str, tuple[tuple[str, str], ...]]

NONE = "none"
"""The label value for "there is none": a channel without a namespace, an account without a name."""


class Counter:
    """A number that only grows. Increment `value` in place: `counter.value += 1`."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0


class Histogram:
    """The number of observed values up to each of some bounds, and their sum."""

    def __init__(self, bounds: Sequence[float]) -> None:
        """bounds: inclusive, in ascending order."""
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def samples(self, name: str, help: str, labels: list[tuple[str, str]]) -> Iterator[Sample]:
        """The series of this histogram, by the conventions of Prometheus: `le` is a bucket's inclusive bound."""
        total = 0
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            total += count
            yield Sample(f"{name}_bucket", "histogram", help, [*labels, ("le", bound)], total)
        yield Sample(f"{name}_sum", "histogram", help, labels, self._sum)
        yield Sample(f"{name}_count", "histogram", help, labels, total)


class Sample(msgspec.Struct, frozen=True, array_like=True):
    """The value of one series at one moment.

    name: of a histogram, with the suffix of the series. kind: "counter", "gauge" or "histogram". labels: pairs of name
    and value.
    """

    name: str
    kind: str
    help: str
    labels: list[tuple[str, str]]
    value: float


class Metrics:
    """The series of one process. Callers look up a counter once and keep it.

    sources: functions that return further samples, called at each snapshot; append to it.
    """

    def __init__(self) -> None:
        self.sources: list[Callable[[], Iterable[Sample]]] = []
        self._counters: dict[Series, tuple[str, Counter]] = {}
        self._gauges: dict[Series, tuple[str, Callable[[], float]]] = {}
        self._histograms: dict[Series, tuple[str, Histogram]] = {}

    def counter(self, name: str, help: str, **labels: str) -> Counter:
        """Return the counter of this name and these labels, the same object at every call.

        name: without the suffix `_total`, which the text form appends.
        """
        series = (name, tuple(sorted(labels.items())))
        _, counter = self._counters.setdefault(series, (help, Counter()))
        return counter

    def gauge(self, name: str, help: str, read: Callable[[], float], **labels: str) -> None:
        """Register a gauge; each snapshot calls `read` for its value."""
        self._gauges[(name, tuple(sorted(labels.items())))] = (help, read)

    def histogram(self, name: str, help: str, bounds: Sequence[float], **labels: str) -> Histogram:
        """Return the histogram of this name and these labels, the same object at every call. bounds: floats."""
        series = (name, tuple(sorted(labels.items())))
        _, histogram = self._histograms.setdefault(series, (help, Histogram(bounds)))
        return histogram

    def snapshot(self, names: Collection[str] = ()) -> list[Sample]:
        """Return a sample of every series. names: restricts it to series of these names; empty for all."""
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
        histograms = [
            sample
            for (name, labels), (help, histogram) in self._histograms.items()
            if not names or name in names
            for sample in histogram.samples(name, help, list(labels))
        ]
        others = [sample for source in self.sources for sample in source() if not names or sample.name in names]
        return counters + gauges + histograms + others


def bad_input_counter(metrics: Metrics, kind: str) -> Counter:
    """Return the counter of refused input and other faults of peers. kind: from a closed set."""
    return metrics.counter("realtime_bad_input", "Refused input and faults of peers", kind=kind)


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(list[Sample])


def dump(samples: list[Sample]) -> bytes:
    """Serialise a snapshot for the control link."""
    return _encoder.encode(samples)


def load(data: bytes) -> list[Sample]:
    """Deserialise a snapshot from `dump`. Raises msgspec.MsgspecError for other bytes."""
    return _decoder.decode(data)
