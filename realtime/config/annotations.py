"""The vocabulary of field annotations in the settings tree: types with limits, help texts and checks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from msgspec import Meta

from realtime.config.values import NUMBER, URL_PATH


def about(text: str) -> Meta:
    """Attach the help text of a key: what it is, its unit, and the meaning of 0 or of an empty value."""
    return Meta(description=text)


def restricted(expected: str, accepts: Callable[[Any], bool]) -> Meta:
    """Restrict a key to values for which `accepts` holds. expected: names these values in messages."""
    return Meta(extra={"expected": expected, "accepts": accepts})


Port = Annotated[int, Meta(ge=0, le=65535)]
NonNegative = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(ge=0)]
PositiveSeconds = Annotated[float, Meta(gt=0)]
WholeSeconds = Annotated[float, Meta(ge=0, multiple_of=1)]
Share = Annotated[float, Meta(ge=0, le=1, extra={"value_type": NUMBER})]
PositiveShare = Annotated[float, Meta(gt=0, le=1, extra={"value_type": NUMBER})]
Secret = Annotated[str, Meta(extra={"secret": True})]
URLPath = Annotated[str, Meta(extra={"value_type": URL_PATH})]
