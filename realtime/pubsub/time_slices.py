"""Time slices for the server's own long work, so that it does not block the loop: fan-out, replays, snapshots.

Long work is an iterator whose steps are short. `TimeSlicer` runs steps for at most one slice of time, then asks the
loop for another turn, so that clients are served in between. Short work runs directly, without an iterator, as long as
the slice of the current turn is not used up.

Without I/O: the caller provides the clock and the way to ask for a turn.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator
from itertools import cycle
from typing import Any, Protocol, TypeVar

HIGH, NORMAL, LOW = range(3)

# The priority of each successive step, in a cycle: a higher priority gets more steps, and none gets nothing.
_SCHEDULE = (HIGH, NORMAL, HIGH, LOW, HIGH, NORMAL, HIGH)

CHUNK = 128
"""Deliveries between two readings of the clock: about a millisecond of work."""

YIELD_EVERY = 500
"""Small items that a coroutine of the server handles before it yields to the loop."""

STRANGER_SLICE = 0.0005
"""Seconds in each turn of the loop for peers that are not connected as clients, over all of them: pipelined requests,
long first messages. An attack needs no credentials there, and may come over any number of connections."""

STRANGER_PAUSE = 0.001
"""Seconds between two such slices: an attack leaves most of the loop's time to the clients."""

T = TypeVar("T")
R = TypeVar("R")


class Waiter(Awaitable[Any], Protocol):
    """An awaitable that the slicer resumes, such as a Deferred."""

    def callback(self, result: None) -> object:
        """Resume the waiting coroutine at once."""


class TimeSlicer:
    """Runs long work in slices, in the loop's thread. See the module.

    is_timed: whether the slice of this turn has started. `has_time` is true until then.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        seconds: float,
        wake: Callable[[Callable[[], None]], object],
        waiter: Callable[[], Waiter] | None = None,
    ) -> None:
        """clock: seconds, never goes back. seconds: of one slice. wake: calls its argument in the loop's next turn.

        waiter: makes a new one for `yield_to_loop`, which does not wait without it.
        """
        self._clock = clock
        self._seconds = seconds
        self._wake = wake
        self._waiter = waiter
        self._queues: tuple[deque[Iterator[None]], ...] = (deque(), deque(), deque())  # by priority
        self._schedule = cycle(_SCHEDULE)
        self._slice_end = 0.0
        self.is_timed = False
        self._is_woken = False

    @classmethod
    def unlimited(cls) -> TimeSlicer:
        """Return a slicer whose slices never end, so that all work runs at once."""
        return cls(lambda: 0.0, math.inf, lambda run: None)

    @property
    def has_time(self) -> bool:
        """Whether this turn has time for direct work."""
        return not self.is_timed or self._clock() < self._slice_end

    @property
    def is_busy(self) -> bool:
        """Whether work waits for its turn."""
        return any(self._queues)

    def start_slice(self) -> None:
        """Start the slice of this turn, after a chunk of direct work."""
        if not self.is_timed:
            self.is_timed = True
            self._slice_end = self._clock() + self._seconds
            self._ask_for_turn()

    def add(self, work: Iterator[None], priority: int = NORMAL) -> None:
        """Run work step by step, in turns with all other work of its priority.

        A step should take well under a slice. work: runs until the iterator ends; if it raises, `run` raises.
        """
        self._queues[priority].append(work)
        self._ask_for_turn()

    def go_on(self) -> None:
        """Ask for a turn if work waits: the thread that would do so is in the midst of a step, and blocked."""
        if self.is_busy:
            self._ask_for_turn()

    def make_waiter(self) -> Waiter | None:
        """Make an awaitable; None without a loop to wait for."""
        return self._waiter() if self._waiter is not None else None

    async def yield_to_loop(self) -> None:
        """Let other work run. A long coroutine awaits this after each millisecond of work."""
        if self._waiter is not None:
            waiter = self._waiter()
            self.add(_resume(waiter))
            await waiter

    async def exhaust(self, steps: Iterator[None]) -> None:
        """Run short steps; yields to the loop after each but the last."""
        for _ in steps:
            await self.yield_to_loop()

    async def map_sliced(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """Return `function` of each item; yields to the loop after every YIELD_EVERY items."""
        results: list[R] = []
        for item in items:
            if len(results) % YIELD_EVERY == YIELD_EVERY - 1:
                await self.yield_to_loop()
            results.append(function(item))
        return results

    def run(self) -> None:
        """Work for one slice. `wake` gets this method."""
        self._is_woken = False
        clock = self._clock
        self.is_timed = True
        now = clock()
        self._slice_end = slice_end = now + self._seconds
        try:
            while (queue := self._next_queue()) is not None:
                work = queue.popleft()
                for _ in work:  # one step
                    queue.append(work)
                    break
                began, now = now, clock()
                if now + 0.9 * (now - began) >= slice_end:  # another such step does not fit
                    break
        finally:
            if any(self._queues):
                self._ask_for_turn()
            else:
                self.is_timed = False

    def _next_queue(self) -> deque[Iterator[None]] | None:
        for _ in _SCHEDULE:
            queue = self._queues[next(self._schedule)]
            if queue:
                return queue
        return None

    def _ask_for_turn(self) -> None:
        if not self._is_woken:
            self._is_woken = True
            self._wake(self.run)


def _resume(waiter: Waiter) -> Iterator[None]:
    waiter.callback(None)
    yield
