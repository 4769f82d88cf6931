"""Time slices: the length of turns, the shares of priorities, and that no work starves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.defer import Deferred

from realtime.pubsub.time_slices import HIGH, LOW, NORMAL, TimeSlicer

SLICE = 0.005


class Loop:
    """A loop whose clock only work moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.asked: list[Callable[[], None]] = []
        self.slices = TimeSlicer(lambda: self.now, SLICE, self.asked.append, Deferred)
        self.log: list[str] = []

    def work(self, name: str, steps: int, cost: float = 0.001) -> Iterator[None]:
        for _ in range(steps):
            self.log.append(name)
            self.now += cost
            yield

    def turn(self) -> float:
        """Run one turn; return the time that the work took."""
        began = self.now
        assert len(self.asked) <= 1
        while self.asked:
            self.asked.pop()()
            break
        return self.now - began

    def until_idle(self) -> list[float]:
        lengths = []
        while self.asked:
            lengths.append(self.turn())
        return lengths


@pytest.fixture
def loop() -> Loop:
    return Loop()


def test_a_turn_ends_with_its_slice_and_asks_for_the_next(loop: Loop) -> None:
    loop.slices.add(loop.work("a", 12))
    assert loop.log == []
    assert loop.until_idle() == pytest.approx([0.005, 0.005, 0.002])
    assert not loop.asked


@pytest.mark.parametrize(("cost", "turn"), [(0.004, 0.004), (0.0018, 0.0036)])
def test_a_long_step_is_not_followed_by_another_that_would_not_fit(loop: Loop, cost: float, turn: float) -> None:
    loop.slices.add(loop.work("a", 8, cost=cost))
    assert loop.until_idle()[:4] == pytest.approx([turn] * 4)


def test_equal_priorities_take_turns(loop: Loop) -> None:
    for name in "abc":
        loop.slices.add(loop.work(name, 4))
    loop.turn()
    assert "".join(loop.log) == "abcab"
    loop.until_idle()
    assert "".join(loop.log) == "abc" * 4


def test_later_work_waits_for_one_step_of_each(loop: Loop) -> None:
    for number in range(20):
        loop.slices.add(loop.work(str(number), 1000))
    loop.turn()
    loop.slices.add(loop.work("late", 1))
    done = len(loop.log)
    while "late" not in loop.log:
        loop.turn()
    assert loop.log.index("late") - done <= 20


def test_a_higher_priority_has_a_larger_share_and_none_has_nothing(loop: Loop) -> None:
    for name, priority in (("low", LOW), ("high", HIGH), ("normal", NORMAL)):
        loop.slices.add(loop.work(name, 1000), priority)
    for _ in range(14):
        loop.turn()
    assert Counter(loop.log) == {"high": 40, "normal": 20, "low": 10}
    assert max(len(gap) for gap in ",".join(loop.log).split("high")) < len(",normal,low,")


def test_an_unused_share_goes_to_the_others(loop: Loop) -> None:
    loop.slices.add(loop.work("low", 9), LOW)
    assert loop.until_idle() == pytest.approx([0.005, 0.004])


def test_long_steps_starve_no_work(loop: Loop) -> None:
    for name, priority in (("low", LOW), ("high", HIGH)):
        loop.slices.add(loop.work(name, 1000, cost=1.0), priority)
    for _ in range(7):
        loop.turn()
    assert "low" in loop.log


def test_an_exception_ends_its_own_work_alone(loop: Loop) -> None:
    def faulty() -> Iterator[None]:
        yield
        raise ZeroDivisionError

    loop.slices.add(faulty())
    loop.slices.add(loop.work("a", 3))
    with pytest.raises(ZeroDivisionError):
        loop.turn()
    loop.until_idle()
    assert loop.log == ["a"] * 3


def test_work_may_add_work(loop: Loop) -> None:
    def parent() -> Iterator[None]:
        loop.slices.add(loop.work("child", 2))
        yield

    loop.slices.add(parent())
    loop.until_idle()
    assert loop.log == ["child"] * 2


def test_direct_work_uses_up_the_turn_and_has_the_next(loop: Loop) -> None:
    assert loop.slices.has_time
    loop.slices.start_slice()
    loop.now += 0.004
    assert loop.slices.has_time
    loop.now += 0.001
    assert not loop.slices.has_time
    loop.turn()
    loop.now += 1.0
    assert loop.slices.has_time


def test_no_direct_work_while_other_work_used_up_the_turn(loop: Loop) -> None:
    loop.slices.add(loop.work("a", 7))
    loop.turn()
    assert not loop.slices.has_time
    loop.turn()
    assert loop.slices.has_time


def test_coroutines_that_yield_share_the_time(loop: Loop) -> None:
    async def long(name: str) -> None:
        for _ in range(6):
            loop.log.append(name)
            loop.now += 0.001
            await loop.slices.yield_to_loop()

    for name in "ab":
        Deferred.fromCoroutine(long(name))
    assert "".join(loop.log) == "ab"
    lengths = loop.until_idle()
    assert "".join(loop.log) == "ab" * 6
    assert max(lengths) < SLICE + 0.002


def test_cancelling_a_yielding_coroutine_affects_no_other(loop: Loop) -> None:
    async def long() -> None:
        await loop.slices.yield_to_loop()
        loop.log.append("on")

    one, other = Deferred.fromCoroutine(long()), Deferred.fromCoroutine(long())
    one.addErrback(lambda failure: loop.log.append("cancelled"))
    one.cancel()
    loop.until_idle()
    assert other.called
    assert loop.log == ["cancelled", "on"]


def test_map_sliced_yields_in_between(loop: Loop) -> None:
    def made(number: int) -> str:
        loop.now += 0.000_002
        return str(number)

    results: list[list[str]] = []
    for size in (0, 1, 499, 500, 10_000):
        Deferred.fromCoroutine(loop.slices.map_sliced(made, range(size))).addCallback(results.append)
    loop.slices.add(loop.work("other", 1))
    loop.turn()
    assert loop.log == ["other"]
    assert max(loop.until_idle()) <= SLICE + 0.001
    assert sorted(results, key=len) == [[str(n) for n in range(size)] for size in (0, 1, 499, 500, 10_000)]


def test_an_unlimited_slicer_never_waits() -> None:
    slices = TimeSlicer.unlimited()
    results: list[list[int]] = []
    Deferred.fromCoroutine(slices.map_sliced(abs, range(10_000))).addCallback(results.append)
    assert results == [list(range(10_000))]
    slices.start_slice()
    assert slices.has_time


@given(
    st.lists(
        st.tuples(st.integers(HIGH, LOW), st.integers(0, 8), st.floats(0.0, 0.01)),
        max_size=12,
    )
)
def test_all_work_is_done_and_no_turn_exceeds_a_slice_and_a_step(works: list[tuple[int, int, float]]) -> None:
    loop = Loop()
    for number, (priority, steps, cost) in enumerate(works):
        loop.slices.add(loop.work(str(number), steps, cost), priority)
    lengths = loop.until_idle()
    assert Counter(loop.log) == {str(number): steps for number, (_, steps, _) in enumerate(works) if steps}
    assert max(lengths, default=0.0) <= SLICE + max((cost for _, _, cost in works), default=0.0) + 1e-9
