"""Who may open a connection to this worker, whatever its transport, and what is told to those who may not."""

from __future__ import annotations

import random
from collections.abc import Callable
from email.utils import formatdate
from http import HTTPStatus

from realtime.config import settings
from realtime.http.forwarded import TrustedProxies
from realtime.http.handshake import origin_policy
from realtime.http.request import Refusal, RequestHead
from realtime.metrics import Metrics

# A client that comes back does so after this many seconds, each after another time.
_RETRY_AFTER = (3, 10)
# Of the descriptors that a worker may have open, those kept back for whatever else it opens: a tenth, and so many.
_KEPT_BACK = 0.1, 32
# A whole connection's worth of the rate, but for what additions are rounded by.
_WHOLE = 1 - 1e-6


class Admission:
    """One for all transports of a worker.

    origin_allowed: whether the page that a request comes from may open connections. proxies: those that are trusted.
    counts: how many connections are open, for each transport.
    """

    def __init__(
        self,
        client: settings.ClientSettings,
        metrics: Metrics,
        seconds: Callable[[], float],
        refuse: Callable[[], Refusal | None] = lambda: None,
        workers: int = 1,
        descriptors: int = 0,
    ) -> None:
        """seconds: a monotonic clock. refuse: why nobody is let in at this moment, if nobody is.

        workers: how many share the limits of `client`; each gets its part, of the number of connections rounded up.
        descriptors: how many this worker may have open, 0 for no limit. At the limit itself it could say nothing.
        """
        self.origin_allowed = origin_policy(client.allowed_origins)
        self.counts: list[Callable[[], int]] = []
        share, spare = _KEPT_BACK
        limits = (-(-client.connection_limit // workers), max(descriptors - int(descriptors * share) - spare, 0))
        self._limit = min(filter(None, limits), default=0)
        self._rate = client.connection_rate_limit / workers
        self._burst = max(self._rate, 1.0)  # as many may come at once after a quiet second
        self._left = self._burst
        self._counted_at = seconds()
        self._seconds = seconds
        self._refuse = refuse
        self.proxies = TrustedProxies(client.trusted_proxies)
        metrics.gauge("realtime_connections", "Connections of clients that are open", lambda: self.connections)

    @property
    def connections(self) -> int:
        """How many are open."""
        return sum(count() for count in self.counts)

    def judge(self) -> Refusal | None:
        """Why one more connection is not opened now, or None; then it counts towards the rate."""
        refusal = self._refuse()
        if refusal is not None:
            return refusal
        if 0 < self._limit <= self.connections:
            return Refusal(503, "too many connections", "connection_limit")
        return None if self._spend() else Refusal(503, "too many new connections", "connection_rate")

    def address(self, head: RequestHead, peer: str) -> str:
        """The client's own address. peer: that of the connection, which may be a proxy's."""
        return self.proxies.client(peer, head.all("x-forwarded-for"))

    def _spend(self) -> bool:
        """Whether one more is within the rate."""
        if not self._rate:
            return True
        now = self._seconds()
        self._left = min(self._left + (now - self._counted_at) * self._rate, self._burst)
        self._counted_at = now
        if self._left < _WHOLE:
            return False
        self._left -= 1
        return True


def response(refusal: Refusal) -> bytes:
    """The complete HTTP response that says no."""
    status = HTTPStatus(refusal.status)
    body = refusal.reason + "\n"
    lines = [
        f"HTTP/1.1 {status.value} {status.phrase}",
        "Server: realtime",
        f"Date: {formatdate(usegmt=True)}",
        "Connection: close",
        "Content-Type: text/plain; charset=utf-8",
        f"Content-Length: {len(body)}",
    ]
    lines += [f"{name}: {value}" for name, value in refusal.headers]
    if status is HTTPStatus.SERVICE_UNAVAILABLE:
        lines.append(f"Retry-After: {random.randint(*_RETRY_AFTER)}")
    return "\r\n".join([*lines, "", body]).encode("latin-1")
