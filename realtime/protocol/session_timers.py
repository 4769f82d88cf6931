"""The time limits of one session: the opening, pings and pongs, and the expiry of the connection and its subscriptions;
the rates of its commands and of its errors.

A session has one deadline at a time (`realtime.deadlines`), the earliest of its limits; `on_deadline` acts on the due
limits. Limits are in loop time, math.inf for none. Tokens and grants expire at Unix seconds, 0.0 for never.
"""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod

from msgspec import Struct

from realtime import errors
from realtime.errors import ClientError
from realtime.protocol.context import Connection, SessionServices, SessionSettings
from realtime.protocol.encodings import Encoding
from realtime.protocol.session_state import CONNECTED, SessionState
from realtime.protocol.subscription import Subscription, SubscriptionSource

# Seconds after which a client that was refused is disconnected. It is expected to close the connection itself.
REFUSED_DELAY = 5.0
# Seconds' worth of commands at the allowed rate that may arrive at once. As many more are refused, then the client is
# disconnected.
RATE_BURST = 2.0
# The window, in seconds, in which failed commands count towards `client.error_limit`.
ERROR_WINDOW = 5.0
# The longest ttl in seconds that fits the SDKs' integers: 68 years.
LONGEST_TTL = 2**31 - 1
# An expired connection closes later by up to this share of its grace, so that many do not close at the same moment.
EXPIRY_SPREAD = 0.1


_NO_FAILURES = (0, 0, -math.inf)


class HandedLimits(Struct, frozen=True, array_like=True):
    """The limits of a session that moves to another worker. Times in seconds from now on, None for no limit.

    awaits_pong: a ping has no pong yet. ping_interval, pong_timeout: in seconds, as at the source: the client was given
    its parameters when it connected. rate_in: until the allowed rate of commands has used up those received.
    failed, subscribes, failures_ago: as in `SessionTimers._failures`; None without failures.
    """

    stale_in: float | None
    ping_in: float | None
    awaits_pong: bool
    expire_in: float | None
    rate_in: float
    failed: int
    subscribes: int
    failures_ago: float | None
    ping_interval: float
    pong_timeout: float


