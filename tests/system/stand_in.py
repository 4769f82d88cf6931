"""A child process that speaks the control plane and does as its settings say: a worker or a broker for tests.

`settings.app.options` tells it how to behave: `fail` (can't start, for this reason; `fail_if`: only while that file is
there), `fail_for_now` (can't start, for this reason, which may pass), `hang` (at start, for ever), `crash` (an exit
status, at start), `ignore_drain`, `slow_start` (seconds), `block` (never turn the loop again
once started, with the GIL held). `only`: just the process of this name behaves so.
A worker serves its listening sockets with one line: its slot and pid.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Sequence
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import deferLater

from realtime.errors import ApplicationFailed, SettingsError
from realtime.process.child import Child, hand_nothing_over
from realtime.process.child import main as run_child
from realtime.worker.listening import adopt


class StandIn:
    """The work of the child."""

    def __init__(self, child: Child) -> None:
        self._child = child
        self._options = child.settings.app.options
        self._behaves = self._options.get("only", child.name) == child.name
        self._streams = child.metrics.counter("realtime_links", "Streams that the supervisor brought.")

    async def start(self) -> None:
        """Behave as the options say."""
        options, child = self._options, self._child
        if self._behaves and "slow_start" in options:
            await deferLater(child.reactor, float(str(options["slow_start"])), lambda: None)
        if self._behaves and "fail" in options and os.path.exists(str(options.get("fail_if", "/"))):
            raise SettingsError([str(options["fail"])])
        if self._behaves and "fail_for_now" in options:
            raise ApplicationFailed(str(options["fail_for_now"]))
        if self._behaves and options.get("hang"):
            hang()
        if self._behaves and "crash" in options:
            os._exit(int(str(options["crash"])))
        for fd in child.listen:
            adopt(child.reactor, fd, Factory.forProtocol(lambda: Greeter(child)))
        if self._behaves and options.get("block"):
            child.reactor.callLater(0.5, block)

    def link(self, slot: int, stream: int) -> None:
        """Count the stream, and close it."""
        self._streams.value += 1
        os.close(stream)

    def adopt(self, stream: int) -> None:
        """Close the stream."""
        os.close(stream)

    def take_over(self, stream: int) -> None:
        """Close the stream."""
        os.close(stream)

    async def hand_over(self, stream: int, connections: int, timeout: float) -> dict[str, object]:
        """Hand nothing over."""
        return hand_nothing_over(stream, "a stand-in has no clients")

    async def drain(self, timeout: float) -> None:
        """Finish at once, or never."""
        if self._behaves and self._options.get("ignore_drain"):
            await Deferred()


def hang() -> None:
    """Wait for an answer that does not come."""
    threading.Event().wait()


def block() -> None:
    """Hold the GIL for ever: sleep(3), which a signal ends, in calls that do not release it."""
    while True:
        ctypes.PyDLL(None).sleep(3600)


class Greeter(Protocol):
    """Tells every client who serves it."""

    def __init__(self, child: Child) -> None:
        self._child = child

    def connectionMade(self) -> None:
        transport: Any = self.transport
        # Not by `write`, which sends in a later turn: the process may end in this one.
        transport.getHandle().send(f"{self._child.slot} {os.getpid()}\n".encode())
        transport.loseConnection()


def main(argv: Sequence[str]) -> int:
    """Run the child, as `realtime.process.zygote` asks."""
    return run_child(argv, StandIn)
