"""What a running server can't change: the settings that stay in force when it reloads its configuration.

All others are those of the workers and of the broker, which a reload replaces, or of the supervisor, which takes them
over.
"""

from __future__ import annotations

import functools
from typing import Any

from msgspec.structs import replace

from realtime.config.schema import value_keys
from realtime.config.settings import MemorySettings, RedisSettings, Settings
from realtime.config.values import quote

FIXED: tuple[tuple[str, ...], ...] = (
    # The listening sockets are open.
    ("http_server", "address"),
    ("http_server", "port"),
    ("http_server", "backlog"),
    ("http_server", "internal_address"),
    ("http_server", "internal_port"),
    # The engine keeps the channels' history, or the connections to Redis.
    ("engine", "type"),
    *(tuple(map(str, path)) for path, _ in value_keys(MemorySettings, ("engine", "memory"))),
    *(tuple(map(str, path)) for path, _ in value_keys(RedisSettings, ("engine", "redis"))),
    # All processes beat by them, the supervisor's checks included.
    ("loop", "interval"),
    ("loop", "stuck"),
    # The kernel has its program.
    ("loop", "steering"),
    # All processes write with it.
    ("log", "max_queued_bytes"),
)
"""The path of each such setting."""

_KEYS = dict(value_keys(Settings))

OF_BROKER = ("queue_max_size", "max_channels")
"""The settings of the engine that the broker runs with: a change replaces the broker too, if it can be."""


def keep_fixed(running: Settings, wanted: Settings) -> tuple[Settings, list[str]]:
    """Return the wanted settings with the fixed ones of the running server, and a line for each that differs."""
    lines = []
    for path in FIXED:
        kept, other = _value(running, path), _value(wanted, path)
        if kept != other:
            change = " has another value" if _KEYS[path].is_secret else f" = {_quote(other)}"
            stays = "the value before" if _KEYS[path].is_secret else _quote(kept)
            lines.append(f"{'.'.join(path)}{change}: needs a restart of the server; until then {stays} stays")
            wanted = _replace(wanted, path, kept)
    return wanted, lines


def replaces_broker(running: Settings, wanted: Settings) -> bool:
    """Whether the broker that runs has other settings than those wanted."""
    return any(getattr(running.engine, key) != getattr(wanted.engine, key) for key in OF_BROKER)


def fixed_values(settings: Settings) -> dict[str, Any]:
    """Return the fixed settings by their keys, for `with_fixed` of another version of this package."""
    return {".".join(path): _value(settings, path) for path in FIXED}


def with_fixed(settings: Settings, values: dict[str, Any]) -> Settings:
    """Put fixed settings of a running server into others. Settings that are not fixed in this version stay."""
    for path in FIXED:
        value = values.get(".".join(path), _value(settings, path))
        settings = _replace(settings, path, tuple(value) if isinstance(value, list) else value)
    return settings


def _quote(value: Any) -> str:
    return quote(list(value)) if isinstance(value, tuple) else quote(value)


def _value(settings: Settings, path: tuple[str, ...]) -> Any:
    return functools.reduce(getattr, path, settings)


def _replace(table: Any, path: tuple[str, ...], value: Any) -> Any:
    """Return a tree with another value at `path`."""
    name, *below = path
    return replace(table, **{name: _replace(getattr(table, name), tuple(below), value) if below else value})
