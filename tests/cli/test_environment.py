"""The checks of packages and libraries before a start."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from realtime.cli import environment
from realtime.config.settings import HTTPAPISettings, Settings


def install(folder: Path, name: str, version: str, *lines: str, package: str | None = None) -> None:
    """Write the metadata of a distribution into a folder of packages."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    info.joinpath("METADATA").write_text(
        "\n".join(["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *lines])
    )
    if package:
        info.joinpath("top_level.txt").write_text(package)


def test_this_environment_has_no_problems() -> None:
    assert environment.find_problems() == []


def test_a_conflicting_distribution_is_a_problem_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "realtime", "2.34.1", package="realtime")
    monkeypatch.syspath_prepend(tmp_path)
    (line,) = environment.find_problems()
    assert line.startswith("realtime: also installs the package `realtime`")
    assert "reinstall twisted-realtime in a virtual environment without realtime" in line


def test_the_server_does_not_start_beside_a_conflicting_distribution(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "realtime", "2.34.1", package="realtime")
    root = Path(environment.__file__).parents[2]
    for command in (
        ["twisted.scripts.twistd", "run()", "-n", "realtime"],
        ["realtime.cli.main", "sys.exit(main())", "check-config"],
    ):
        module, call, *arguments = command
        code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(root)!r}]; from {module} import *; {call}"
        code = code.replace("import *", "import run" if call == "run()" else "import main")
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 78
        assert done.stderr.startswith("realtime: also installs the package `realtime`")
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("requirement", "version", "refused"),
    [
        ("fake[tls]>=26.10", "26.9.1", True),
        ("fake[tls]>=26.10", "26.10.0", False),
        ("fake>=26.10", "27.1rc1", False),
        ("fake>=2", "1.99", True),
        ("fake>=2; extra == 'dev'", "1.0", False),
        ("fake", "0.1", False),
        ("absent>=2", "1.0", False),
    ],
)
def test_a_library_below_its_minimum_version_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, requirement: str, version: str, refused: bool
) -> None:
    install(tmp_path, "fake", version)
    install(tmp_path, "twisted-realtime", "9.9", f"Requires-Dist: {requirement}")
    monkeypatch.syspath_prepend(tmp_path)
    lines = environment.find_problems()
    assert len(lines) == refused
    assert all(line.startswith(f"fake: version {version} is too old") and "pip install" in line for line in lines)


@pytest.mark.parametrize("environ", [{}, {"AUTOBAHN_USE_NVX": "0"}, {"AUTOBAHN_USE_NVX": "No"}])
def test_nvx_is_detected_as_autobahn_detects_it(environ: dict[str, str]) -> None:
    code = "from autobahn.websocket import USES_NVX; print(USES_NVX)"
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == str(environment.uses_nvx(environ))
    assert len(environment.find_warnings(environ)) == (done.stdout.strip() == "False")


@pytest.mark.parametrize(
    ("quota", "line"),
    [
        (1e9, "6 usable: 6 of 8 by affinity"),
        (1.5, "2 usable: 6 of 8 by affinity, quota of 1.5 by the control group"),
    ],
)
def test_the_description_names_the_limits_of_the_cores(
    monkeypatch: pytest.MonkeyPatch, quota: float, line: str
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(6)))
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setattr("realtime.config.cores.cpu_quota", lambda root=None: quota)
    assert environment.describe({})["cores"] == line


@pytest.mark.parametrize(("uid", "drops_root", "count"), [(0, False, 1), (0, True, 0), (1000, False, 0)])
def test_a_server_that_stays_root_is_an_exposure(
    monkeypatch: pytest.MonkeyPatch, uid: int, drops_root: bool, count: int
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: uid)
    lines = environment.find_exposure(None, Settings(), drops_root)
    assert len(lines) == count
    assert all("run as root" in line and "--uid" in line for line in lines)


@pytest.mark.parametrize(
    ("mode", "key", "count"), [(0o644, "k" * 32, 1), (0o640, "k" * 32, 0), (0o600, "k" * 32, 0), (0o644, "", 0)]
)
def test_secrets_that_every_user_may_read_are_an_exposure(tmp_path: Path, mode: int, key: str, count: int) -> None:
    file = tmp_path / "realtime.toml"
    file.touch(mode)
    file.chmod(mode)
    lines = environment.find_exposure(str(file), Settings(http_api=HTTPAPISettings(key=key)), drops_root=True)
    assert len(lines) == count
    assert all(line.startswith(f"{file}: ") and "chmod 640" in line and key not in line for line in lines)
