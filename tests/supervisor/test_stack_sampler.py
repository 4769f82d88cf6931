"""Whose code the supervisor takes a file for."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import msgspec

import realtime
import twisted
from realtime.config.settings import AppSettings
from realtime.supervision.stacks import CodeOrigin
from realtime.supervisor.stack_sampler import _application_paths, _foreign_paths


def origin(module: str = "", path: str = "") -> CodeOrigin:
    return CodeOrigin(_application_paths(AppSettings(module, path)), _foreign_paths())


def test_python_and_what_is_installed_and_this_server_are_foreign_paths() -> None:
    for module in (asyncio, json, msgspec, twisted, realtime):
        assert not origin().is_application_code(str(module.__file__))


def test_the_application_is_own_wherever_it_is(tmp_path: Path) -> None:
    (tmp_path / "chat.py").touch()
    assert origin("chat:app", str(tmp_path)).is_application_code(str(tmp_path / "chat.py"))
    assert origin("chat:app", str(tmp_path)).is_application_code(str(tmp_path / "rooms" / "names.py"))
    assert origin().is_application_code(str(tmp_path / "elsewhere.py"))


def test_an_application_that_is_installed_is_own_too() -> None:
    # Any package will do that is installed and is not imported for this.
    assert origin("twisted.web:app").is_application_code(str(twisted.__file__))
    assert not origin("twisted.web:app").is_application_code(str(msgspec.__file__))


def test_an_application_inside_the_server_s_folder_is_own() -> None:
    folder = Path(realtime.__file__).parent
    assert origin("demo:app", str(folder / "demo")).is_application_code(str(folder / "demo" / "demo.py"))
    assert not origin("demo:app", str(folder / "demo")).is_application_code(str(folder / "app.py"))


def test_a_module_that_is_not_there_is_no_mistake() -> None:
    assert not origin("no_such_module_anywhere:app").is_application_code(str(json.__file__))
