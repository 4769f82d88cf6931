"""The settings of the HTTP API and of the server's own RPC methods."""

from __future__ import annotations

import pytest

from realtime.config.settings import Settings
from tests.config.parsing import parse_file

KEYS = {
    "http_api.max_batch_commands": 10,
    "http_api.max_refused_body_size": 0,
    "http_api.body_timeout": "3s",
}


@pytest.mark.parametrize("key", KEYS)
def test_a_limit_of_the_api_is_read(key: str) -> None:
    value, name = KEYS[key], key.partition(".")[2]
    given = f'"{value}"' if isinstance(value, str) else value
    assert getattr(parse_file(f"{key} = {given}").http_api, name) == (3.0 if isinstance(value, str) else value)


def test_no_text_of_the_settings_has_the_key() -> None:
    tree = parse_file('http_api.key = "a-key-of-sixteen"')
    assert tree.http_api.key == "a-key-of-sixteen"
    assert "a-key-of-sixteen" not in repr(tree)


def test_the_servers_own_method_is_off() -> None:
    assert not Settings().rpc.ping.enabled
