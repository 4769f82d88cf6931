"""The conversations of the corpus files, and the configurations that they were recorded with."""

from __future__ import annotations

import gzip
import json
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from tests.system.serving import Sections, merged, toml

HERE = Path(__file__).parent

Step = dict[str, Any]
Event = list[Any]
# The events of one step by the name of the client; under "response", the answer to an HTTP request.
Answers = dict[str, list[Event]]


@dataclass(frozen=True, eq=False)
class Conversation:
    """The steps of clients and the wanted answers.

    today: by number of the step, the faulty answers that this server gave when the corpus was made.
    """

    name: str
    steps: list[Step]
    wanted: list[Answers]
    today: dict[int, Answers] = field(default_factory=dict)
    verdict: dict[str, Any] = field(default_factory=dict)
    slow: bool = False
    alone: bool = False
    quick: bool = False

    @property
    def faults(self) -> list[str]:
        """The numbers of its known faults."""
        return list(self.verdict.get("fault", ()))

    @property
    def transports(self) -> set[str]:
        opened = {step["transport"] for step in self.steps if "open" in step}
        return opened | {"http" for step in self.steps if "http" in step}

    def __str__(self) -> str:
        lines = [f"{self.name} {json.dumps(self.verdict or '')}"]
        for number, (step, answers) in enumerate(zip(self.steps, self.wanted, strict=True), start=1):
            lines.append(f"  {number:2}  {json.dumps(step, ensure_ascii=False)}")
            for client, events in answers.items():
                lines += [f"        {client} <- {json.dumps(event, ensure_ascii=False)}" for event in events]
        return "\n".join(lines)


def _conversation(line: str, corrections: dict[str, dict[str, Any]]) -> Conversation:
    """The conversation that a line of a corpus file holds. corrections: keys that replace its own, by name."""
    loaded = json.loads(line)
    loaded |= corrections.get(loaded["name"], {})
    wanted = {int(number): answers for number, answers in loaded.get("wanted", {}).items()}
    return Conversation(
        name=loaded["name"],
        steps=loaded["steps"],
        wanted=[wanted.get(number, answers) for number, answers in enumerate(loaded["recorded"])],
        today={int(number): answers for number, answers in loaded.get("today", {}).items()},
        verdict=loaded.get("verdict", {}),
        slow=loaded.get("slow", False),
        alone=loaded.get("alone", False),
        quick=loaded.get("quick", False),
    )


@cache
def profiles() -> list[str]:
    """The names of the configurations for which there are conversations."""
    return sorted(path.stem.removeprefix("profile-") for path in HERE.glob("profile-*.toml"))


@cache
def conversations(profile: str) -> list[Conversation]:
    """The conversations of a profile, with the corrections of corrections-PROFILE.jsonl."""
    corrected = HERE / f"corrections-{profile}.jsonl"
    lines_of_corrections = corrected.read_text().splitlines() if corrected.exists() else []
    corrections = {line["name"]: line for line in map(json.loads, lines_of_corrections)}
    with gzip.open(HERE / f"corpus-{profile}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [_conversation(line, corrections) for line in lines]


def chosen(
    among: Iterable[Conversation], text: str = "", *, transport: str | None = None, quick: bool = False
) -> list[Conversation]:
    """The conversations with `text` in their names. transport: only with this one. quick: only the sample."""
    return [
        one
        for one in among
        if text in one.name and (one.quick or not quick) and (transport is None or transport in one.transports)
    ]


def configuration(profile: str) -> str:
    """The TOML of a profile: profile-main.toml, with the keys of the profile's own file laid over it."""
    sections: Sections = {}
    for name in ("main", profile):
        sections = merged(sections, tomllib.loads((HERE / f"profile-{name}.toml").read_text()))
    return "".join(f"{key} = {toml(value)}\n" for key, value in sections.items())
