"""The differences from the wanted answers that are known and not mended yet."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.conformance.comparison import Difference
from tests.conformance.corpus import Conversation

FILE = Path(__file__).with_name("known-faults.txt")


@dataclass(frozen=True)
class Line:
    """The number of a fault, and a pattern for the names of a family, in which * stands for any text."""

    fault: str
    pattern: str

    def names(self, conversation: Conversation) -> bool:
        """Whether the conversation is of the family."""
        pattern = re.escape(self.pattern).replace(r"\*", ".*")
        return bool(re.fullmatch(pattern, conversation.name, re.DOTALL))

    def covers(self, conversation: Conversation) -> bool:
        """Whether the conversation is of the family and was found to suffer from the fault."""
        return self.fault in conversation.faults and self.names(conversation)


class KnownFaults:
    """The lines of known-faults.txt."""

    def __init__(self, text: str) -> None:
        self.lines: list[Line] = []
        for line in text.splitlines():
            fault, _, pattern = line.partition("#")[0].strip().partition(" ")
            if pattern:
                self.lines.append(Line(fault, pattern.strip()))

    @classmethod
    def read(cls) -> KnownFaults:
        return cls(FILE.read_text())

    def affect(self, conversation: Conversation) -> bool:
        """Whether a line covers the conversation: then the faulty answers of old are expected too."""
        return any(line.covers(conversation) for line in self.lines)

    def covers(self, difference: Difference) -> bool:
        """Whether a line covers the conversation, and the fault is known to show in that step."""
        return difference.step in difference.conversation.today and self.affect(difference.conversation)

    def mended(self, played: Iterable[Conversation], differing: set[Conversation]) -> list[Line]:
        """The lines whose conversations were played and gave the wanted answers, all of them."""
        families = {line: {one for one in played if line.covers(one)} for line in self.lines}
        return [line for line, family in families.items() if family and family.isdisjoint(differing)]
