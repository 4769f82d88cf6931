"""Parses settings from text, for the tests of this room, and collects the problems of wrong ones."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from realtime.config.settings import Settings
from realtime.config.sources import parse
from realtime.errors import SettingsError


def parse_file(text: str) -> Settings:
    return parse({}, ("realtime.toml", text), {})


def problems(
    text: str | None = None, environ: Mapping[str, str] | None = None, arguments: Mapping[str, str] | None = None
) -> list[str]:
    """Return the problems of a wrong configuration. Each is one line, with its source before the first colon."""
    with pytest.raises(SettingsError) as caught:
        parse(arguments or {}, None if text is None else ("realtime.toml", text), environ or {})
    for line in caught.value.problems:
        assert line.isprintable()
        assert ": " in line
    return caught.value.problems


def problem(
    text: str | None = None, environ: Mapping[str, str] | None = None, arguments: Mapping[str, str] | None = None
) -> str:
    """Return the only problem of a wrong configuration."""
    (line,) = problems(text, environ, arguments)
    return line


def parse_options(table: str, **values: str) -> Settings:
    """Return the settings of command-line values for keys of one table."""
    return parse({f"{table}.{key}": text for key, text in values.items()}, None, {})


def option_problem(table: str, **values: str) -> str:
    """Return the only problem of wrong command-line values for keys of one table."""
    return problem(arguments={f"{table}.{key}": text for key, text in values.items()})


def value_at(settings: Settings, key: str) -> object:
    """Return the value of a dotted key."""
    value: object = settings
    for part in key.split("."):
        value = getattr(value, part)
    return value
