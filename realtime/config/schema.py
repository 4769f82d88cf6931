"""The schema of a settings tree: its keys, their types, limits, defaults and environment variables.

The tree is a msgspec Struct whose fields are further Structs (tables), lists of Structs with a `name` (named lists) or
values. A field's annotation says everything about its key: `Annotated[int, Meta(ge=0, le=9, description=...,
extra=...)]`, where `extra` may hold `value_type` (a ValueType other than the default of the field's type), `secret`
(True), and `expected` with `accepts` (a noun phrase and a predicate). This module knows no key by name.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from msgspec import NODEFAULT, Struct, inspect

from realtime.config import values
from realtime.config.values import INT64_MAX, ValueType

PREFIX = "REALTIME_"

# A place in the tree: keys, and the index of an entry in a named list.
KeyPath = tuple[str | int, ...]

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")

_VALUE_TYPES: dict[type, ValueType] = {
    inspect.BoolType: values.BOOLEAN,
    inspect.IntType: values.INTEGER,
    inspect.FloatType: values.DURATION,
    inspect.StrType: values.STRING,
    inspect.VarTupleType: values.STRING_LIST,
    inspect.DictType: values.TABLE,
}


@dataclass(frozen=True, slots=True)
class Key:
    """One key of a table. It holds a value of `value_type`, or a table that the Struct `table` describes.

    help: one line for the operator. expected: names the accepted values in messages. default: NODEFAULT for a required
    key, which then has an `example`. accepts: whether the key takes this value of its type. is_list: the key holds a
    list of such tables. is_secret: messages never show its value.
    """

    name: str
    help: str
    expected: str
    default: Any
    example: Any
    value_type: ValueType
    accepts: Callable[[Any], bool]
    table: type[Struct] | None
    is_list: bool
    is_secret: bool


@functools.cache
def keys_of(table: type[Struct]) -> Mapping[str, Key]:
    """Return the keys of a table by name, in the order of the Struct's fields."""
    described = inspect.type_info(table)
    assert isinstance(described, inspect.StructType)
    return {field.name: _key(field) for field in described.fields}


def _key(field: inspect.Field) -> Key:
    field_type: Any = field.type
    extra: Mapping[str, Any] = {}
    schema: Mapping[str, Any] = {}
    if isinstance(field_type, inspect.Metadata):
        field_type, extra, schema = field_type.type, field_type.extra or {}, field_type.extra_json_schema or {}
    is_list = isinstance(field_type, inspect.VarTupleType) and isinstance(field_type.item_type, inspect.StructType)
    table_type = field_type.item_type if is_list else field_type
    if isinstance(field_type, inspect.LiteralType):
        value_type = values.choice([str(value) for value in field_type.values])
    elif isinstance(field_type, inspect.VarTupleType) and isinstance(field_type.item_type, inspect.LiteralType):
        value_type = values.choices([str(value) for value in field_type.item_type.values])
    else:
        value_type = extra.get("value_type") or _VALUE_TYPES.get(type(field_type), values.TABLE)
    is_within_limits, accepts = _limits(field_type), extra.get("accepts")
    return Key(
        name=field.name,
        help=schema.get("description", ""),
        expected=extra.get("expected") or value_type.expected + _describe_limits(field_type, value_type),
        default=field.default_factory() if field.default_factory is not NODEFAULT else field.default,
        example=next(iter(schema.get("examples", ())), None),
        value_type=value_type,
        accepts=lambda value: is_within_limits(value) and (accepts is None or accepts(value)),
        table=table_type.cls if isinstance(table_type, inspect.StructType) else None,
        is_list=is_list,
        is_secret=bool(extra.get("secret")),
    )


def _describe_limits(field_type: Any, value_type: ValueType) -> str:
    low, high, above = (getattr(field_type, name, None) for name in ("ge", "le", "gt"))
    if getattr(field_type, "min_length", None):
        return " that is not empty"
    step = " in whole seconds" if isinstance(field_type, inspect.FloatType) and field_type.multiple_of else ""
    if low is not None and high is not None:
        return f"{step} from {value_type.to_file(low)} to {value_type.to_file(high)}"
    if low is not None:
        return f"{step} of at least {value_type.to_file(low)}"
    return f"{step} above {value_type.to_file(above)}" if above is not None else step


_LIMITS: dict[str, Callable[[Any, Any], bool]] = {
    "ge": lambda value, limit: value >= limit,
    "le": lambda value, limit: value <= limit,
    "gt": lambda value, limit: value > limit,
    "multiple_of": lambda value, limit: value % limit == 0,
    "min_length": lambda value, limit: len(value) >= limit,
    "pattern": lambda value, limit: re.search(limit, value) is not None,
}


def _limits(field_type: Any) -> Callable[[Any], bool]:
    """Return a predicate that holds for values within all limits of an annotation."""
    limits = [
        (holds, limit) for name, holds in _LIMITS.items() if (limit := getattr(field_type, name, None)) is not None
    ]
    if isinstance(field_type, inspect.IntType):
        limits.append((_LIMITS["le"], INT64_MAX))
    return lambda value: all(holds(value, limit) for holds, limit in limits)


def value_keys(table: type[Struct], path: KeyPath = ()) -> Iterator[tuple[KeyPath, Key]]:
    """Yield each key below `table` that holds a value or a named list, with its path."""
    for name, key in keys_of(table).items():
        if key.table is not None and not key.is_list:
            yield from value_keys(key.table, (*path, name))
        else:
            yield (*path, name), key


def format_path(path: KeyPath) -> str:
    """Return a path as operators write it, channel.namespaces[2].history_ttl, on one line even if a key has several."""
    parts = (f"[{part}]" if isinstance(part, int) else "." + _format_key(part) for part in path)
    return "".join(parts).removeprefix(".")


def _format_key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else json.dumps(key)


def variable_name(path: KeyPath) -> str:
    """Return the environment variable of a key. An entry of a named list goes by its name, not by its index."""
    return PREFIX + re.sub(r"[-.]", "_", "_".join(map(str, path)).upper())


def environment_variables(
    table: type[Struct], entry_names: Mapping[KeyPath, Sequence[str]]
) -> Iterator[tuple[str, KeyPath, Key]]:
    """Yield the name of each environment variable of a tree, with the path and the key that it sets.

    entry_names: the names of the entries of each named list; the options of these entries have variables too.
    """
    for path, key in value_keys(table):
        yield variable_name(path), path, key
        if key.is_list and key.table is not None:
            for index, name in enumerate(entry_names.get(path, ())):
                for below, option in value_keys(key.table):
                    if below != ("name",):
                        yield variable_name((*path, name, *below)), (*path, index, *below), option
