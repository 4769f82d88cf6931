"""docs/protocol.md names everything that clients and callers can use, and only tests that exist."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest

from realtime import errors
from realtime.config import rules, settings
from realtime.protocol import messages
from realtime.protocol.commands import COMMANDS
from realtime.server_api import http_api

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "protocol.md").read_text()
REFERENCES = sorted(set(re.findall(r"`([\w/]+\.py)::([\w:]+)`", PAGE)))


@cache
def found_in(path: Path) -> set[str]:
    """The tests of a file, those in classes as Class::test."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        inner = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}::" if isinstance(node, ast.ClassDef) else ""
        found |= {prefix + one.name for one in inner if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef)}
    return found


def section(title: str) -> list[str]:
    """The first cells of the rows of one section's tables."""
    text = PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    return re.findall(r"^\| ?([^|]*?) ?\|", text, re.MULTILINE)


def named(title: str) -> set[str]:
    """The names in code type among them."""
    return {name for cell in section(title) for name in re.findall(r"`([^`]+)`", cell)}


def codes(title: str) -> set[int]:
    return {int(code) for cell in section(title) for code in re.findall(r"\b\d{3,4}\b", cell)}


def codes_of_the_server(size: int) -> Iterable[int]:
    """The codes among the constants of `errors` that have so many parts: three for errors, two for the others."""
    return (value[0] for value in vars(errors).values() if isinstance(value, tuple) and len(value) == size)


def test_every_test_that_is_named_exists() -> None:
    assert len(REFERENCES) > 100
    missing = [(path, name) for path, name in REFERENCES if name not in found_in(TESTS / path)]
    assert missing == []
    assert [name for _, name in REFERENCES if not name.rpartition("::")[2].startswith("test_")] == []


def test_nearly_every_row_names_a_test() -> None:
    rows = [row for row in PAGE.splitlines() if row.startswith("| ") and "---" not in row]
    without = [row for row in rows if ".py::" not in row]
    # The heads of the tables, and what is not supported or described elsewhere.
    assert [
        row
        for row in without
        if not re.search(r"\| test \||not supported|not used|see below|likewise", row) and "| | Centrifugo |" not in row
    ] == []


def test_every_code_is_there() -> None:
    assert set(codes_of_the_server(3)) <= codes("Error codes")
    disconnects = set(codes_of_the_server(2))
    assert {code for code in disconnects if code >= 3000} <= codes("Disconnect codes")
    assert {code for code in disconnects if code < 3000} <= codes("Unsubscribe codes")


def test_every_command_is_there() -> None:
    assert set(COMMANDS) <= named("Commands")
    assert set(COMMANDS) | {"ping"} == set(messages.Command.__struct_fields__) - {"id"}


@pytest.mark.parametrize(
    ("title", "table"), [("Channel options", settings.ChannelOptions), ("Client options", settings.ClientSettings)]
)
def test_every_option_is_there(title: str, table: type) -> None:
    fields = set(table.__struct_fields__)  # type: ignore[attr-defined]
    assert fields - named(title) == set()


def test_every_method_of_the_api_is_there() -> None:
    assert set(http_api.METHODS) - named("Server API") == set()


def test_every_transport_is_there() -> None:
    paths = {name for name in rules.TABLES_WITH_PATHS if name not in ("http_api", "websocket", "init", "emulation")}
    assert paths <= named("Transports and encodings")


def test_every_push_is_there() -> None:
    pushes = {"pub", "join", "leave", "unsubscribe", "message", "subscribe", "connect", "disconnect", "refresh"}
    assert pushes <= named("Pushes")
