"""Value types: how a setting's value is written in a TOML file, in an environment variable and in a message.

Each `ValueType` has one function that reads text (environment, command line) and one that reads a TOML or JSON value.
Inside the server, durations are seconds (float) and sizes are bytes (int).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import msgspec

INT64_MAX = 2**63 - 1
_QUOTE_LENGTH = 60  # characters of a value that a message shows

_UNITS = {"ns": 1, "us": 10**3, "µs": 10**3, "μs": 10**3, "ms": 10**6, "s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9}
_TERM = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)(" + "|".join(sorted(_UNITS, key=len, reverse=True)) + ")")
_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]+)?")
_INTEGER = re.compile(r"[-+]?(?:0[xX][0-9a-fA-F_]+|0[oO][0-7_]+|0[bB][01_]+|0|[1-9][0-9_]*)")


class ValueRefused(ValueError):
    """A value with a problem of its own. The message names problem and remedy, and shows no secret."""


@dataclass(frozen=True, slots=True)
class ValueType:
    """A type of values, named `expected` in messages.

    from_text, from_file: read a value of this type; they raise ValueError or TypeError for other values, ValueRefused
    to say more than that another value is expected. to_file: the value as a file has it.
    """

    expected: str
    from_text: Callable[[str], Any]
    from_file: Callable[[Any], Any]
    to_file: Callable[[Any], Any] = lambda value: value


def parse_duration(text: str) -> float:
    """Return the seconds of a duration in Go's form: "1h30m", "1.5s", "300ms", "-1s", "0". Raises ValueError.

    Source: the Go standard library, time.ParseDuration. As there, fractions of a nanosecond are cut off and the range
    is that of a signed 64-bit count of nanoseconds.
    """
    sign, unsigned = (-1 if text[:1] == "-" else 1), text[1:] if text[:1] in ("-", "+") else text
    terms = _TERM.findall(unsigned)
    if unsigned != "0" and (not terms or "".join(number + unit for number, unit in terms) != unsigned):
        raise ValueError(f"not a duration: {text!r}")
    nanoseconds = sum(int(Fraction(number) * _UNITS[unit]) for number, unit in terms)
    if nanoseconds > INT64_MAX:
        raise ValueError("a duration of more than 292 years")
    return sign * nanoseconds / 10**9


def format_duration(seconds: float) -> str:
    """Return the shortest text that `parse_duration` reads as `seconds`, to the nanosecond: "1h30m" for 5400.0."""
    remainder = round(abs(seconds) * 10**9)
    parts = ["-"] if seconds < 0 else []
    for unit in ("h", "m", "s", "ms", "us", "ns"):
        count, remainder = divmod(remainder, _UNITS[unit])
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts) or "0"


def _parse_integer(text: str) -> int:
    if not _INTEGER.fullmatch(text):
        raise ValueError(f"not a whole number: {text!r}")
    return int(text, 0)


def _parse_number(text: str) -> float:
    if not _NUMBER.fullmatch(text):
        raise ValueError(f"not a number: {text!r}")
    return float(text)


def _parse_boolean(text: str) -> bool:
    if text in ("1", "t", "T", "TRUE", "true", "True"):
        return True
    if text in ("0", "f", "F", "FALSE", "false", "False"):
        return False
    raise ValueError(f"neither true nor false: {text!r}")


def _parse_url_path(text: str) -> str:
    if not re.fullmatch(r"/[^\s?#]*", text):
        raise ValueError(f"not a path: {text!r}")
    return text.rstrip("/") or "/"


def _require_plain_table(value: object) -> dict[str, object]:
    """Return a table that msgpack carries unchanged to another process: no dates, NaN or integers beyond 64 bits."""
    if not isinstance(value, dict) or msgspec.msgpack.decode(msgspec.msgpack.encode(value)) != value:
        raise ValueError("not a table of plain values")
    return value


def _require_type(required: type, value: Any) -> Any:
    if type(value) is not required:
        raise TypeError(f"not {required.__name__}")
    return value


def _require_utf8(text: str) -> str:
    """Return text that UTF-8 can encode: not the undecoded bytes of a variable, not half a surrogate pair of JSON."""
    text.encode()
    return text


def _string_list(value: object) -> tuple[str, ...]:
    items = value if isinstance(value, list) else [value]
    return tuple(_require_utf8(_require_type(str, item)) for item in items)


def _quoted(expected: str, from_text: Callable[[str], Any]) -> ValueType:
    """Return a type whose values are TOML strings with the same syntax as in a variable."""
    return ValueType(expected, from_text, lambda value: from_text(_require_type(str, value)))


BOOLEAN = ValueType("true or false", _parse_boolean, lambda value: _require_type(bool, value))
INTEGER = ValueType(
    "a whole number",
    _parse_integer,
    lambda value: _parse_integer(value) if isinstance(value, str) else _require_type(int, value),
)
STRING = _quoted("a string in quotes", _require_utf8)
NUMBER = ValueType(
    "a number", _parse_number, lambda value: float(value) if type(value) is int else _require_type(float, value)
)
DURATION = ValueType(
    'a duration with a unit (such as "25s" or "1h30m")',
    parse_duration,
    lambda value: parse_duration(_require_type(str, value)),
    to_file=format_duration,
)
URL_PATH = _quoted('a path that starts with "/"', _parse_url_path)
STRING_LIST = ValueType("a list of strings", lambda text: _string_list(text.split(" ")), _string_list)
TABLE = ValueType(
    "a table without dates, NaN or numbers beyond 64 bits",
    lambda text: _require_plain_table(json.loads(text)),
    _require_plain_table,
)


def choice(values: Sequence[str]) -> ValueType:
    """Return the type of a string that is one of `values`, in upper or lower case."""
    return _quoted("one of " + ", ".join(map(json.dumps, values)), lambda text: values[values.index(text.lower())])


def choices(values: Sequence[str]) -> ValueType:
    """Return the type of a list of `values`, in upper or lower case."""
    one = choice(values)
    return ValueType(
        "a list of " + ", ".join(map(json.dumps, values)),
        lambda text: tuple(map(one.from_text, text.split(" "))),
        lambda value: tuple(map(one.from_file, value if isinstance(value, list) else [value])),
    )


# Values in messages and in a generated file.


def quote(value: object) -> str:
    """Return a value of a file as one line for a message, cut after 60 characters."""
    if isinstance(value, int) and abs(value) > INT64_MAX:
        return "a number beyond 64 bits"
    if isinstance(value, dict):
        return "a table"
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        text = "a list" if isinstance(value, list) else "a date or time"
    return text if len(text) <= _QUOTE_LENGTH else text[: _QUOTE_LENGTH - 3] + "..."


def quote_setting(value: object) -> str:
    """Return a value of a rule's key for a message: as `quote`, but seconds as a duration."""
    return json.dumps(format_duration(value)) if isinstance(value, float) else quote(value)


def to_toml(value: object) -> str:
    """Return a value of a file as TOML: string, boolean, number, list of strings, or an empty table."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def escape_unprintable(name: str) -> str:
    """Return the name of a file or variable as printable text on one line, for a message."""
    return name if name.isprintable() else ascii(name)[1:-1]
