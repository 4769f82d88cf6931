"""`twistd realtime`: from the command line to the supervisor and its settings."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

import pytest
from twisted.application.service import IServiceMaker
from twisted.logger import LogLevel, capturedLogs
from twisted.plugin import getPlugins
from twisted.python.usage import Options, UsageError
from twisted.scripts.twistd import ServerOptions

from realtime import tap
from realtime.cli import environment
from realtime.config.settings import Settings


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("REALTIME_", "CENTRIFUGO_")):
            monkeypatch.delenv(name)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """Collects the settings of the requested supervisors, and makes none."""
    settings: list[Settings] = []
    monkeypatch.setattr(tap, "make_service", lambda given, **_: settings.append(given))
    return settings


def start(*arguments: str) -> None:
    options = tap.Options()
    options.parseOptions(arguments)
    tap.makeService(options)


def test_without_options_the_defaults_are_used(made: list[Settings]) -> None:
    start()
    assert made == [Settings()]


def test_the_limit_on_descriptors_is_raised(made: list[Settings]) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = before[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, most))
    try:
        start()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (min(most, 1 << 20), most)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_options_win_over_the_environment_which_wins_over_the_file(
    made: list[Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "realtime.toml"
    file.write_text("[workers]\ncount = 1\nthreads = 2\n[http_server]\nport = 1\nbacklog = 7")
    monkeypatch.setenv("REALTIME_WORKERS_COUNT", "3")
    monkeypatch.setenv("REALTIME_HTTP_SERVER_PORT", "4")
    start("--config", str(file), "--port", "5", "--app", "chat:app")
    (settings,) = made
    assert (settings.workers.count, settings.workers.threads) == (3, 2)
    assert (settings.http_server.port, settings.http_server.backlog) == (5, 7)
    assert (settings.app.module, settings.app.path) == ("chat:app", str(tmp_path))


def test_short_options_are_the_long_ones(made: list[Settings]) -> None:
    start("-w", "2", "-p", "0")
    (settings,) = made
    assert (settings.workers.count, settings.http_server.port) == (2, 0)


def test_with_mistakes_all_are_printed_and_no_supervisor_is_made(
    made: list[Settings], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "find_problems", lambda: ["fake: version 1 is too old; upgrade it"])
    with pytest.raises(SystemExit) as stopped:
        start("--workers", "many")
    assert stopped.value.code == 78
    shown = capsys.readouterr()
    assert shown.out == ""
    assert [line.split(":")[0] for line in shown.err.splitlines()] == ["fake", "command line"]
    assert made == []


def test_a_daemon_starts_although_the_import_of_its_application_raises(
    made: list[Settings], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in the foreground: a database may come up a little later."""
    (tmp_path / "chat.py").write_text("raise OSError('no database')")
    (tmp_path / "realtime.toml").write_text('[app]\nmodule = "chat:app"')
    twistd = Options()
    options = tap.Options()
    options.parent = twistd
    options.parseOptions(["--config", str(tmp_path / "realtime.toml")])
    with capturedLogs() as logged:
        tap.makeService(options)
    assert len(made) == 1
    expected = "chat.py:1: OSError: no database; the workers will try again"
    assert expected in capsys.readouterr().err
    assert any(expected in event["line"] for event in logged)


def test_warnings_are_logged_and_the_server_starts(made: list[Settings], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REALTIME_CLIENT_INSECURE", "true")
    monkeypatch.setenv("REALTIME_{BRACES}", "1")
    monkeypatch.setenv("AUTOBAHN_USE_NVX", "0")
    monkeypatch.setattr("os.geteuid", lambda: 0)
    with capturedLogs() as logged:
        start()
    assert all(event["log_level"] is LogLevel.warn for event in logged)
    subjects = ["client.insecure", "REALTIME_{BRACES}", "autobahn", "the server and the application run as root"]
    assert [event["line"].split(":")[0] for event in logged] == subjects
    assert len(made) == 1


def test_a_surplus_argument_is_a_usage_error() -> None:
    with pytest.raises(UsageError):
        tap.Options().parseOptions(["chat:app"])


def test_the_plugin_names_these_options_and_this_service() -> None:
    (maker,) = (plugin for plugin in getPlugins(IServiceMaker) if plugin.tapname == "realtime")
    assert maker.options is tap.Options
    assert maker.makeService is tap.makeService


def test_each_insecure_setting_is_a_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REALTIME_CLIENT_INSECURE", "true")
    monkeypatch.setenv("REALTIME_CLIENT_TOKEN_HMAC_SECRET_KEY", "secret")
    monkeypatch.setattr("os.geteuid", lambda: 0)
    options = tap.Options()
    options.parseOptions([])
    metrics = tap.makeService(options).metrics  # type: ignore[attr-defined]
    found = [sample.labels for sample in metrics.snapshot() if sample.name == "realtime_insecure_settings"]
    assert found == [[("key", key)] for key in ("client.insecure", "client.token.hmac_secret_key", "root")]


def launch(*arguments: str) -> list[str]:
    """Return the arguments with which twistd would be executed for an upgrade."""
    options = ServerOptions()
    options.parseOptions(arguments)
    given = {"workers.count": "3"} if "--workers" in arguments else {}
    launch = tap._launch(options.subOptions, given)
    assert launch is not None
    assert launch.command[0] == sys.executable
    return launch.command[launch.command.index("--nodaemon") :]


def test_an_upgrade_starts_twistd_in_the_foreground_with_the_same_log_and_options(tmp_path: Path) -> None:
    same = ["--nodaemon", "--pidfile=", "--no_save", "--originalname"]
    assert launch("-n", "realtime") == [*same, "realtime"]
    assert launch("realtime") == [*same, "--logfile=twistd.log", "realtime"], "a daemon's default"
    assert launch("--syslog", "realtime") == [*same, "--syslog", "--prefix=twisted", "realtime"]
    config = os.path.relpath(tmp_path / "a.toml")
    expected = [*same, "--logfile=x.log", "realtime", f"--config={tmp_path}/a.toml", "--workers=3"]
    assert launch("--logfile=x.log", "realtime", "--config", config, "--workers", "3") == expected
    options = tap.Options()
    options.parseOptions([])
    assert tap._launch(options, {}) is None, "another program than twistd"
