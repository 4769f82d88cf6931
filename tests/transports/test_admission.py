"""Limits that all transports of a worker share, by a clock that stands still."""

from __future__ import annotations

import pytest

from realtime.config import settings
from realtime.http.request import Refusal
from realtime.metrics import Metrics
from realtime.transports.admission import Admission, response


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def admission(workers: int = 1, clock: Clock | None = None, **client: int) -> Admission:
    return Admission(settings.ClientSettings(**client), Metrics(), clock or Clock(), workers=workers)


def let_in(door: Admission, attempts: int) -> int:
    """How many of so many attempts succeed."""
    return sum(door.judge() is None for _ in range(attempts))


def test_no_limits_by_default() -> None:
    assert let_in(admission(), 1000) == 1000


@pytest.mark.parametrize(("limit", "workers", "share"), [(10, 1, 10), (10, 3, 4), (1, 4, 1)])
def test_a_share_of_the_connections(limit: int, workers: int, share: int) -> None:
    door = admission(workers, connection_limit=limit)
    door.counts = [lambda: share - 1, lambda: 0]
    assert door.judge() is None
    door.counts = [lambda: share - 1, lambda: 1]
    refusal = door.judge()
    assert refusal is not None
    assert (refusal.status, refusal.kind) == (503, "connection_limit")


@pytest.mark.parametrize(("limit", "descriptors", "most"), [(0, 1024, 890), (100, 1024, 100), (900, 1024, 890)])
def test_some_descriptors_are_kept_back(limit: int, descriptors: int, most: int) -> None:
    door = Admission(settings.ClientSettings(connection_limit=limit), Metrics(), Clock(), descriptors=descriptors)
    door.counts = [lambda: most - 1]
    assert door.judge() is None
    door.counts = [lambda: most]
    refusal = door.judge()
    assert refusal is not None
    assert (refusal.status, refusal.kind) == (503, "connection_limit")


@pytest.mark.parametrize(("rate", "workers"), [(100, 1), (100, 4), (7, 2), (1, 1), (3, 4), (1, 10)])
def test_a_share_of_the_rate(rate: int, workers: int) -> None:
    clock = Clock()
    door = admission(workers, clock, connection_rate_limit=rate)
    burst = max(rate // workers, 1)
    assert burst <= let_in(door, 1000) <= burst + 1
    total = 0
    for _ in range(10 * 100):
        clock.now += 0.1
        total += let_in(door, 10)
    assert total == pytest.approx(100 * rate / workers, rel=0.06)
    clock.now += 3600
    assert burst <= let_in(door, 1000) <= burst + 1


def test_pressure_goes_before_the_rate() -> None:
    pressed = Refusal(503, "too busy", "")
    door = Admission(settings.ClientSettings(connection_rate_limit=1), Metrics(), Clock(), lambda: pressed)
    for _ in range(5):
        assert door.judge() is pressed


def test_a_refusal_is_a_whole_response() -> None:
    text = response(Refusal(405, "not by this method", "stream", (("Allow", "POST"),))).decode()
    head, _, body = text.partition("\r\n\r\n")
    assert head.startswith("HTTP/1.1 405 Method Not Allowed\r\n")
    assert "Connection: close" in head.split("\r\n")
    assert "Allow: POST" in head.split("\r\n")
    assert f"Content-Length: {len(body)}" in head.split("\r\n")
    assert "Retry-After" not in head


def test_whoever_comes_back_later_is_told_when() -> None:
    waits = {
        int(line.partition(": ")[2])
        for _ in range(200)
        for line in response(Refusal(503, "no", "")).decode().split("\r\n")
        if line.startswith("Retry-After: ")
    }
    assert waits == set(range(3, 11))
