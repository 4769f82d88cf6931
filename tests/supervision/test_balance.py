"""Weights follow health and load, and the program for the kernel follows the weights."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realtime.supervision.balance import FULL, INSTRUCTION_BYTES, MAX_SLOTS, Balance, program
from realtime.supervision.health import Condition, Health

KERNELS_CHOICE = 0xFFFFFFFF


def run(code: bytes, random: int) -> int:
    """Return what the kernel would: an interpreter for the few instructions of classic BPF in use."""
    instructions = list(struct.iter_unpack("=HBBI", code))
    accumulator, at = 0, 0
    while True:
        operation, if_true, if_false, k = instructions[at]
        at += 1
        match operation:
            case 0x20:
                assert k == 0xFFFFF038  # SKF_AD_OFF + SKF_AD_RANDOM
                accumulator = random
            case 0x94:
                accumulator %= k
            case 0x35:
                at += if_true if accumulator >= k else if_false
            case 0x06:
                return k
            case _:
                raise AssertionError(f"unknown instruction {operation:#x}")


weights = st.lists(st.integers(0, FULL), min_size=1, max_size=40)


@given(weights)
def test_each_slot_is_drawn_as_often_as_its_weight_says(weights: list[int]) -> None:
    code, total = program(weights), sum(weights)
    drawn = [run(code, number) for number in range(total)]
    assert [drawn.count(slot) for slot in range(len(weights))] == weights


@given(weights, st.integers(0, 2**32 - 1))
def test_only_slots_with_a_weight_are_drawn(weights: list[int], random: int) -> None:
    drawn = run(program(weights), random)
    assert drawn == KERNELS_CHOICE if not any(weights) else weights[drawn] > 0


def test_without_weights_the_kernel_chooses() -> None:
    assert run(program([0, 0, 0]), 17) == KERNELS_CHOICE
    assert run(program([]), 17) == KERNELS_CHOICE


def test_the_largest_number_of_slots_fits_into_a_program() -> None:
    assert len(program([FULL] * MAX_SLOTS)) // INSTRUCTION_BYTES <= 4096
    with pytest.raises(ValueError, match="too many"):
        program([1] * (MAX_SLOTS + 1))


def health(
    slot: int, condition: Condition = Condition.HEALTHY, connections: int = 0, utilization: float = 0.0
) -> Health:
    return Health(slot, condition, since=0.0, connections=connections, utilization=utilization)


def weigh(*slots: Health) -> tuple[int, ...]:
    return Balance(len(slots)).weigh({health.slot: health for health in slots})


def test_equal_slots_weigh_the_same() -> None:
    assert weigh(health(0), health(1), health(2)) == (FULL, FULL, FULL)


@pytest.mark.parametrize("condition", [Condition.ABSENT, Condition.PRESSED, Condition.DRAINING])
def test_a_slot_that_can_not_accept_has_no_weight(condition: Condition) -> None:
    assert weigh(health(0, condition), health(1)) == (0, FULL)


def test_without_an_accepting_slot_all_weights_are_zero() -> None:
    assert weigh(health(0, Condition.PRESSED), health(1, Condition.ABSENT)) == (0, 0)


def test_a_slot_of_unknown_health_has_no_weight() -> None:
    assert Balance(2).weigh({}) == (0, 0)
    assert Balance(2).weigh({1: health(1)}) == (0, FULL)


def test_a_lagging_slot_gets_a_quarter() -> None:
    assert weigh(health(0, Condition.LAGGING), health(1)) == (FULL // 4, FULL)


def test_weights_are_in_proportion_to_spare_capacity() -> None:
    assert weigh(health(0, utilization=0.75), health(1, utilization=0.5)) == (FULL // 2, FULL)


def test_a_loop_that_is_always_busy_keeps_a_small_weight() -> None:
    assert weigh(health(0, utilization=1.0), health(1)) == (2, FULL)


def test_a_new_worker_gets_more_connections_until_it_has_as_many_as_the_others() -> None:
    balance = Balance(2)
    shares = []
    for joined in (0, 250, 500, 750, 1000):
        mine, other = balance.weigh({0: health(0, connections=joined), 1: health(1, connections=1000)})
        assert mine == FULL
        shares.append(other)
    assert shares == sorted(shares)
    assert shares[0] == 2  # the largest factor for one slot, and the smallest for the other
    assert shares[-1] == FULL


def test_a_few_connections_change_no_weight() -> None:
    assert weigh(health(0, connections=1), health(1)) == (FULL, FULL)


def test_connections_of_slots_that_can_not_accept_do_not_count() -> None:
    with_dead = weigh(health(0), health(1), health(2, Condition.PRESSED, connections=100_000))
    assert with_dead == (FULL, FULL, 0)


@given(st.floats(0.0, 0.03), st.floats(0.0, 0.03))
def test_small_changes_of_load_change_no_weight(first: float, second: float) -> None:
    balance = Balance(2)
    before = balance.weigh({0: health(0, utilization=0.2), 1: health(1, utilization=0.2)})
    after = balance.weigh({0: health(0, utilization=0.2 + first), 1: health(1, utilization=0.2 + second)})
    assert after == before


conditions = st.sampled_from(Condition)
anything = st.lists(st.tuples(conditions, st.integers(0, 100_000), st.floats(0.0, 1.0)), min_size=1, max_size=8)


@given(anything, anything)
def test_after_any_history_weights_are_in_range_and_only_accepting_slots_have_one(
    before: list[tuple[Condition, int, float]], now: list[tuple[Condition, int, float]]
) -> None:
    slots = max(len(before), len(now))
    balance = Balance(slots)
    for state in (before, now):
        seen = {slot: health(slot, *values) for slot, values in enumerate(state)}
        weights = balance.weigh(seen)
        taking = {slot for slot, found in seen.items() if found.condition in (Condition.HEALTHY, Condition.LAGGING)}
        assert {slot for slot, weight in enumerate(weights) if weight} == taking
        assert all(0 <= weight <= FULL for weight in weights)
        assert not taking or max(weights) >= FULL - 1
