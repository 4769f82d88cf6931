"""Vital signs of this worker -> which of its limits are reached. Without I/O: the clock is an argument.

The supervisor judges a worker from outside (`realtime.supervision.health`), to steer new clients away from it. This
module is the worker's own judgement, by which it refuses work or gives cheaper answers. The worker is under pressure as
soon as a limit is reached, and until RECOVERY_TIME seconds after it was last reached, so a value near a limit does not
flap.

The lag is the maximum over the last RECOVERY_TIME seconds, or the age of an overdue beat. So the first callback after a
long one sees the pressure, before any timer could report it. A loop that many short callbacks block one after another
shows lag too, because its timer waits for all of them.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

from realtime.config.settings import LoopSettings
from realtime.supervision.loop_time import LoopAccount
from realtime.supervision.vitals import ProcessState, Vitals

# Seconds after which a limit that is no longer reached causes no more pressure.
RECOVERY_TIME = 0.5

# A busy loop that keeps up is healthy: a high utilization causes a warning, and never refuses work.
_WARNING_ONLY = {"utilization"}


def find_exceeded(loop: LoopSettings, vitals: Vitals) -> list[str]:
    """Return the limits that this reading reaches and that refuse work. Lag is judged by `Pressure`."""
    limits = _limits(loop)
    return [name for name in limits.keys() - _WARNING_ONLY if getattr(vitals, name) >= limits[name]]


def _limits(loop: LoopSettings) -> dict[str, float]:
    """Return the limits in force by the name of their field in `Vitals`."""
    limits = {
        "utilization": loop.max_utilization,
        "rss": loop.max_rss,
        "queued_bytes": loop.max_queued_bytes,
        "threads_waiting": loop.max_threads_waiting,
    }
    return {name: limit for name, limit in limits.items() if limit}


class Pressure:
    """The pressure on one worker. Reading it takes less than a microsecond, and is allowed in any thread."""

    def __init__(self, loop: LoopSettings, clock: Callable[[], float]) -> None:
        """clock: returns CLOCK_MONOTONIC seconds, the clock of the beats."""
        self._limits = _limits(loop)
        self.max_lag = loop.max_lag or math.inf
        self._interval = loop.interval
        self._clock = clock
        self._has_served = False
        self._reached: dict[str, float] = {}  # when each limit was last reached
        self._lags: deque[tuple[float, float]] = deque()  # (time, lag) with falling lags: the maximum comes first
        # The state at the last beat. Each value is replaced as a whole, so other threads may read it.
        self._last_beat = clock()
        self._max_recent_lag = 0.0
        self._active: frozenset[str] = frozenset()  # limits reached in the last RECOVERY_TIME seconds
        self._is_limit_reached = False  # one of them is more than a warning

    def observe(self, vitals: Vitals) -> None:
        """Take the reading of a beat. Call it at every beat of the loop."""
        now = vitals.beat / 1e9
        # A starting loop is late because it loads the application, and has no clients yet that could notice.
        self._record_lag(now, 0.0 if vitals.state is ProcessState.STARTING else vitals.lag)
        if not self._has_served and vitals.state is not ProcessState.STARTING:
            self._has_served = True
            if vitals.rss >= self._limits.get("rss", math.inf):
                # No worker can stay below this limit. Refusing all clients for it would help none.
                del self._limits["rss"]
                self._reached.pop("rss", None)
        for name, limit in self._limits.items():
            if getattr(vitals, name) >= limit:
                self._reached[name] = now
        self._active = frozenset(name for name, at in self._reached.items() if now - at < RECOVERY_TIME)
        self._is_limit_reached = bool(self._active - _WARNING_ONLY)
        self._last_beat = now

    @property
    def lag(self) -> float:
        """Seconds by which the loop is late, or was late in the last RECOVERY_TIME seconds."""
        return max(self._max_recent_lag, self._clock() - self._last_beat - self._interval)

    @property
    def load(self) -> float:
        """The lag as a share of its limit; 1 or more whenever any limit is reached."""
        load = self.lag / self.max_lag
        return max(load, 1.0) if self._is_limit_reached else load

    @property
    def pressed(self) -> bool:
        """Whether the worker is under pressure: any limit is reached."""
        if self._is_limit_reached or self._max_recent_lag >= self.max_lag:
            return True
        return self._clock() - self._last_beat - self._interval >= self.max_lag

    @property
    def reasons(self) -> tuple[str, ...]:
        """The limits that are reached: "lag", "rss", "queued_bytes", "threads_waiting"; empty without pressure."""
        late = ("lag",) if self.lag >= self.max_lag else ()
        return (*late, *sorted(self._active - _WARNING_ONLY))

    @property
    def busy(self) -> bool:
        """Whether the utilization is at its limit, which is worth a warning and no more."""
        return "utilization" in self._active

    def _record_lag(self, now: float, lag: float) -> None:
        # A monotonic queue: a lag that a later one exceeds can't be the maximum any more.
        lags = self._lags
        while lags and lags[-1][1] <= lag:
            lags.pop()
        lags.append((now, lag))
        while now - lags[0][0] >= RECOVERY_TIME:
            lags.popleft()
        self._max_recent_lag = lags[0][1]


class Throttle:
    """Limits how many calls of one handler run on the loop at a time. There is no limit until they cause pressure.

    The lag that the calls cause grows with their number, so the throttle cuts their number in proportion. It raises the
    limit by one every RECOVERY_TIME seconds, as long as the calls take less of the loop than TARGET_SHARE allows, and
    removes it after LIFT_AFTER seconds in which it kept no call out. Calls that are known to block the loop are limited
    before they do it for too long together.

    limit: most calls at a time; None for no limit. running: calls in progress. sample: number of calls by which the
    cost of one is measured. is_proven: whether so many have ended; until then the caller starts no more at a time.
    """

    __slots__ = (
        *("_account", "_adjusted_at", "_cost", "_ended", "_max_lag", "_max_spent", "_needed_at", "_peak", "_sampled"),
        *("_spent", "_started", "is_proven", "limit", "running", "sample"),
    )

    # Share of `loop.max_lag` from which on a call blocks the loop.
    BLOCKING_SHARE = 1 / 16

    # Share of an excessive lag that a handler must have caused to be throttled.
    MIN_CAUSED_SHARE = 0.5
    # Share of `loop.max_lag` for which the handler's calls may occupy the loop between two beats.
    TARGET_SHARE = 0.5
    # Seconds.
    LIFT_AFTER = 10.0

    def __init__(self, account: LoopAccount, sample: int = 5) -> None:
        """account: charged with the handler's time on the loop. sample: see `workers.sample_calls`."""
        self.sample = sample
        self.limit: int | None = None
        self.running = 0
        self._account = account
        self.is_proven = False
        self._max_lag = math.inf  # of the last beat
        self._cost = 0.0  # seconds for which a call blocked the loop lately; 0 for less than BLOCKING_SHARE
        self._started = self._ended = 0  # calls in the current sample
        self._sampled = account.spent  # at its start
        self._spent = account.spent  # at the last beat
        self._peak = 0  # most calls at a time since the last beat
        self._adjusted_at = 0.0  # when the limit was last reconsidered
        self._max_spent = 0.0  # most seconds that the calls took between two beats since then
        self._needed_at = 0.0  # when the limit last kept a call out; infinite: since it was last reconsidered

    def admits(self) -> bool:
        """Return whether one more call may run. A False counts as a call that the limit kept out."""
        if self.limit is None and self._cost:
            most = max(1, int(self.TARGET_SHARE * self._max_lag / self._cost))
            if self.running >= most:
                self.limit = most
        if self.limit is None or self.running < self.limit:
            return True
        self._needed_at = math.inf
        return False

    def enter(self) -> None:
        """Count a call that begins. Call `leave` at its end."""
        self.running += 1
        self._started += 1
        if self.running > self._peak:
            self._peak = self.running

    def leave(self) -> None:
        """Count a call that has ended."""
        self.running -= 1
        self._ended += 1
        if self._ended >= self.sample:
            self.measure()

    def observe(self, now: float, lag: float, max_lag: float) -> None:
        """Adapt the limit at a beat of the loop. lag: seconds by which this beat is late."""
        self._max_lag = max_lag
        spent, peak = (self._account.spent - self._spent) / 1e9, self._peak
        self._spent, self._peak = self._account.spent, self.running
        if lag >= max_lag and spent >= lag * self.MIN_CAUSED_SHARE:
            self.limit = max(1, int(peak * self.TARGET_SHARE * max_lag / lag))
            self._adjusted_at = self._needed_at = now
            self._max_spent = 0.0
            return
        if self.limit is None:
            return
        self._max_spent = max(self._max_spent, spent)
        if now - self._adjusted_at >= RECOVERY_TIME:
            self._relax(now, self._max_spent < self.TARGET_SHARE * max_lag)

    def measure(self) -> None:
        """Learn what a call costs from the current sample, complete or not, and begin another."""
        spent = self._account.spent
        cost = (spent - self._sampled) / 1e9 / max(self._started, self._ended, 1)
        self._cost = cost if cost >= self.BLOCKING_SHARE * self._max_lag else 0.0
        self._started, self._ended, self._sampled = 0, 0, spent
        self.is_proven = True

    def _relax(self, now: float, has_room: bool) -> None:
        assert self.limit is not None
        self._adjusted_at, self._max_spent = now, 0.0
        if self._needed_at == math.inf:
            self._needed_at = now
            self.limit += has_room
        elif now - self._needed_at >= self.LIFT_AFTER:
            self.limit = None
