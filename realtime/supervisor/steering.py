"""Steers new connections: keeps the kernel's program for the shared port in step with the workers' health.

The program belongs to the group of listening sockets. Replacing it takes microseconds, and queued connections stay in
their queues. Where the kernel refuses the program, its own hash keeps spreading the connections.
"""

from __future__ import annotations

import ctypes
import math
import socket
import struct
from collections.abc import Callable, Mapping

from twisted.logger import Logger

from realtime.metrics import Metrics
from realtime.process import log
from realtime.supervision.balance import INSTRUCTION_BYTES, Balance, program
from realtime.supervision.health import Health
from realtime.supervisor.listener import SharedPort, accept_queue

# Fewest seconds between two changes of weights, unless a worker's condition changes.
MIN_UPDATE_INTERVAL = 0.5

# asm-generic/socket.h; Python has no constant for it.
_SO_ATTACH_REUSEPORT_CBPF = 51
# linux/filter.h: struct sock_fprog {unsigned short len; struct sock_filter *filter;}
_PROGRAM = struct.Struct("@HP")

_log = Logger(observer=log.observer)


class Steering:
    """The weights of one shared port's slots.

    Call `update` after each health check, and `condition_changed` for every changed condition. weights: those in force,
    by slot; all 0 while the kernel chooses by its hash.
    """

    def __init__(
        self,
        port: SharedPort,
        health: Mapping[int, Health],
        seconds: Callable[[], float],
        metrics: Metrics,
        enabled: bool,
    ) -> None:
        """health: health by slot, a live mapping. seconds: returns the time of a monotonic clock. enabled: False leaves
        the choice to the kernel."""
        self.weights = (0,) * len(port.sockets)
        self._port = port
        self._health = health
        self._seconds = seconds
        self._balance = Balance(len(port.sockets))
        self._updated_at = -math.inf
        self._is_active = enabled and len(port.sockets) > 1
        if self._is_active and port.has_other_listeners:
            self._give_up(
                "workers of a killed server still listen on this port; restart this server once they are gone"
            )
        for slot in range(len(port.sockets)):
            self._add_gauges(metrics, slot)

    def update(self) -> None:
        """Adapt the kernel's program to the load, at most once per MIN_UPDATE_INTERVAL."""
        if self._seconds() - self._updated_at >= MIN_UPDATE_INTERVAL:
            self._replace_program()

    def condition_changed(self, slot: int, health: Health) -> None:
        """Adapt the kernel's program at once."""
        self._replace_program()

    def accept_queue(self, slot: int) -> tuple[int, int]:
        """Return the length and the limit of the slot's accept queue."""
        return accept_queue(self._port.sockets[slot])

    def _replace_program(self) -> None:
        self._updated_at = self._seconds()
        if not self._is_active:
            return
        weights = self._balance.weigh(self._health)
        if weights == self.weights:
            return
        try:
            _attach(self._port.sockets[0], program(weights))
        except OSError as error:
            advice = "allow SO_ATTACH_REUSEPORT_CBPF, or set loop.steering = false"
            self._give_up(f"the kernel refuses its program: {error.strerror}; {advice}")
        else:
            self.weights = weights

    def _give_up(self, reason: str) -> None:
        self._is_active = False
        _log.warn("steering is off, the kernel spreads new connections by its hash: {reason}", reason=reason)

    def _add_gauges(self, metrics: Metrics, slot: int) -> None:
        help = "Weight of the worker in the spread of new connections; all 0: the kernel spreads them by its hash."
        metrics.gauge("realtime_slot_weight", help, lambda: self.weights[slot], worker=str(slot))
        help = "Connections in the worker's accept queue."
        metrics.gauge("realtime_accept_queue_depth", help, lambda: self.accept_queue(slot)[0], worker=str(slot))
        help = "Limit of the worker's accept queue."
        metrics.gauge("realtime_accept_queue_limit", help, lambda: self.accept_queue(slot)[1], worker=str(slot))


def _attach(member: socket.socket, code: bytes) -> None:
    """Attach the program to the group of sockets that `member` belongs to. Raises OSError if the kernel refuses it."""
    instructions = ctypes.create_string_buffer(code, len(code))
    value = _PROGRAM.pack(len(code) // INSTRUCTION_BYTES, ctypes.addressof(instructions))
    member.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_REUSEPORT_CBPF, value)
