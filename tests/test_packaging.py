"""The distribution: what the wheel holds, and that twistd finds the plugin from a wheel and from a checkout."""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from realtime import __version__

ROOT = Path(__file__).parents[1]
TWISTD = "from twisted.scripts.twistd import run; run()"


def run(*command: str | Path, cwd: Path) -> str:
    """What a command prints. It must end well. It sees nothing of this process's way of finding modules."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environ, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def fresh_environment(folder: Path) -> Path:
    """The interpreter of a new virtual environment with our dependencies but not us: .pth files there don't count."""
    venv.create(folder, with_pip=False)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    folder.joinpath("lib", version, "site-packages", "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "bin" / "python"


def install(python: Path, *what: str | Path) -> None:
    """Install into that environment. What is installed in ours is ignored, or pip would uninstall it there."""
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed"]
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, *what, cwd=python.parent)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone as git would make it, so that building leaves nothing in ours. Changes not yet committed are in it."""
    copy = tmp_path_factory.mktemp("clone") / "realtime"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, check=True, text=True,
    ).stdout  # fmt: skip
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, cwd=checkout)
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_wheel_holds_the_package_the_plugin_and_nothing_else(checkout: Path, names: set[str]) -> None:
    info = f"twisted_realtime-{__version__}.dist-info/"
    package = {str(path.relative_to(checkout)) for path in (checkout / "realtime").rglob("*") if path.is_file()}
    assert {name for name in names if not name.startswith(info)} == package | {"twisted/plugins/realtime_plugin.py"}
    assert names >= {"realtime/py.typed", "realtime/web/index.html", "realtime/web/live.js", "realtime/web/live.css"}
    assert f"{info}licenses/LICENSE" in names


def test_nothing_makes_a_package_of_twisteds_folders(names: set[str]) -> None:
    # An __init__.py there would hide Twisted itself, or its plugins.
    assert not names & {"twisted/__init__.py", "twisted/plugins/__init__.py"}
    assert sorted(path.name for path in (ROOT / "twisted").rglob("*.py")) == ["realtime_plugin.py"]


def test_the_metadata_says_what_it_should(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        metadata = email.message_from_bytes(archive.read(f"twisted_realtime-{__version__}.dist-info/METADATA"))
    assert metadata["Name"] == "twisted-realtime"
    assert metadata["Version"] == __version__
    assert metadata["Requires-Python"] == ">=3.11"
    assert (metadata["License-Expression"] or metadata["License"]) == "MIT"
    assert "Typing :: Typed" in metadata.get_all("Classifier", [])
    assert metadata.get_payload().startswith("# ")  # the README


def test_an_installed_wheel_has_the_plugin_and_the_command(wheel: Path, tmp_path: Path) -> None:
    python = fresh_environment(tmp_path / "venv")
    install(python, wheel)
    (tmp_path / "empty").mkdir()
    assert "\n    realtime " in run(python, "-c", TWISTD, "--help", cwd=tmp_path / "empty")
    assert "--workers" in run(python, "-c", TWISTD, "realtime", "--help", cwd=tmp_path / "empty")
    assert run(python.parent / "realtime", "--version", cwd=tmp_path / "empty") == f"realtime {__version__}\n"
    assert run(python, "-m", "realtime", "--version", cwd=tmp_path / "empty") == f"realtime {__version__}\n"
    where = run(python, "-c", "import realtime.tap; print(realtime.tap.__file__)", cwd=tmp_path / "empty")
    assert where.startswith(str(tmp_path / "venv"))


def test_an_editable_install_has_the_plugin(checkout: Path, tmp_path: Path) -> None:
    python = fresh_environment(tmp_path / "venv")
    install(python, "--editable", checkout)
    (tmp_path / "empty").mkdir()
    assert "\n    realtime " in run(python, "-c", TWISTD, "--help", cwd=tmp_path / "empty")
    where = run(python, "-c", "import realtime.tap; print(realtime.tap.__file__)", cwd=tmp_path / "empty")
    assert where == f"{checkout / 'realtime' / 'tap.py'}\n"


def test_a_checkout_has_the_plugin_where_nothing_is_installed(checkout: Path, tmp_path: Path) -> None:
    python = fresh_environment(tmp_path / "venv")
    (tmp_path / "empty").mkdir()
    assert "\n    realtime " in run(python, "-c", TWISTD, "--help", cwd=checkout)
    assert "\n    realtime " not in run(python, "-c", TWISTD, "--help", cwd=tmp_path / "empty")


def test_the_example_serves_this_machine_only_unless_an_address_is_set(tmp_path: Path) -> None:
    for name in ("scripts", ".venv/bin"):
        (tmp_path / name).mkdir(parents=True)
    shutil.copy(ROOT / "scripts/run", tmp_path / "scripts/run")
    (tmp_path / "scripts/environment.bash").write_text("python_environment() { :; }\nnpm_packages() { :; }\n")
    (tmp_path / ".venv/bin/twistd").write_text('#!/bin/sh\necho "$REALTIME_HTTP_SERVER_ADDRESS"\n')
    (tmp_path / ".venv/bin/twistd").chmod(0o755)
    for given, address in (({}, "127.0.0.1"), ({"REALTIME_HTTP_SERVER_ADDRESS": "0.0.0.0"}, "0.0.0.0")):
        environment = {"PATH": os.environ["PATH"], **given}
        done = subprocess.run(
            [tmp_path / "scripts/run"], env=environment, capture_output=True, text=True, check=True, timeout=60
        )
        assert done.stdout.strip() == address
