"""The faults of a soak and their times, all from its seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

# Each kind of fault: how often it occurs in a round, and the seconds that it may last, one of them by chance.
Kind = tuple[int, tuple[float, ...]]
KINDS: dict[str, Kind] = {
    "kill a worker": (3, (0.0,)),
    "stop a worker": (3, (0.5, 2.0, 5.0)),
    "stop a worker for good": (1, (12.0,)),
    "drain a worker": (2, (0.0,)),
    "reload": (3, (0.0,)),
    "scale": (2, (2.0, 10.0)),
    "recycle workers": (1, (15.0,)),
    "rebalance": (1, (15.0,)),
    "kill the broker": (2, (0.0,)),
    "stop the broker": (2, (1.0, 4.0, 8.0)),
    "kill the supervisor": (1, (0.0,)),
    "stop the supervisor": (1, (3.0, 11.0)),
    "stop all processes": (1, (3.0, 11.0)),
    "restart the service": (1, (0.0,)),
    "fill the disk of the output": (1, (20.0,)),
    "leave the output unread": (1, (15.0,)),
    "kill a handler process": (1, (0.0,)),
    "stop a handler process": (1, (3.0, 12.0)),
    "block a loop": (3, (0.3, 1.0, 3.0)),
    "block a loop for good": (1, (12.0,)),
    "hold the interpreter's lock": (1, (0.7, 2.0)),
    "cut a link to the broker": (2, (0.0,)),
    "take a worker's descriptors": (2, (3.0, 8.0)),
    "cut clients": (3, (0.0,)),
    "cut all clients": (1, (0.0,)),
    "forget clients": (2, (60.0,)),
    "read nothing": (2, (5.0, 20.0, 40.0)),
    "read slowly": (2, (15.0, 30.0)),
    "open clients and say nothing": (1, (8.0,)),
}
# Those of a run with Redis, beside the others.
REDIS_KINDS: dict[str, Kind] = {
    "kill Redis": (2, (1.0, 6.0)),
    "stop Redis": (3, (0.5, 3.0, 9.0)),
    "cut the links to Redis": (3, (0.0,)),
    "forget Redis' scripts": (1, (0.0,)),
    "empty Redis": (1, (0.0,)),
    "start Redis without its data": (1, (1.0,)),
    "start Redis from an old snapshot": (1, (1.0,)),
    "cut a node from Redis": (2, (3.0, 12.0)),
}


@dataclass(frozen=True, slots=True)
class Fault:
    """at: seconds from the start. target: from 0 to 1, which worker or which share. lasts: seconds."""

    at: float
    kind: str
    target: float
    lasts: float

    def __str__(self) -> str:
        lasts = f", {self.lasts:g} s" if self.lasts else ""
        return f"{self.kind} at {self.at:.1f} s{lasts} (target {self.target:.3f})"


def schedule(
    seed: int, seconds: float, number: int, only: Sequence[str] = (), all_kinds: Mapping[str, Kind] = KINDS
) -> list[Fault]:
    """Return `number` faults within `seconds`, in their order. Each kind occurs once before one is repeated.

    only: the kinds to choose from, all if empty.
    """
    random = Random(f"faults of {seed}")
    kinds = list(only or all_kinds)
    random.shuffle(kinds)
    while len(kinds) < number:
        deck = [kind for kind in only or all_kinds for _ in range(all_kinds[kind][0])]
        random.shuffle(deck)
        kinds += deck
    step = seconds / number if number else 0.0
    return [
        Fault(
            round((index + 0.5 + random.uniform(-0.4, 0.4)) * step, 3),
            kind,
            random.random(),
            random.choice(all_kinds[kind][1]),
        )
        for index, kind in enumerate(kinds[:number])
    ]
