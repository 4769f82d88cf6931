"""What the tests of declarations share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from realtime.errors import SettingsError


def problem(declare: Callable[[], Any]) -> str:
    """Return the one line of the SettingsError that `declare` raises."""
    with pytest.raises(SettingsError) as caught:
        declare()
    [line] = caught.value.problems
    assert "\n" not in line
    return line


def line_of(function: Callable[..., Any]) -> str:
    code = function.__code__
    return f"{code.co_filename}:{code.co_firstlineno}"


async def coroutine(*args: Any) -> Any: ...


def plain(*args: Any) -> Any: ...
