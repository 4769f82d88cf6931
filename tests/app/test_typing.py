"""What a type checker says of an application: nothing of a correct one, and each mistake at its line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from mypy import api

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def check(name: str) -> tuple[str, int]:
    """Run mypy over a file beside this one as a user would: strict, and without this project's configuration."""
    options = ["--strict", "--config-file=", "--show-error-codes", "--no-error-summary", "--follow-imports=silent"]
    output, errors, status = api.run([*options, f"--cache-dir={ROOT / '.mypy_cache'}", str(HERE / "typed" / name)])
    assert errors == ""
    return output, status


@pytest.mark.timeout(300)
def test_a_correct_application_has_no_error() -> None:
    assert check("chat.py") == ("", 0)


@pytest.mark.timeout(300)
def test_each_mistake_is_found_at_its_line() -> None:
    lines = (HERE / "typed" / "mistakes.py").read_text().splitlines()
    expected = {(number, line.rpartition("  # ")[2]) for number, line in enumerate(lines, 1) if "  # " in line}
    output, _ = check("mistakes.py")
    found = re.findall(r"^\S+mistakes\.py:(\d+): error: .*\[([a-z-]+)\]$", output, re.MULTILINE)
    assert {(int(number), code) for number, code in found} == expected, output
