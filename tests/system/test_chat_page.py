"""The chat page's rooms and outbox, which know no DOM, in Node."""

from __future__ import annotations

from typing import Any

import pytest

from tests.system.serving import run_node

pytestmark = pytest.mark.node


@pytest.fixture(scope="module")
def page() -> Any:
    return run_node("page.mjs")


def test_messages_stand_in_order_and_once(page: Any) -> None:
    assert page["order"] == {"offsets": [1, 3, 4, 5, 9, 11], "again": None, "resent": None, "other": 11, "oldest": 1}


def test_a_room_keeps_a_bounded_number_and_can_read_the_rest_again(page: Any) -> None:
    assert page["bounds"] == {"kept": True, "trims": True, "atStart": False, "back": 1}


def test_whatever_another_program_publishes_is_shown_as_text(page: Any) -> None:
    shown = [text for text, _, _ in page["strangers"]]
    assert shown == ["null", "7", "words", "[\n 1\n]", '{\n "text": 5\n}', "ok", "{}"]
    assert all(time == 0 and user == "" for _, time, user in page["strangers"])


def test_a_person_with_two_tabs_is_listed_once_until_both_are_gone(page: Any) -> None:
    assert page["people"] == {"both": ["ADA", "BOB"], "left": ["BOB"]}


def test_the_outbox_sends_in_order_and_keeps_what_did_not_arrive(page: Any) -> None:
    assert page["outbox"] == {
        "broken": False,
        "afterBreak": ["waiting", "waiting", "waiting"],
        "fine": True,
        "states": [["one", "sent"], ["two", "refused"], ["three", "sent"]],
        "sent": ["one", "one", "two", "three"],
        "reloaded": ["two", "elsewhere"],
        "settled": ["two"],
        "left": ["elsewhere"],
    }


def test_a_message_is_never_on_its_way_twice(page: Any) -> None:
    assert page["concurrency"] == {"results": [True, True], "calls": 2}
