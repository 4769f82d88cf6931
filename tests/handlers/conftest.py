"""Fixtures of the handler tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.handlers.bench import Bench


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    if bench.dispatcher is not None and bench.dispatcher.threads._pool.started:
        bench.dispatcher.threads._pool.stop()
