"""Rules between several settings: each violation is one line, with the place of a given value."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.config.parsing import option_problem, parse_options, problem

REFUSED = [
    ("[client]\npong_timeout = '25s'", 2, '"25s" must be shorter than client.ping_interval, "25s"'),
    ("[client]\nping_interval = '5s'", 2, '"8s" must be shorter than client.ping_interval, "5s"'),
    ("[client]\nqueue_max_size = 100", 2, "100 is too small for one message of websocket.message_size_limit, 65536"),
    ("[engine]\nqueue_max_size = 100", 2, "100 is too small for one message of websocket.message_size_limit, 65536"),
    ("[channel.without_namespace]\nhistory_size = 5", 2, "history_size without history_ttl keeps nothing"),
    ("[channel.without_namespace]\nhistory_ttl = '5s'", 2, "history_ttl without history_size keeps nothing"),
    ("[[channel.namespaces]]\nname = 'ab'\nforce_recovery = true", 3, "force_recovery needs history"),
    ("[channel]\nhistory_meta_ttl = '1s'\nwithout_namespace = { history_size = 1, history_ttl = '2s' }", 2, "any name"),
    ("[http_server]\nport = 8001", 2, "the port for operators must differ from http_server.port, 8001"),
    ("[http_api]\nhandler_prefix = '/connection/websocket'", 2, "websocket.handler_prefix has the same path"),
    ("[client.token]\nhmac_previous_secret_key = 'abc'", 2, "needs hmac_secret_key in the same table"),
    ("[workers]\nrestart_delay = '1m'", 2, '"1m" must not be longer than workers.restart_delay_max, "30s"'),
    ("[loop]\nstuck = '5ms'", 2, '"5ms" must be longer than loop.interval, "40ms"'),
    ("[loop]\nmax_lag = '5ms'", 2, '"5ms" must not be shorter than loop.lagging, "50ms"'),
]


@pytest.mark.parametrize(("text", "line", "message"), REFUSED, ids=[message[:40] for _, _, message in REFUSED])
def test_a_broken_rule_is_refused_with_its_line(text: str, line: int, message: str) -> None:
    found = problem(text)
    assert found.startswith(f"realtime.toml:{line}: ")
    assert message in found


def test_a_limit_of_zero_is_never_reached_and_so_breaks_no_rule() -> None:
    settings = parse_options("loop", max_lag="0", stuck="0")
    assert (settings.loop.max_lag, settings.loop.stuck) == (0.0, 0.0)


@pytest.mark.parametrize("key", ["hmac_secret_key", "hmac_previous_secret_key"])
def test_a_public_key_is_not_accepted_as_a_secret(key: str) -> None:
    public_key = rsa.generate_private_key(65537, 2048).public_key()
    pem = public_key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    line = option_problem("client.token", **{"hmac_secret_key": "x" * 32, key: pem})
    assert line.startswith(f"command line: client.token.{key}: is a PEM key")
    assert pem[30:60] not in line


def test_a_key_set_over_http_must_be_allowed() -> None:
    assert "use https" in option_problem("client.token", jwks_public_endpoint="http://id.example/keys")
    parse_options("client.token", jwks_public_endpoint="http://id.example/keys", jwks_allow_insecure="true")
    for url in ("http://keys.svc/keys", "http://KEYS.svc:8080/keys"):
        parse_options("client.token", jwks_public_endpoint=url, jwks_allowed_hosts="keys.svc")
    line = option_problem("client.token", jwks_public_endpoint="http://id.example/k", jwks_allowed_hosts="keys.svc")
    assert "jwks_allowed_hosts" in line


@pytest.mark.parametrize("pattern", ["(?P<tenant>[a-z]+)", "(?P<other>acme)", "acme"])
def test_a_placeholder_must_be_a_group_of_listed_texts(pattern: str) -> None:
    url = "https://id.example/{{tenant}}/keys"
    line = option_problem("client.token", jwks_public_endpoint=url, issuer_regex=pattern)
    assert "{{name}} must be a named group" in line


@pytest.mark.parametrize("url", ["https://id.example/{tenant}", "https://id.example/{{ tenant }}"])
def test_a_malformed_placeholder_is_refused(url: str) -> None:
    option_problem("client.token", jwks_public_endpoint=url, issuer_regex="(?P<tenant>acme)")


def test_placeholders_of_listed_texts_are_accepted() -> None:
    parse_options(
        "client.token",
        jwks_public_endpoint="https://{{host}}/{{tenant}}/keys",
        issuer_regex="(?P<tenant>acme|globex)",
        audience_regex=r"(?P<host>a\.example)",
    )
