"""Values as text and as TOML: each value type, durations, and values in messages."""

from __future__ import annotations

import os

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from realtime.config.sources import parse
from realtime.config.values import (
    DURATION,
    NUMBER,
    escape_unprintable,
    format_duration,
    parse_duration,
    quote,
    quote_setting,
    to_toml,
)
from tests.config.parsing import parse_file, problem, value_at


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
        ("[loop]\nmax_utilization = 0.9", "loop.max_utilization", 0.9),
        ("[loop]\nmax_utilization = 1", "loop.max_utilization", 1.0),
        (
            "[channel.without_namespace]\nallowed_delta_types = 'Fossil'",
            "channel.without_namespace.allowed_delta_types",
            ("fossil",),
        ),
    ],
)
def test_a_file_may_write_a_value_in_several_forms(text: str, key: str, value: object) -> None:
    assert value_at(parse_file(text), key) == value


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
        ("LOOP_MAX_UTILIZATION", "0.9", "loop.max_utilization", 0.9),
        ("CLIENT_ALLOWED_ORIGINS", "https://a https://b", "client.allowed_origins", ("https://a", "https://b")),
        ("CLIENT_TOKEN_HMAC_SECRET_KEY", "hush", "client.token.hmac_secret_key", "hush"),
        ("APP_OPTIONS", '{"a": [1, 2.5, null]}', "app.options", {"a": [1, 2.5, None]}),
        ("CHANNEL_WITHOUT_NAMESPACE_PRESENCE", "true", "channel.without_namespace.presence", True),
        ("PORT", "tcp://10.0.0.1:8000", "http_server.port", 8000),
    ],
)
def test_a_variable_may_write_a_value_in_several_forms(name: str, text: str, key: str, value: object) -> None:
    assert value_at(parse({}, None, {f"REALTIME_{name}": text}), key) == value


REFUSED = [
    # wrong types
    ("[http_server]\nport = 'eighty'", 2, 'expected a whole number from 0 to 65535, got "eighty"; correct it, or'),
    ("[http_server]\nport = 80.5", 2, "http_server.port: expected a whole number"),
    ("[http_server]\nport = true", 2, "got true; correct it, or remove it to use the default, 8000"),
    ("[http_server]\nport = [80]", 2, "got [80]"),
    ("[http_server]\nport = 1979-05-27", 2, "got a date or time"),
    ("[http_server]\nport = '0o8'", 2, "expected a whole number"),
    ("[http_server]\nport = '010'", 2, "expected a whole number"),
    ("[http_server]\nport = ' 80'", 2, "expected a whole number"),
    ("[http_server]\nport = '٨٠'", 2, "expected a whole number"),
    ("[client]\ninsecure = 1", 2, "client.insecure: expected true or false, got 1"),
    ("[client]\ninsecure = 'true'", 2, 'expected true or false, got "true"'),
    ("[node]\nname = 5", 2, "node.name: expected a string in quotes, got 5"),
    ("[client]\nallowed_origins = [1]", 2, "client.allowed_origins: expected a list of origin patterns"),
    ("[app]\noptions = 'x'", 2, "app.options: expected a table"),
    ("[app]\noptions = { big = 99999999999999999999 }", 2, "app.options: expected a table"),
    ("[app]\noptions = { when = 1979-05-27 }", 2, "app.options: expected a table"),
    ("[app]\noptions = { odd = nan }", 2, "app.options: expected a table"),
    ("[client.token]\nhmac_secret_key = 12345", 2, "expected a string in quotes, got another value, not shown"),
    (
        "[loop]\nmax_utilization = 1.1",
        2,
        "loop.max_utilization: expected a number from 0 to 1, got 1.1; correct it, or",
    ),
    ("[loop]\nmax_utilization = nan", 2, "expected a number from 0 to 1"),
    ("[loop]\nmax_utilization = true", 2, "expected a number from 0 to 1"),
    ("[loop]\nmax_utilization = '900ms'", 2, "expected a number from 0 to 1"),
    (
        "[channel.without_namespace]\nallowed_delta_types = ['fossil', 'xdelta']",
        2,
        'expected a list of "fossil", got ["fossil", "xdelta"]; correct it, or',
    ),
    # durations
    ("[client]\nping_interval = 25", 2, '"25s" or "1h30m") of at least 0, got 25; write "25s" if you mean seconds'),
    ("[client]\nping_interval = 2.5", 2, 'write "2s500ms" if you mean seconds'),
    ("[client]\nping_interval = '25'", 2, "expected a duration with a unit"),
    ("[client]\nping_interval = '1d'", 2, "expected a duration with a unit"),
    ("[client]\nping_interval = '1s 5ms'", 2, "expected a duration with a unit"),
    ("[client]\nping_interval = '9999999999h'", 2, "expected a duration"),
    ("[loop]\nstuck = 0", 2, 'loop.stuck: expected a duration with a unit (such as "25s" or "1h30m") of at least 0'),
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
    ("[channel]\nnamespace_boundary = ''", 2, 'expected a string in quotes that is not empty, got ""'),
]


