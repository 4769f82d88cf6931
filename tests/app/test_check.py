"""The process that imports the application for a check: its exit status, and where its lines go."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from realtime.config import settings as configuration
from realtime.config.settings import AppSettings, Settings


def check(folder: Path, module: str) -> subprocess.CompletedProcess[bytes]:
    settings = Settings(app=AppSettings(module=module, path=str(folder)))
    command = [sys.executable, "-P", "-m", "realtime.app.check"]
    return subprocess.run(command, input=configuration.dump(settings), capture_output=True, timeout=60)


def test_an_application_that_loads_is_no_problem(tmp_path: Path) -> None:
    (tmp_path / "chat.py").write_text("from realtime import App\nprint('loading')\napp = App()\n")
    done = check(tmp_path, "chat:app")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"loading\n")


@pytest.mark.parametrize(
    ("text", "problem", "status"),
    [
        ("app = (", "chat.py:1: SyntaxError", 78),
        ("", "'app' is missing", 78),
        ("1 / 0", "chat.py:1: Zero", 75),
    ],
)
def test_a_problem_is_a_line_on_standard_output(tmp_path: Path, text: str, problem: str, status: int) -> None:
    (tmp_path / "chat.py").write_text(text)
    done = check(tmp_path, "chat:app")
    assert done.returncode == status
    (line,) = done.stdout.decode().splitlines()
    assert line.startswith('app.module = "chat:app": ') and problem in line
