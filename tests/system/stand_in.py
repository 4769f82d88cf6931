"""A child process that speaks the control plane and does as its settings say: a worker or a broker for tests.

`settings.app.options` tells it how to behave: `fail` (can't start, for this reason; `fail_if`: only while that file is
there), `crash` (an exit status, at start), `ignore_drain`, `slow_start` (seconds), `block` (never turn the loop again
once started, with the GIL held). `only`: just the process of this name behaves so.
A worker serves its listening sockets with one line: its slot and pid.
"""

from __future__ import annotations

import ctypes
import os
import sys

from twisted.internet.defer import Deferred
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import deferLater

from realtime.errors import SettingsError
from realtime.process.child import Child, main
from realtime.worker.listening import adopt


async def start(child: Child) -> None:
    """Behave."""
    options = child.settings.app.options
    mine = options.get("only", child.name) == child.name
    if mine and "slow_start" in options:
        await deferLater(child.reactor, float(str(options["slow_start"])), lambda: None)
    if mine and "fail" in options and os.path.exists(str(options.get("fail_if", "/"))):
        raise SettingsError([str(options["fail"])])
    if mine and "crash" in options:
        os._exit(int(str(options["crash"])))
    for fd in child.listen:
        adopt(child.reactor, fd, Factory.forProtocol(lambda: Greeter(child)))
    streams = child.metrics.counter("realtime_links", "Streams that the supervisor brought.")

    def linked(slot: int, stream: int) -> None:
        streams.value += 1
        os.close(stream)

    async def drain(timeout: float) -> None:
        if mine and options.get("ignore_drain"):
            await Deferred()

    child.on_link = linked
    child.on_drain = drain
    if mine and options.get("block"):
        child.reactor.callLater(0.5, block)


def block() -> None:
    """Hold the GIL for ever: sleep(3), which a signal ends, in calls that do not release it."""
    while True:
        ctypes.PyDLL(None).sleep(3600)


class Greeter(Protocol):
    """Tells every client who serves it."""

    def __init__(self, child: Child) -> None:
        self._child = child

    def connectionMade(self) -> None:
        assert self.transport is not None
        self.transport.write(f"{self._child.slot} {os.getpid()}\n".encode())
        self.transport.loseConnection()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], start))
