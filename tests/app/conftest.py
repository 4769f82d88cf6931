"""Fixtures of the tests of applications."""

from __future__ import annotations

import pytest

from realtime import App


@pytest.fixture
def app() -> App:
    return App()
