"""The settings of the tables below [engine.redis]."""

from __future__ import annotations

from typing import Annotated

from msgspec import Struct

from realtime.config.annotations import PositiveSeconds, about


class RedisSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Redis or Valkey, for engine.type = "redis"."""

    prefix: Annotated[str, about("Beginning of the names of all keys and channels. It keeps installations apart.")] = (
        "realtime"
    )
    address: Annotated[tuple[str, ...], about("Addresses of the servers.")] = ("redis://127.0.0.1:6379",)
    connect_timeout: Annotated[PositiveSeconds, about("Time limit for a connection to a server.")] = 1.0
    io_timeout: Annotated[PositiveSeconds, about("Time limit for a server's answer.")] = 4.0
    strict_epoch: Annotated[
        bool,
        about(
            "Start a new epoch of each channel when the server may have other data than before: after its restart or"
            " a failover. Off, only for a single server that never loses acknowledged writes."
        ),
    ] = True
