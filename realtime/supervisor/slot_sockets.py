"""The listening sockets of slots that come and go while the server runs.

The kernel resets the connections in the queue of a socket that is closed, and the handshakes that began there. So new
connections avoid such a socket for a while first, and it is closed once its queue is empty.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from realtime.supervision.health import Health
from realtime.supervisor.listener import SharedPort
from realtime.supervisor.steering import Steering

LINGER = 3.0
"""Seconds for handshakes that have begun: the kernel repeats its part of one after a second, and after two more."""

# Seconds after which a socket is closed although clients are queued: no worker takes them.
_LONGEST = 10.0


class SlotSockets:
    """Opens and closes the sockets of the last slots. Call `close_due` a few times a second."""

    def __init__(
        self, port: SharedPort, steering: Steering, health: dict[int, Health], seconds: Callable[[], float]
    ) -> None:
        """health: by slot; a closed slot is removed from it. seconds: returns the time of a monotonic clock."""
        self._port = port
        self._steering = steering
        self._health = health
        self._seconds = seconds
        self._kept = len(port.sockets)
        self._empty_from = len(port.sockets)  # the slots from here on have no process any more
        self._avoided_at = -math.inf

    def open(self, count: int) -> None:
        """Have a socket for each of `count` slots. Raises OSError."""
        while len(self._port.sockets) < count:
            self._port.add()
        if count > self._kept:
            self._kept = self._empty_from = count
            self._steering.resize(len(self._port.sockets) - count)

    def avoid(self, count: int) -> None:
        """New connections avoid all slots but the first `count` from now on."""
        self._kept = count
        self._avoided_at = self._seconds()
        self._steering.resize(len(self._port.sockets) - count)

    def close_from(self, slot: int) -> None:
        """The slots from this one on have no process any more: close their sockets as soon as no connection is lost."""
        self._empty_from = slot

    def close_due(self) -> None:
        """Close what can be closed now, the last socket first: the kernel keeps the order of the others then."""
        while (slot := len(self._port.sockets) - 1) >= max(self._kept, self._empty_from):
            waited = self._seconds() - self._avoided_at
            is_queued = self._steering.accept_queue(slot)[0] and waited < _LONGEST
            if waited < LINGER or is_queued:
                return
            self._port.remove_last()
            self._health.pop(slot, None)
            self._steering.resize(slot - self._kept)
