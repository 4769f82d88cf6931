"""What a reload can't change stays, and is named."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from realtime.config.reload import FIXED, OF_BROKER, keep_fixed
from realtime.config.settings import (
    ChannelSettings,
    EngineSettings,
    HTTPServerSettings,
    LoopSettings,
    Namespace,
    Settings,
)


@pytest.mark.parametrize(("table", "key"), (*FIXED, *(("engine", key) for key in OF_BROKER)))
def test_each_fixed_setting_exists(table: str, key: str) -> None:
    assert hasattr(getattr(Settings(), table), key)


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


def test_other_settings_change_without_a_line() -> None:
    wanted = Settings(channel=ChannelSettings(namespaces=(Namespace(name="news"),)))
    assert keep_fixed(Settings(), wanted) == (wanted, [])
