"""What a running server can't change: the settings that stay in force when it reloads its configuration.

All others are those of the workers, which a reload replaces, or of the supervisor, which takes them over.
"""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from realtime.config.settings import Settings
from realtime.config.values import quote

FIXED = (
    # The listening sockets are open.
    ("http_server", "address"),
    ("http_server", "port"),
    ("http_server", "backlog"),
    ("http_server", "internal_address"),
    ("http_server", "internal_port"),
    # The broker runs with them, and keeps the channels' history.
    ("engine", "type"),
    ("engine", "queue_max_size"),
    ("engine", "max_channels"),
    ("engine.memory", "path"),
    ("engine.memory", "fsync"),
    ("engine.memory", "fsync_interval"),
    ("engine.memory", "queue_size"),
    ("engine.memory", "max_file_size"),
    ("loop", "interval"),
    ("loop", "stuck"),
    # The kernel has its program.
    ("loop", "steering"),
    # All processes write with it.
    ("log", "max_queued_bytes"),
)
"""Table and key of each such setting."""


def keep_fixed(running: Settings, wanted: Settings) -> tuple[Settings, list[str]]:
    """Return the wanted settings with the fixed ones of the running server, and a line for each that differs."""
    lines = []
    for table, key in FIXED:
        kept, other = _value(running, table, key), _value(wanted, table, key)
        if kept != other:
            lines.append(
                f"{table}.{key} = {quote(other)}: needs a restart of the server; until then {quote(kept)} stays"
            )
            wanted = _with(wanted, [*table.split("."), key], kept)
    return wanted, lines


def _value(settings: Settings, table: str, key: str) -> Any:
    value: Any = settings
    for name in (*table.split("."), key):
        value = getattr(value, name)
    return value


def _with(tree: Any, path: list[str], value: Any) -> Any:
    """Return a tree with another value of one key."""
    name, *rest = path
    return replace(tree, **{name: _with(getattr(tree, name), rest, value) if rest else value})
