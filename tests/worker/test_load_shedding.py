"""The response of a worker to its pressure: handshakes, caches, metrics, log."""

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
from realtime.handlers.call import HandlerServices
from realtime.handlers.dispatch import Dispatcher
from realtime.metrics import Metrics
from realtime.supervision.loop_time import LoopTimeLedger, LoopWork
from realtime.supervision.pressure import RECOVERY_TIME, Pressure, Throttle
from realtime.supervision.vitals import ProcessState, Vitals, VitalsPage
from realtime.worker.load_shedding import LoadShedding, configure_cache_host
from tests.driving import on_loop


class Bench:
    """The load shedding of a worker; its page says whether other workers can take its clients."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.page = VitalsPage.create()
        self.metrics = Metrics()
        self.logged: list[dict[str, Any]] = []
        self.pressure = Pressure(LoopSettings(max_utilization=0.9), lambda: self.now)
        log = Logger(observer=self.logged.append)
        self.throttle = Throttle(LoopTimeLedger(int).open(LoopWork.HANDLER, "rpc f"))
        self.shedding = LoadShedding(self.pressure, [self.throttle], self.page, self.metrics, log)

    def beat(self, after: float = 0.01, **vitals: Any) -> None:
        self.now += after
        self.shedding.beat(replace(Vitals(int(self.now * 1e9), 0.0, 0, 0, ProcessState.READY), **vitals))

    def series(self, name: str) -> dict[tuple[str, ...], float]:
        return {
            tuple(value for _, value in sample.labels): sample.value
            for sample in self.metrics.snapshot()
            if sample.name == name
        }

    def lines(self) -> list[str]:
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
    assert (refusal.status, refusal.kind) == (503, "pressure")
    bench.page.set_substitute(True)
    assert bench.shedding.refuse_handshake() is None
    bench.page.set_substitute(False)
    assert bench.shedding.refuse_handshake() is not None
    assert bench.series("realtime_shed_requests") == {("handshake", "lag"): 2}


def test_the_metrics_name_the_reasons_of_pressure(bench: Bench) -> None:
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
    assert len(bench.lines()) == 2
    assert (
        bench.lines()[0]
        == "the worker is under pressure by lag (its loop is 300 ms late) and sheds load until it recovers"
    )
    assert bench.lines()[1].startswith("the worker is no longer under pressure, after 0.5 s")
    bench.beat(after=60, lag=0.3)
    assert len(bench.lines()) == 3


def test_a_busy_loop_causes_a_warning_and_no_refusal(bench: Bench) -> None:
    bench.beat(utilization=0.95)
    assert bench.lines() == ["the loop is 95% busy and refuses nothing yet; consider more workers (workers.count)"]
    assert bench.shedding.refuse_handshake() is None


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> cache.Host:
    """A host of caches in place of the process's own."""
    host = cache.Host()
    monkeypatch.setattr(cache, "HOST", host)
    return host


@on_loop
async def test_caches_get_the_load_the_loop_and_the_metrics_of_the_worker(bench: Bench, host: cache.Host) -> None:
    dispatcher = Dispatcher(App(), HandlerServices(reactor, WorkersSettings(), bench.metrics, Logger()))
    configure_cache_host(host, bench.pressure, dispatcher.run_coroutine, bench.metrics)

    @Cache(ttl=10)
    async def twice(number: int) -> int:
        await deferLater(reactor, 0)  # type: ignore[arg-type]
        return 2 * number

    assert [await twice(1), await twice(1), await twice(2)] == [2, 2, 4]
    name = twice.__qualname__
    assert bench.series("realtime_cache_events") == {(name, "miss"): 2, (name, "evicted"): 0, (name, "hit"): 1}
    bench.beat(lag=0.1)
    assert host.load() == pytest.approx(0.5)


def test_throttles_get_every_reading(bench: Bench) -> None:
    bench.throttle.limit = 1
    bench.beat(after=Throttle.LIFT_AFTER + RECOVERY_TIME)
    bench.beat(after=RECOVERY_TIME)
    assert bench.throttle.limit is None
