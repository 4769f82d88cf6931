"""Steers new connections: keeps the kernel's program for the shared port in step with the workers' health.

The program belongs to the group of listening sockets, and is replaced in microseconds; what is queued already stays
where it is. Where the kernel refuses it, its own hash goes on dealing the connections out.
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

# Seconds between two changes of weights while no worker's condition changes.
MIN_UPDATE_INTERVAL = 0.5

# asm-generic/socket.h; Python has no name for it.
_SO_ATTACH_REUSEPORT_CBPF = 51
# linux/filter.h: struct sock_fprog {unsigned short len; struct sock_filter *filter;}
_PROGRAM = struct.Struct("@HP")

_log = Logger(observer=log.observer)


class Steering:
    """The weights of one shared port's slots.

    Call `update` after each look at the workers' health, and `condition_changed` for every such change.
    """

    def __init__(
        self,
        port: SharedPort,
        health: Mapping[int, Health],
        seconds: Callable[[], float],
        metrics: Metrics,
        enabled: bool,
    ) -> None:
        """health: of each slot, as it changes. seconds: a monotonic clock. enabled: False leaves all to the kernel."""
        self.weights = (0,) * len(port.sockets)  # in force; all 0 while the kernel chooses by its hash
        self._port = port
        self._health = health
        self._seconds = seconds
        self._balance = Balance(len(port.sockets))
        self._weighed = -math.inf
        self._steers = enabled and len(port.sockets) > 1
        if self._steers and port.has_other_listeners:
            self._give_up("another server's workers still listen on this port")
        for slot in range(len(port.sockets)):
            self._measure(metrics, slot)

    def update(self) -> None:
        """Bring the kernel's program up to date with the load, where that is due."""
        if self._seconds() - self._weighed >= MIN_UPDATE_INTERVAL:
            self._weigh()

    def condition_changed(self, slot: int, health: Health) -> None:
        """Bring it up to date at once."""
        self._weigh()

    def accept_queue(self, slot: int) -> tuple[int, int]:
        """Connections that wait to be accepted in this slot, and how many may."""
        return accept_queue(self._port.sockets[slot])

    def _weigh(self) -> None:
        self._weighed = self._seconds()
        if not self._steers:
            return
        weights = self._balance.weigh(self._health)
        if weights == self.weights:
            return
        try:
            _attach(self._port.sockets[0], program(weights))
        except OSError as error:
            self._give_up(f"the kernel refuses: {error.strerror}")
        else:
            self.weights = weights

    def _give_up(self, reason: str) -> None:
        self._steers = False
        _log.warn("new connections are not steered, but spread by the kernel's hash: {reason}", reason=reason)

    def _measure(self, metrics: Metrics, slot: int) -> None:
        help = "Share of new connections that the worker is given, against the others'; all 0: the kernel's choice."
        metrics.gauge("realtime_slot_weight", help, lambda: self.weights[slot], worker=str(slot))
        help = "Connections that wait to be accepted."
        metrics.gauge("realtime_accept_queue_depth", help, lambda: self.accept_queue(slot)[0], worker=str(slot))
        help = "Connections that may wait to be accepted."
        metrics.gauge("realtime_accept_queue_limit", help, lambda: self.accept_queue(slot)[1], worker=str(slot))


def _attach(member: socket.socket, code: bytes) -> None:
    """Have the program choose among the sockets of `member`'s group. Raises OSError where the kernel refuses."""
    instructions = ctypes.create_string_buffer(code, len(code))
    value = _PROGRAM.pack(len(code) // INSTRUCTION_BYTES, ctypes.addressof(instructions))
    member.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_REUSEPORT_CBPF, value)
