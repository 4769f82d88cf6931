"""The replay sees answers that are missing, surplus, changed or out of order."""

from __future__ import annotations

import pytest

from tests.conformance.comparison import Difference, difference, same
from tests.conformance.corpus import Answers, Conversation
from tests.conformance.deltas import apply_delta
from tests.conformance.known_faults import KnownFaults
from tests.conformance.memory import Memory

FIRST = ["message", {"id": 1, "publish": {}}]
SECOND = ["message", {"id": 2, "publish": {}}]
NEWS = ["message", {"push": {"channel": "news", "pub": {"data": 1}}}]
MORE_NEWS = ["message", {"push": {"channel": "news", "pub": {"data": 2}}}]
SPORT = ["message", {"push": {"channel": "sport", "pub": {"data": 1}}}]

ANSWERS: Answers = {"A": [FIRST]}
FAULTY: Answers = {"A": [SECOND]}
NEW: Answers = {"A": [NEWS]}

FAULT = Conversation(
    name="envelope null:t%",
    steps=[{"sleep": 0}] * 3,
    wanted=[ANSWERS] * 3,
    today={1: FAULTY},
    verdict={"fault": ["8.2"]},
)


@pytest.mark.parametrize(
    "got",
    [
        {},
        {"A": [FIRST]},
        {"A": [FIRST, NEWS, NEWS]},
        {"A": [FIRST, MORE_NEWS]},
        {"A": [FIRST, NEWS], "B": [NEWS]},
        {"B": [FIRST, NEWS]},
    ],
)
def test_answers_that_differ(got: Answers) -> None:
    assert not same({"A": [FIRST, NEWS]}, got)


def test_order_counts_within_replies_and_within_a_channel_only() -> None:
    wanted = {"A": [FIRST, SECOND, NEWS, MORE_NEWS, SPORT]}

    assert same(wanted, {"A": [NEWS, FIRST, SPORT, MORE_NEWS, SECOND]})
    assert not same(wanted, {"A": [SECOND, FIRST, NEWS, MORE_NEWS, SPORT]})
    assert not same(wanted, {"A": [FIRST, SECOND, MORE_NEWS, NEWS, SPORT]})


@pytest.mark.parametrize(
    "got, step",
    [
        ([ANSWERS, FAULTY, ANSWERS], 1),
        ([ANSWERS, FAULTY, NEW], 2),  # behind the known fault
        ([NEW], 0),
    ],
)
def test_the_step_that_is_reported(got: list[Answers], step: int) -> None:
    found = difference(FAULT, got)

    assert found is not None
    assert found.step == step
    assert f"step    {step + 1}" in str(found)


def test_as_wanted() -> None:
    assert difference(FAULT, [ANSWERS] * 3) is None


def test_a_known_fault_covers_its_family_in_the_steps_in_which_it_shows() -> None:
    known, faulty = KnownFaults("# 8.2  about\n\n8.2  envelope*  # so\n"), Difference(FAULT, 1, FAULTY)

    assert known.covers(faulty)
    assert not known.covers(Difference(FAULT, 2, NEW))
    assert not KnownFaults("8.2  field*\n8.3  envelope*\n").covers(faulty)


def test_a_line_whose_family_passes_is_mended() -> None:
    known = KnownFaults("8.2  envelope*\n8.2  field*\n")

    assert [line.pattern for line in known.mended([FAULT], set())] == ["envelope*"]
    assert known.mended([FAULT], {FAULT}) == []


def test_deltas_are_decoded_and_those_that_do_not_fit_are_seen() -> None:
    delta = b"5\n4@0,1:o3NPMmh;"  # copy of 4, one letter

    assert apply_delta(b"hell!", delta) == b"hello"
    for base, damaged in ((b"help!", delta), (b"", delta), (b"hell!", delta[:-1]), (b"hell!", b"")):
        with pytest.raises(ValueError):
            apply_delta(base, damaged)


def test_what_differs_between_two_playings_gets_a_name() -> None:
    connected = {"id": 1, "connect": {"client": "8b0c", "session": "s1", "node": "n1", "ttl": 298}}
    subscribed = {"id": 2, "subscribe": {"epoch": "xyz"}}
    memory = Memory()
    memory.ask("A", {"id": 2, "subscribe": {"channel": "news"}})
    for message in (connected, subscribed):
        memory.learn("A", message, unidirectional=False)

    shown = {"client": "<client A>", "session": "<session>", "node": "<node>", "ttl": "<ttl about 300>"}
    assert memory.normalised(connected) == {"id": 1, "connect": shown}
    assert memory.normalised(subscribed) == {"id": 2, "subscribe": {"epoch": "<epoch 1>"}}
    assert memory.fill({"epoch": {"$epoch": "news"}, "client": {"$client": "A"}}) == {"epoch": "xyz", "client": "8b0c"}
    assert memory.normalised(memory.fill("news:%")) == "news:%"
