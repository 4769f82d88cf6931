"""Warnings: risky values, and variables that the server ignores."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from realtime.config.settings import Settings
from realtime.config.sources import parse
from realtime.config.warnings import find_warnings, insecure_keys
from tests.config.parsing import parse_file


def warnings_of(environ: Mapping[str, str], text: str = "") -> list[str]:
    return find_warnings(parse({}, ("realtime.toml", text), environ), environ)


@pytest.mark.parametrize(
    "name",
    ["REALTIME_PORT", "REALTIME_SERVICE_HOST", "REALTIME_PORT_8000_TCP_ADDR", "REALTIME_CHAT_SERVICE_PORT", "PATH"],
)
def test_variables_from_kubernetes_cause_no_warning(name: str) -> None:
    assert warnings_of({name: "tcp://10.0.0.1:8000"}) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("REALTIME_CLIENT_INSECUR", "realtime has no such setting; did you mean REALTIME_CLIENT_INSECURE?"),
        ("REALTIME_ZZZ", "realtime has no such setting"),
        ("REALTIME_CHANNEL_NAMESPACES_CHAT_PRESENCE", "realtime has no such setting"),
        ("REALTIME_ADMIN_PASSWORD", "a Centrifugo key that realtime does not support yet; remove it"),
        ("REALTIME_GRPC_API_ENABLED", "a Centrifugo key that realtime does not support; remove it"),
    ],
)
def test_an_unknown_variable_causes_a_warning(name: str, message: str) -> None:
    (line,) = warnings_of({name: "1"})
    assert line.startswith(f"{name}: {message}")


def test_a_variable_of_an_existing_namespace_causes_no_warning() -> None:
    environ = {"REALTIME_CHANNEL_NAMESPACES_CHAT_PRESENCE": "1"}
    assert warnings_of(environ, "[[channel.namespaces]]\nname = 'chat'") == []


def test_variables_of_centrifugo_cause_one_warning() -> None:
    (line,) = warnings_of({"CENTRIFUGO_A": "1", "CENTRIFUGO_B": "2", "CENTRIFUGO_C": "3"})
    assert line == "CENTRIFUGO_A and 2 more: CENTRIFUGO_ variables are ignored; rename them to REALTIME_..."


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
def test_a_risky_value_causes_a_warning_without_secrets(text: str, key: str) -> None:
    (line,) = warnings_of({}, text)
    assert line.startswith(f"{key}: ")
    assert "xxx" not in line
    assert insecure_keys(parse_file(text)) == [key]


def test_a_strong_and_an_empty_secret_cause_no_warning() -> None:
    assert warnings_of({}, f"client.token.hmac_secret_key = '{'x' * 32}'") == []
    assert warnings_of({}) == []
    assert insecure_keys(Settings()) == []


def test_patterns_that_exclude_unrelated_pages_cause_no_warning() -> None:
    assert warnings_of({}, "client.allowed_origins = ['https://*.example.com', 'http://localhost:*']") == []
    assert warnings_of({}, "client.trusted_proxies = ['10.0.0.0/8', '::1']") == []


def test_an_unused_table_causes_no_warning() -> None:
    assert warnings_of({}, "[client.subscription_token]\nhmac_secret_key = 'x'\njwks_allow_insecure = true") == []
