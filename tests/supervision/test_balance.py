"""Weights follow health and load, and the program for the kernel follows the weights."""

from __future__ import annotations

import random as randomness
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realtime.supervision.balance import (
    FULL,
    INSTRUCTION_BYTES,
    MAX_MOVED,
    MAX_SLOTS,
    Balance,
    Move,
    Rebalancing,
    program,
)
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


# Moves of established connections.

DIFFERENCE, DELAY = 0.4, 30.0


class Room:
    """Workers with clients, each of which takes a share of a loop's time. Moves take the clients at random."""

    def __init__(self, *workers: list[float], seed: int = 0) -> None:
        self.workers = [list(clients) for clients in workers]
        self.condition = [Condition.HEALTHY] * len(workers)
        self.rebalancing = Rebalancing(DIFFERENCE, DELAY)
        self.random = randomness.Random(seed)
        self.now = 1000.0
        self.moves: list[tuple[float, Move]] = []

    def busy(self) -> list[float]:
        return [min(sum(clients), 1.0) for clients in self.workers]

    def wait(self, seconds: int) -> list[Move]:
        """Let seconds pass. Returns the moves in them."""
        before = len(self.moves)
        for _ in range(seconds):
            self.now += 1.0
            healths = {
                slot: Health(slot, self.condition[slot], 0.0, utilization=busy, connections=len(self.workers[slot]))
                for slot, busy in enumerate(self.busy())
            }
            move = self.rebalancing.find_move(healths, self.now)
            if move is not None:
                self.moves.append((self.now, move))
                source, target = self.workers[move.source], self.workers[move.target]
                assert 1 <= move.connections < len(source), "a worker keeps a connection"
                for _ in range(move.connections):
                    target.append(source.pop(self.random.randrange(len(source))))
        return [move for _, move in self.moves[before:]]


def test_clients_of_a_hot_worker_move_slowly_until_the_difference_is_small() -> None:
    room = Room([0.0009] * 1000, [0.0001] * 1000)
    assert room.wait(30) == []
    (first,) = room.wait(2)
    assert (first.source, first.target, first.lasting) == (0, 1, DELAY)
    assert 1 <= first.connections <= MAX_MOVED
    room.wait(2000)
    hot, idle = room.busy()
    assert 0 < hot - idle < DIFFERENCE
    assert room.wait(2000) == []
    assert all(later - sooner >= DELAY for (sooner, _), (later, _) in zip(room.moves, room.moves[1:], strict=False))


def test_a_difference_that_does_not_last_moves_nothing() -> None:
    room = Room([0.0009] * 1000, [0.0001] * 1000)
    calm, hot = room.workers[0][:100], room.workers[0]
    for _ in range(20):
        room.workers[0] = hot
        assert room.wait(25) == []
        room.workers[0] = calm
        assert room.wait(5) == []


def test_a_small_difference_moves_nothing() -> None:
    assert Room([0.0009] * 1000, [0.0006] * 1000).wait(1000) == []


def test_one_client_that_makes_every_worker_hot_does_not_wander() -> None:
    room = Room([0.9, 0.0001], [0.0001] * 2)
    room.wait(10_000)
    sooner = [at for at, move in room.moves if move.source == 0]
    later = [at for at, move in room.moves if move.source == 1]
    for one in sooner:
        assert all(other - one >= 10 * DELAY for other in later if other > one)


def test_no_clients_move_to_or_from_a_worker_that_can_not_take_them() -> None:
    room = Room([0.0009] * 1000, [0.0001] * 1000, [0.0001] * 1000)
    room.condition[1] = Condition.DRAINING
    assert {move.target for move in room.wait(500)} == {2}
    room = Room([0.0009] * 1000, [0.0001] * 1000)
    room.condition[1] = Condition.PRESSED
    assert room.wait(500) == []
    room.condition = [Condition.ABSENT] * 2
    assert room.wait(500) == []


@given(st.lists(st.lists(st.floats(0.0, 0.02), min_size=0, max_size=80), min_size=1, max_size=5), st.integers(0, 2**32))
def test_whatever_the_load_is_moves_end_and_no_worker_gives_what_it_has_just_received(
    workers: list[list[float]], seed: int
) -> None:
    room = Room(*workers, seed=seed)
    room.wait(3000)
    assert room.wait(1000) == []
    received: dict[int, float] = {}
    for at, move in room.moves:
        assert move.source != move.target
        assert at - received.get(move.source, 0.0) >= 10 * DELAY
        received[move.target] = at
