"""The reader: keys, tables and named lists from three sources, and one line for each mistake."""

from __future__ import annotations

import pytest

from realtime.config.settings import Namespace
from realtime.config.sources import parse
from tests.config.parsing import problem, problems


def test_names_in_a_variable_extend_the_files_namespaces() -> None:
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
    # tables
    ("[channel]\nnamespaces = 3", 2, "expected a list of tables, got 3; write [[channel.namespaces]]"),
    ("[channel]\nnamespaces = ['chat']", 2, 'expected a list of tables, got ["chat"]'),
    ("[channel.namespaces]\nname = 'chat'", 1, "expected a list of tables, got a table"),
    ("client = 'x'", 1, 'client: expected a table, got "x"; write [client]'),
    # named lists
    ("[[channel.namespaces]]\npresence = true", 1, "channel.namespaces[0].name: missing: expected a name"),
    ("[[channel.namespaces]]\nname = 'ab'\n[[channel.namespaces]]\nname = 'ab'", 4, '"ab" is used twice'),
]


@pytest.mark.parametrize(("text", "line", "message"), REFUSED, ids=[message[:40] for _, _, message in REFUSED])
def test_an_unknown_key_or_a_wrong_table_is_refused_with_its_line(text: str, line: int, message: str) -> None:
    found = problem(text)
    assert found.startswith(f"realtime.toml:{line}: ")
    assert message in found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[{", "channel.namespaces: expected a JSON array of objects, or names"),
        ("[1]", "channel.namespaces: expected a list of tables, got [1]"),
        ('[{"presence": true}]', "channel.namespaces[0].name: missing"),
        ('[{"name": "ab", "x": 1}]', "channel.namespaces[0].x: unknown key"),
        ("ab ab", 'channel.namespaces[1].name: "ab" is used twice'),
    ],
)
def test_a_wrong_list_in_a_variable_is_refused_by_its_name(text: str, message: str) -> None:
    name = "REALTIME_CHANNEL_NAMESPACES"
    assert problem(environ={name: text}).startswith(f"{name}: {message}")


def test_a_variable_that_matches_two_namespaces_is_refused() -> None:
    environ = {"REALTIME_CHANNEL_NAMESPACES": "a-b a_b", "REALTIME_CHANNEL_NAMESPACES_A_B_PRESENCE": "1"}
    line = problem(environ=environ)
    assert line.startswith("REALTIME_CHANNEL_NAMESPACES_A_B_PRESENCE: matches channel.namespaces[0].presence and")


def test_a_mistake_on_the_command_line_names_the_command_line() -> None:
    found = problems(arguments={"workers.count": "x", "workers.cout": "1"})
    assert found[0].startswith("command line: workers.count: expected a whole number")
    assert found[1].startswith("command line: workers.cout: unknown key; did you mean workers.count?")


def test_a_broken_rule_names_the_source_of_a_given_value() -> None:
    line = problem("[client]\nping_interval = '5s'", {"REALTIME_CLIENT_PONG_TIMEOUT": "6s"})
    assert line.startswith("REALTIME_CLIENT_PONG_TIMEOUT: client.pong_timeout: ")


def test_rules_hold_for_variables_of_a_namespace() -> None:
    environ = {"REALTIME_CHANNEL_NAMESPACES": "chat", "REALTIME_CHANNEL_NAMESPACES_CHAT_HISTORY_SIZE": "3"}
    assert problem(environ=environ).startswith(
        "REALTIME_CHANNEL_NAMESPACES_CHAT_HISTORY_SIZE: channel.namespaces[0].history_size: history_size without"
    )


def test_one_error_has_every_problem() -> None:
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


def test_a_rule_is_skipped_when_one_of_its_values_is_invalid() -> None:
    text = "[channel.without_namespace]\nhistory_size = 'many'\nhistory_ttl = '5s'"
    assert "history_size: expected a whole number" in problem(text)


def test_no_problem_shows_a_secret() -> None:
    found = problems("[http_api]\nkey = ['hush-hush']\n[client.token]\nhmac_previous_secret_key = 'hush-hush'")
    assert len(found) == 2
    assert "hush" not in "".join(found)
