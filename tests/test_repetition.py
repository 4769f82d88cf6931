"""Which of many like events pass."""

from __future__ import annotations

from realtime.repetition import REPEAT_AFTER, Repetition


def test_one_event_of_each_key_passes_in_a_minute_and_the_next_one_has_the_number_left_out() -> None:
    repetition: Repetition[str] = Repetition()
    assert [repetition.admit("a", 0.0), repetition.admit("a", 1.0), repetition.admit("b", 2.0)] == [0, None, 0]
    assert repetition.admit("a", REPEAT_AFTER - 0.1) is None
    assert repetition.admit("a", REPEAT_AFTER) == 2
    assert repetition.admit("a", 2 * REPEAT_AFTER) == 0


def test_events_left_out_are_reported_once_when_their_minute_is_over() -> None:
    repetition: Repetition[str] = Repetition()
    assert not repetition.has_left_out
    for now in (0.0, 1.0, 2.0):
        repetition.admit("a", now)
    assert repetition.has_left_out
    assert repetition.take_left_out(REPEAT_AFTER - 0.1) == []
    assert repetition.take_left_out(REPEAT_AFTER) == [("a", 2)]
    assert not repetition.has_left_out
    # The report was the line of a new minute.
    assert repetition.admit("a", REPEAT_AFTER + 1) is None
    assert repetition.take_left_out(2 * REPEAT_AFTER) == [("a", 1)]


def test_a_flood_of_keys_fills_neither_memory_nor_log() -> None:
    repetition: Repetition[int] = Repetition(10)
    assert sum(repetition.admit(key, 0.0) is not None for key in range(1000)) == len(repetition) == 10
    assert sum(repetition.admit(key, REPEAT_AFTER) is not None for key in range(1000)) == len(repetition) == 10
