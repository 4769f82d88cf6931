"""Reads a tree of settings from three sources: a TOML file, the environment and the command line.

The tree is a msgspec Struct whose fields are further Structs (tables), lists of Structs with a `name` (named lists) or
values. This module knows no key of its own: what a key holds, its limits, its explanation and its default all come from
the field's annotation. `Reader` takes the sources in rising order of weight, notes every problem in one line, and
builds the tree at the end. It does no I/O.
"""

from __future__ import annotations

import difflib
import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import msgspec
from msgspec import NODEFAULT, Struct, inspect

PREFIX = "REALTIME_"

# A place in the tree: keys, and the index of an entry in a named list.
KeyPath = tuple[str | int, ...]

_UNITS = {"ns": 1, "us": 10**3, "µs": 10**3, "μs": 10**3, "ms": 10**6, "s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9}
_TERM = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)(" + "|".join(sorted(_UNITS, key=len, reverse=True)) + ")")
_INTEGER = re.compile(r"[-+]?(?:0[xX][0-9a-fA-F_]+|0[oO][0-7_]+|0[bB][01_]+|0|[1-9][0-9_]*)")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_INT64 = 2**63 - 1


# Values: each form has one function that reads it from text and one that reads it from TOML or JSON.


def duration(text: str) -> float:
    """Seconds of a duration in Go's form: "1h30m", "1.5s", "300ms", "-1s", "0". Raises ValueError.

    Source: the Go standard library, time.ParseDuration; like there, a part of a nanosecond is cut off and the range is
    that of a signed 64-bit count of nanoseconds.
    """
    sign, rest = (-1 if text[:1] == "-" else 1), text[1:] if text[:1] in ("-", "+") else text
    terms = _TERM.findall(rest)
    if rest != "0" and (not terms or "".join(number + unit for number, unit in terms) != rest):
        raise ValueError(f"not a duration: {text!r}")
    nanoseconds = sum(int(Fraction(number) * _UNITS[unit]) for number, unit in terms)
    if nanoseconds > _INT64:
        raise ValueError("a duration of more than 292 years")
    return sign * nanoseconds / 10**9


def write_duration(seconds: float) -> str:
    """The shortest plain form that `duration` reads back as `seconds`, to the nanosecond: 5400.0 is "1h30m"."""
    rest = round(abs(seconds) * 10**9)
    parts = ["-"] if seconds < 0 else []
    for unit in ("h", "m", "s", "ms", "us", "ns"):
        count, rest = divmod(rest, _UNITS[unit])
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts) or "0"


def _integer(text: str) -> int:
    if not _INTEGER.fullmatch(text):
        raise ValueError(f"not a whole number: {text!r}")
    return int(text, 0)


def _truth(text: str) -> bool:
    if text in ("1", "t", "T", "TRUE", "true", "True"):
        return True
    if text in ("0", "f", "F", "FALSE", "false", "False"):
        return False
    raise ValueError(f"neither true nor false: {text!r}")


def _prefix(text: str) -> str:
    if not re.fullmatch(r"/[^\s?#]*", text):
        raise ValueError(f"not a path: {text!r}")
    return text.rstrip("/") or "/"


def _plain(value: Any) -> dict[str, object]:
    """A table that reaches another process unchanged: no local dates, no NaN, no number beyond 64 bits."""
    if not isinstance(value, dict) or msgspec.msgpack.decode(msgspec.msgpack.encode(value)) != value:
        raise ValueError("not a table of plain values")
    return value


