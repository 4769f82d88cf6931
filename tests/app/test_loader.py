"""Importing the configured application: a mistake in it becomes one line with its place."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from realtime.app import Handler, load
from realtime.config.settings import AppSettings
from realtime.errors import ApplicationFailed
from tests.app.declaring import problem


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], AppSettings]]:
    """Write a module `its_app` and give the settings that name it; forget both afterwards."""
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write(source: str, module: str = "its_app:app", **files: str) -> AppSettings:
        for name, text in {"its_app": source, **files}.items():
            (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
        return AppSettings(module=module, path=str(tmp_path), options={"greeting": "hello"})

    yield write
    for name in ("its_app", "below"):
        sys.modules.pop(name, None)


def test_load_gives_the_app_its_options(write: Any) -> None:
    settings = write(
        """
        import realtime.app
        app = realtime.app.App()
        @app.rpc("f")
        async def f(data): ...
        """
    )
    app = load(settings)
    assert app.options == {"greeting": "hello"}
    assert isinstance(app.handlers("rpc")["f"], Handler)
    assert sys.path[0] == settings.path


def test_no_module_is_an_app_without_handlers() -> None:
    assert load(AppSettings()).handlers("rpc") == {}


@pytest.mark.parametrize(
    ("source", "place", "says"),
    [
        ("app = (\n", "its_app.py:1", "SyntaxError"),
        ("import nothing_of_that_name\n", "its_app.py:1", "No module named 'nothing_of_that_name'"),
        ("from realtime import nothing\n", "its_app.py:1", "ImportError: cannot import name 'nothing'"),
        (
            "from realtime.app import App\napp = App()\n@app.rpc('f')\ndef f(): ...\n",
            "its_app.py:3",
            "is called with (data) or (client, data)",
        ),
        ("other = 1\n", "its_app.py", "'app' is missing; define it as app = realtime.App()"),
        ("app = 7\n", "its_app.py", "'app' is of type int; define it as app = realtime.App()"),
    ],
)
def test_mistake_in_the_users_code_is_one_line_with_its_place(write: Any, source: str, place: str, says: str) -> None:
    settings = write(source)
    line = problem(lambda: load(settings))
    assert f"{settings.path}/{place}" in line
    assert says in line


@pytest.mark.parametrize(
    ("source", "place", "says"),
    [
        ("import realtime\n\nlimit = 1 / 0\n", "its_app.py:3", "ZeroDivisionError: division by zero"),
        ("import json\n\njson.loads('{')\n", "its_app.py:3", "JSONDecodeError"),
        ("import sys\nsys.exit(3)\n", "its_app.py:2", "SystemExit: 3"),
        ("import below\n", "below.py:2", "ConnectionRefusedError: no database"),
        ("raise ValueError('one\\ntwo')\n", "its_app.py:1", "ValueError: one"),
        ("raise ValueError\n", "its_app.py:1", "ValueError"),
    ],
)
def test_an_exception_that_may_pass_is_one_line_with_its_place(write: Any, source: str, place: str, says: str) -> None:
    settings = write(source, below="\nraise ConnectionRefusedError('no database')\n")
    with pytest.raises(ApplicationFailed) as caught:
        load(settings)
    line = str(caught.value)
    assert line.startswith('app.module = "its_app:app": ') and "\n" not in line
    assert f"{settings.path}/{place}" in line
    assert says in line


@pytest.mark.parametrize("module", ["not_there:app", "not_there.below:app", "its_app.below:app"])
def test_missing_module_is_named_with_the_path(write: Any, module: str) -> None:
    settings = write("app = 1\n", module)
    line = problem(lambda: load(settings))
    assert f'app.module = "{module}"' in line
    assert "there is no module" in line or "is not a package" in line


def test_attribute_is_app_unless_named(write: Any) -> None:
    settings = write("from realtime.app import App\napp = App()\nother = App()\n", "its_app")
    assert load(settings) is sys.modules["its_app"].app
    assert load(AppSettings("its_app:other", settings.path)) is sys.modules["its_app"].other
