"""The settings of the Redis servers."""

from __future__ import annotations

from realtime.config.settings import RedisSettings


def test_one_server_on_this_machine_is_the_default() -> None:
    settings = RedisSettings()
    assert settings.address == ("redis://127.0.0.1:6379",)
    assert (settings.prefix, settings.connect_timeout, settings.io_timeout) == ("realtime", 1.0, 4.0)
