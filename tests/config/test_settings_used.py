"""Every key of the settings is read somewhere: one without effect would be a promise that nobody keeps."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import msgspec

from realtime.config import settings

ROOT = Path(settings.__file__).parents[1]
# These check, explain or write keys, and do not act on them.
ABOUT_KEYS = {"settings.py", "warnings.py", "centrifugo_keys.py", "reader.py"}
# By a name that is put together; tests of sessions try each of them.
PUT_TOGETHER = re.compile(r"allow_(publish|presence|history)_for_(client|subscriber|anonymous)")


def read_in(tree: ast.AST) -> set[str]:
    return {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def test_every_key_is_read() -> None:
    read = read_in(ast.parse(inspect.getsource(settings.history_options)))
    for path in ROOT.rglob("*.py"):
        if path.name not in ABOUT_KEYS:
            read |= read_in(ast.parse(path.read_text()))
    tables = [one for one in vars(settings).values() if inspect.isclass(one) and issubclass(one, msgspec.Struct)]
    keys = {(table.__name__, field.name) for table in tables for field in msgspec.structs.fields(table)}
    assert len(keys) > 150
    unread = {(table, key) for table, key in keys if key not in read and not PUT_TOGETHER.fullmatch(key)}
    assert unread == set()
