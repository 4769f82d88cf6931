"""The same seed gives the same faults."""

from __future__ import annotations

from random import Random

from tests.soak.bad_input import generate
from tests.soak.faults import ACTIONS
from tests.soak.schedule import KINDS, REDIS_KINDS, schedule


def test_the_same_seed_gives_the_same_faults_and_another_seed_others() -> None:
    assert schedule(7, 3600, 200) == schedule(7, 3600, 200)
    assert schedule(7, 3600, 200) != schedule(8, 3600, 200)


def test_all_kinds_occur_in_their_order_within_the_time() -> None:
    faults = schedule(7, 3600, 200)
    assert len(faults) == 200
    assert {fault.kind for fault in faults[: len(KINDS)]} == set(KINDS)
    times = [fault.at for fault in faults]
    assert times == sorted(times) and times[0] >= 0 and times[-1] <= 3600


def test_only_the_chosen_kinds_occur() -> None:
    assert {fault.kind for fault in schedule(7, 60, 10, ["kill a worker"])} == {"kill a worker"}


def test_every_kind_can_be_carried_out() -> None:
    assert set(ACTIONS) == {*KINDS, *REDIS_KINDS}


def test_the_same_seed_gives_the_same_bad_input() -> None:
    one, other = Random("7"), Random("7")
    assert [generate(one) for _ in range(500)] == [generate(other) for _ in range(500)]
