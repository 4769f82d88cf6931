"""The trial of a configuration and an application in a process of its own, as a program."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec

from realtime._version import __version__
from realtime.config.sources import Sources


def try_out(sources: Sources) -> dict[str, Any]:
    reading, writing = os.pipe()

    def place() -> None:
        os.dup2(writing, 3)

    command = [sys.executable, "-P", "-m", "realtime.app.trial"]
    done = subprocess.run(
        command,
        input=msgspec.msgpack.encode(sources),
        close_fds=False,
        preexec_fn=place,
        capture_output=True,
        check=True,
    )
    os.close(writing)
    with open(reading, "rb") as pipe:
        result: dict[str, Any] = msgspec.msgpack.decode(pipe.read())
    return {**result, "output": done.stdout.decode()}


def sources(tmp_path: Path, application: str, more: str = "") -> Sources:
    (tmp_path / "tried.py").write_text(application)
    config = tmp_path / "realtime.toml"
    config.write_text(f'[app]\nmodule = "tried:app"\n{more}')
    return Sources(str(config), {"workers.count": "3"}, {"REALTIME_LOG_LEVEL": "warn"})


def test_good_settings_of_all_sources_come_back(tmp_path: Path) -> None:
    result = try_out(sources(tmp_path, "import realtime\nprint('hello')\napp = realtime.App()\n"))
    settings = result["settings"]
    assert (settings["workers"]["count"], settings["log"]["level"]) == (3, "warn")
    assert settings["app"]["path"] == str(tmp_path)
    assert (result["version"], result["output"]) == (__version__, "hello\n")


def test_mistakes_of_the_configuration_come_back(tmp_path: Path) -> None:
    result = try_out(sources(tmp_path, "", "[workers]\ncuont = 3\n"))
    assert result["problems"] == [
        f"{tmp_path}/realtime.toml:4: workers.cuont: unknown key; did you mean workers.count? Correct or remove it"
    ]


def test_a_mistake_of_the_application_comes_back(tmp_path: Path) -> None:
    result = try_out(sources(tmp_path, "import realtime\n1 / 0\n"))
    assert result["problems"] == [
        f'app.module = "tried:app": {tmp_path}/tried.py:2: ZeroDivisionError: division by zero'
    ]
