"""What a worker does about its pressure: handshakes, caches, metrics, log."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from msgspec.structs import replace
from twisted.internet import reactor
from twisted.internet.task import deferLater
from twisted.logger import Logger, formatEvent

from realtime import cache
from realtime.app import App
from realtime.cache import Cache
from realtime.config.settings import LoopSettings, WorkersSettings
from realtime.handlers.dispatch import Dispatcher
from realtime.http.request import UNCOUNTED
from realtime.metrics import Metrics
from realtime.supervision.pressure import RECOVERY_TIME, Pressure
from realtime.supervision.vitals import ProcessState, Vitals, VitalsPage
from realtime.worker.load_shedding import Shedding
from tests.driving import on_loop


class Bench:
    """A worker's shedding, with a page that says whether others can take its clients."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.page = VitalsPage.create()
        self.metrics = Metrics()
        self.logged: list[dict[str, Any]] = []
        self.pressure = Pressure(LoopSettings(max_utilization=0.9), lambda: self.now)
        log = Logger(observer=self.logged.append)
        self.shedding = Shedding(self.pressure, self.page, self.metrics, log)

    def beat(self, after: float = 0.01, **vitals: Any) -> None:
        self.now += after
        self.shedding.beat(replace(Vitals(int(self.now * 1e9), 0.0, 0, 0, ProcessState.READY), **vitals))

    def series(self, name: str) -> dict[tuple[str, ...], float]:
        return {
            tuple(value for _, value in one.labels): one.value for one in self.metrics.snapshot() if one.name == name
        }

    def said(self) -> list[str]:
        return [str(formatEvent(event)) for event in self.logged]


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.page.close()


def test_handshakes_are_refused_only_when_no_other_worker_can_take_them(bench: Bench) -> None:
    bench.beat()
    assert bench.shedding.refuse_handshake() is None
    bench.beat(lag=0.3)
    refusal = bench.shedding.refuse_handshake()
    assert refusal is not None
    assert (refusal.status, refusal.kind) == (503, UNCOUNTED)
    bench.page.set_relief(True)
    assert bench.shedding.refuse_handshake() is None
    bench.page.set_relief(False)
    assert bench.shedding.refuse_handshake() is not None
    assert bench.series("realtime_shed_requests") == {("handshake", "lag"): 2}


def test_the_metrics_say_what_presses(bench: Bench) -> None:
    bench.beat(threads_waiting=10**6)
    assert bench.series("realtime_pressure") == {
        ("lag",): 0,
        ("queued_bytes",): 0,
        ("rss",): 0,
        ("threads_waiting",): 1,
    }


def test_pressure_is_logged_when_it_comes_and_goes_and_once_a_minute(bench: Bench) -> None:
    for _ in range(5):
        bench.beat(lag=0.3)
        bench.beat(after=RECOVERY_TIME)
        bench.beat()
    assert len(bench.said()) == 2
    assert bench.said()[0] == "under pressure by lag: lag 300 ms"
    assert bench.said()[1].startswith("under pressure no more, after 0.5 s")
    bench.beat(after=60, lag=0.3)
    assert len(bench.said()) == 3


def test_a_busy_loop_is_warned_of_and_nothing_is_refused(bench: Bench) -> None:
    bench.beat(utilization=0.95)
    assert bench.said() == ["the loop is 95% busy; nothing is refused for that"]
    assert bench.shedding.refuse_handshake() is None


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> cache.Host:
    """The host of caches, as this test leaves nothing in that of the process."""
    host = cache.Host()
    monkeypatch.setattr(cache, "HOST", host)
    return host


@on_loop
async def test_caches_of_the_application_get_what_they_need(bench: Bench, host: cache.Host) -> None:
    dispatcher = Dispatcher(App(), reactor, WorkersSettings(), bench.metrics, Logger())
    bench.shedding.serve(dispatcher)

    @Cache(ttl=10)
    async def twice(number: int) -> int:
        await deferLater(reactor, 0)  # type: ignore[arg-type]
        return 2 * number

    assert [await twice(1), await twice(1), await twice(2)] == [2, 2, 4]
    name = twice.__qualname__
    assert bench.series("realtime_cache_events") == {(name, "miss"): 2, (name, "evicted"): 0, (name, "hit"): 1}
    bench.beat(lag=0.1)
    assert host.load() == pytest.approx(0.5)
