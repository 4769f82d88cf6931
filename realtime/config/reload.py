"""What a running server can't change: the settings that stay in force when it reloads its configuration.

All others are those of the workers and of the broker, which a reload replaces, or of the supervisor, which takes them
over.
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
    # The engine keeps the channels' history.
    ("engine", "type"),
    # All processes beat by them, the supervisor's checks included.
    ("loop", "interval"),
    ("loop", "stuck"),
    # The kernel has its program.
    ("loop", "steering"),
    # All processes write with it.
    ("log", "max_queued_bytes"),
)
"""Table and key of each such setting."""

OF_BROKER = ("queue_max_size", "max_channels")
"""The settings of the engine that the broker runs with: a change replaces the broker too."""


def keep_fixed(running: Settings, wanted: Settings) -> tuple[Settings, list[str]]:
    """Return the wanted settings with the fixed ones of the running server, and a line for each that differs."""
    lines = []
    for table, key in FIXED:
        kept, other = _value(running, table, key), _value(wanted, table, key)
        if kept != other:
            lines.append(
                f"{table}.{key} = {quote(other)}: needs a restart of the server; until then {quote(kept)} stays"
            )
            wanted = replace(wanted, **{table: replace(getattr(wanted, table), **{key: kept})})
    return wanted, lines


def _value(settings: Settings, table: str, key: str) -> Any:
    return getattr(getattr(settings, table), key)