@pytest.mark.parametrize(("text", "line", "message"), REFUSED, ids=[message[:40] for _, _, message in REFUSED])
def test_a_value_of_another_type_or_beyond_a_limit_is_refused_with_its_line(text: str, line: int, message: str) -> None:
    found = problem(text)
    assert found.startswith(f"realtime.toml:{line}: ")
    assert message in found


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("CLIENT_INSECURE", "yes", 'client.insecure: expected true or false, got "yes"'),
        ("CLIENT_PING_INTERVAL", "25", "client.ping_interval: expected a duration with a unit"),
        ("WORKERS_COUNT", "two", 'workers.count: expected a whole number from 0 to 1024, got "two"'),
        ("WORKERS_COUNT", " 2", "workers.count: expected a whole number"),
        ("CLIENT_ALLOWED_ORIGINS", "https://a  https://b", "client.allowed_origins: expected a list of origin"),
        ("APP_OPTIONS", "[]", "app.options: expected a table"),
        ("APP_OPTIONS", "{", "app.options: expected a table"),
        ("APP_OPTIONS", '{"a": NaN}', "app.options: expected a table"),
        ("APP_OPTIONS", "[" * 100_000, "app.options: expected a table"),
        ("APP_OPTIONS", '{"a": "\\ud800"}', "app.options: expected a table"),
        ("NODE_NAME", os.fsdecode(b"\xff"), "node.name: expected a string in quotes"),
    ],
)
def test_a_variable_of_another_type_is_refused_by_its_name(name: str, text: str, message: str) -> None:
    assert problem(environ={f"REALTIME_{name}": text}).startswith(f"REALTIME_{name}: {message}")


def test_a_message_shows_the_start_of_a_long_value() -> None:
    assert len(problem(f"[log]\nlevel = '{'x' * 10_000}'")) < 300


def test_values_in_messages_and_in_a_generated_file() -> None:
    assert quote([1, "a"]) == '[1, "a"]'
    assert quote({"a": 1}) == "a table"
    assert quote("x" * 100) == '"' + "x" * 56 + "..."
    assert quote_setting(90.0) == '"1m30s"'
    assert to_toml(DURATION.to_file(90.0)) == '"1m30s"'
    assert to_toml(NUMBER.to_file(0.5)) == "0.5"
    assert to_toml(("é", "\x7f")) == '["é", "\\u007f"]'
    assert escape_unprintable("a\nb") == "a\\nb"
    assert escape_unprintable("é") == "é"


@given(st.integers(min_value=0, max_value=2**53))
@example(0)
@example(1)
@example(2**53)
def test_a_formatted_duration_is_parsed_to_the_same_nanosecond(nanoseconds: int) -> None:
    seconds = nanoseconds / 10**9
    assert round(parse_duration(format_duration(seconds)) * 10**9) == round(seconds * 10**9)


@given(st.text(alphabet="0123456789.hmsnuµ+- ", max_size=12))
def test_parsing_a_duration_raises_nothing_but_value_error(text: str) -> None:
    try:
        seconds = parse_duration(text)
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
def test_a_duration_has_the_form_of_go(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "-", ".", "s", ".s", "1", "1 s", "1S", "1d", "1e3s", "0x1s", "--1s", "٣s", "1s,"])
def test_a_duration_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="duration"):
        parse_duration(text)
