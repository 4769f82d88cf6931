"""Vital signs of this worker -> what presses it, without I/O: the clock is an argument.

The supervisor judges a worker from outside (`realtime.supervision.health`), to steer new clients round it. This is the
worker's own judgement, by which it refuses work or answers more cheaply. A limit presses as soon as it is reached, and
for CALM seconds after it was last reached: what flickers around a limit does not flap.

Lag is judged by its maximum over the last CALM seconds, and by the beat that has not come yet. So it is known to the
first callback after a long one, before any timer could tell; and a loop that is blocked in short stretches, one after
the other, shows it, since its timer waits for all of them.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

from realtime.config.settings import LoopSettings
from realtime.supervision.loop_time import LoopAccount
from realtime.supervision.vitals import ProcessState, Vitals

# Seconds without cause after which a limit presses no more.
CALM = 0.5

# A busy loop that keeps up is a healthy one: utilization warns, and never sheds.
_WARNS = {"utilization"}


class Pressure:
    """What presses one worker. Asking costs less than a microsecond, and may be done in any thread."""

    def __init__(self, loop: LoopSettings, clock: Callable[[], float]) -> None:
        """clock: CLOCK_MONOTONIC seconds, like the beats."""
        limits = {
            "utilization": loop.max_utilization,
            "rss": loop.max_rss,
            "queued_bytes": loop.max_queued_bytes,
            "threads_waiting": loop.max_threads_waiting,
        }
        self._limits = {name: limit for name, limit in limits.items() if limit}
        self.max_lag = loop.max_lag or math.inf
        self._interval = loop.interval
        self._clock = clock
        self._reached: dict[str, float] = {}  # when each limit was last reached
        self._lags: deque[tuple[float, float]] = deque()  # (when, seconds), falling: the maximum comes first
        # As of the last beat, so that threads may ask.
        self._beat = clock()
        self._late = 0.0
        self._held: frozenset[str] = frozenset()

    def beat(self, vitals: Vitals) -> None:
        """Take a reading; at every beat of the loop."""
        now = vitals.beat / 1e9
        # A loop that is late before it serves anybody, since it loads the application, is late for nobody.
        self._note_lag(now, 0.0 if vitals.state is ProcessState.STARTING else vitals.lag)
        for name, limit in self._limits.items():
            if getattr(vitals, name) >= limit:
                self._reached[name] = now
        self._held = frozenset(name for name, at in self._reached.items() if now - at < CALM)
        self._beat = now

    @property
    def lag(self) -> float:
        """How late the loop is or lately was, in seconds."""
        return max(self._late, self._clock() - self._beat - self._interval)

    @property
    def load(self) -> float:
        """That lag as a share of its limit; 1 or more whenever anything presses."""
        load = self.lag / self.max_lag
        return max(load, 1.0) if self._held - _WARNS else load

    @property
    def pressed(self) -> bool:
        """Whether anything presses."""
        return self.load >= 1

    @property
    def reasons(self) -> tuple[str, ...]:
        """What presses: "lag", "rss", "queued_bytes", "threads_waiting"; empty for nothing."""
        late = ("lag",) if self.lag >= self.max_lag else ()
        return (*late, *sorted(self._held - _WARNS))

    @property
    def busy(self) -> bool:
        """Whether the utilization is at its limit, which is worth a warning and no more."""
        return "utilization" in self._held

    def _note_lag(self, now: float, lag: float) -> None:
        lags = self._lags
        while lags and lags[-1][1] <= lag:
            lags.pop()
        lags.append((now, lag))
        while now - lags[0][0] >= CALM:
            lags.popleft()
        self._late = lags[0][1]


class Throttle:
    """How many calls of one handler may run on the loop at a time; as many as come, until they have pressed it.

    The lag that they cause grows with their number, so their number is cut in proportion. It is raised again by one
    in each CALM seconds, as long as they take less of the loop than they may, and set free once it was not needed for
    LIFT seconds.
    """

    __slots__ = ("_account", "_eased", "_needed", "_peak", "_spent", "_worst", "limit", "running")

    # Of a lag that presses, the share that a handler must have caused to be throttled.
    BLAME = 0.5
    # Of `loop.max_lag`, the share that its calls may take of the loop in one go.
    SHARE = 0.5
    LIFT = 10.0

    def __init__(self, account: LoopAccount) -> None:
        """account: of the handler's time on the loop."""
        self.limit: int | None = None
        self.running = 0
        self._account = account
        self._spent = account.spent  # at the last beat
        self._peak = 0  # most calls at a time since then
        self._eased = 0.0  # when the limit was last looked at
        self._worst = 0.0  # most that was spent between two beats since then
        self._needed = 0.0  # when the limit last kept a call out

    def admits(self) -> bool:
        """Whether one more call may run. A False is taken for a call that is kept out."""
        if self.limit is None or self.running < self.limit:
            return True
        self._needed = math.inf
        return False

    def enter(self) -> None:
        """A call begins. Then `leave` is due."""
        self.running += 1
        self._peak = max(self._peak, self.running)

    def leave(self) -> None:
        """A call has ended."""
        self.running -= 1

    def beat(self, now: float, lag: float, max_lag: float) -> None:
        """Learn from the last stretch of the loop; at each of its beats. lag: by which this one is late."""
        spent, peak = (self._account.spent - self._spent) / 1e9, self._peak
        self._spent, self._peak = self._account.spent, self.running
        if lag >= max_lag and spent >= lag * self.BLAME:
            self.limit = max(1, int(peak * self.SHARE * max_lag / lag))
            self._eased = self._needed = now
            self._worst = 0.0
            return
        if self.limit is None:
            return
        self._worst = max(self._worst, spent)
        if now - self._eased >= CALM:
            self._ease(now, self._worst < self.SHARE * max_lag)

    def _ease(self, now: float, room: bool) -> None:
        assert self.limit is not None
        self._eased, self._worst = now, 0.0
        if self._needed == math.inf:
            self._needed = now
            self.limit += room
        elif now - self._needed >= self.LIFT:
            self.limit = None
