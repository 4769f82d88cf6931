"""Compares the answers of a conversation with the wanted ones."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, NamedTuple

from tests.conformance.corpus import Answers, Conversation, Event

SHOWN_LENGTH = 1500  # characters of a value in a report


class _Ordered(NamedTuple):
    """Events in the orders that count. How replies and pushes of other channels lie between each other does not."""

    replies: list[Any]
    pushes: dict[Any, list[Any]]  # by channel
    others: list[Event]


def _ordered(events: list[Event]) -> _Ordered:
    found = _Ordered([], {}, [])
    for event in events:
        kind, *values = event
        message = values[0] if kind == "message" else None
        if kind == "emulation":
            found.pushes.setdefault("emulation", []).append(values)
        elif not isinstance(message, dict):
            found.others.append(event)
        elif "id" in message:
            found.replies.append(message)
        else:
            push = message.get("push", message)
            found.pushes.setdefault(push.get("channel") if isinstance(push, dict) else None, []).append(push)
    return found


def same(wanted: Answers, got: Answers) -> bool:
    """Whether nothing is missing, nothing surplus, and all in the order that counts."""
    return wanted == got or (
        wanted.keys() == got.keys() and all(_ordered(wanted[client]) == _ordered(got[client]) for client in wanted)
    )


@dataclass(frozen=True)
class Difference:
    """A step of a conversation, counted from 0, in which the answers are not as wanted."""

    conversation: Conversation
    step: int
    got: Answers | str

    def __str__(self) -> str:
        shown = {
            "sent": self.conversation.steps[self.step],
            "wanted": self.conversation.wanted[self.step],
            "got": self.got,
        }
        lines = [self.conversation.name, f"  step    {self.step + 1}"]
        for name, value in shown.items():
            lines.append(f"  {name:6}  {json.dumps(value, ensure_ascii=False)[:SHOWN_LENGTH]}")
        return "\n".join(lines)


def difference(conversation: Conversation, got: list[Answers]) -> Difference | None:
    """The step to report: the last one if its answers are new, else the first whose answers are not as wanted.

    The last one may be that of a new fault, behind steps with the faulty answers of old.
    """
    differing = [number for number, answers in enumerate(got) if not same(conversation.wanted[number], answers)]
    if not differing:
        return None
    number = differing[0] if differing[-1] in conversation.today else differing[-1]
    return Difference(conversation, number, got[number])
