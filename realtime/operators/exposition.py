"""/metrics: samples of all processes as Prometheus text.

Each series names the process that it is about: `process="supervisor"`, `process="broker"`, or `process="worker"` with
the worker's slot as `worker`. The supervisor's measurements of a child carry the child's labels, so series about one
process join without `ignoring`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from realtime.metrics import NONE, Metrics, Sample
from realtime.supervision.health import Condition, Health
from realtime.supervision.incidents import Blocks
from realtime.supervision.pool import Pool
from realtime.supervision.slots import BROKER, SlotState
from realtime.supervision.vitals import Vitals

_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_LABEL = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")

SUPERVISOR = {"process": "supervisor"}

LabelledSample = tuple[Mapping[str, str], Sample]
"""The labels of the process that a sample is about, and the sample."""


class VitalProcess(Protocol):
    """A child process with vital signs; None before the first."""

    @property
    def vitals(self) -> Vitals | None: ...


def process_labels(slot: int) -> dict[str, str]:
    """The labels of the process in a slot."""
    return {"process": "broker"} if slot == BROKER else {"process": "worker", "worker": str(slot)}


def exposition(samples: Iterable[LabelledSample]) -> bytes:
    """Prometheus text of the samples, each with its own labels and those of its process."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Families(samples))
    return generate_latest(registry)


class _Families(Collector):
    """Samples grouped by metric name, for prometheus_client."""

    def __init__(self, samples: Iterable[LabelledSample]) -> None:
        self._families: dict[str, Metric] = {}
        for labels, sample in samples:
            self._add(sample, {**dict(sample.labels), **labels})

    def _add(self, sample: Sample, labels: dict[str, str]) -> None:
        # A sample of another version, or a malformed one, must not spoil the page for the others.
        if not _NAME.fullmatch(sample.name) or not all(map(_LABEL.fullmatch, labels)):
            return
        if sample.kind not in ("counter", "gauge", "histogram"):
            return
        # A histogram's series share a family: its buckets, their sum and their number.
        name = sample.name.rpartition("_")[0] if sample.kind == "histogram" else sample.name
        family = self._families.setdefault(name, Metric(name, sample.help, sample.kind))
        if family.type == sample.kind:
            name = f"{sample.name}_total" if sample.kind == "counter" else sample.name
            family.add_sample(name, labels, sample.value)

    def collect(self) -> Iterable[Metric]:
        return self._families.values()


def supervisor_samples(metrics: Metrics) -> Iterator[LabelledSample]:
    """The supervisor's own series. A series with a label `worker` or `process` is about that process."""
    for sample in metrics.snapshot():
        labels = dict(sample.labels)
        process = labels.get("process", "worker" if "worker" in labels else "supervisor")
        yield {"process": process}, sample


def pool_samples(pool: Pool, children: Mapping[int, VitalProcess], now: float) -> Iterator[LabelledSample]:
    """Workers by state, and each slot's restarts and vital signs. children: all processes by generation. now: seconds
    of a monotonic clock."""
    states = [process.state for slot in pool.workers for process in slot.places]
    for state in SlotState:
        help = "Workers by state. While one is replaced, its slot has two."
        yield SUPERVISOR, Sample("realtime_workers", "gauge", help, [("state", state.value)], states.count(state))
    for slot in pool.slots.values():
        labels = process_labels(slot.number)
        help = "1 while the process is ready and its loop turns, else 0."
        yield labels, Sample("realtime_process_up", "gauge", help, [], float(pool.is_up(slot)))
        for reason, count in slot.restarts.items():
            help = "Replacements of processes that ended, by reason."
            yield labels, Sample("realtime_process_restarts", "counter", help, [("reason", reason)], count)
        second = slot.predecessor and children.get(slot.predecessor.generation)
        if second and second.vitals:
            help = "Connections that the process before still has to hand over, while a worker is replaced."
            yield labels, Sample("realtime_predecessor_connections", "gauge", help, [], second.vitals.connections)
        process = children.get(slot.process.generation)
        vitals = process.vitals if process else None
        if vitals:
            for sample in _vital_samples(vitals, now):
                yield labels, sample


def condition_samples(healths: Iterable[Health]) -> Iterator[LabelledSample]:
    """The condition of each worker, and the lag of each process as the conditions read it."""
    for health in healths:
        if health.vitals is not None:
            help = "How late the process's loop is now: by its present turn, its overdue beat, or its latest timer."
            yield process_labels(health.slot), Sample("realtime_loop_lag_seconds", "gauge", help, [], health.lag)
        if health.slot == BROKER:
            continue
        for condition in Condition:
            help = "1 for the condition that the worker is in, 0 for each other one."
            value = float(health.condition is condition)
            labels = [("condition", condition.value)]
            yield process_labels(health.slot), Sample("realtime_worker_condition", "gauge", help, labels, value)


def block_samples(blocks: Mapping[tuple[str, str], Blocks]) -> Iterator[LabelledSample]:
    """Number and length of the loops' blocks, by handler and place."""
    for (handler, place), block in blocks.items():
        labels = [("handler", handler or NONE), ("place", place)]
        help = "Turns of workers' loops that took longer than loop.lagging, by handler and place of the block."
        yield SUPERVISOR, Sample("realtime_loop_blocks", "counter", help, labels, block.count)
        help = "Seconds of the turns in realtime_loop_blocks_total."
        yield SUPERVISOR, Sample("realtime_loop_blocked_seconds", "counter", help, labels, block.seconds)


def beat_age(vitals: Vitals, now: float) -> float:
    """Seconds since the process's loop last turned."""
    return max(0.0, now - vitals.beat / 1e9)


def _vital_samples(vitals: Vitals, now: float) -> Iterator[Sample]:
    """The figures of one process's vitals page."""
    gauges = {
        "realtime_loop_beat_age_seconds": (beat_age(vitals, now), "Since the process's loop last turned."),
        "realtime_loop_utilization": (
            vitals.utilization,
            "Share of the last second that the process's loop did not idle.",
        ),
        "realtime_queued_bytes": (vitals.queued_bytes, "Bytes queued for slow sockets."),
        "realtime_resident_memory_bytes": (vitals.rss, "The process's resident memory."),
    }
    for name, (value, help) in gauges.items():
        yield Sample(name, "gauge", help, [], value)
    yield Sample("realtime_loop_turns", "counter", "Turns of the process's loop.", [], vitals.turns)
    help = "Callbacks that were ready when the loop's turns began."
    yield Sample("realtime_loop_callbacks", "counter", help, [], vitals.callbacks)
