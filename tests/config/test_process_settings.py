"""The settings of the workers and their loops."""

from __future__ import annotations

import pytest

from realtime.config.settings import Settings
from tests.config.parsing import parse_file, problem

KEYS = {
    "loop.relief": ("false", False),
    "loop.relief_after": ("'100ms'", 0.1),
    "loop.rebalance_delay": ("'2m'", 120.0),
    "workers.max_age": ("'24h'", 86400.0),
}


@pytest.mark.parametrize("key", KEYS)
def test_a_setting_of_the_processes_is_read(key: str) -> None:
    text, value = KEYS[key]
    table, _, name = key.partition(".")
    assert getattr(getattr(parse_file(f"[{table}]\n{name} = {text}"), table), name) == value


def test_relief_begins_before_a_worker_lags_and_a_worker_is_killed_last() -> None:
    loop = Settings().loop
    assert loop.interval < loop.lagging
    assert loop.relief_after < loop.lagging < loop.max_lag < loop.stuck


def test_a_time_of_relief_without_a_unit_is_refused() -> None:
    assert "loop.relief_after: expected a duration with a unit" in problem("[loop]\nrelief_after = 1")
