"""Settings from three sources, and the one line that each mistake gets."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from realtime.config import centrifugo_keys
from realtime.config.reader import dotted, duration, keys, leaves, variables, write_duration
from realtime.config.settings import MAX_FILE_BYTES, Namespace, Settings, dump, load, parse, read
from realtime.config.toml_lines import commented, tables
from realtime.config.warnings import unwise, warnings
from realtime.errors import SettingsError


def of_file(text: str) -> Settings:
    return parse({}, ("realtime.toml", text), {})


def problems(
    text: str | None = None, environ: Mapping[str, str] | None = None, arguments: Mapping[str, str] | None = None
) -> list[str]:
    """The lines that a configuration is refused with; each is one line, with a place before the first colon."""
    with pytest.raises(SettingsError) as caught:
        parse(arguments or {}, None if text is None else ("realtime.toml", text), environ or {})
    for line in caught.value.problems:
        assert line.isprintable()
        assert ": " in line
    return caught.value.problems


def problem(text: str | None = None, environ: Mapping[str, str] | None = None) -> str:
    (line,) = problems(text, environ)
    return line


# The three sources.


def test_nothing_given_is_the_tree_of_defaults() -> None:
    assert parse({}, None, {}) == Settings()
    assert of_file("") == Settings()


def test_a_file_sets_what_it_names_and_leaves_the_rest() -> None:
    settings = of_file(
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


def test_arguments_win_over_the_environment_and_that_over_the_file() -> None:
    file = ("realtime.toml", "[workers]\ncount = 1\nthreads = 1\n[http_server]\nport = 1")
    environ = {"REALTIME_WORKERS_COUNT": "2", "REALTIME_WORKERS_THREADS": "2"}
    settings = parse({"workers.count": "3"}, file, environ)
    assert (settings.workers.count, settings.workers.threads, settings.http_server.port) == (3, 2, 1)


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ('[http_server]\ninternal_port = "9001"', "http_server.internal_port", 9001),
        ('[client]\nallowed_origins = "*"', "client.allowed_origins", ("*",)),
        ('[log]\nlevel = "WARN"', "log.level", "warn"),
        ('[http_api]\nhandler_prefix = "/v1/api//"', "http_api.handler_prefix", "/v1/api"),
        ('[websocket]\nhandler_prefix = "/"', "websocket.handler_prefix", "/"),
        ('[loop]\nstuck = "0"', "loop.stuck", 0.0),
        ('[client]\nping_interval = "0"', "client.ping_interval", 0.0),
        ("[client]\nchannel_limit = 0", "client.channel_limit", 0),
        ("[workers]\ncount = 0", "workers.count", 0),
        ('[channel]\nprivate_prefix = ""', "channel.private_prefix", ""),
        ('[http_server]\naddress = "::1"', "http_server.address", "::1"),
        ('[app]\nmodule = "shop.live:app"', "app.module", "shop.live:app"),
        ("client.token.max_length = 0x10", "client.token.max_length", 16),
    ],
)
def test_forms_that_a_file_may_use(text: str, key: str, value: object) -> None:
    assert value_at(of_file(text), key) == value


def value_at(settings: Settings, key: str) -> object:
    found: object = settings
    for part in key.split("."):
        found = getattr(found, part)
    return found


@pytest.mark.parametrize(
    ("name", "text", "key", "value"),
    [
        *(("CLIENT_INSECURE", text, "client.insecure", True) for text in ("1", "t", "T", "TRUE", "true", "True")),
        *(("CLIENT_INSECURE", text, "client.insecure", False) for text in ("0", "f", "F", "FALSE", "false", "False")),
        ("WORKERS_COUNT", "4", "workers.count", 4),
        ("WORKERS_COUNT", "0x10", "workers.count", 16),
        ("WORKERS_COUNT", "0b11", "workers.count", 3),
        ("WEBSOCKET_MESSAGE_SIZE_LIMIT", "1_000", "websocket.message_size_limit", 1000),
        ("CLIENT_PING_INTERVAL", "1h30m", "client.ping_interval", 5400.0),
        ("CLIENT_PING_INTERVAL", "", "client.ping_interval", 25.0),
        ("CLIENT_ALLOWED_ORIGINS", "https://a https://b", "client.allowed_origins", ("https://a", "https://b")),
        ("CLIENT_TOKEN_HMAC_SECRET_KEY", "hush", "client.token.hmac_secret_key", "hush"),
        ("APP_OPTIONS", '{"a": [1, 2.5, null]}', "app.options", {"a": [1, 2.5, None]}),
        ("CHANNEL_WITHOUT_NAMESPACE_PRESENCE", "true", "channel.without_namespace.presence", True),
        ("PORT", "tcp://10.0.0.1:8000", "http_server.port", 8000),
    ],
)
def test_forms_that_a_variable_may_use(name: str, text: str, key: str, value: object) -> None:
    assert value_at(parse({}, None, {f"REALTIME_{name}": text}), key) == value


def test_every_key_has_a_variable_of_its_own() -> None:
    names = [name for name, _, _ in variables(Settings, {})]
    assert len(names) == len(set(names))
    assert "REALTIME_CLIENT_TOKEN_HMAC_SECRET_KEY" in names


def test_names_in_a_variable_are_added_to_the_files_namespaces() -> None:
    settings = parse(
        {},
        ("realtime.toml", '[[channel.namespaces]]\nname = "chat"\npresence = true'),
        {
            "REALTIME_CHANNEL_NAMESPACES": "news a-b.c",
            "REALTIME_CHANNEL_NAMESPACES_CHAT_JOIN_LEAVE": "true",
            "REALTIME_CHANNEL_NAMESPACES_NEWS_HISTORY_SIZE": "5",
            "REALTIME_CHANNEL_NAMESPACES_NEWS_HISTORY_TTL": "10s",
            "REALTIME_CHANNEL_NAMESPACES_A_B_C_PRESENCE": "1",
        },
    )
    assert settings.channel.namespaces == (
        Namespace(name="chat", presence=True, join_leave=True),
        Namespace(name="news", history_size=5, history_ttl=10.0),
        Namespace(name="a-b.c", presence=True),
    )


def test_a_json_array_in_a_variable_replaces_the_files_namespaces() -> None:
    settings = parse(
        {},
        ("realtime.toml", '[[channel.namespaces]]\nname = "chat"\n[[channel.namespaces]]\nname = "more"'),
        {
            "REALTIME_CHANNEL_NAMESPACES": '[{"name": "news", "presence": true}]',
            "REALTIME_CHANNEL_NAMESPACES_NEWS_JOIN_LEAVE": "true",
        },
    )
    assert settings.channel.namespaces == (Namespace(name="news", presence=True, join_leave=True),)


# What is refused: by the text of the file, the line it is blamed on, and what the message must say.

REFUSED = [
    # unknown keys
    ("[client]\npong_timeot = '1s'", 2, "client.pong_timeot: unknown key; did you mean client.pong_timeout?"),
    ("\n\nport = 80", 3, "port: unknown key; did you mean http_server.port?"),
    ("[clients]\na = 1", 1, "clients: unknown key; did you mean client?"),
    ("[Client]", 1, "Client: unknown key; did you mean client?"),
    ("quite_something = 1", 1, "quite_something: unknown key; remove it"),
    ('"a\\nb" = 1', 1, '"a\\nb": unknown key'),
    ("client.token.hmac = 'a'", 1, "client.token.hmac: unknown key"),
    ("[[channel.namespaces]]\nname = 'chat'\nhistory_tl = '1s'", 3, "did you mean channel.namespaces[0].history_ttl?"),
    ("channel = { namespaces = [\n{ name = 'ab' },\n{ name = 'cd', x = 1 }] }", 3, "channel.namespaces[1].x"),
    # keys of Centrifugo
    ("[admin]\nenabled = true", 1, "admin: a Centrifugo key that realtime does not support yet"),
    ("[grpc_api]\nenabled = true", 1, "grpc_api: a Centrifugo key that realtime does not support; remove it"),
    ("[client]\npresence_update_interval = '9s'", 2, "client.presence_update_interval: a Centrifugo key that realtime"),
    (
        "[channel.without_namespace]\nsubscription_type = 'map'",
        2,
        "a Centrifugo key that realtime does not support yet",
    ),
    ("[[channel.namespaces]]\nname = 'ab'\npublish_proxy_name = 'x'", 3, "a Centrifugo key that realtime does not"),
    # wrong types
    ("[http_server]\nport = 'eighty'", 2, 'expected a whole number from 0 to 65535, got "eighty"; correct it, or'),
    ("[http_server]\nport = 80.5", 2, "http_server.port: expected a whole number"),
    ("[http_server]\nport = true", 2, "got true; correct it, or remove it for the default, 8000"),
    ("[http_server]\nport = [80]", 2, "got [80]"),
    ("[http_server]\nport = 1979-05-27", 2, "got a date or time"),
    ("[http_server]\nport = '0o8'", 2, "expected a whole number"),
    ("[http_server]\nport = '010'", 2, "expected a whole number"),
    ("[http_server]\nport = ' 80'", 2, "expected a whole number"),
    ("[http_server]\nport = '٨٠'", 2, "expected a whole number"),
    ("[client]\ninsecure = 1", 2, "client.insecure: expected true or false, got 1"),
    ("[client]\ninsecure = 'true'", 2, 'expected true or false, got "true"'),
    ("[node]\nname = 5", 2, "node.name: expected text in quotes, got 5"),
    ("[client]\nallowed_origins = [1]", 2, "client.allowed_origins: expected a list of origin patterns"),
    ("[channel]\nnamespaces = 3", 2, "expected a list of tables, got 3; write [[channel.namespaces]]"),
    ("[channel]\nnamespaces = ['chat']", 2, 'expected a list of tables, got ["chat"]'),
    ("[channel.namespaces]\nname = 'chat'", 1, "expected a list of tables, got a table"),
    ("client = 'x'", 1, 'client: expected a table, got "x"; write [client]'),
    ("[app]\noptions = 'x'", 2, "app.options: expected a table"),
    ("[app]\noptions = { big = 99999999999999999999 }", 2, "app.options: expected a table"),
    ("[app]\noptions = { when = 1979-05-27 }", 2, "app.options: expected a table"),
    ("[app]\noptions = { odd = nan }", 2, "app.options: expected a table"),
    ("[client.token]\nhmac_secret_key = 12345", 2, "expected text in quotes, got something else"),
    # durations
    ("[client]\nping_interval = 25", 2, '"25s" or "1h30m") of at least 0, got 25; write "25s" if seconds were meant'),
    ("[client]\nping_interval = 2.5", 2, 'write "2s500ms" if seconds were meant'),
    ("[client]\nping_interval = '25'", 2, "expected a duration with its unit"),
    ("[client]\nping_interval = '1d'", 2, "expected a duration with its unit"),
    ("[client]\nping_interval = '1s 5ms'", 2, "expected a duration with its unit"),
    ("[client]\nping_interval = '9999999999h'", 2, "expected a duration"),
    ("[loop]\nstuck = 0", 2, 'loop.stuck: expected a duration with its unit (such as "25s" or "1h30m") of at least 0'),
    ("[workers]\nstart_timeout = '0'", 2, "above 0"),
    ("[[channel.namespaces]]\nname='ab'\nhistory_size=1\nhistory_ttl='1.5s'", 4, "in whole seconds"),
    ("[channel]\nhistory_meta_ttl = '1ms'", 2, "in whole seconds"),
    # out of range
    ("[http_server]\nport = 65536", 2, "from 0 to 65535, got 65536"),
    ("[http_server]\nport = -1", 2, "from 0 to 65535, got -1"),
    ("[client]\nchannel_limit = -1", 2, "at least 0, got -1"),
    ("[websocket]\nmessage_size_limit = 0", 2, "at least 1, got 0"),
    ("[client]\nchannel_limit = 9223372036854775808", 2, "got a number beyond 64 bits"),
    ("[client]\nchannel_limit = 0x" + "f" * 5000, 2, "got a number beyond 64 bits"),
    ("[client]\nconnection_limit = -5", 2, "client.connection_limit: expected a whole number of at least 0"),
    ("[shutdown]\ntimeout = '-1s'", 2, 'at least 0, got "-1s"'),
    ("[workers]\ncount = -1", 2, "workers.count"),
    ("[channel]\nnamespace_boundary = ''", 2, 'expected text in quotes that is not empty, got ""'),
    # values with a form of their own
    ("[log]\nlevel = 'loud'", 2, 'one of "debug", "error", "info", "none", "trace", "warn", got "loud"'),
    ("[engine]\ntype = 'redis'", 2, 'engine.type: expected one of "memory", got "redis"'),
    ("[http_server]\naddress = 'example.com'", 2, "expected an IP address"),
    ("[http_server]\ninternal_address = '0.0.0.0'", 2, "expected a loopback address"),
    ("[http_server]\ninternal_address = ''", 2, "expected a loopback address"),
    ("[client]\nallowed_origins = ['https://example.com/']", 2, 'got ["https://example.com/"]'),
    ("[client]\nallowed_origins = ['https://Example.com']", 2, "in lower case"),
    ("[client]\nallowed_origins = ['example.com']", 2, "origin patterns"),
    ("[client]\nallowed_origins = ['null']", 2, "origin patterns"),
    ("[http_api]\nhandler_prefix = 'api'", 2, 'expected a path that starts with "/", got "api"'),
    ("[websocket]\nhandler_prefix = '/a b'", 2, 'expected a path that starts with "/"'),
    ("[app]\nmodule = 'chat'", 2, 'expected the place of an App, such as "chat:app", got "chat"'),
    ("[app]\nmodule = 'chat.py:app:x'", 2, "app.module"),
    ("[app]\nmodule = 'chat:make.app'", 2, "app.module"),
    ("[channel.without_namespace]\nchannel_regex = '('", 2, "expected a regular expression that Python compiles"),
    ("[[channel.namespaces]]\nname = 'x'", 2, "expected a name of two or more of"),
    ("[[channel.namespaces]]\nname = 'a b'", 2, 'such as "chat", got "a b"'),
    ('[[channel.namespaces]]\nname = "chat\\n"', 2, "channel.namespaces[0].name"),
    ("[[channel.namespaces]]\npresence = true", 1, "channel.namespaces[0].name: missing: expected a name"),
    # contradictions
    ("[client]\npong_timeout = '25s'", 2, '"25s" must be shorter than client.ping_interval, "25s"'),
    ("[client]\nping_interval = '5s'", 2, '"8s" must be shorter than client.ping_interval, "5s"'),
    ("[client]\nqueue_max_size = 100", 2, "100 can't hold one message of websocket.message_size_limit, 65536"),
    ("[engine]\nqueue_max_size = 100", 2, "100 can't hold one message of websocket.message_size_limit, 65536"),
    ("[channel.without_namespace]\nhistory_size = 5", 2, "history_size without history_ttl keeps nothing"),
    ("[channel.without_namespace]\nhistory_ttl = '5s'", 2, "history_ttl without history_size keeps nothing"),
    ("[[channel.namespaces]]\nname = 'ab'\nforce_recovery = true", 3, "force_recovery needs history"),
    ("[[channel.namespaces]]\nname = 'ab'\n[[channel.namespaces]]\nname = 'ab'", 4, '"ab" is there twice'),
    ("[channel]\nhistory_meta_ttl = '1s'\nwithout_namespace = { history_size = 1, history_ttl = '2s' }", 2, "any name"),
    ("[http_server]\nport = 8001", 2, "the port for operators must differ from http_server.port, 8001"),
    ("[http_api]\nhandler_prefix = '/connection/websocket'", 2, "is the path of websocket.handler_prefix"),
    ("[client.token]\nhmac_previous_secret_key = 'abc'", 2, "needs hmac_secret_key beside it"),
    ("[workers]\nrestart_delay = '1m'", 2, '"1m" must not be longer than workers.restart_delay_max, "30s"'),
    ("[loop]\nstuck = '5ms'", 2, '"5ms" must be longer than loop.interval, "40ms"'),
    ("[loop]\nmax_lag = '5ms'", 2, '"5ms" must not be shorter than loop.lagging, "50ms"'),
    # not TOML
    ("[client]\ninsecure = yes", 2, "not valid TOML: invalid value; text stands in quotes"),
    ("[client]\na = 1\na = 2", 3, "not valid TOML: this key is already set further up"),
    ("[client]\n[log]\n[client]", 3, "not valid TOML: this table is already there further up"),
    ("[client\na = 1", 1, "not valid TOML"),
    ("a = [\n1,\n", 3, "not valid TOML"),
    ('a = "\n"', 1, "not valid TOML"),
    ("{}", 1, "not valid TOML"),
    ("\ufeff[client]", 1, "starts with a byte order mark; save it as UTF-8 without one"),
]


@pytest.mark.parametrize(("text", "line", "says"), REFUSED, ids=[says[:40] for _, _, says in REFUSED])
def test_a_mistake_in_the_file_is_one_line_with_its_place(text: str, line: int, says: str) -> None:
    found = problem(text)
    assert found.startswith(f"realtime.toml:{line}: ")
    assert says in found


@pytest.mark.parametrize("text", ["a = " + "[" * 100_000, "a = " + "9" * 5000])
def test_text_that_the_parser_gives_up_on_is_refused_by_name(text: str) -> None:
    assert problem(text).startswith("realtime.toml: not ")


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("CLIENT_INSECURE", "yes", 'client.insecure: expected true or false, got "yes"'),
        ("CLIENT_PING_INTERVAL", "25", "client.ping_interval: expected a duration with its unit"),
        ("WORKERS_COUNT", "two", 'workers.count: expected a whole number from 0 to 1024, got "two"'),
        ("WORKERS_COUNT", " 2", "workers.count: expected a whole number"),
        ("CLIENT_ALLOWED_ORIGINS", "https://a  https://b", "client.allowed_origins: expected a list of origin"),
        ("APP_OPTIONS", "[]", "app.options: expected a table"),
        ("APP_OPTIONS", "{", "app.options: expected a table"),
        ("APP_OPTIONS", '{"a": NaN}', "app.options: expected a table"),
        ("APP_OPTIONS", "[" * 100_000, "app.options: expected a table"),
        ("APP_OPTIONS", '{"a": "\\ud800"}', "app.options: expected a table"),
        ("CHANNEL_NAMESPACES", "[{", "channel.namespaces: expected a JSON array of objects, or names"),
        ("CHANNEL_NAMESPACES", "[1]", "channel.namespaces: expected a list of tables, got [1]"),
        ("CHANNEL_NAMESPACES", '[{"presence": true}]', "channel.namespaces[0].name: missing"),
        ("CHANNEL_NAMESPACES", '[{"name": "ab", "x": 1}]', "channel.namespaces[0].x: unknown key"),
        ("CHANNEL_NAMESPACES", "ab ab", 'channel.namespaces[1].name: "ab" is there twice'),
        ("NODE_NAME", os.fsdecode(b"\xff"), "node.name: expected text in quotes"),
    ],
)
def test_a_mistake_in_a_variable_names_the_variable(name: str, text: str, says: str) -> None:
    assert problem(environ={f"REALTIME_{name}": text}).startswith(f"REALTIME_{name}: {says}")


def test_a_variable_of_a_namespace_is_held_to_the_same_rules() -> None:
    environ = {"REALTIME_CHANNEL_NAMESPACES": "chat", "REALTIME_CHANNEL_NAMESPACES_CHAT_HISTORY_SIZE": "3"}
    assert problem(environ=environ).startswith(
        "REALTIME_CHANNEL_NAMESPACES_CHAT_HISTORY_SIZE: channel.namespaces[0].history_size: history_size without"
    )


def test_a_variable_that_stands_for_two_namespaces_is_refused() -> None:
    environ = {"REALTIME_CHANNEL_NAMESPACES": "a-b a_b", "REALTIME_CHANNEL_NAMESPACES_A_B_PRESENCE": "1"}
    line = problem(environ=environ)
    assert line.startswith("REALTIME_CHANNEL_NAMESPACES_A_B_PRESENCE: stands for channel.namespaces[0].presence and")


def test_a_mistake_on_the_command_line_says_so() -> None:
    found = problems(arguments={"workers.count": "x", "workers.cout": "1"})
    assert found[0].startswith("command line: workers.count: expected a whole number")
    assert found[1].startswith("command line: workers.cout: unknown key; did you mean workers.count?")


def test_a_contradiction_between_sources_names_one_that_was_given() -> None:
    line = problem("[client]\nping_interval = '5s'", {"REALTIME_CLIENT_PONG_TIMEOUT": "6s"})
    assert line.startswith("REALTIME_CLIENT_PONG_TIMEOUT: client.pong_timeout: ")


def test_every_problem_is_in_the_one_error() -> None:
    text = """
    [client]
    ping_interval = 25
    unknown = 1
    queue_max_size = 1
    [admin]
    [[channel.namespaces]]
    name = "x"
    history_size = 4
    """
    found = problems(text, {"REALTIME_LOG_LEVEL": "loud"}, {"workers.count": "-1"})
    places = [":".join(line.split(": ")[:2]).removeprefix("realtime.toml:") for line in found]
    assert places == [
        "3:client.ping_interval",
        "4:client.unknown",
        "6:admin",
        "8:channel.namespaces[0].name",
        "REALTIME_LOG_LEVEL:log.level",
        "command line:workers.count",
        "9:channel.namespaces[0].history_size",
        "5:client.queue_max_size",
    ]


def test_a_wrong_value_starts_no_second_problem_that_is_only_apparent() -> None:
    text = "[channel.without_namespace]\nhistory_size = 'many'\nhistory_ttl = '5s'"
    assert "history_size: expected a whole number" in problem(text)


def test_a_file_that_is_no_toml_hides_no_wrong_variable_but_tries_no_contradiction() -> None:
    environ = {"REALTIME_LOG_LEVEL": "loud", "REALTIME_CHANNEL_WITHOUT_NAMESPACE_HISTORY_SIZE": "3"}
    found = problems("[", environ)
    assert [line.split(": ")[0] for line in found] == ["realtime.toml:1", "REALTIME_LOG_LEVEL"]


def test_no_problem_shows_a_secret() -> None:
    found = problems("[http_api]\nkey = ['hush-hush']\n[client.token]\nhmac_previous_secret_key = 'hush-hush'")
    assert len(found) == 2
    assert "hush" not in "".join(found)


def test_a_long_value_is_cut() -> None:
    assert len(problem(f"[log]\nlevel = '{'x' * 10_000}'")) < 300


@pytest.mark.parametrize(
    ("text", "path", "line"),
    [
        ("a = 1\n# x = [\nb.c = 2", ("b", "c"), 3),
        ('a = """\nb = 1\n"""\nb = 2', ("b",), 4),
        ("a = '''\nb = 1\n'''\nb = 2", ("b",), 4),
        ('a = """x"""""\nb = 2', ("b",), 2),
        ('a = "\\"[" # ]\nb = 2', ("b",), 2),
        ("a = [\n  [1, 2], # one\n  [3,\n 4],\n]\nb = 2", ("a", 1, 1), 4),
        ("a = [\n  [1, 2], # one\n  [3,\n 4],\n]\nb = 2", ("b",), 6),
        ("a = { b = { c = 1 }, d = 2 }\ne = 1", ("e",), 2),
        ("[a]\n[[a.b]]\n[[a.b]]\n[a.b.c]\nd = 1", ("a", "b", 1, "c", "d"), 5),
        ("[[a]]\n[[a.b]]\nx=1\n[[a]]\n[[a.b]]\nx=1\n[[a.b]]\nx=1", ("a", 1, "b", 1, "x"), 8),
        ("t = 1979-05-27 07:32:00.5\nf = -1.5e+3\nb = 2", ("b",), 3),
        ("[ 'a b' . \"c\\u0064\" ]\nx = 1", ("a b", "cd", "x"), 2),
        ("1.2 = 3\r\n4 = 5", ("4",), 2),
    ],
)
def test_the_line_of_a_key_is_found(text: str, path: tuple[str | int, ...], line: int) -> None:
    tomllib.loads(text.replace("\r", ""))
    _, where = tables("f", text)
    assert where(path) == f"f:{line}"


# Durations.


@given(st.integers(min_value=0, max_value=2**53))
@example(0)
@example(1)
@example(2**53)
def test_a_duration_is_read_back_to_the_nanosecond(nanoseconds: int) -> None:
    seconds = nanoseconds / 10**9
    assert round(duration(write_duration(seconds)) * 10**9) == round(seconds * 10**9)


@given(st.text(alphabet="0123456789.hmsnuµ+- ", max_size=12))
def test_no_text_makes_the_reader_of_durations_fail_otherwise(text: str) -> None:
    try:
        seconds = duration(text)
    except ValueError:
        return
    assert abs(seconds) < 9.3e9


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0.0),
        ("-0", 0.0),
        ("25s", 25.0),
        ("1h30m", 5400.0),
        ("1.5s", 1.5),
        ("300ms", 0.3),
        ("720h", 2_592_000.0),
        (".5s", 0.5),
        ("1.s", 1.0),
        ("-1m", -60.0),
        ("+1us", 1e-6),
        ("1µs", 1e-6),
        ("1μs2ns", 1.002e-6),
        ("1s1h", 3601.0),
    ],
)
def test_durations_have_gos_form(text: str, seconds: float) -> None:
    assert duration(text) == seconds


@pytest.mark.parametrize("text", ["", "-", ".", "s", ".s", "1", "1 s", "1S", "1d", "1e3s", "0x1s", "--1s", "٣s", "1s,"])
def test_other_forms_of_a_duration_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="duration"):
        duration(text)


# Whatever comes.

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
def test_no_text_of_a_file_makes_parsing_fail_otherwise(text: str) -> None:
    try:
        settings = of_file(text)
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


@given(st.dictionaries(st.sampled_from([name for name, _, _ in variables(Settings, {})]), VALUES, max_size=4))
def test_no_text_of_a_variable_makes_parsing_fail_otherwise(environ: dict[str, str]) -> None:
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


def test_without_a_file_an_app_is_looked_for_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert read(None, {"app.module": "chat:app"}, {}).app.path == str(tmp_path)


def test_a_folder_of_the_app_that_is_not_there_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "realtime.toml"
    file.write_text("[app]\nmodule = 'chat:app'\npath = 'cod'")
    with pytest.raises(SettingsError, match=r"app\.path: no folder at .*/cod; correct it"):
        read(str(file), {}, {})


def refused(config: Path) -> str:
    with pytest.raises(SettingsError) as caught:
        read(str(config), {}, {})
    (line,) = caught.value.problems
    return line.removeprefix(str(config))


def test_a_file_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    assert refused(tmp_path / "no.toml").startswith(": can't be read: No such file or directory; ")


def test_a_folder_is_one_line(tmp_path: Path) -> None:
    assert refused(tmp_path).startswith(": can't be read: Is a directory; name the file in it")


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is unreadable to root")
def test_an_unreadable_file_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "realtime.toml"
    file.touch(mode=0o000)
    assert refused(file).startswith(": can't be read: Permission denied; ")


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that opens but can't be read")
def test_a_file_that_fails_while_it_is_read_is_one_line() -> None:
    assert refused(Path("/proc/self/mem")).startswith(": can't be read: Input/output error; name a readable file")


def test_bytes_that_are_no_utf8_are_one_line(tmp_path: Path) -> None:
    file = tmp_path / "realtime.toml"
    file.write_bytes(b"# a\n# b\nnode.name = '\xe9'\n")
    assert refused(file).startswith(":3: not UTF-8; ")


def test_utf16_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "realtime.toml"
    file.write_text("[client]", encoding="utf-16")
    assert refused(file).startswith(":1: not UTF-8; ")


def test_a_byte_order_mark_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "realtime.toml"
    file.write_text("[client]", encoding="utf-8-sig")
    assert refused(file).startswith(":1: starts with a byte order mark")


def test_a_huge_file_is_one_line_and_is_not_read_whole(tmp_path: Path) -> None:
    file = tmp_path / "realtime.toml"
    with file.open("wb") as sparse:
        sparse.truncate(100 * MAX_FILE_BYTES)
    assert refused(file).startswith(": larger than 1 MiB")


def test_a_large_file_with_a_mistake_at_its_end_is_still_placed(tmp_path: Path) -> None:
    file = tmp_path / "realtime.toml"
    file.write_text("# comment\n" * 100_000 + "[client]\nnope = 1\n")
    assert refused(file).startswith(":100002: client.nope: unknown key")


def test_a_file_name_with_a_line_break_makes_no_second_line(tmp_path: Path) -> None:
    file = tmp_path / "a\nb.toml"
    file.write_text("nope = 1")
    with pytest.raises(SettingsError) as caught:
        read(str(file), {}, {})
    assert "\n" not in str(caught.value)


# What is allowed, but worth a warning.


def warned(environ: Mapping[str, str], text: str = "") -> list[str]:
    return warnings(parse({}, ("realtime.toml", text), environ), environ)


@pytest.mark.parametrize(
    "name",
    ["REALTIME_PORT", "REALTIME_SERVICE_HOST", "REALTIME_PORT_8000_TCP_ADDR", "REALTIME_CHAT_SERVICE_PORT", "PATH"],
)
def test_what_kubernetes_injects_is_nobodys_mistake(name: str) -> None:
    assert warned({name: "tcp://10.0.0.1:8000"}) == []


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("REALTIME_CLIENT_INSECUR", "not a variable that realtime reads; did you mean REALTIME_CLIENT_INSECURE?"),
        ("REALTIME_ZZZ", "not a variable that realtime reads"),
        ("REALTIME_CHANNEL_NAMESPACES_CHAT_PRESENCE", "not a variable that realtime reads"),
        ("REALTIME_ADMIN_PASSWORD", "a Centrifugo key that realtime does not support yet; remove it"),
        ("REALTIME_GRPC_API_ENABLED", "a Centrifugo key that realtime does not support; remove it"),
    ],
)
def test_an_unknown_variable_is_a_warning(name: str, says: str) -> None:
    (line,) = warned({name: "1"})
    assert line.startswith(f"{name}: {says}")


def test_the_variable_of_a_namespace_that_exists_is_known() -> None:
    environ = {"REALTIME_CHANNEL_NAMESPACES_CHAT_PRESENCE": "1"}
    assert warned(environ, "[[channel.namespaces]]\nname = 'chat'") == []


def test_variables_of_centrifugo_are_spoken_of_once() -> None:
    (line,) = warned({"CENTRIFUGO_A": "1", "CENTRIFUGO_B": "2", "CENTRIFUGO_C": "3"})
    assert line == "CENTRIFUGO_A and 2 more: CENTRIFUGO_ variables are not read; rename them to REALTIME_..."


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("client.insecure = true", "client.insecure"),
        ("http_api.insecure = true", "http_api.insecure"),
        ("client.allowed_origins = ['*']", "client.allowed_origins"),
        ("client.allowed_origins = ['https://example.com', '**']", "client.allowed_origins"),
        ("client.allowed_origins = ['http*://*']", "client.allowed_origins"),
        ("client.allowed_origins = ['https://*']", "client.allowed_origins"),
        ("client.allowed_origins = ['https://*:8443']", "client.allowed_origins"),
        ("client.trusted_proxies = ['10.0.0.1', '0.0.0.0/0']", "client.trusted_proxies"),
        ("client.trusted_proxies = ['::/0']", "client.trusted_proxies"),
        (f"http_api.key = '{'x' * 31}'", "http_api.key"),
        (f"client.token.hmac_secret_key = '{'x' * 31}'", "client.token.hmac_secret_key"),
        ("client.token.hmac_secret_key = 'secret'", "client.token.hmac_secret_key"),
        ("client.token.jwks_allow_insecure = true", "client.token.jwks_allow_insecure"),
        (
            "[client.subscription_token]\nenabled = true\njwks_allow_insecure = true",
            "client.subscription_token.jwks_allow_insecure",
        ),
        (
            f"[client.subscription_token]\nenabled = true\nhmac_secret_key = '{'x' * 31}'",
            "client.subscription_token.hmac_secret_key",
        ),
        (
            f"client.token.hmac_secret_key = '{'y' * 32}'\nclient.token.hmac_previous_secret_key = '{'x' * 31}'",
            "client.token.hmac_previous_secret_key",
        ),
        ("client.user_id_http_header = 'X-User'", "client.user_id_http_header"),
    ],
)
def test_what_is_unwise_is_a_warning_without_secrets(text: str, key: str) -> None:
    (line,) = warned({}, text)
    assert line.startswith(f"{key}: ")
    assert "xxx" not in line
    assert unwise(of_file(text)) == [key]


def test_a_strong_key_and_an_empty_one_need_no_warning() -> None:
    assert warned({}, f"client.token.hmac_secret_key = '{'x' * 32}'") == []
    assert warned({}) == []
    assert unwise(Settings()) == []


def test_patterns_that_leave_strangers_out_need_no_warning() -> None:
    assert warned({}, "client.allowed_origins = ['https://*.example.com', 'http://localhost:*']") == []
    assert warned({}, "client.trusted_proxies = ['10.0.0.0/8', '::1']") == []


def test_a_table_that_is_not_used_needs_no_warning() -> None:
    assert warned({}, "[client.subscription_token]\nhmac_secret_key = 'x'\njwks_allow_insecure = true") == []


# The tree.


def test_the_tree_survives_the_way_to_a_child_process() -> None:
    text = "[[channel.namespaces]]\nname = 'chat'\n[app.options]\na = [1, 2.5, { b = 'é' }]\n[client]\ninsecure = true"
    settings = of_file(text)
    assert load(dump(settings)) == settings


def test_a_dump_of_something_else_is_not_loaded() -> None:
    with pytest.raises(msgspec.ValidationError):
        load(msgspec.msgpack.encode({"http_server": {"port": 70_000}}))


def test_a_tree_in_a_log_shows_no_secret() -> None:
    secret = "a-secret-of-some-length"
    settings = of_file(f"http_api.key = '{secret}'\nclient.token.hmac_secret_key = '{secret}'")
    assert settings.http_api.key == secret
    assert secret not in repr(settings)


def test_every_key_is_explained_and_its_default_is_one_that_it_takes() -> None:
    for path, key in leaves(Settings):
        assert key.about.endswith("."), dotted(path)
        if not key.many and key.form.from_file is not None:
            assert key.accepts(key.default), dotted(path)
    for name, key in keys(Namespace).items():
        assert key.about.endswith("."), name


def test_no_key_of_ours_is_still_called_foreign() -> None:
    ours = {dotted(path) for path, _ in leaves(Settings)}
    ours |= {f"channel.namespaces[].{name}" for name in keys(Namespace)}
    sections = {part for key in ours for part in (key.rpartition(".")[0], key)}
    assert not sections & (centrifugo_keys.LATER | centrifugo_keys.NEVER)
    assert not centrifugo_keys.LATER & centrifugo_keys.NEVER


def test_a_generated_file_is_the_tree_of_defaults() -> None:
    name = "\x7f'\\\n\"😀é" * 20
    text = "\n".join(commented(Settings, {"node.name": name, "loop.stuck": 1.5}))
    settings = of_file(text)
    assert settings.node.name == name
    assert settings.loop.stuck == 1.5
    changed = {"node": Settings().node, "loop": Settings().loop}
    assert msgspec.structs.replace(settings, **changed) == Settings()


def test_every_line_of_a_generated_file_is_valid_once_its_mark_is_gone() -> None:
    lines = list(commented(Settings, {}))
    text = "\n".join(line.removeprefix("#") if not line.startswith("# ") else line for line in lines)
    tree = tomllib.loads(text)
    assert of_file(text) == msgspec.structs.replace(
        Settings(), channel=msgspec.structs.replace(Settings().channel, namespaces=(Namespace(name="chat"),))
    )
    for path, _ in leaves(Settings):
        found = tree
        for part in path:
            assert part in found, dotted(path)
            found = found[str(part)]
    assert json.dumps(tree)
