"""Turns for the server's own long work, so that none of it holds the loop: fan-out, replays, snapshots.

What may take long is an iterator that does a little at each step. `TimeSlicer` runs the steps for at most one slice of
time, then asks the loop for another turn, so that clients are heard in between. What is short is done at once, without
any of this, as long as the turn's slice is not used up.

Without I/O: the clock, and the way to ask for a turn, are the caller's.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator
from itertools import cycle
from typing import Any, Protocol, TypeVar

HIGH, NORMAL, LOW = range(3)

# Whose work gets the next step, over and over: the higher the more, and nobody nothing.
_SHARES = (HIGH, NORMAL, HIGH, LOW, HIGH, NORMAL, HIGH)

CHUNK = 128
"""Deliveries that are made without a look at the clock: about a millisecond's worth."""

BREATH = 500
"""Small things that a coroutine of ours does before it lets others have a turn."""

T = TypeVar("T")
R = TypeVar("R")


class Waiter(Awaitable[Any], Protocol):
    """What a coroutine waits for, such as a Deferred."""

    def callback(self, result: None) -> object:
        """Let the coroutine go on, at once."""


class TimeSlicer:
    """See the module. timed: whether this turn's slice has begun; `free` is true until then. Loop thread only."""

    def __init__(
        self,
        clock: Callable[[], float],
        seconds: float,
        wake: Callable[[Callable[[], None]], object],
        gate: Callable[[], Waiter] | None = None,
    ) -> None:
        """clock: seconds, never goes back. seconds: of one slice. wake: calls what it is given in the loop's next turn.

        gate: makes a new one for `breathe`, which without it waits for nothing.
        """
        self._clock = clock
        self._seconds = seconds
        self._wake = wake
        self._gate = gate
        self._works: tuple[deque[Iterator[None]], ...] = (deque(), deque(), deque())
        self._shares = cycle(_SHARES)
        self._until = 0.0
        self.timed = False
        self._asked = False

    @classmethod
    def unlimited(cls) -> TimeSlicer:
        """Slices that never end: all is done at once."""
        return cls(lambda: 0.0, math.inf, lambda run: None)

    @property
    def free(self) -> bool:
        """Whether this turn has time for work that is done directly."""
        return not self.timed or self._clock() < self._until

    def begin(self) -> None:
        """A chunk of work was done directly: from now on this turn's slice is timed."""
        if not self.timed:
            self.timed = True
            self._until = self._clock() + self._seconds
            self._ask()

    def add(self, work: Iterator[None], priority: int = NORMAL) -> None:
        """Have work done, a step at a time, in turns with all other work of its priority.

        A step should take well under a slice. work: the generator's end is its end; if it raises, `run` does.
        """
        self._works[priority].append(work)
        self._ask()

    async def yield_to_loop(self) -> None:
        """Let others have a turn. For a coroutine that does long work: await it after each millisecond's worth."""
        if self._gate is not None:
            gate = self._gate()
            self.add(_opening(gate))
            await gate

    async def map_sliced(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """`function` of each item; others have a turn after every BREATH of them."""
        results: list[R] = []
        for item in items:
            if len(results) % BREATH == BREATH - 1:
                await self.yield_to_loop()
            results.append(function(item))
        return results

    def run(self) -> None:
        """Work for one slice: what was given to `wake`."""
        self._asked = False
        clock = self._clock
        self.timed = True
        self._until = until = clock() + self._seconds
        try:
            while (works := self._next()) is not None:
                work = works.popleft()
                for _ in work:
                    works.append(work)
                    break
                if clock() >= until:
                    break
        finally:
            if any(self._works):
                self._ask()
            else:
                self.timed = False

    def _next(self) -> deque[Iterator[None]] | None:
        for _ in _SHARES:
            works = self._works[next(self._shares)]
            if works:
                return works
        return None

    def _ask(self) -> None:
        if not self._asked:
            self._asked = True
            self._wake(self.run)


def _opening(gate: Waiter) -> Iterator[None]:
    gate.callback(None)
    yield
