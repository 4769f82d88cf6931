"""Fixtures of the server API's tests."""

from __future__ import annotations

import pytest

from tests.server_api.bench import Bench


@pytest.fixture
def bench() -> Bench:
    return Bench()
