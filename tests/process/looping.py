"""A loop in a thread of its own, with a relief thread, as in a worker."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from twisted.logger import Logger

from realtime.metrics import Metrics
from realtime.process.heartbeat import MeasuredSelector
from realtime.process.periodic import PeriodicTasks
from realtime.process.reactor import ServerReactor
from realtime.process.relief import Relief
from realtime.process.server_lock import ReleasingMarker, ServerLock
from realtime.supervision.loop_time import LoopWork
from realtime.supervision.vitals import VitalsPage

# Seconds after which a test fails instead of waiting for ever.
PATIENCE = 30
NAMES = (b"rpc block", b"block")


class Blocking:
    """A loop whose steps a test blocks. Its attributes are those of a child process."""

    def __init__(self, after: float = 0.01) -> None:
        self.page = VitalsPage.create()
        self.selector = MeasuredSelector(self.page)
        self.loop = asyncio.SelectorEventLoop(self.selector)
        self.selector.attach(self.loop)
        self.reactor = ServerReactor(None, self.selector)
        self.metrics = Metrics()
        self.tasks = PeriodicTasks(Logger())
        self._after = after
        self._has_started = threading.Event()
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        self.lock = ServerLock()
        self.marker = ReleasingMarker(self.page, self.selector.accounts, self.lock)
        self.relief = Relief(
            self.lock, self._after, self.selector, self.reactor, self.marker, self.tasks, self.page, self.metrics
        )
        self.account = self.selector.accounts.open(LoopWork.HANDLER, "rpc block")

        async def main() -> None:
            self.relief.start()
            self._ended = asyncio.Event()
            self._has_started.set()
            await self._ended.wait()

        self.loop.run_until_complete(main())

    def start(self) -> None:
        self.thread.start()
        assert self._has_started.wait(PATIENCE)

    def stop(self) -> None:
        self.relief.stop()
        self.loop.call_soon_threadsafe(self._ended.set)
        self.thread.join(PATIENCE)
        assert self.relief._thread is not None
        self.relief._thread.join(PATIENCE)
        assert not (self.thread.is_alive() or self.relief._thread.is_alive())
        self.loop.close()
        self.page.close()

    def step(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function of the application, as a handler is called."""
        outer = self.marker.enter(NAMES, self.account)
        try:
            return function(*args)
        finally:
            self.marker.leave(outer)

    @contextmanager
    def blocked(self) -> Iterator[threading.Event]:
        """Block a step of the loop. The event is set when the step has ended."""
        entered, release, ended = threading.Event(), threading.Event(), threading.Event()

        def block() -> None:
            entered.set()
            release.wait(PATIENCE)

        def run() -> None:
            self.step(block)
            ended.set()

        self.loop.call_soon_threadsafe(run)
        assert entered.wait(PATIENCE)
        try:
            yield ended
        finally:
            release.set()
            assert ended.wait(PATIENCE)


@contextmanager
def blocking(after: float = 0.01) -> Iterator[Blocking]:
    made = Blocking(after)
    made.start()
    try:
        yield made
    finally:
        made.stop()
