"""The check of the application, as `realtime check-config` and a daemon's start make it."""

from __future__ import annotations

from pathlib import Path

import pytest

from realtime.cli.application import check
from realtime.config.settings import AppSettings, Settings, WorkersSettings


def settings(folder: Path, text: str, module: str = "chat:app") -> Settings:
    (folder / "chat.py").write_text(text)
    return Settings(app=AppSettings(module=module, path=str(folder)), workers=WorkersSettings(start_timeout=20.0))


def test_no_application_and_a_good_one_are_no_problem(tmp_path: Path) -> None:
    assert check(Settings()) == ([], [])
    assert check(settings(tmp_path, "from realtime import App\napp = App()\n")) == ([], [])


@pytest.mark.parametrize(
    ("text", "module", "line", "may_pass"),
    [
        ("app = (", "chat:app", "chat.py:1: SyntaxError: '(' was never closed", False),
        ("", "nosuch:app", "there is no module 'nosuch'", False),
        ("raise OSError('no database')", "chat:app", "chat.py:1: OSError: no database", True),
        ("import os\nos._exit(3)", "chat:app", "the import ended the process with status 3", True),
    ],
)
def test_each_problem_is_one_line(tmp_path: Path, text: str, module: str, line: str, may_pass: bool) -> None:
    (problem,) = check(settings(tmp_path, text, module)).problems
    assert problem.line.startswith(f'app.module = "{module}": ')
    assert line in problem.line
    assert problem.may_pass is may_pass


def test_an_import_that_hangs_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "chat.py").write_text("import time\ntime.sleep(60)")
    given = Settings(app=AppSettings(module="chat:app", path=str(tmp_path)), workers=WorkersSettings(start_timeout=0.5))
    ((line, may_pass),) = check(given).problems
    assert may_pass
    assert "takes more than 0.5 s (workers.start_timeout)" in line


def test_a_call_that_blocks_the_loop_is_a_warning(tmp_path: Path) -> None:
    text = """
import time
from realtime import App
app = App()

@app.rpc("f")
async def f(data):
    time.sleep(1)
"""
    problems, warnings = check(settings(tmp_path, text))
    assert problems == []
    assert warnings == [
        f"{tmp_path}/chat.py:8: rpc f calls time.sleep on the loop, which blocks all clients of the worker meanwhile;"
        " await asyncio.sleep in its place"
    ]
