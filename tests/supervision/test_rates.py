"""Counters of processes as rates."""

from __future__ import annotations

from realtime.supervision.rates import MAX_AGE, Growth, Rates


def test_a_rate_needs_two_readings_of_one_process() -> None:
    rates = Rates[str]()
    assert rates.of(0, 100, 0.0) is None
    rates.record(0, 100, {"sent": 10.0}, 1.0)
    assert rates.of(0, 100, 1.0) is None
    rates.record(0, 100, {"sent": 40.0, "new": 4.0}, 3.0)
    assert rates.of(0, 100, 3.0) == {"sent": 15.0, "new": 2.0}
    assert rates.of(1, 100, 3.0) is None


def test_a_new_process_in_a_slot_starts_without_a_rate() -> None:
    rates = Rates[str]()
    rates.record(0, 100, {"sent": 1000.0}, 1.0)
    rates.record(0, 101, {"sent": 10.0}, 2.0)
    assert rates.of(0, 101, 2.0) is None
    rates.record(0, 101, {"sent": 12.0}, 3.0)
    assert rates.of(0, 100, 3.0) is None
    assert rates.of(0, 101, 3.0) == {"sent": 2.0}


def test_an_old_reading_gives_no_rate() -> None:
    rates = Rates[str]()
    rates.record(0, 100, {"sent": 0.0}, 1.0)
    rates.record(0, 100, {"sent": 5.0}, 2.0)
    assert rates.of(0, 100, 2.0 + MAX_AGE) == {"sent": 5.0}
    assert rates.of(0, 100, 2.1 + MAX_AGE) is None


def test_two_readings_at_the_same_time_give_no_rate() -> None:
    rates = Rates[str]()
    rates.record(0, 100, {"sent": 0.0}, 1.0)
    rates.record(0, 100, {"sent": 5.0}, 1.0)
    assert rates.of(0, 100, 1.0) is None


def test_a_longer_span_is_smoother_and_forgets() -> None:
    rates = Rates[str](span=3)
    for second, total in enumerate([0.0, 9.0, 9.0, 9.0, 9.0]):
        rates.record(0, 100, {"sent": total}, second)
        if second == 1:
            assert rates.of(0, 100, second) == {"sent": 9.0}
        if second == 3:
            assert rates.of(0, 100, second) == {"sent": 3.0}
    assert rates.of(0, 100, 4) == {"sent": 0.0}


def test_growth_is_summed_over_processes_and_outlives_them() -> None:
    growth = Growth[str](span=60.0)
    growth.record(0, "first", {"a": 3, "b": 0}, 0.0)
    growth.record(0, "second", {"a": 1}, 30.0)
    growth.record(1, "other", {"a": 2, "c": 5}, 40.0)
    growth.record(1, "other", {"a": 2, "c": 5}, 50.0)
    assert growth.totals() == {"a": 6, "c": 5}
    assert growth.recent(50.0) == {"a": 6, "c": 5}
    assert growth.recent(60.0) == {"a": 3, "c": 5}
    assert growth.recent(100.0) == {}
    growth.record(0, "second", {"a": 2}, 101.0)
    assert list(growth.totals()) == ["c", "a"], "the latest growth is at the end"
