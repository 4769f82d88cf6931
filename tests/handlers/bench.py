"""The bench of the handler tests: an App with its dispatcher, on a clock that the test moves."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest
from twisted.internet.task import Clock
from twisted.logger import Logger

from realtime.app import App
from realtime.config.settings import WorkersSettings
from realtime.errors import ClientError
from realtime.handlers.call import HandlerServices
from realtime.handlers.coroutines import start_future
from realtime.handlers.dispatch import Dispatcher
from realtime.handlers.marking import Names
from realtime.metrics import Metrics
from realtime.supervision.loop_time import LoopAccount
from realtime.types import Grant


class ClockedReactor(Clock):
    """A clock that the test moves; calls from threads reach the loop through the real reactor."""

    def callFromThread(self, function: Callable[..., Any], *args: Any) -> None:
        # Not at the top: `conftest` imports this module before pytest-twisted installs the reactor.
        from twisted.internet import reactor

        reactor.callFromThread(function, *args)  # type: ignore[attr-defined]


class FakeClient:
    """Records the calls of its methods, and whether each ran in the main thread."""

    def __init__(self) -> None:
        self.id = "c1"
        self.user = "ada"
        self.channels = {"news"}
        self.calls: list[tuple[Any, ...]] = []

    def _record(self, *call: Any) -> None:
        self.calls.append((*call, threading.current_thread() is threading.main_thread()))

    def send(self, data: Any) -> None:
        self._record("send", data)

    def subscribe(self, channel: str, grant: Grant | None) -> None:
        self._record("subscribe", channel, grant)

    def refresh(self, expire_at: int | None, info: Any) -> None:
        self._record("refresh", expire_at, info)

    def unsubscribe(self, channel: str) -> None:
        self._record("unsubscribe", channel)

    def disconnect(self, code: int, reason: str) -> None:
        self._record("disconnect", code, reason)


class RecordingMarker:
    """Records the handlers that run now, the innermost last."""

    def __init__(self) -> None:
        self.running: list[Names] = []

    def enter(self, names: Names, account: LoopAccount) -> None:
        self.running.append(names)

    def leave(self, outer: None) -> None:
        self.running.pop()


class Bench:
    """An App, and the dispatcher that serves it after `start`."""

    def __init__(self) -> None:
        self.app = App()
        self.clock = ClockedReactor()
        self.metrics = Metrics()
        self.logged: list[dict[str, Any]] = []
        self.client = FakeClient()
        self.dispatcher: Dispatcher | None = None
        self.marker = RecordingMarker()
        self.wall_time = 0.0  # Unix time at the clock's zero

    async def start(self, **settings: Any) -> Dispatcher:
        log = Logger(observer=self.logged.append)
        services = HandlerServices(
            self.clock,
            WorkersSettings(**settings),
            self.metrics,
            log,
            marker=self.marker,
            wall_clock=lambda: self.wall_time + self.clock.seconds(),
        )
        self.dispatcher = Dispatcher(self.app, services)
        await self.dispatcher.start()
        return self.dispatcher

    async def call(self, method: str, data: Any = None) -> Any:
        """Call an rpc handler for a client, and return the decoded result."""
        assert self.dispatcher is not None
        procedure = self.dispatcher.procedure(method)
        assert procedure is not None
        result = await procedure(self.client, data)
        return None if result is None else msgspec.json.decode(result)

    def begin(self, method: str, data: Any = None) -> asyncio.Future[Any]:
        return start_future(self.call(method, data))

    def count(self, outcome: str, handler: str = "rpc f") -> float:
        labels = [("handler", handler), ("outcome", outcome)]
        return sum(sample.value for sample in self.metrics.snapshot() if sample.labels == labels)

    def gauge(self, name: str) -> float:
        name = f"realtime_handler_threads_{name}"
        return next(sample.value for sample in self.metrics.snapshot() if sample.name == name)


async def refusal(awaitable: Awaitable[Any]) -> ClientError:
    """Return the ClientError that an awaitable raises."""
    with pytest.raises(ClientError) as caught:
        await awaitable
    return caught.value


async def until(condition: Callable[[], bool]) -> None:
    """Wait until the condition holds; the time limit of the test ends a wait in vain."""
    while not condition():
        await asyncio.sleep(0.001)
