"""Moves established clients from a worker that stays much busier than another one.

`realtime.supervision.balance` decides; this module has the clock, the processes and the log.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from twisted.logger import Logger

from realtime.config.settings import LoopSettings
from realtime.metrics import Metrics
from realtime.process import log
from realtime.supervision.balance import Move, Rebalancing
from realtime.supervision.health import Health
from realtime.supervisor.handover import HandOverProcess, HandOverResult, hand_over

INTERVAL = 1.0
"""Seconds between two calls of `check`."""

# Seconds for the clients' commands under way to end. A client with a longer one stays.
_TIMEOUT = 5.0

_log = Logger(observer=log.observer)


class Rebalancer:
    """Moves a few clients at a time. Call `check` every INTERVAL seconds."""

    def __init__(
        self,
        health: Mapping[int, Health],
        processes: Mapping[int, HandOverProcess],
        loop: LoopSettings,
        metrics: Metrics,
        seconds: Callable[[], float],
        may_move: Callable[[], bool],
    ) -> None:
        """health, processes: by slot, live mappings. seconds: returns the time of a monotonic clock. may_move: returns
        whether clients may move now: not while workers are being replaced."""
        self._health = health
        self._processes = processes
        self._metrics = metrics
        self._seconds = seconds
        self._may_move = may_move
        self._rebalancing = Rebalancing(loop.rebalance_difference, loop.rebalance_delay)
        self._is_on = loop.rebalance
        self._is_moving = False

    def configure(self, loop: LoopSettings) -> None:
        """Use other settings from now on."""
        self._is_on = loop.rebalance
        self._rebalancing.configure(loop.rebalance_difference, loop.rebalance_delay)

    def check(self) -> None:
        """Begin a move that is due."""
        if not self._is_on or self._is_moving or not self._may_move():
            return
        move = self._rebalancing.find_move(self._health, self._seconds())
        if move is None:
            return
        source, target = self._processes.get(move.source), self._processes.get(move.target)
        if source is not None and target is not None:
            self._is_moving = True
            shares = self._health[move.source].utilization, self._health[move.target].utilization
            hand_over(source, target, move.connections, _TIMEOUT).addCallback(self._moved, move, shares)

    def _moved(self, result: HandOverResult, move: Move, shares: tuple[float, float]) -> None:
        self._is_moving = False
        help = "Connections that moved from a hot worker to an idle one."
        self._metrics.counter("realtime_rebalanced_connections", help, worker=str(move.source)).value += result.moved
        _log.info(
            "worker {source} has been busier than worker {target} for {lasting:.0f} s ({hot:.0%} of the time against"
            " {idle:.0%}); clients that have moved: {moved} (loop.rebalance){reason}",
            moved=result.moved,
            source=move.source,
            target=move.target,
            lasting=move.lasting,
            hot=shares[0],
            idle=shares[1],
            reason=f"; {result.reason}" if result.reason else "",
        )
