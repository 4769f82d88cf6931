"""The lines of a TOML file: problems with their lines, and generated files."""

from __future__ import annotations

import json
import tomllib

import msgspec
import pytest

from realtime.config.schema import format_path, value_keys
from realtime.config.settings import Namespace, Settings
from realtime.config.toml_lines import commented_lines, parse_toml
from tests.config.parsing import parse_file, problem

REFUSED = [
    ("[client]\ninsecure = yes", 2, "not valid TOML: invalid value; put strings in quotes"),
    ("[client]\na = 1\na = 2", 3, "not valid TOML: this key is already set above"),
    ("[client]\n[log]\n[client]", 3, "not valid TOML: this table is already defined above"),
    ("[client\na = 1", 1, "not valid TOML"),
    ("a = [\n1,\n", 3, "not valid TOML"),
    ('a = "\n"', 1, "not valid TOML"),
    ("{}", 1, "JSON, but realtime reads TOML; convert it with: realtime gen-config --from"),
    ('\n{"client": {"insecure": true}}', 1, "JSON, but realtime reads TOML"),
    ("\ufeff[client]", 1, "starts with a byte order mark; save it as UTF-8 without one"),
]


@pytest.mark.parametrize(("text", "line", "message"), REFUSED, ids=[message[:40] for _, _, message in REFUSED])
def test_invalid_toml_is_refused_with_its_line(text: str, line: int, message: str) -> None:
    found = problem(text)
    assert found.startswith(f"realtime.toml:{line}: ")
    assert message in found


@pytest.mark.parametrize("text", ["a = " + "[" * 100_000, "a = " + "9" * 5000])
def test_text_beyond_the_parsers_limits_is_refused_by_the_files_name(text: str) -> None:
    assert problem(text).startswith("realtime.toml: not ")


@pytest.mark.parametrize(
    ("text", "path", "line"),
    [
        ("a = 1\n# x = [\nb.c = 2", ("b", "c"), 3),
        ('a = """\nb = 1\n"""\nb = 2', ("b",), 4),
        ("a = '''\nb = 1\n'''\nb = 2", ("b",), 4),
        ('a = """x"""""\nb = 2', ("b",), 2),
        ('a = "\\"[" # ]\nb = 2', ("b",), 2),
        ("a = [\n  [1, 2], # one\n  [3,\n 4],\n]\nb = 2", ("a", 1, 1), 4),
        ("a = [\n  [1, 2], # one\n  [3,\n 4],\n]\nb = 2", ("b",), 6),
        ("a = { b = { c = 1 }, d = 2 }\ne = 1", ("e",), 2),
        ("[a]\n[[a.b]]\n[[a.b]]\n[a.b.c]\nd = 1", ("a", "b", 1, "c", "d"), 5),
        ("[[a]]\n[[a.b]]\nx=1\n[[a]]\n[[a.b]]\nx=1\n[[a.b]]\nx=1", ("a", 1, "b", 1, "x"), 8),
        ("t = 1979-05-27 07:32:00.5\nf = -1.5e+3\nb = 2", ("b",), 3),
        ("[ 'a b' . \"c\\u0064\" ]\nx = 1", ("a b", "cd", "x"), 2),
        ("1.2 = 3\r\n4 = 5", ("4",), 2),
    ],
)
def test_every_key_has_a_line(text: str, path: tuple[str | int, ...], line: int) -> None:
    tomllib.loads(text.replace("\r", ""))
    _, locate = parse_toml("f", text)
    assert locate(path) == f"f:{line}"


def test_a_generated_file_is_parsed_to_the_defaults() -> None:
    name = "\x7f'\\\n\"😀é" * 20
    text = "\n".join(commented_lines(Settings, {"node.name": name, "loop.stuck": 1.5}))
    settings = parse_file(text)
    assert settings.node.name == name
    assert settings.loop.stuck == 1.5
    changed = {"node": Settings().node, "loop": Settings().loop}
    assert msgspec.structs.replace(settings, **changed) == Settings()


def test_every_line_of_a_generated_file_is_valid_without_its_mark() -> None:
    lines = list(commented_lines(Settings, {}))
    text = "\n".join(line.removeprefix("#") if not line.startswith("# ") else line for line in lines)
    tree = tomllib.loads(text)
    assert parse_file(text) == msgspec.structs.replace(
        Settings(), channel=msgspec.structs.replace(Settings().channel, namespaces=(Namespace(name="chat"),))
    )
    for path, _ in value_keys(Settings):
        value = tree
        for part in path:
            assert part in value, format_path(path)
            value = value[str(part)]
    assert json.dumps(tree)
