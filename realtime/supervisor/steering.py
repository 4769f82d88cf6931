"""Steers new connections: keeps the kernel's program for the shared port in step with the workers' health.

The program belongs to the group of listening sockets. Replacing it takes microseconds, and queued connections stay in
their queues. Where the kernel refuses the program, its own hash keeps spreading the connections.
"""

from __future__ import annotations

import ctypes
import math
import socket
import struct
from collections.abc import Callable, Iterator, Mapping

from twisted.logger import Logger

from realtime.metrics import Metrics, Sample
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
        self._is_enabled = enabled
        self._is_permitted = True  # by the kernel
        self._has_program = False
        self._closing = 0  # the number of sockets that are about to be closed, the last ones
        if enabled and len(port.sockets) > 1 and port.has_other_listeners:
            self._give_up(
                "workers of a killed server still listen on this port; restart this server once they are gone"
            )
        metrics.sources.append(lambda: list(self._samples()))

    def update(self) -> None:
        """Adapt the kernel's program to the load, at most once per MIN_UPDATE_INTERVAL."""
        if self._seconds() - self._updated_at >= MIN_UPDATE_INTERVAL:
            self._replace_program()

    def condition_changed(self, slot: int, health: Health) -> None:
        """Adapt the kernel's program at once."""
        self._replace_program()

    def resize(self, closing: int = 0) -> None:
        """The port has another number of sockets, or the last `closing` of them are about to be closed.

        New connections avoid those from now on, also while steering is disabled: the kernel would reset them.
        """
        slots = len(self._port.sockets)
        self._closing = closing
        self._balance.resize(slots)
        self.weights = (*self.weights, *(0,) * slots)[:slots]
        self._replace_program()

    def accept_queue(self, slot: int) -> tuple[int, int]:
        """Return the length and the limit of the slot's accept queue."""
        return accept_queue(self._port.sockets[slot])

    def _replace_program(self) -> None:
        self._updated_at = self._seconds()
        weights = self._wanted_weights()
        if weights == self.weights:
            return
        try:
            _attach(self._port.sockets[0], program(weights))
        except OSError as error:
            advice = "allow SO_ATTACH_REUSEPORT_CBPF, or set loop.steering = false"
            self._give_up(f"the kernel refuses its program: {error.strerror}; {advice}")
        else:
            self.weights, self._has_program = weights, True

    def _wanted_weights(self) -> tuple[int, ...]:
        """Return the weights that the program should have now; those it has, if it should not change."""
        slots = len(self._port.sockets)
        if not self._is_permitted or slots == 1 or not (self._is_enabled or self._closing or self._has_program):
            return self.weights
        weights = (self._balance.weigh(self._health) if self._is_enabled else (1,) * slots)[: slots - self._closing]
        if self._closing and not any(weights):
            weights = (1,) * len(weights)  # the kernel's own choice would be among all sockets
        return (*weights, *(0,) * self._closing)

    def _give_up(self, reason: str) -> None:
        self._is_permitted = False
        _log.warn("steering is off, the kernel spreads new connections by its hash: {reason}", reason=reason)

    def _samples(self) -> Iterator[Sample]:
        for slot, weight in enumerate(self.weights):
            labels = [("worker", str(slot))]
            help = "Weight of the worker in the spread of new connections; all 0: the kernel spreads them by its hash."
            yield Sample("realtime_slot_weight", "gauge", help, labels, weight)
            depth, limit = self.accept_queue(slot)
            help = "Connections in the worker's accept queue."
            yield Sample("realtime_accept_queue_depth", "gauge", help, labels, depth)
            help = "Limit of the worker's accept queue."
            yield Sample("realtime_accept_queue_limit", "gauge", help, labels, limit)


def _attach(member: socket.socket, code: bytes) -> None:
    """Attach the program to the group of sockets that `member` belongs to. Raises OSError if the kernel refuses it."""
    instructions = ctypes.create_string_buffer(code, len(code))
    value = _PROGRAM.pack(len(code) // INSTRUCTION_BYTES, ctypes.addressof(instructions))
    member.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_REUSEPORT_CBPF, value)