def _only(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise TypeError(f"not {kind.__name__}")
    return value


def _unicode(text: str) -> str:
    """Text that UTF-8 can carry: a variable with other bytes, or JSON with half a surrogate pair, is none."""
    text.encode()
    return text


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(_unicode(_only(str, item)) for item in (value if isinstance(value, list) else [value]))


@dataclass(frozen=True, slots=True)
class ValueType:
    """How values of one kind are written. Both functions raise ValueError or TypeError for anything else."""

    expected: str
    from_text: Callable[[str], Any]
    from_file: Callable[[Any], Any]


def _quoted(expected: str, from_text: Callable[[str], Any]) -> ValueType:
    return ValueType(expected, from_text, lambda value: from_text(_only(str, value)))


SWITCH = ValueType("true or false", _truth, lambda value: _only(bool, value))
INTEGER = ValueType(
    "a whole number", _integer, lambda value: _integer(value) if isinstance(value, str) else _only(int, value)
)
TEXT = _quoted("text in quotes", _unicode)
DURATION = _quoted('a duration with its unit (such as "25s" or "1h30m")', duration)
URL_PATH = _quoted('a path that starts with "/"', _prefix)
TEXTS = ValueType("a list of texts", lambda text: _texts(text.split(" ")), _texts)
TABLE = ValueType(
    "a table without dates, NaN and numbers beyond 64 bits", lambda text: _plain(json.loads(text)), _plain
)

_VALUE_TYPES: dict[type, ValueType] = {
    inspect.BoolType: SWITCH,
    inspect.IntType: INTEGER,
    inspect.FloatType: DURATION,
    inspect.StrType: TEXT,
    inspect.VarTupleType: TEXTS,
    inspect.DictType: TABLE,
}


def _choice(values: Sequence[str]) -> ValueType:
    return _quoted("one of " + ", ".join(map(json.dumps, values)), lambda text: values[values.index(text.lower())])


# Keys: the tree's annotations, read once.


@dataclass(frozen=True, slots=True)
class Key:
    """One key of a table. Either it holds a value, of a `form`, or a table, described by the Struct `table`.

    many: the key holds a list of such tables. about: one line for the operator. secret: its value is never shown.
    accepts: whether a value of the right form is one that this key takes. default: NODEFAULT where it must be given,
    and then there is an example.
    """

    name: str
    about: str
    expected: str
    default: Any
    example: Any
    form: ValueType
    accepts: Callable[[Any], bool]
    table: type[Struct] | None
    many: bool
    secret: bool


@functools.cache
def keys(table: type[Struct]) -> Mapping[str, Key]:
    """The keys of a table, by name, in the order of the Struct.

    A field's annotation says all: `Annotated[int, Meta(ge=0, le=9, description=..., extra=...)]`, where `extra` may
    hold form (a Form other than the type's own), secret (True), and expected with accepts (a sentence, a predicate).
    """
    described = inspect.type_info(table)
    assert isinstance(described, inspect.StructType)
    return {field.name: _key(field) for field in described.fields}


def _key(field: inspect.Field) -> Key:
    kind: Any = field.type
    extra: Mapping[str, Any] = {}
    schema: Mapping[str, Any] = {}
    if isinstance(kind, inspect.Metadata):
        kind, extra, schema = kind.type, kind.extra or {}, kind.extra_json_schema or {}
    many = isinstance(kind, inspect.VarTupleType) and isinstance(kind.item_type, inspect.StructType)
    inner = kind.item_type if many else kind
    table = inner.cls if isinstance(inner, inspect.StructType) else None
    if isinstance(kind, inspect.LiteralType):
        form = _choice([str(value) for value in kind.values])
    else:
        form = extra.get("form") or _VALUE_TYPES.get(type(kind), TABLE)
    own, limits, within = extra.get("accepts"), _limits(kind), _within(kind)
    return Key(
        name=field.name,
        about=schema.get("description", ""),
        expected=extra.get("expected") or form.expected + limits,
        default=field.default_factory() if field.default_factory is not NODEFAULT else field.default,
        example=next(iter(schema.get("examples", ())), None),
        form=form,
        accepts=lambda value: within(value) and (own is None or own(value)),
        table=table,
        many=many,
        secret=bool(extra.get("secret")),
    )


def _limits(kind: Any) -> str:
    low, high, above = (getattr(kind, name, None) for name in ("ge", "le", "gt"))
    if getattr(kind, "min_length", None):
        return " that is not empty"
    words = " in whole seconds" if isinstance(kind, inspect.FloatType) and kind.multiple_of else ""
    written = write_duration if isinstance(kind, inspect.FloatType) else str
    if low is not None and high is not None:
        return f"{words} from {written(low)} to {written(high)}"
    if low is not None:
        return f"{words} of at least {written(low)}"
    return f"{words} above {written(above)}" if above is not None else words


_LIMITS: dict[str, Callable[[Any, Any], bool]] = {
    "ge": lambda value, limit: value >= limit,
    "le": lambda value, limit: value <= limit,
    "gt": lambda value, limit: value > limit,
    "multiple_of": lambda value, limit: value % limit == 0,
    "min_length": lambda value, limit: len(value) >= limit,
    "pattern": lambda value, limit: re.search(limit, value) is not None,
}


def _within(kind: Any) -> Callable[[Any], bool]:
    limits = [(holds, limit) for name, holds in _LIMITS.items() if (limit := getattr(kind, name, None)) is not None]
    if isinstance(kind, inspect.IntType):
        limits.append((_LIMITS["le"], _INT64))
    return lambda value: all(holds(value, limit) for holds, limit in limits)


def leaves(table: type[Struct], path: KeyPath = ()) -> Iterator[tuple[KeyPath, Key]]:
    """Every key below `table` that holds a value or a named list."""
    for name, key in keys(table).items():
        if key.table is not None and not key.many:
            yield from leaves(key.table, (*path, name))
        else:
            yield (*path, name), key


def dotted(path: KeyPath) -> str:
    """How an operator writes a path: channel.namespaces[2].history_ttl. One line, whatever the keys hold."""
    parts = (f"[{part}]" if isinstance(part, int) else "." + _written(part) for part in path)
    return "".join(parts).removeprefix(".")


def _written(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else json.dumps(key)


def one_line(name: str) -> str:
    """The name of a file or variable, fit for a message whatever bytes it is made of."""
    return name if name.isprintable() else ascii(name)[1:-1]


def variable(path: KeyPath) -> str:
    """The environment variable of a key: the entry of a named list goes by its name."""
    return PREFIX + re.sub(r"[-.]", "_", "_".join(map(str, path)).upper())


def variables(table: type[Struct], names: Mapping[KeyPath, Sequence[str]]) -> Iterator[tuple[str, KeyPath, Key]]:
    """The environment variables that are read, with what each of them sets.

    names: the names of the entries of each named list, whose options have variables too.
    """
    for path, key in leaves(table):
        yield variable(path), path, key
        if key.many and key.table is not None:
            for index, name in enumerate(names.get(path, ())):
                for below, option in leaves(key.table):
                    if below != ("name",):
                        yield variable((*path, name, *below)), (*path, index, *below), option


# The reader.


@dataclass(frozen=True, slots=True)
class Rule:
    """What must hold between several keys of one table (and below it): an item of the Struct's class variable `RULES`.

    keys: those that it looks at, dotted from the table, the one to blame first; when one of them could not be read,
    the rule is not tried. holds: a predicate over the table's Struct. otherwise: says what is wrong and the remedy;
    "{0}" in it stands for the value of the first key, and so on.
    """

    keys: tuple[str, ...]
    holds: Callable[[Any], bool]
    otherwise: str


@dataclass(frozen=True, slots=True)
class _Given:
    value: Any
    where: Callable[[], str]


class Reader:
    """Collects values and problems from several sources; a later source wins over an earlier one.

    problems: one line for each mistake, in the order in which they were met. strangers: explains a key that is not in
    the tree but is known to mean something elsewhere (None: it is not), from its dotted path without indexes.
    """

    def __init__(self, root: type[Struct], strangers: Callable[[str], str | None] = lambda key: None) -> None:
        self.problems: list[str] = []
        self._root = root
        self._strangers = strangers
        self._given: dict[KeyPath, _Given] = {}
        self._lengths: dict[KeyPath, int] = {}
        self._spoiled: set[KeyPath] = set()

    def take(self, tables: Mapping[str, Any], where: Callable[[KeyPath], str]) -> None:
        """Take what a file holds. where: the file and line of a path in it."""
        self._table(self._root, tables, (), where)

    def take_environment(self, environ: Mapping[str, str]) -> None:
        """Take the variables whose names are known; an empty one counts as unset."""
        for path, key in leaves(self._root):
            if text := environ.get(name := variable(path)):
                self._text(key, text, path, name)
        claims: dict[str, list[tuple[KeyPath, Key]]] = {}
        for name, path, key in variables(self._root, self._names()):
            if any(isinstance(part, int) for part in path) and environ.get(name):
                claims.setdefault(name, []).append((path, key))
        for name, claimed in claims.items():
            if len(claimed) > 1:
                both = " and ".join(dotted(path) for path, _ in claimed)
                self.problems.append(f"{name}: stands for {both} alike; rename one of the entries")
            else:
                self._text(claimed[0][1], environ[name], claimed[0][0], name)

    def take_options(self, options: Mapping[str, str]) -> None:
        """Take command-line options, by dotted key."""
        known = {dotted(path): (path, key) for path, key in leaves(self._root)}
        for name, text in options.items():
            if name in known:
                path, key = known[name]
                self._text(key, text, path, "command line")
            else:
                self._unknown(tuple(name.split(".")), "command line")

    def build(self) -> Any:
        """The tree, tried against its rules. Of use only while `problems` is empty: bad values have their defaults."""
        return self._build(self._root, ())

    def _table(
        self, table: type[Struct], values: Mapping[str, Any], path: KeyPath, where: Callable[[KeyPath], str]
    ) -> None:
        known = keys(table)
        for name, value in values.items():
            here = (*path, name)
            key = known.get(name)
            if key is None:
                self._unknown(here, where(here))
            elif key.table is None:
                self._value(key, key.form.from_file, value, here, functools.partial(where, here))
            elif key.many:
                self._entries(key, value, here, where)
            elif isinstance(value, dict):
                self._table(key.table, value, here, where)
            else:
                self._note(here, where(here), f"expected a table, got {_shown(value)}; write [{dotted(here)}]")

    def _entries(self, key: Key, value: Any, path: KeyPath, where: Callable[[KeyPath], str]) -> None:
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            self._note(path, where(path), f"expected a list of tables, got {_shown(value)}; write [[{dotted(path)}]]")
            return
        assert key.table is not None
        for index, item in enumerate(value, self._lengths.get(path, 0)):
            self._lengths[path] = index + 1
            here = (*path, index)
            self._table(key.table, item, here, where)
            if "name" not in item:
                self._note(
                    (*here, "name"), where(here), f"missing: expected {keys(key.table)['name'].expected}; add it"
                )
        self._unique(path)

    def _unique(self, path: KeyPath) -> None:
        seen: set[Any] = set()
        for index in range(self._lengths.get(path, 0)):
            here = (*path, index, "name")
            given = self._given.get(here)
            if given is None or here in self._spoiled:
                continue
            if given.value in seen:
                self._note(here, given.where(), f"{_shown(given.value)} is there twice; rename or remove one")
            seen.add(given.value)

    def _text(self, key: Key, text: str, path: KeyPath, name: str) -> None:
        if key.many:
            self._list(key, text, path, name)
        else:
            self._value(key, key.form.from_text, text, path, lambda: name)

    def _list(self, key: Key, text: str, path: KeyPath, name: str) -> None:
        """A named list in one variable: a JSON array takes the place of the file's, bare names are added to it."""
        entries: Any = [{"name": item} for item in text.split(" ")]
        if text.lstrip().startswith("["):
            try:
                entries = json.loads(text)
            except (ValueError, RecursionError) as error:
                self._note(path, name, f"expected a JSON array of objects, or names parted by one space ({error})")
                return
            self._given = {place: given for place, given in self._given.items() if place[: len(path)] != path}
            self._lengths[path] = 0
        self._entries(key, entries, path, lambda place: name)

    def _value(self, key: Key, read: Callable[[Any], Any], value: Any, path: KeyPath, where: Callable[[], str]) -> None:
        try:
            result = read(value)
        except (ValueError, TypeError, OverflowError, RecursionError):
            pass
        else:
            if key.accepts(result):
                self._given[path] = _Given(result, where)
                return
        got = "something else" if key.secret else _shown(value)
        self._note(path, where(), f"expected {key.expected}, got {got}; {_remedy(key, value)}")

    def _unknown(self, path: KeyPath, where: str) -> None:
        plain = ".".join("[]" if isinstance(part, int) else part for part in path).replace(".[]", "[]")
        says = self._strangers(plain)
        if says is None:
            nearest = self._nearest(path)
            hint = f"did you mean {nearest}? Correct or remove it" if nearest else "remove it"
            says = f"unknown key; {hint}"
        self._note(path, where, says)

    def _nearest(self, path: KeyPath) -> str | None:
        """The known key that was most likely meant: a neighbour, else one of such a name elsewhere."""
        *parents, name = path
        table: type[Struct] | None = self._root
        for part in parents:
            if isinstance(part, str) and table is not None:
                key = keys(table).get(part)
                table = key.table if key else None
        near = difflib.get_close_matches(str(name).lower(), keys(table) if table else (), 1)
        if near:
            return dotted((*parents, near[0]))
        elsewhere = {str(known[-1]): dotted(known) for known, _ in reversed(list(leaves(self._root)))}
        near = difflib.get_close_matches(str(name).lower(), elsewhere, 1, 0.75)
        return elsewhere[near[0]] if near else None

    def _note(self, path: KeyPath, where: str, says: str) -> None:
        self._spoiled.add(path)
        self.problems.append(f"{where}: {dotted(path)}: {says}")

    def _names(self) -> dict[KeyPath, list[str]]:
        return {
            path: [
                given.value if (given := self._given.get((*path, index, "name"))) else f"#{index}"
                for index in range(length)
            ]
            for path, length in self._lengths.items()
        }

    def _build(self, table: type[Struct], path: KeyPath) -> Any:
        values: dict[str, Any] = {}
        for name, key in keys(table).items():
            here = (*path, name)
            if key.table is None:
                given = self._given.get(here)
                if given is not None or key.default is NODEFAULT:
                    values[name] = given.value if given else ""
            elif key.many:
                length = self._lengths.get(here, 0)
                values[name] = tuple(self._build(key.table, (*here, index)) for index in range(length))
            else:
                values[name] = self._build(key.table, here)
        built = table(**values)
        for rule in getattr(table, "RULES", ()):
            self._try(rule, built, path)
        return built

    def _try(self, rule: Rule, built: Struct, path: KeyPath) -> None:
        places = [(*path, *key.split(".")) for key in rule.keys]
        if any(place in self._spoiled for place in places) or rule.holds(built):
            return
        values = [functools.reduce(getattr, key.split("."), built) for key in rule.keys]
        says = rule.otherwise.format(*map(_message, values))
        given = next((self._given[place] for place in places if place in self._given), None)
        self._note(places[0], given.where() if given else "defaults", says)


def _remedy(key: Key, value: Any) -> str:
    if key.form is DURATION and type(value) in (int, float) and key.accepts(float(value)):
        return f'write "{write_duration(float(value))}" if seconds were meant'
    if key.default is NODEFAULT:
        return "correct it"
    if key.secret or key.default in ("", (), {}):
        return "correct it, or remove it for the default"
    return f"correct it, or remove it for the default, {_message(key.default)}"


def _shown(value: Any) -> str:
    """A value as the file has it, on one line, cut after 60 characters."""
    if isinstance(value, int) and abs(value) > _INT64:
        return "a number beyond 64 bits"
    if isinstance(value, dict):
        return "a table"
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        text = "a list" if isinstance(value, list) else "a date or time"
    return text if len(text) <= 60 else text[:57] + "..."


def _message(value: Any) -> str:
    """A value of the tree, for a message."""
    return json.dumps(write_duration(value)) if isinstance(value, float) else _shown(value)


def written(value: Any) -> str:
    """A value of the tree as TOML: text, a switch, a whole number, seconds, a list of texts, or an empty table."""
    if isinstance(value, float):
        value = write_duration(value)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
