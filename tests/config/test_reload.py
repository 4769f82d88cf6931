"""What a reload can't change stays, and is named."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from realtime.config.reload import FIXED, OF_BROKER, keep_fixed
from realtime.config.schema import value_keys
from realtime.config.settings import (
    ChannelSettings,
    EngineSettings,
    HTTPServerSettings,
    LoopSettings,
    Namespace,
    Settings,
)
from tests.config.parsing import parse_options


@pytest.mark.parametrize("path", (*FIXED, *(("engine", key) for key in OF_BROKER)), ids=".".join)
def test_each_fixed_setting_exists(path: tuple[str, ...]) -> None:
    assert path in dict(value_keys(Settings))


def test_what_needs_a_restart_stays_and_is_named_in_one_line() -> None:
    running = Settings(http_server=HTTPServerSettings(port=8000))
    wanted = Settings(
        http_server=HTTPServerSettings(port=9000, max_headers=7),
        engine=EngineSettings(max_channels=5, publish_timeout=2),
        loop=LoopSettings(stuck=5.0, relief_after=0.2),
    )
    settings, lines = keep_fixed(running, wanted)
    assert settings == replace(
        running,
        http_server=HTTPServerSettings(port=8000, max_headers=7),
        engine=EngineSettings(max_channels=5, publish_timeout=2),
        loop=LoopSettings(relief_after=0.2),
    )
    assert lines == [
        "http_server.port = 9000: needs a restart of the server; until then 8000 stays",
        "loop.stuck = 5.0: needs a restart of the server; until then 10.0 stays",
    ]


def test_the_lines_show_no_credentials_of_redis() -> None:
    running = parse_options("engine.redis", address="redis://:secret1@a:1", password="secret2", db="1")
    wanted = parse_options("engine.redis", address="redis://:secret3@a:1", password="secret4", cluster_address="a:1")
    settings, lines = keep_fixed(running, wanted)
    assert settings == running
    assert lines == [
        "engine.redis.address has another value: needs a restart of the server; until then the value before stays",
        'engine.redis.cluster_address = ["a:1"]: needs a restart of the server; until then [] stays',
        "engine.redis.password has another value: needs a restart of the server; until then the value before stays",
        "engine.redis.db = 0: needs a restart of the server; until then 1 stays",
    ]


def test_other_settings_change_without_a_line() -> None:
    wanted = Settings(channel=ChannelSettings(namespaces=(Namespace(name="news"),)))
    assert keep_fixed(Settings(), wanted) == (wanted, [])
