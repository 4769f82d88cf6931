"""Counting in a process, and the snapshot that reaches the supervisor."""

from __future__ import annotations

import msgspec
import pytest

from realtime.metrics import Metrics, Sample, bad_input_counter, dump, load


def test_a_counter_is_found_again_by_name_and_labels() -> None:
    metrics = Metrics()
    counter = metrics.counter("commands", "Commands", command="rpc", code="0")
    assert metrics.counter("commands", "Commands", code="0", command="rpc") is counter
    assert metrics.counter("commands", "Commands", command="send", code="0") is not counter
    counter.value += 3
    assert [(one.value, one.labels) for one in metrics.snapshot()] == [
        (3, [("code", "0"), ("command", "rpc")]),
        (0, [("code", "0"), ("command", "send")]),
    ]


def test_a_gauge_is_read_at_each_snapshot_and_replaced_by_its_successor() -> None:
    metrics, values = Metrics(), [1.0, 2.0]
    metrics.gauge("queued", "Bytes", lambda: values.pop(0))
    assert [metrics.snapshot()[0].value for _ in range(2)] == [1.0, 2.0]
    metrics.gauge("queued", "Bytes", lambda: 7.0)
    assert [one.value for one in metrics.snapshot()] == [7.0]


def test_a_snapshot_of_some_names_reads_no_others() -> None:
    metrics = Metrics()
    metrics.counter("a", "A").value = 1
    metrics.gauge("b", "B", lambda: pytest.fail("the gauge was read"))
    metrics.sources.append(lambda: [Sample("c", "counter", "C", [], 5.0), Sample("d", "counter", "D", [], 6.0)])
    assert [(one.name, one.value) for one in metrics.snapshot(["a", "c"])] == [("a", 1), ("c", 5.0)]


def test_a_snapshot_survives_the_way_to_the_supervisor() -> None:
    metrics = Metrics()
    metrics.counter("a", "A", kind="ü").value = 2**53
    assert load(dump(metrics.snapshot())) == metrics.snapshot()
    for data in (b"", b"\xff", dump(metrics.snapshot())[:-1], msgspec.msgpack.encode([["a"]])):
        with pytest.raises(msgspec.MsgspecError):
            load(data)


def test_bad_input_is_one_counter_for_each_kind() -> None:
    metrics = Metrics()
    bad_input_counter(metrics, "frame").value += 1
    bad_input_counter(metrics, "frame").value += 1
    bad_input_counter(metrics, "origin").value += 1
    samples = {tuple(sample.labels): sample.value for sample in metrics.snapshot(["realtime_bad_input"])}
    assert samples == {(("kind", "frame"),): 2, (("kind", "origin"),): 1}


def test_a_histogram_counts_values_up_to_each_bound() -> None:
    metrics = Metrics()
    histogram = metrics.histogram("lag", "Lag", (0.1, 1.0), worker="0")
    assert metrics.histogram("lag", "Lag", (0.1, 1.0), worker="0") is histogram
    for value in (0.1, 0.5, 7.0):
        histogram.observe(value)
    samples = metrics.snapshot(["lag"])
    assert [(one.name, dict(one.labels).get("le"), one.value) for one in samples] == [
        ("lag_bucket", "0.1", 1),
        ("lag_bucket", "1.0", 2),
        ("lag_bucket", "+Inf", 3),
        ("lag_sum", None, 7.6),
        ("lag_count", None, 3),
    ]
    assert {one.kind for one in samples} == {"histogram"}
    assert load(dump(samples)) == samples
