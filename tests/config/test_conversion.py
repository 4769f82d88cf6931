"""Converting a Centrifugo configuration in JSON to TOML."""

from __future__ import annotations

import json
import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realtime.config.conversion import convert_json
from realtime.config.sources import parse
from realtime.errors import SettingsError

CENTRIFUGO = {
    "http_server": {"port": 8000, "internal_port": "9000"},
    "client": {
        "allowed_origins": ["https://*.example.com"],
        "token": {"hmac_secret_key": "a secret of thirty-two characters"},
        "ping_interval": "20s",
        "channel_position_max_time_lag": "5s",
    },
    "http_api": {"key": "k"},
    "admin": {"enabled": True, "password": None},
    "channel": {
        "without_namespace": {"presence": True},
        "namespaces": [
            {"name": "news", "history_size": 10, "history_ttl": "300s", "subscribe_proxy_enabled": True},
            {"name": "chat", "join_leave": True},
        ],
    },
}


def test_a_centrifugo_file_is_usable_after_the_conversion() -> None:
    text = convert_json("config.json", json.dumps(CENTRIFUGO))
    settings = parse({}, ("realtime.toml", text), {})
    assert (settings.http_server.port, settings.http_server.internal_port) == (8000, 9000)
    assert settings.client.token.hmac_secret_key == "a secret of thirty-two characters"
    assert (settings.client.ping_interval, settings.client.allowed_origins) == (20.0, ("https://*.example.com",))
    assert settings.channel.without_namespace.presence
    assert [(each.name, each.history_size) for each in settings.channel.namespaces] == [("news", 10), ("chat", 0)]


def test_keys_without_support_are_comments_with_the_reason() -> None:
    lines = convert_json("config.json", json.dumps(CENTRIFUGO)).splitlines()
    assert "# admin = { enabled = true }  # a Centrifugo key that realtime does not support yet" in lines
    assert "# subscribe_proxy_enabled = true  # a Centrifugo key that realtime does not support" in lines
    note = "# Only operators use this port here. The HTTP API stays on http_server.port."
    assert lines[lines.index(note) + 1] == 'internal_port = "9000"'


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "7", "null", '{"a": NaN}', r'{"a": "\ud800"}', "[" * 100_000, "client:\n  insecure: true"]
)
def test_text_that_is_no_json_object(text: str) -> None:
    with pytest.raises(SettingsError) as caught:
        convert_json("config.json", text)
    [line] = caught.value.problems
    assert line.startswith("config.json: ")


_VALUES = st.recursive(
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(st.text(), _VALUES, max_size=5))
def test_every_json_object_without_null_has_the_same_values_in_toml(tables: dict[str, Any]) -> None:
    known = {f"x{name}": value for name, value in tables.items()}  # no key of Centrifugo's begins like that
    assert tomllib.loads(convert_json("config.json", json.dumps(known))) == known
