"""Counters of commands and error replies."""

from __future__ import annotations

import pytest

from realtime.metrics import Metrics
from realtime.protocol.commands import COMMANDS
from realtime.protocol.context import SessionCounters


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


def test_every_command_has_a_counter(metrics: Metrics) -> None:
    assert SessionCounters(metrics).commands.keys() == COMMANDS.keys()


def test_the_application_s_error_codes_share_a_label(metrics: Metrics) -> None:
    counters = SessionCounters(metrics)
    for code in (103, 400, 1001):
        counters.count_error("rpc", code)
    assert metrics.counter("realtime_command_errors", "", command="rpc", code="103").value == 1
    assert metrics.counter("realtime_command_errors", "", command="rpc", code="application").value == 2
