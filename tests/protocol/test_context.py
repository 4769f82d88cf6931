"""Counters of commands, error replies and bad input of clients."""

from __future__ import annotations

import pytest

from realtime import errors
from realtime.metrics import Metrics
from realtime.protocol.commands import COMMANDS
from realtime.protocol.context import SessionCounters


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


def test_every_command_has_a_counter(metrics: Metrics) -> None:
    assert SessionCounters(metrics).commands.keys() == COMMANDS.keys()


@pytest.mark.parametrize(("code", "kind"), [(errors.NO_PONG[0], "no_pong"), (errors.BAD_PROTOCOL[0], "command")])
def test_a_disconnect_for_a_fault_of_the_client_is_bad_input(metrics: Metrics, code: int, kind: str) -> None:
    SessionCounters(metrics).count_disconnect(code)
    assert metrics.counter("realtime_bad_input", "", kind=kind).value == 1


def test_other_disconnects_are_not_bad_input(metrics: Metrics) -> None:
    counters = SessionCounters(metrics)
    counters.count_disconnect(errors.SHUTDOWN[0])
    assert [counter.value for counter in counters.bad_input.values()] == [0] * len(counters.bad_input)


def test_the_application_s_error_codes_share_a_label(metrics: Metrics) -> None:
    counters = SessionCounters(metrics)
    for code in (103, 400, 1001):
        counters.count_error("rpc", code)
    assert metrics.counter("realtime_command_errors", "", command="rpc", code="103").value == 1
    assert metrics.counter("realtime_command_errors", "", command="rpc", code="application").value == 2
