"""Converts a Centrifugo configuration in JSON to TOML with the same keys.

Keys that realtime does not support become comments with the reason, so that the result can be read, and nothing is lost
without a word. Values are not checked here: `realtime check-config` does it for the result.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from realtime.config.centrifugo_keys import explain_key
from realtime.config.values import to_toml
from realtime.errors import SettingsError

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
# Keys with another meaning here, and the difference.
_DIFFERENCES = {
    "http_server.internal_port": "Only operators use this port here. The HTTP API stays on http_server.port.",
}


def convert_json(name: str, text: str) -> str:
    """Return the TOML of a JSON object. Raises SettingsError with one line for text that is no JSON object."""
    try:
        tables = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise SettingsError([f"{name}: nested too deeply; flatten it"]) from None
    except ValueError as error:
        raise SettingsError([f"{name}: not valid JSON: {error}; name a Centrifugo configuration in JSON"]) from None
    if not isinstance(tables, dict):
        raise SettingsError([f"{name}: not a JSON object; name a Centrifugo configuration in JSON"])
    converted = "\n".join([f"# Converted from {name}.", "", *_table(tables, "", "")])
    try:
        converted.encode()
    except UnicodeEncodeError:
        raise SettingsError([f"{name}: half a surrogate pair in a string; correct the string"]) from None
    return converted


def _table(table: dict[str, Any], path: str, dotted: str) -> Iterator[str]:
    """Yield the lines of one table: its values, then the tables below it.

    path: of the table in TOML. dotted: the same for `explain_key`, with [] for each list.
    """
    below: list[tuple[str, str, Any]] = []
    for name, value in table.items():
        here, plain = _joined(path, _key(name)), _joined(dotted, name)
        if value is None:
            continue  # as if it were absent
        if reason := explain_key(plain):
            yield f"# {_key(name)} = {_inline(value)}  # {reason.removesuffix('; remove it')}"
        elif isinstance(value, dict) or _is_list_of_tables(value):
            below.append((here, plain, value))
        else:
            yield from (f"# {note}" for note in (_DIFFERENCES.get(plain),) if note)
            yield f"{_key(name)} = {_inline(value)}"
    yield ""
    for here, plain, value in below:
        for entry in [value] if isinstance(value, dict) else value:
            yield f"[{here}]" if isinstance(value, dict) else f"[[{here}]]"
            yield from _table(entry, here, plain if isinstance(value, dict) else plain + "[]")


def _joined(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _key(name: str) -> str:
    return name if _BARE_KEY.fullmatch(name) else to_toml(name)


def _is_list_of_tables(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(entry, dict) for entry in value)


def _inline(value: Any) -> str:
    """Return a value on one line. null has no place in TOML and is left out."""
    if isinstance(value, dict):
        entries = [f"{_key(name)} = {_inline(entry)}" for name, entry in value.items() if entry is not None]
        return f"{{ {', '.join(entries)} }}" if entries else "{}"
    if isinstance(value, list):
        return f"[{', '.join(_inline(entry) for entry in value if entry is not None)}]"
    return to_toml(value)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
