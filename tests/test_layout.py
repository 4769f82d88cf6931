"""The shape of the code: a test for each module, one meaning for each class name, sizes, and plain words."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(path.relative_to(ROOT / "realtime") for path in (ROOT / "realtime").rglob("*.py"))
PROSE = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *(ROOT / "realtime").rglob("*.py")])

FUNCTION_LINES = 60
MODULE_LINES = 600

# Modules without behaviour of their own, and the tests that cover them.
WITHOUT_TEST = {
    Path("__main__.py"): "tests/cli/test_main.py",
    Path("_version.py"): "tests/test_packaging.py",
    Path("supervision/effects.py"): "tests/supervision/test_pool.py",
    Path("supervision/slots.py"): "tests/supervision/test_pool.py",
    Path("app/client.py"): "tests/app/test_typing.py",
}
# Class names that the client protocol or the server API prescribes for two things.
PRESCRIBED = {"ConnectRequest"}
# Words of a dialect: they stand for a noun that the sentence should name.
DIALECT = re.compile(r"\b(whoever|whatever (it|they)|nobody|somebody|told of|is told|are told)\b", re.IGNORECASE)


def trees() -> Iterator[tuple[Path, ast.Module]]:
    for path in MODULES:
        yield path, ast.parse((ROOT / "realtime" / path).read_text())


@pytest.mark.parametrize("path", [path for path in MODULES if path.name != "__init__.py"], ids=str)
def test_a_module_has_a_test_of_its_name(path: Path) -> None:
    expected = WITHOUT_TEST.get(path, f"tests/{path.with_name(f'test_{path.name}')}")
    assert (ROOT / expected).exists(), f"realtime/{path} needs {expected}"


def test_a_class_name_has_one_meaning() -> None:
    places: dict[str, list[str]] = defaultdict(list)
    for path, tree in trees():
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(str(path))
    assert {name: found for name, found in places.items() if len(found) > 1 and name not in PRESCRIBED} == {}


def test_functions_are_short() -> None:
    long = [
        f"realtime/{path}:{node.lineno} {node.name}: {node.end_lineno - node.lineno + 1} lines"
        for path, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno >= FUNCTION_LINES
    ]
    assert long == []


def test_modules_are_of_one_sitting() -> None:
    def code_lines(path: Path) -> int:
        lines = (ROOT / "realtime" / path).read_text().splitlines()
        return sum(1 for line in lines if line.strip() and not line.strip().startswith("#"))

    assert {str(path): lines for path in MODULES if (lines := code_lines(path)) > MODULE_LINES} == {}


@pytest.mark.parametrize("path", PROSE, ids=lambda path: str(path.relative_to(ROOT)))
def test_sentences_name_their_nouns(path: Path) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if DIALECT.search(line)
    ]
    assert found == []


def test_documents_name_modules_that_exist() -> None:
    rooms = "|".join(sorted({path.parts[0] for path in MODULES if len(path.parts) > 1}))
    named = re.compile(rf"`((?:{rooms})/(?!test_)[a-z_]+\.py)(?!::)")
    missing = [
        f"{page.name}: {name}"
        for page in ROOT.glob("docs/*.md")
        for name in named.findall(page.read_text())
        if not (ROOT / "realtime" / name).exists()
    ]
    assert missing == []
