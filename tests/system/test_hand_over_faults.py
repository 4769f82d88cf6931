"""A process is killed at a step of a hand-over; `scripts/soak --hand-over 0` kills each of them at each step."""

from __future__ import annotations

import pytest

from tests.system.test_soak import read_account, run_soak

CASES = 4  # one for each of the processes that take part


@pytest.mark.timeout(300)
def test_a_connection_is_served_once_or_closed_whatever_process_dies() -> None:
    said = run_soak("--seed=3", "--clients=60", f"--hand-over={CASES}", limit=270)

    account = read_account(said)
    assert f"cases: {CASES}, steps not reached: 0" in said
    assert account["delivered"] > 500
    assert account["silently lost"] == account["repeated"] == account["reordered"] == account["broken rule"] == 0
