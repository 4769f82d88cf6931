"""Limits over all transports of a worker, with a simulated clock."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from realtime.config import settings
from realtime.http.request import Refusal, parse_whole_head
from realtime.metrics import Metrics
from realtime.transports.admission import Admission, refusal_response


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def make_admission(workers: int = 1, clock: Clock | None = None, **client: int) -> Admission:
    return Admission(settings.ClientSettings(**client), Metrics(), clock or Clock(), workers=workers)


def admitted(admission: Admission, attempts: int) -> int:
    """Return the number of successful ones among `attempts` checks."""
    return sum(admission.check() is None for _ in range(attempts))


def test_no_limits_by_default() -> None:
    assert admitted(make_admission(), 1000) == 1000


@pytest.mark.parametrize(("limit", "workers", "share"), [(10, 1, 10), (10, 3, 4), (1, 4, 1)])
def test_a_share_of_the_connections(limit: int, workers: int, share: int) -> None:
    limits = make_admission(workers, connection_limit=limit)
    connections = [share - 1, 0]
    limits.add_transport(lambda: connections[0])
    limits.add_transport(lambda: connections[1])
    assert limits.check() is None
    connections[1] = 1
    refusal = limits.check()
    assert refusal is not None
    assert (refusal.status, refusal.kind) == (503, "connection_limit")


@pytest.mark.parametrize(("limit", "descriptors", "most"), [(0, 1024, 890), (100, 1024, 100), (900, 1024, 890)])
def test_some_descriptors_are_reserved(limit: int, descriptors: int, most: int) -> None:
    limits = Admission(settings.ClientSettings(connection_limit=limit), Metrics(), Clock(), descriptors=descriptors)
    connections = most - 1
    limits.add_transport(lambda: connections)
    assert limits.check() is None
    connections = most
    refusal = limits.check()
    assert refusal is not None
    assert (refusal.status, refusal.kind) == (503, "connection_limit")


def test_connections_of_another_process_are_counted_and_not_refused() -> None:
    settings_of_one = settings.ClientSettings(connection_limit=1, connection_limit_per_address=1)
    limits = Admission(settings_of_one, Metrics(), Clock(), descriptors=100)
    connections = 0
    limits.add_transport(lambda: connections)
    assert limits.has_descriptors_for(58)
    assert not limits.has_descriptors_for(59)
    releases = [limits.take_over("10.0.0.1") for _ in range(3)]
    connections = 3
    assert not limits.has_descriptors_for(56)
    head, _ = parse_whole_head(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", 0, 1000, 10)  # type: ignore[misc]
    peer = SimpleNamespace(getPeer=lambda: SimpleNamespace(host="10.0.0.1"))
    for release in releases:
        assert limits.take_address(head, peer)[1] is not None
        assert release is not None
        release()
    assert limits.take_address(head, peer) == ("10.0.0.1", None)
    assert make_admission().take_over("10.0.0.1") is None


@pytest.mark.parametrize(("rate", "workers"), [(100, 1), (100, 4), (7, 2), (1, 1), (3, 4), (1, 10)])
def test_a_share_of_the_rate(rate: int, workers: int) -> None:
    clock = Clock()
    limits = make_admission(workers, clock, connection_rate_limit=rate)
    burst = max(rate // workers, 1)
    assert burst <= admitted(limits, 1000) <= burst + 1
    total = 0
    for _ in range(10 * 100):
        clock.now += 0.1
        total += admitted(limits, 10)
    assert total == pytest.approx(100 * rate / workers, rel=0.06)
    clock.now += 3600
    assert burst <= admitted(limits, 1000) <= burst + 1


def test_overload_refuses_before_the_rate_does() -> None:
    overloaded = Refusal(503, "too busy", "")
    limits = Admission(settings.ClientSettings(connection_rate_limit=1), Metrics(), Clock(), lambda: overloaded)
    for _ in range(5):
        assert limits.check() is overloaded


def test_a_refusal_is_a_whole_response() -> None:
    text = refusal_response(Refusal(405, "not by this method", "stream", (("Allow", "POST"),))).decode()
    head, _, body = text.partition("\r\n\r\n")
    assert head.startswith("HTTP/1.1 405 Method Not Allowed\r\n")
    assert "Connection: close" in head.split("\r\n")
    assert "Allow: POST" in head.split("\r\n")
    assert f"Content-Length: {len(body)}" in head.split("\r\n")
    assert "Retry-After" not in head


def test_status_503_has_a_random_retry_after() -> None:
    waits = {
        int(line.partition(": ")[2])
        for _ in range(200)
        for line in refusal_response(Refusal(503, "no", "")).decode().split("\r\n")
        if line.startswith("Retry-After: ")
    }
    assert waits == set(range(3, 11))
