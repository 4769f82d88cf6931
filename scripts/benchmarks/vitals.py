"""Measure the cost of vital signs: of a turn, of accounts, of an idle worker, and of the supervisor's check.

The cost of accounts is compared with the minimal cost of a message: one recv(2) and one send(2).
"""

from __future__ import annotations

import argparse
import asyncio
import selectors
import socket
import time
import timeit
from collections.abc import Awaitable, Callable

from realtime.config.settings import ChannelSettings, LoopSettings, Namespace
from realtime.process.heartbeat import HandlerMarker, Heartbeat, LoopClock, MeasuredSelector
from realtime.protocol.channel_rules import ChannelRules
from realtime.pubsub.engine import Answer, AnswerCallback, EngineNotice, EngineRequest
from realtime.pubsub.hub import Hub
from realtime.supervision.health import CHECK_INTERVAL, HealthTracker
from realtime.supervision.loop_time import LoopTimeLedger, LoopWork
from realtime.supervision.vitals import ProcessState, VitalsPage
from realtime.types import Publication
from realtime.worker.loop_time import ChargedReceiver, NamespaceAccounts

REPEATS = 20_000


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench vitals", description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0, help="duration of the measurement of each idle loop")
    seconds = parser.parse_args(arguments).seconds
    page = VitalsPage.create()
    measured, plain = MeasuredSelector(page), selectors.DefaultSelector()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        theirs = socket.create_connection(listening.getsockname())
        ours, _ = listening.accept()
    theirs.send(b"x")
    for selector in (measured, plain):
        selector.register(ours, selectors.EVENT_READ)
    marker, account_of_handler = (
        HandlerMarker(page, measured.accounts),
        measured.accounts.open(LoopWork.HANDLER, "rpc report"),
    )
    heartbeat = Heartbeat(page, LoopClock(asyncio.new_event_loop()), LoopSettings(), measured)
    heartbeat.enter(ProcessState.READY)
    tracker = HealthTracker(LoopSettings())

    def mark() -> None:
        marker.leave(marker.enter((b"rpc report", b"report"), account_of_handler))

    def check() -> None:
        tracker.assess(0, page.read(), time.monotonic())

    def quick_check() -> None:
        tracker.quick_check(0, *page.peek(), time.monotonic())

    # The selector never waits: the socket is readable.
    turn = microseconds(lambda: measured.select(1)) - microseconds(lambda: plain.select(1))
    print(f"a turn of the loop       {turn:6.2f} us more than without vital signs")
    print(f"a handler's step         {microseconds(mark):6.2f} us")
    account(measured.accounts, ours, theirs)
    each = microseconds(check)
    print(
        f"a check of a worker      {each:6.2f} us, {each / 1e6 / CHECK_INTERVAL:.2%} of a core while it is not healthy"
    )
    print(f"a quick check of one     {microseconds(quick_check):6.2f} us")
    beating, waking = idle_share(seconds, measured=True), idle_share(seconds, measured=False)
    print(f"an idle worker           {beating:.2%} of a core, {waking:.2%} of a core for wake-ups alone")
    return 0


class NoEngine:
    """An engine without subscribed channels, which is never asked."""

    def ask(self, request: EngineRequest[Answer]) -> Awaitable[Answer]:
        raise NotImplementedError

    def ask_then(self, request: EngineRequest[Answer], done: AnswerCallback) -> None:
        raise NotImplementedError

    def tell(self, notice: EngineNotice) -> None: ...


def account(accounts: LoopTimeLedger, ours: socket.socket, theirs: socket.socket) -> None:
    """Print the cost of charging an account."""
    protocol = accounts.open(LoopWork.PROTOCOL)
    rules = ChannelRules(ChannelSettings(namespaces=(Namespace(name="chat"),)))
    hub = Hub(lambda hub: NoEngine(), lambda order: None)
    fan_out = ChargedReceiver(hub, NamespaceAccounts(accounts, ["chat"], rules.namespace))
    publication = Publication(bytes(128))

    def switch() -> None:
        before = accounts.switch(protocol)
        try:
            pass
        finally:
            accounts.switch(before)

    def echo() -> None:
        theirs.send(bytes(128))
        ours.recv(4096)

    floor = microseconds(echo)
    pair = microseconds(switch) - microseconds(lambda: None)
    fanned = microseconds(lambda: fan_out.on_publication("chat:1", publication, "e"))
    more = fanned - microseconds(lambda: hub.on_publication("chat:1", publication, "e"))
    print(f"charging an account      {pair:6.2f} us, {pair / floor:.1%} of a bare recv() and send() ({floor:.1f} us)")
    print(f"charging a fan-out       {more:6.2f} us, once for all subscribers")


def microseconds(function: Callable[[], object]) -> float:
    """Return the duration of one call, the best of five runs."""
    return min(timeit.repeat(function, number=REPEATS, repeat=5)) / REPEATS * 1e6


def idle_share(seconds: float, measured: bool) -> float:
    """Return the share of a core that an idle loop uses for its heartbeat; without `measured`, for an empty timer."""
    page = VitalsPage.create()
    selector = MeasuredSelector(page)
    loop = asyncio.SelectorEventLoop(selector if measured else selectors.DefaultSelector())

    def wake() -> None:
        loop.call_later(LoopSettings().interval, wake)

    heartbeat = Heartbeat(page, LoopClock(loop), LoopSettings(), selector, beats_idle=True)
    loop.call_soon(heartbeat.start if measured else wake)
    loop.call_later(seconds, loop.stop)
    began, used = time.monotonic(), time.process_time()
    loop.run_forever()
    share = (time.process_time() - used) / (time.monotonic() - began)
    loop.close()
    page.close()
    return share
