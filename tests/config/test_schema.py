"""The schema of a settings tree: keys from annotations, paths, and environment variables."""

from __future__ import annotations

from typing import Annotated

from msgspec import NODEFAULT, Meta, Struct, field

from realtime.config import values
from realtime.config.annotations import Share
from realtime.config.schema import environment_variables, format_path, keys_of, value_keys, variable_name
from realtime.config.settings import Settings


class Entry(Struct):
    name: str
    size: int = 1


class Table(Struct):
    ratio: Annotated[float, Meta(ge=0, le=1, description="A ratio.", extra={"secret": True})] = 0.5
    share: Share = 0.0
    entries: tuple[Entry, ...] = ()


class Root(Struct):
    table: Table = field(default_factory=Table)


def test_a_key_comes_from_the_annotation_of_its_field() -> None:
    key = keys_of(Table)["ratio"]
    assert (key.help, key.default, key.is_secret, key.is_list, key.table) == ("A ratio.", 0.5, True, False, None)
    assert key.value_type is values.DURATION
    assert key.expected.endswith(" from 0 to 1s")
    assert keys_of(Table)["share"].expected == "a number from 0 to 1"
    assert [key.accepts(value) for value in (0.0, 1.0, 1.1, -0.1)] == [True, True, False, False]
    assert keys_of(Table)["entries"].is_list
    assert keys_of(Entry)["name"].default is NODEFAULT


def test_keys_with_values_and_named_lists_have_paths() -> None:
    assert [path for path, _ in value_keys(Root)] == [("table", "ratio"), ("table", "share"), ("table", "entries")]


def test_a_path_is_written_on_one_line() -> None:
    assert format_path(("channel", "namespaces", 2, "history_ttl")) == "channel.namespaces[2].history_ttl"
    assert format_path(("a b", "c\n")) == '"a b"."c\\n"'


def test_entries_of_a_named_list_have_variables_by_their_names() -> None:
    found = {name: path for name, path, _ in environment_variables(Root, {("table", "entries"): ["a-b.c"]})}
    assert found == {
        "REALTIME_TABLE_RATIO": ("table", "ratio"),
        "REALTIME_TABLE_SHARE": ("table", "share"),
        "REALTIME_TABLE_ENTRIES": ("table", "entries"),
        "REALTIME_TABLE_ENTRIES_A_B_C_SIZE": ("table", "entries", 0, "size"),
    }
    assert variable_name(("http_server", "port")) == "REALTIME_HTTP_SERVER_PORT"


def test_every_key_has_its_own_variable() -> None:
    names = [name for name, _, _ in environment_variables(Settings, {})]
    assert len(names) == len(set(names))
    assert "REALTIME_CLIENT_TOKEN_HMAC_SECRET_KEY" in names
