"""Prometheus text: labels of each process, and that one malformed sample does not spoil the page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from realtime.config.settings import LoopSettings, WorkersSettings
from realtime.metrics import Metrics, Sample
from realtime.operators.exposition import (
    block_samples,
    condition_samples,
    exposition,
    pool_samples,
    process_labels,
    supervisor_samples,
)
from realtime.supervision.health import Condition, Health
from realtime.supervision.incidents import Blocks
from realtime.supervision.pool import Pool
from realtime.supervision.slots import BROKER
from realtime.supervision.vitals import ProcessState, Vitals

ROOT = Path(__file__).parents[2]


def test_each_process_has_its_labels() -> None:
    assert process_labels(BROKER) == {"process": "broker"}
    assert process_labels(3) == {"process": "worker", "worker": "3"}


def test_a_series_of_the_supervisor_about_a_worker_has_that_workers_labels() -> None:
    metrics = Metrics()
    metrics.counter("realtime_rescue_failures", "Failures.").value = 2
    metrics.counter("realtime_rescued_connections", "Rescued.", worker="1").value = 7
    lines = exposition(supervisor_samples(metrics)).decode().splitlines()
    assert 'realtime_rescue_failures_total{process="supervisor"} 2.0' in lines
    assert 'realtime_rescued_connections_total{process="worker",worker="1"} 7.0' in lines


def test_slots_and_conditions_have_the_labels_of_their_process() -> None:
    pool = Pool(1, WorkersSettings(), LoopSettings(), 30.0)
    pool.start(0.0)
    pool.process_ready(pool.slots[0].process.generation, 0.0)
    pool.process_exited(pool.slots[BROKER].process.generation, -9, 1.0)
    health = Health(0, Condition.LAGGING, 0.0, 0.1)
    lines = exposition([*pool_samples(pool, {}, 2.0), *condition_samples([health])]).decode().splitlines()
    assert 'realtime_workers{process="supervisor",state="ready"} 1.0' in lines
    assert 'realtime_process_up{process="worker",worker="0"} 1.0' in lines
    assert 'realtime_process_up{process="broker"} 0.0' in lines
    assert 'realtime_process_restarts_total{process="broker",reason="signal"} 1.0' in lines
    assert 'realtime_worker_condition{condition="lagging",process="worker",worker="0"} 1.0' in lines
    assert 'realtime_worker_condition{condition="healthy",process="worker",worker="0"} 0.0' in lines


def test_a_block_outside_a_handler_has_the_handler_none() -> None:
    text = exposition(block_samples({("", "/app/chat.py:7"): Blocks(2, 0.5)})).decode()
    labels = 'handler="none",place="/app/chat.py:7",process="supervisor"'
    assert f"realtime_loop_blocks_total{{{labels}}} 2.0\n" in text
    assert f"realtime_loop_blocked_seconds_total{{{labels}}} 0.5\n" in text


@pytest.mark.parametrize(
    "sample",
    [
        Sample("no good", "gauge", "", [], 1),
        Sample("realtime_x\n", "gauge", "", [], 1),
        Sample("realtime_x", "summary", "", [], 1),
        Sample("realtime_x", "gauge", "", [("bad label", "v")], 1),
        Sample("realtime_ok", "counter", "", [], 1),  # of another kind than the others of its name
    ],
)
def test_a_malformed_sample_does_not_spoil_the_page(sample: Sample) -> None:
    good = Sample("realtime_ok", "gauge", "Fine.", [], 1)
    assert exposition([({"worker": "0"}, good), ({"worker": "1"}, sample)]) == exposition([({"worker": "0"}, good)])


def test_label_values_and_help_are_escaped() -> None:
    sample = Sample("realtime_ok", "gauge", "two\nlines", [("a", 'quo"te\nnew')], 1)
    text = exposition([({}, sample)]).decode()
    assert "# HELP realtime_ok two\\nlines\n" in text
    assert 'realtime_ok{a="quo\\"te\\nnew"} 1.0\n' in text


def test_the_documents_name_only_metrics_that_exist() -> None:
    code = "".join(path.read_text() for path in ROOT.glob("realtime/**/*.py"))
    emitted = set(re.findall(r"realtime_[a-z0-9_]+", code))
    for document in [*ROOT.glob("docs/*.md"), ROOT / "README.md"]:
        for name in re.findall(r"\brealtime_[a-z0-9_]+\b", document.read_text()):
            assert re.sub("_(total|bucket|sum|count)$", "", name) in emitted, f"{document.name}: {name}"


def test_a_replaced_worker_counts_until_it_has_ended() -> None:
    class Old:
        vitals = Vitals(1, 0.0, 40, 0, ProcessState.READY)

    pool = Pool(1, WorkersSettings(), LoopSettings(), 30.0, broker=False)
    pool.start(0.0)
    old = pool.slots[0].process.generation
    pool.process_ready(old, 0.0)
    pool.reload(1.0)
    assert pool.slots[0].successor is not None
    pool.process_ready(pool.slots[0].successor.generation, 2.0)
    lines = exposition(pool_samples(pool, {old: Old()}, 2.0)).decode().splitlines()
    assert 'realtime_workers{process="supervisor",state="ready"} 1.0' in lines
    assert 'realtime_workers{process="supervisor",state="handing over"} 1.0' in lines
    assert 'realtime_predecessor_connections{process="worker",worker="0"} 40.0' in lines
    assert 'realtime_process_restarts_total{process="worker",reason="reload",worker="0"} 1.0' in lines