class SessionTimers(ABC):
    """The part of a `Session` that deals with time.

    A base class rather than an object of its own, which would cost memory in every session.
    """

    __slots__ = (
        "_expire_by",
        "_failures",
        "_ping_at",
        "_pong_by",
        "_rate_due",
        "_stale_by",
        "deadline_bucket",
        "services",
        "settings",
    )

    # Set by the session:
    state: SessionState
    encoding: Encoding
    subscriptions: dict[str, Subscription]
    is_refreshable: bool
    running: int
    _connection: Connection

    def __init__(self, settings: SessionSettings, services: SessionServices) -> None:
        self.settings = settings
        self.services = services
        self._ping_at = self._pong_by = self._expire_by = math.inf
        self._stale_by = self._after(settings.client.stale_close_delay or math.inf)
        self.deadline_bucket = 0
        # The time at which the allowed rate would have used up the commands received so far.
        self._rate_due = 0.0
        # The number of failed commands, of refused subscribes beside these, and the time of the first one.
        self._failures = _NO_FAILURES

    @property
    @abstractmethod
    def is_paused(self) -> bool:
        """Whether the socket is not read now."""

    @abstractmethod
    def disconnect(self, code: int, reason: str, *, kind: str = "") -> None: ...

    @abstractmethod
    def unsubscribe(self, channel: str, code: int, reason: str) -> None: ...

    def schedule_deadline(self) -> None:
        """Have `on_deadline` called when the earliest limit is due; to be called after a limit was changed."""
        due = min(self._stale_by, self._ping_at, self._pong_by, self._expire_by, self._subscription_expiry())
        if due < math.inf and self.state is not SessionState.CLOSED:
            self.services.deadlines.set(self, due)

    def abort(self) -> None:
        """Abort the connection, after an exception of the session."""
        self._connection.abort()

    def on_deadline(self) -> None:
        """Act on the limits that are due."""
        now = self.services.deadlines.now
        if self._stale_by <= now:
            self._stale()
        elif self._pong_by <= now and not self.is_paused and self._is_read:
            self.disconnect(*errors.NO_PONG)
        elif self._expire_by <= now:
            self.disconnect(*errors.CONNECTION_EXPIRED)
        else:
            if self._pong_by <= now and not self._is_read:
                # The pong may be unread, or the ping behind a long reply. Meanwhile `websocket.write_timeout` finds a
                # client that is gone.
                self._pong_by = self._after(self.settings.client.pong_timeout)
            self._expire_subscriptions(now)
            if self._ping_at <= now and self.state is CONNECTED:
                self._ping(now)
            self.schedule_deadline()

    @property
    def _is_read(self) -> bool:
        """Whether the client has got its ping, and a pong would have been read."""
        return self._connection.is_drained and not self._connection.is_held

    def _after(self, delay: float) -> float:
        return self.services.deadlines.now + delay

    def _loop_time(self, expire_at: float, grace: float = 0.0) -> float:
        """Convert a time of expiry to loop time, `grace` seconds later; math.inf for 0.0."""
        return self._after(expire_at - self.services.wall_clock() + grace) if expire_at else math.inf

    # -- hand-over ---------------------------------------------------------------------------------------------------

    @property
    def handed_limits(self) -> HandedLimits:
        """The limits, for another worker."""
        failed, subscribes, since = self._failures
        return HandedLimits(
            self._left(self._stale_by),
            self._left(self._ping_at),
            self._pong_by < math.inf,
            self._left(self._expire_by),
            max(self._rate_due - self.services.deadlines.now, 0.0),
            failed,
            subscribes,
            self.services.deadlines.now - since if since > -math.inf else None,
            self.settings.client.ping_interval,
            self.settings.client.pong_timeout,
        )

    def restore_limits(self, handed: HandedLimits) -> None:
        """Continue with the limits of another worker. The time for a pong begins anew: the socket was not read."""

        def after(delay: float | None) -> float:
            return math.inf if delay is None else self._after(delay)

        self._stale_by, self._ping_at = after(handed.stale_in), after(handed.ping_in)
        self._expire_by = after(handed.expire_in)
        self._pong_by = self._after(self.settings.client.pong_timeout) if handed.awaits_pong else math.inf
        self._rate_due = self._after(handed.rate_in)
        if handed.failures_ago is not None:
            self._failures = handed.failed, handed.subscribes, self._after(-handed.failures_ago)
        self.schedule_deadline()

    def resume_limits(self) -> None:
        """Watch the limits again, after the socket was not read for a while."""
        self._restart_pong_limit()
        self.schedule_deadline()

    def _left(self, time: float) -> float | None:
        return time - self.services.deadlines.now if time < math.inf else None

    # -- rates -------------------------------------------------------------------------------------------------------

    def _exceeds_rate(self) -> bool:
        """Count a command; return whether it exceeds the rate. Disconnects a client that goes far beyond."""
        rate = self.settings.client.commands_per_second
        now = self.services.deadlines.now
        self._rate_due = max(self._rate_due, now) + 1 / rate
        # Half a command is more than the sum of all rounding errors of these additions.
        commands = (self._rate_due - now) * rate - 0.5
        if commands > 2 * RATE_BURST * rate:
            self.disconnect(*errors.TOO_MANY_COMMANDS)
        return commands > RATE_BURST * rate

    def _count_failure(self, name: str) -> None:
        """Disconnect the client when too many of its commands failed by its own fault.

        An SDK that reconnects sends all its subscriptions at once, so refused ones do not count up to `channel_limit`.
        """
        settings, now = self.settings.client, self.services.deadlines.now
        failed, subscribes, since = self._failures if now - self._failures[2] <= ERROR_WINDOW else (0, 0, now)
        if name == "subscribe" and subscribes < settings.channel_limit:
            subscribes += 1
        else:
            failed += 1
        self._failures = failed, subscribes, since
        if 0 < settings.error_limit < failed:
            self.disconnect(*errors.TOO_MANY_ERRORS)

    # -- opening -----------------------------------------------------------------------------------------------------

    def _stale(self) -> None:
        if self.state is SessionState.REFUSED:
            self.disconnect(*errors.CONNECTION_CLOSED)
        elif self.running:
            # The client has sent its connect command, which takes long here.
            self.disconnect(*errors.SERVER_ERROR)
        else:
            self.disconnect(*errors.STALE, kind="stale")

    def _limit_refused(self) -> None:
        """Give a refused client REFUSED_DELAY seconds to close the connection."""
        self._stale_by = self._after(REFUSED_DELAY)
        self.schedule_deadline()

    # -- pings -------------------------------------------------------------------------------------------------------

    @property
    def ping_parameters(self) -> tuple[int, bool]:
        """The client's parameters: seconds between two pings, 0 for none, and whether it has to answer them."""
        settings = self.settings.client
        if not (settings.ping_interval > 0 and self._connection.needs_pings):
            return 0, False
        return math.ceil(settings.ping_interval), self._wants_pongs

    @property
    def _wants_pongs(self) -> bool:
        return self.settings.client.pong_timeout > 0 and not self.encoding.unidirectional

    def _start_pings(self) -> None:
        """End the limit of the opening, and begin to ping."""
        self._stale_by = math.inf
        interval, _ = self.ping_parameters
        if interval:
            # Random, so that clients that connected together are not pinged together.
            self._ping_at = self._after(self.settings.client.ping_interval * random.uniform(0.5, 1.0))
        self.schedule_deadline()

    def _ping(self, now: float) -> None:
        self._ping_at = now + self.settings.client.ping_interval
        if self._pong_by < math.inf:
            return  # the client is not read now, and would answer a second ping by one pong too many
        if self._wants_pongs:
            self._pong_by = now + self.settings.client.pong_timeout
        self._connection.send(self.encoding.ping, is_push=True)

    def _pong_received(self) -> None:
        # A pong is taken before the queued commands: their duration is not the client's fault. The deadline stays set
        # and wakes the session once for nothing, which costs less than moving it at every pong.
        self._pong_by = math.inf

    def _restart_pong_limit(self) -> None:
        """Wait anew for a pong that may have arrived long ago, while the socket was not read."""
        if self._pong_by < math.inf:
            self._pong_by = self._after(self.settings.client.pong_timeout)
            self.schedule_deadline()

    # -- expiry ------------------------------------------------------------------------------------------------------

    def ttl(self, expire_at: float) -> int:
        """Return the whole seconds until `expire_at`, 0 for never. Raises ClientError 110 when it has passed."""
        if not expire_at:
            return 0
        left = expire_at - self.services.wall_clock()
        if left <= 0:
            raise ClientError(*errors.EXPIRED)
        return min(math.ceil(left), LONGEST_TTL)

    def set_expiry(self, expire_at: float) -> None:
        """End the connection at `expire_at`, with a grace if its token can be refreshed."""
        grace = self.settings.client.expired_close_delay if self.is_refreshable else 0.0
        self._expire_by = self._loop_time(expire_at, grace * random.uniform(1.0, 1.0 + EXPIRY_SPREAD))
        self.schedule_deadline()

    def _subscription_expiry(self) -> float:
        if not self.subscriptions:
            return math.inf
        times = [subscription.expire_at for subscription in self.subscriptions.values() if subscription.expire_at]
        return self._loop_time(min(times)) if times else math.inf

    def _expire_subscriptions(self, now: float) -> None:
        for subscription in list(self.subscriptions.values()):
            if subscription.is_active and self._loop_time(subscription.expire_at) <= now:
                if subscription.source is SubscriptionSource.CLIENT:
                    self.unsubscribe(subscription.channel, *errors.SUBSCRIPTION_EXPIRED_PUSH)
                else:
                    self.disconnect(*errors.SUBSCRIPTION_EXPIRED)
                    return
