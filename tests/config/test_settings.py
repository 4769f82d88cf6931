"""The settings tree: serialization, help texts, and the use of every key."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import msgspec
import pytest

from realtime.config import channel_settings, redis_settings, settings
from realtime.config.schema import format_path, keys_of, value_keys
from realtime.config.settings import Namespace, Settings, dump, load
from realtime.config.values import NUMBER
from tests.config.parsing import parse_file

PACKAGE = Path(settings.__file__).parents[1]
# Keys whose attribute names the code composes; tests of sessions try each of them.
COMPOSED = re.compile(r"allow_(publish|presence|history)_for_(client|subscriber|anonymous)")


def test_a_dumped_tree_loads_unchanged() -> None:
    text = "[[channel.namespaces]]\nname = 'chat'\n[app.options]\na = [1, 2.5, { b = 'é' }]\n[client]\ninsecure = true"
    tree = parse_file(text)
    assert load(dump(tree)) == tree


def test_loading_a_value_beyond_its_limits_fails() -> None:
    with pytest.raises(msgspec.ValidationError):
        load(msgspec.msgpack.encode({"http_server": {"port": 70_000}}))


def test_the_representation_of_a_tree_has_no_secret() -> None:
    secret = "a-secret-of-some-length"
    tree = parse_file(f"http_api.key = '{secret}'\nclient.token.hmac_secret_key = '{secret}'")
    assert tree.http_api.key == secret
    assert secret not in repr(tree)


def test_every_key_has_a_help_text_and_accepts_its_default() -> None:
    for path, key in value_keys(Settings):
        assert key.help.endswith("."), format_path(path)
        if not key.is_list:
            assert key.accepts(key.default), format_path(path)
    for name, key in keys_of(Namespace).items():
        assert key.help.endswith("."), name


def test_a_share_is_a_number_without_a_unit() -> None:
    keys = dict(value_keys(Settings))
    shares = [path for path, key in keys.items() if "from 0 to 1" in key.help]
    assert ("loop", "rebalance_difference") in shares
    assert {keys[path].value_type for path in shares} == {NUMBER}


def attributes_in(tree: ast.AST) -> set[str]:
    return {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def test_the_server_reads_every_key() -> None:
    """The config room itself does not count, but for two functions: it checks, explains and writes keys."""
    read = attributes_in(ast.parse(inspect.getsource(channel_settings.history_options)))
    read |= attributes_in(ast.parse(inspect.getsource(redis_settings.addresses_in_use)))
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name != "config":
            read |= attributes_in(ast.parse(path.read_text()))
    tables = [
        value for value in vars(settings).values() if inspect.isclass(value) and issubclass(value, msgspec.Struct)
    ]
    keys = {(table.__name__, field.name) for table in tables for field in msgspec.structs.fields(table)}
    assert len(keys) > 150
    unread = {(table, key) for table, key in keys if key not in read and not COMPOSED.fullmatch(key)}
    assert unread == set()
