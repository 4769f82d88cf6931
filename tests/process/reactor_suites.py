"""Twisted's own tests of reactors, over the reactor of this server. Run by trial, in a process of its own."""

from __future__ import annotations

import asyncio
from importlib import import_module
from typing import Any

from twisted.internet import tcp
from twisted.internet.test.reactormixins import ReactorBuilder
from twisted.trial.unittest import SkipTest, SynchronousTestCase

from realtime.process.heartbeat import MeasuredSelector
from realtime.process.reactor import Reactor
from realtime.process.transport import DirectServer
from realtime.supervision.vitals import VitalsPage

MODULES = ("core", "fdset", "newtls", "process", "socket", "stdio", "tcp", "threads", "time", "tls", "udp", "unix")
# Twisted makes a class for each of its reactors from each builder of tests; the one for its asyncio reactor:
SUFFIX = "_AsyncioSelectorReactorTests"


def make_reactor(case: Any) -> Reactor:
    page = VitalsPage.create()
    selector = MeasuredSelector(page)
    loop = asyncio.SelectorEventLoop(selector)
    selector.attach(loop)
    case.addCleanup(page.close)
    asyncio.set_event_loop(loop)
    case.addCleanup(asyncio.set_event_loop, asyncio.new_event_loop())
    case.addCleanup(loop.close)
    return Reactor(loop, selector)


class Server(DirectServer):
    """Writes and reads as the connections of the server do, but begins TLS as Twisted's."""

    def startTLS(self, *arguments: Any) -> None:
        self.stopReading()
        self.reads_directly = ""
        self.startReading()
        super().startTLS(*arguments)


# Tests that do not apply, by name.
SKIPPED = {
    "test_logPrefix": "the reactor makes no logging context for each event",
    "test_lostFileDescriptor": "epoll(7) does not report a closed descriptor",
    "test_writeSequeceWithoutWrite": "it replaces a method that a direct reader has looked up",
    "test_changeUID": "the other user must be able to run this Python",
}


def over_our_reactor(builder: type[ReactorBuilder], skip: str | None) -> type:
    attributes: dict[str, Any] = {"reactorFactory": make_reactor, "__module__": __name__}
    if skip is not None:
        attributes["skip"] = skip  # for Twisted's asyncio reactor as well
    for test, reason in SKIPPED.items():
        if hasattr(builder, test):
            attributes[test] = skipping(reason)
    return type(builder.__name__, (builder, SynchronousTestCase), attributes)


def skipping(reason: str) -> Any:
    def skip(self: SynchronousTestCase) -> None:
        raise SkipTest(reason)

    return skip


tcp.Port.transport = Server

for module in MODULES:
    for name, made in vars(import_module(f"twisted.internet.test.test_{module}")).items():
        if name.endswith(SUFFIX):
            builder = made.__mro__[1]
            globals()[builder.__name__] = over_our_reactor(builder, getattr(made, "skip", None))
