"""`realtime ...` and `twistd realtime`, run as an operator runs them, each in its own process."""

from __future__ import annotations

import os
import re
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from realtime import __version__
from realtime.config.sources import read

ROOT = Path(__file__).parents[2]
REALTIME = [sys.executable, "-m", "realtime"]
TWISTD = [sys.executable, "-c", "from twisted.scripts.twistd import run; run()"]
EX_CONFIG = 78


def run(command: list[str], cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("REALTIME_", "CENTRIFUGO_"))}
    inherited["PYTHONPATH"] = str(ROOT)
    return subprocess.run(
        command, cwd=cwd, env=inherited | environ, capture_output=True, text=True, timeout=60, umask=0o022
    )


def realtime(cwd: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return run([*REALTIME, *arguments], cwd, **environ)


def twistd(cwd: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return run([*TWISTD, "-n", "realtime", *arguments], cwd, **environ)


# check-config and the start of the server.

BAD = {
    "unknown key": "[client]\nping_intervall = '25s'",
    "bad unit": "[client]\nping_interval = 25",
    "bad TOML": "[client",
    "contradiction": "[client]\npong_timeout = '30s'",
    "several": "[client]\npong_timeout = '30s'\n[log]\nlevel = 5\n[workers]\ncount = -1\nx = 1",
    "missing folder": "[app]\nmodule = 'chat:app'\npath = 'nowhere'",
}


@pytest.mark.parametrize("text", BAD.values(), ids=BAD)
def test_check_config_and_the_server_report_the_same_problems_and_bind_nothing(tmp_path: Path, text: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        # A server that got as far as binding would report this port too.
        port = taken.getsockname()[1]
        (tmp_path / "realtime.toml").write_text(text)
        environ = {"REALTIME_HTTP_SERVER_ADDRESS": "127.0.0.1", "REALTIME_HTTP_SERVER_PORT": str(port)}
        checked = realtime(tmp_path, "check-config", "--config", "realtime.toml", **environ)
        started = twistd(tmp_path, "--config", "realtime.toml", **environ)
    assert checked.returncode == started.returncode == EX_CONFIG
    assert checked.stdout == started.stdout == ""
    assert checked.stderr == started.stderr
    assert "Traceback" not in checked.stderr
    for line in checked.stderr.splitlines():
        assert re.match(r"realtime\.toml:\d+: |app\.path: ", line), line
    assert os.listdir(tmp_path) == ["realtime.toml"]


def test_each_problem_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "realtime.toml").write_text(BAD["several"])
    checked = realtime(tmp_path, "check-config", "-c", "realtime.toml")
    assert [line.split(": ")[1] for line in checked.stderr.splitlines()] == [
        "log.level",
        "workers.count",
        "workers.x",
        "client.pong_timeout",
    ]


@pytest.mark.parametrize("config", ["missing.toml", ".", "/dev/null/x"])
def test_an_unreadable_file_is_one_line(tmp_path: Path, config: str) -> None:
    checked = realtime(tmp_path, "check-config", "-c", config)
    started = twistd(tmp_path, "-c", config)
    assert checked.returncode == started.returncode == EX_CONFIG
    assert checked.stderr == started.stderr
    assert checked.stderr.count("\n") == 1
    assert checked.stderr.startswith(f"{config}: can't be read: ")


def test_check_config_and_the_server_refuse_a_wrong_variable(tmp_path: Path) -> None:
    checked = realtime(tmp_path, "check-config", REALTIME_WORKERS_COUNT="two")
    started = twistd(tmp_path, REALTIME_WORKERS_COUNT="two")
    assert checked.returncode == started.returncode == EX_CONFIG
    assert checked.stderr == started.stderr
    assert checked.stderr.startswith("REALTIME_WORKERS_COUNT: workers.count: expected a whole number")


@pytest.mark.parametrize(("option", "key"), [("--workers", "workers.count"), ("--port", "http_server.port")])
def test_a_wrong_option_value_is_a_wrong_configuration(tmp_path: Path, option: str, key: str) -> None:
    started = twistd(tmp_path, option, "many")
    assert started.returncode == EX_CONFIG
    assert started.stderr.startswith(f"command line: {key}: expected a whole number")
    assert started.stderr.count("\n") == 1


def test_the_daemon_reports_problems_on_the_terminal_before_it_forks(tmp_path: Path) -> None:
    (tmp_path / "realtime.toml").write_text("x = 1")
    started = run([*TWISTD, "realtime", "-c", "realtime.toml"], tmp_path)
    assert started.returncode == EX_CONFIG
    assert started.stderr.startswith("realtime.toml:1: x: unknown key")
    assert os.listdir(tmp_path) == ["realtime.toml"]


def test_twistd_refuses_an_unknown_option_of_the_server(tmp_path: Path) -> None:
    started = twistd(tmp_path, "--nope")
    assert started.returncode == 1
    assert "option --nope not recognized" in started.stdout + started.stderr
    assert "Traceback" not in started.stdout + started.stderr


def test_the_help_of_twistd_lists_the_servers_options(tmp_path: Path) -> None:
    started = twistd(tmp_path, "--help")
    assert started.returncode == 0
    for option in ("--config", "--workers", "--app", "--port", "--version"):
        assert option in started.stdout
    assert twistd(tmp_path, "--version").stdout == f"realtime {__version__}\n"


def test_warnings_are_printed_and_fail_only_when_strict(tmp_path: Path) -> None:
    environ = {"REALTIME_CLIENT_INSECURE": "true", "REALTIME_OOPS": "1", "CENTRIFUGO_PORT": "1"}
    checked = realtime(tmp_path, "check-config", **environ)
    assert checked.returncode == 0
    assert checked.stdout == "environment: good\n"
    assert [line.split(": ")[:2] for line in checked.stderr.splitlines()] == [
        ["warning", "client.insecure"],
        ["warning", "REALTIME_OOPS"],
        ["warning", "CENTRIFUGO_PORT"],
    ]
    assert realtime(tmp_path, "check-config", "--strict", **environ).returncode == EX_CONFIG
    assert realtime(tmp_path, "check-config", "--strict").returncode == 0


def test_commands_work_in_centrifugos_spelling_too(tmp_path: Path) -> None:
    assert realtime(tmp_path, "genconfig", "-c", "new.toml").returncode == 0
    assert realtime(tmp_path, "checkconfig", "-c", "new.toml").returncode == 0


# gen-config.


def test_a_generated_file_is_valid_private_and_never_overwritten(tmp_path: Path) -> None:
    file = tmp_path / "realtime.toml"
    first = realtime(tmp_path, "gen-config", "--config", "realtime.toml")
    assert (first.returncode, first.stderr) == (0, "")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    settings = read(str(file), {}, {})
    for secret in (settings.client.token.hmac_secret_key, settings.http_api.key):
        assert len(secret) >= 32
        assert secret not in first.stdout
    assert realtime(tmp_path, "check-config", "--strict", "-c", "realtime.toml").returncode == 0

    before = file.read_text()
    second = realtime(tmp_path, "gen-config", "--config", "realtime.toml")
    assert second.returncode == 1
    assert second.stderr.startswith("realtime.toml: can't be written: File exists; ")
    assert file.read_text() == before


def test_generating_a_file_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "link.toml").symlink_to(tmp_path / "elsewhere.toml")
    assert realtime(tmp_path, "gen-config", "-c", "link.toml").returncode == 1
    assert not (tmp_path / "elsewhere.toml").exists()


def test_generating_a_file_in_a_missing_folder_fails(tmp_path: Path) -> None:
    done = realtime(tmp_path, "gen-config", "-c", "no/realtime.toml")
    assert done.returncode == 1
    assert done.stderr == "no/realtime.toml: can't be written: No such file or directory; name another file\n"


def test_a_configuration_in_json_is_converted_by_the_command_that_its_error_names(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"client": {"ping_interval": "20s"}, "admin": {"enabled": true}}')
    done = realtime(tmp_path, "check-config", "--config", "config.json")
    remedy = "realtime gen-config --from config.json --config realtime.toml"
    assert (done.returncode, done.stderr) == (
        78,
        f"config.json:1: JSON, but realtime reads TOML; convert it with: {remedy}\n",
    )
    assert realtime(tmp_path, *remedy.split()[1:]).returncode == 0
    assert stat.S_IMODE((tmp_path / "realtime.toml").stat().st_mode) == 0o600
    assert realtime(tmp_path, "check-config", "-c", "realtime.toml").returncode == 0
    assert read(str(tmp_path / "realtime.toml"), {}, {}).client.ping_interval == 20.0
    for wrong in ("realtime.toml", "missing.json"):
        done = realtime(tmp_path, "gen-config", "--from", wrong)
        assert (done.returncode, done.stderr.count("\n")) == (78, 1)


def test_each_printed_configuration_has_new_secrets(tmp_path: Path) -> None:
    secrets = set()
    for index in range(2):
        done = realtime(tmp_path, "gen-config")
        (tmp_path / f"{index}.toml").write_text(done.stdout)
        settings = read(str(tmp_path / f"{index}.toml"), {}, {})
        secrets |= {settings.client.token.hmac_secret_key, settings.http_api.key}
    assert len(secrets) == 4


# info, --version and wrong usage.


def test_info_prints_versions_and_kernel_features(tmp_path: Path) -> None:
    done = realtime(tmp_path, "info")
    assert done.returncode == 0
    lines = dict(re.split(r"  +", line, maxsplit=1) for line in done.stdout.splitlines())
    assert lines["realtime"] == __version__
    assert lines["python"].endswith(sys.version.split()[0])
    for name in ("twisted", "autobahn", "msgspec", "nvx", "kernel", "steering", "port sharing"):
        assert lines[name]


def test_the_version_is_one_line(tmp_path: Path) -> None:
    done = realtime(tmp_path, "--version")
    assert (done.returncode, done.stdout) == (0, f"realtime {__version__}\n")


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["check-config", "--nope"], ["check-config", "extra"]])
def test_wrong_usage_is_status_2(tmp_path: Path, arguments: list[str]) -> None:
    done = realtime(tmp_path, *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: realtime")
    assert "Traceback" not in done.stderr


# dump.


def test_a_dump_without_a_server_prints_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    done = realtime(tmp_path, "dump", "stacks", "--port", str(port))
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 1
    assert f"http://127.0.0.1:{port}/dump?worker=0&what=stacks: no answer" in done.stderr


def test_a_dump_ignores_proxies_of_the_environment(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as proxy, socket.create_server(("127.0.0.1", 0)) as free:
        proxy.settimeout(0)
        port = free.getsockname()[1]
        free.close()
        environ = {"http_proxy": f"http://127.0.0.1:{proxy.getsockname()[1]}", "no_proxy": ""}
        done = realtime(tmp_path, "dump", "stacks", "--port", str(port), **environ)
        assert "no answer" in done.stderr
        with pytest.raises(BlockingIOError):
            proxy.accept()


def test_a_dump_refuses_a_wrong_configuration(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("[client")
    assert realtime(tmp_path, "dump", "stacks", "--config", "bad.toml").returncode == EX_CONFIG


# The application, and what twistd writes.


def test_check_config_and_a_daemon_report_an_application_that_does_not_load(tmp_path: Path) -> None:
    (tmp_path / "chat.py").write_text("app = (")
    (tmp_path / "realtime.toml").write_text('[app]\nmodule = "chat:app"')
    checked = realtime(tmp_path, "check-config", "-c", "realtime.toml")
    started = run([*TWISTD, "realtime", "-c", "realtime.toml"], tmp_path)
    assert checked.returncode == started.returncode == EX_CONFIG
    assert checked.stderr == started.stderr
    assert checked.stderr.startswith('app.module = "chat:app": ')
    assert "twistd.pid" not in os.listdir(tmp_path)
    assert realtime(tmp_path, "check-config", "--without-app", "-c", "realtime.toml").returncode == 0


@pytest.mark.parametrize("arguments", [["-n"], ["--nodaemon", "--pidfile=twistd.pid"]])
def test_in_the_foreground_a_pid_file_of_a_killed_server_does_not_count(tmp_path: Path, arguments: list[str]) -> None:
    """In a container the killed server had the same pid as the next one."""
    (tmp_path / "twistd.pid").write_text(str(os.getpid()))
    (tmp_path / "realtime.toml").write_text('[app]\nmodule = "nosuch:app"\n[http_server]\nport = 0\ninternal_port = 0')
    started = run([*TWISTD, *arguments, "realtime", "-c", "realtime.toml"], tmp_path)
    assert started.returncode == EX_CONFIG
    assert "Another twistd server is running" not in started.stdout + started.stderr
    assert (tmp_path / "twistd.pid").read_text() == str(os.getpid())
