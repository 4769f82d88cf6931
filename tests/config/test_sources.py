"""The three sources of settings, their precedence, and the file system."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from realtime.config.schema import environment_variables
from realtime.config.settings import Namespace, Settings, dump, load
from realtime.config.sources import MAX_FILE_BYTES, parse, read
from realtime.errors import SettingsError
from tests.config.parsing import parse_file, problems


def test_without_values_the_tree_has_its_defaults() -> None:
    assert parse({}, None, {}) == Settings()
    assert parse_file("") == Settings()


def test_a_file_sets_its_keys_and_keeps_other_defaults() -> None:
    settings = parse_file(
        """
        [http_server]
        port = 9000
        [client]
        allowed_origins = ["https://example.com"]
        ping_interval = "1m30s"
        [channel]
        namespaces = [{ name = "chat", history_size = 10, history_ttl = "5m" }]
        [channel.without_namespace]
        presence = true
        [app.options]
        rooms = ["lobby"]
        """
    )
    assert settings.http_server.port == 9000
    assert settings.http_server.internal_port == 8001
    assert settings.client.allowed_origins == ("https://example.com",)
    assert settings.client.ping_interval == 90.0
    assert settings.channel.namespaces == (Namespace(name="chat", history_size=10, history_ttl=300.0),)
    assert settings.channel.without_namespace.presence
    assert settings.app.options == {"rooms": ["lobby"]}


def test_arguments_override_variables_which_override_the_file() -> None:
    file = ("realtime.toml", "[workers]\ncount = 1\nthreads = 1\n[http_server]\nport = 1")
    environ = {"REALTIME_WORKERS_COUNT": "2", "REALTIME_WORKERS_THREADS": "2"}
    settings = parse({"workers.count": "3"}, file, environ)
    assert (settings.workers.count, settings.workers.threads, settings.http_server.port) == (3, 2, 1)


def test_invalid_toml_hides_no_wrong_variable_and_no_rule_is_checked() -> None:
    environ = {"REALTIME_LOG_LEVEL": "loud", "REALTIME_CHANNEL_WITHOUT_NAMESPACE_HISTORY_SIZE": "3"}
    found = problems("[", environ)
    assert [line.split(": ")[0] for line in found] == ["realtime.toml:1", "REALTIME_LOG_LEVEL"]


MARKS = st.text(alphabet="[]{}=.,'\"#\\ é1-\x85\ufeff\n\ra", max_size=20)
NAMES = st.sampled_from(
    ["client", "channel", "app", "namespaces", "options", "name", "ping_interval", "'a b'", "app.options.x", "[", "1"]
)
LITERALS = st.sampled_from(
    ["1", '"1s"', "'chat'", "nan", "[]", "{}", "[{name='ab'}]", "[[1,\n2],{}]", "1979-05-27", "#", "{a.b=1}"]
)
LINES = (
    st.builds("{} = {}".format, NAMES, LITERALS) | st.builds("[{}]".format, NAMES) | st.just("[[channel.namespaces]]")
)


@given(MARKS | st.lists(LINES, max_size=8).map("\n".join))
@example("[[channel.namespaces]]\nname='chat'\n[channel.namespaces.app]\n")
def test_parsing_a_file_raises_nothing_but_settings_error(text: str) -> None:
    try:
        settings = parse_file(text)
    except SettingsError as error:
        assert error.problems
        assert all(line.isprintable() and line.startswith("realtime.toml:") for line in error.problems)
    else:
        assert load(dump(settings)) == settings


VALUES = st.text(max_size=8) | st.sampled_from(
    [
        "1",
        "-1",
        "0x7",
        "1s",
        "1.5s",
        "true",
        "*",
        "/a",
        "[]",
        '[{"name": "ab"}]',
        "{}",
        '{"a": {"b": 1e400}}',
        "a:b",
        "ab cd",
    ]
)


@given(
    st.dictionaries(st.sampled_from([name for name, _, _ in environment_variables(Settings, {})]), VALUES, max_size=4)
)
def test_parsing_variables_raises_nothing_but_settings_error(environ: dict[str, str]) -> None:
    try:
        settings = parse({}, None, environ)
    except SettingsError as error:
        assert error.problems
        assert all(line.isprintable() and line.startswith("REALTIME_") for line in error.problems)
    else:
        assert load(dump(settings)) == settings


# The file system.


def test_a_relative_app_path_starts_at_the_files_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "realtime.toml").write_text("[app]\nmodule = 'chat:app'\npath = 'code'")
    monkeypatch.chdir(tmp_path.parent)
    settings = read(f"{tmp_path.name}/realtime.toml", {}, {})
    assert settings.app.path == str(tmp_path / "code")


def test_without_a_file_the_app_path_is_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert read(None, {"app.module": "chat:app"}, {}).app.path == str(tmp_path)


def test_a_missing_folder_of_the_app_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "realtime.toml"
    file.write_text("[app]\nmodule = 'chat:app'\npath = 'cod'")
    with pytest.raises(SettingsError, match=r"app\.path: no folder at .*/cod; correct the path"):
        read(str(file), {}, {})


def refused(config: Path) -> str:
    with pytest.raises(SettingsError) as caught:
        read(str(config), {}, {})
    (line,) = caught.value.problems
    return line.removeprefix(str(config))


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    assert refused(tmp_path / "no.toml").startswith(": can't be read: No such file or directory; ")


def test_a_folder_is_one_line(tmp_path: Path) -> None:
    assert refused(tmp_path).startswith(": can't be read: Is a directory; name a file in this folder")


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is unreadable to root")
def test_an_unreadable_file_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "realtime.toml"
    file.touch(mode=0o000)
    assert refused(file).startswith(": can't be read: Permission denied; ")


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that opens but can't be read")
def test_a_file_with_a_failing_read_is_one_line() -> None:
    assert refused(Path("/proc/self/mem")).startswith(": can't be read: Input/output error; name a readable file")


def test_bytes_other_than_utf8_are_one_line(tmp_path: Path) -> None:
    file = tmp_path / "realtime.toml"
    file.write_bytes(b"# a\n# b\nnode.name = '\xe9'\n")
    assert refused(file).startswith(":3: not UTF-8; save")


def test_utf16_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "realtime.toml"
    file.write_text("[client]", encoding="utf-16")
    assert refused(file).startswith(":1: not UTF-8; save")


def test_a_byte_order_mark_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "realtime.toml"
    file.write_text("[client]", encoding="utf-8-sig")
    assert refused(file).startswith(":1: starts with a byte order mark")


def test_a_huge_file_is_one_line_and_is_not_read_whole(tmp_path: Path) -> None:
    file = tmp_path / "realtime.toml"
    with file.open("wb") as sparse:
        sparse.truncate(100 * MAX_FILE_BYTES)
    assert refused(file).startswith(": larger than 1 MiB")


def test_a_mistake_at_the_end_of_a_large_file_has_its_line(tmp_path: Path) -> None:
    file = tmp_path / "realtime.toml"
    file.write_text("# comment\n" * 100_000 + "[client]\nnope = 1\n")
    assert refused(file).startswith(":100002: client.nope: unknown key")


def test_an_unreadable_certificate_is_one_line_with_its_key(tmp_path: Path) -> None:
    file = tmp_path / "realtime.toml"
    file.write_text("engine.redis.tls.server_ca_pem = 'missing.pem'\nengine.type = 'redis'")
    assert refused(file) == (
        "engine.redis.tls.server_ca_pem: neither PEM text nor a readable file: No such file or directory; correct it"
    )
    file.write_text("engine.redis.tls.server_ca_pem = 'missing.pem'")  # not in use
    read(str(file), {}, {})


def test_a_relative_path_of_a_certificate_starts_at_the_folder_of_the_file(tmp_path: Path) -> None:
    file, certificate = tmp_path / "realtime.toml", tmp_path / "ca.pem"
    file.write_text("engine.redis.tls.server_ca_pem = 'ca.pem'\nengine.type = 'redis'")
    certificate.write_text("-----BEGIN CERTIFICATE-----")
    assert read(str(file), {}, {}).engine.redis.tls.server_ca_pem == str(certificate)
    text = "-----BEGIN CERTIFICATE-----\n"
    environ = {"REALTIME_ENGINE_REDIS_SENTINEL_TLS_CERT_PEM": text, "REALTIME_ENGINE_REDIS_SENTINEL_TLS_KEY_PEM": text}
    assert read(str(file), {}, environ).engine.redis.sentinel_tls.cert_pem == text


def test_a_line_break_in_the_file_name_adds_no_line(tmp_path: Path) -> None:
    file = tmp_path / "a\nb.toml"
    file.write_text("nope = 1")
    with pytest.raises(SettingsError) as caught:
        read(str(file), {}, {})
    assert "\n" not in str(caught.value)
