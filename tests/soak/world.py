"""The channels of a soak, the configuration of its server, and which client is where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from tests.soak.account import Account, Channel
from tests.soak.members import Room

CHECKOUT = Path(__file__).parents[2]
KEY = "the key of the soak"
SECRET = "a secret of the soak, of 32 bytes"
RECOVERY_LIMIT = 300

_OPEN = {"allow_subscribe_for_client": True}
_STREAM = {**_OPEN, "history_size": 1000, "history_ttl": "600s", "force_recovery": True}
# By namespace: its options, and the number of clients for each of its channels.
NAMESPACES: dict[str, tuple[dict[str, Any], int]] = {
    "stream": (_STREAM, 50),
    "talk": ({**_STREAM, "allow_publish_for_subscriber": True}, 20),
    "delta": ({**_STREAM, "allowed_delta_types": ["fossil"], "delta_publish": True}, 40),
    "tags": ({**_STREAM, "allow_tags_filter": True}, 40),
    "cache": ({**_STREAM, "force_recovery_mode": "cache", "auto_cache_recover": True}, 40),
    "short": ({**_STREAM, "history_size": 10, "history_ttl": "8s"}, 40),
    "heavy": (_STREAM, 10),
    "own": ({**_STREAM, "allow_subscribe_for_client": False}, 10),
    "plain": (_OPEN, 50),
    "room": ({**_OPEN, "presence": True, "join_leave": True, "allow_presence_for_subscriber": True}, 40),
    "closed": ({}, 50),
}
WATCHERS = 2  # for each room
HEAVY = 4000  # bytes of a publication in the namespace `heavy`


@dataclass(frozen=True, slots=True)
class Mix:
    """What the clients are, out of a hundred: the namespace of the first subscription, and of the second; transports;
    liars, which claim impossible positions. members: the number of clients for each channel, that of `NAMESPACES` if 0.

    Clients of a unidirectional transport have a channel of the namespace `own` alone.
    """

    first: Mapping[str, int]
    second: Mapping[str, int]
    transports: Mapping[str, int]
    liars: int = 0
    members: int = 0


SOAK = Mix(
    {"stream": 34, "talk": 10, "delta": 12, "tags": 12, "cache": 8, "short": 8, "heavy": 4, "own": 12},
    {"plain": 50, "room": 30, "closed": 2, "": 18},
    {
        "websocket": 71, "websocket protobuf": 14, "http_stream": 4, "http_stream protobuf": 2, "sse": 6,
        "uni_websocket": 1, "uni_http_stream": 1, "uni_sse": 1,
    },
    liars=3,
)  # fmt: skip


def settings(port: int, operator_port: int, workers: int) -> dict[str, Any]:
    """Return the server's configuration."""
    return {
        "http_server": {"address": "127.0.0.1", "port": port, "internal_port": operator_port},
        "workers": {"count": workers, "restart_delay_max": "2s"},
        "shutdown": {"timeout": "10s", "spread": "1s"},
        "app": {"module": "tests.soak.app:app", "path": str(CHECKOUT)},
        "client": {"token": {"hmac_secret_key": SECRET}},
        "http_api": {"key": KEY},
        "http_stream": {"enabled": True},
        "sse": {"enabled": True},
        "uni_websocket": {"enabled": True},
        "uni_http_stream": {"enabled": True},
        "uni_sse": {"enabled": True},
        "channel": {"namespaces": [{"name": name, **options} for name, (options, _) in NAMESPACES.items()]},
    }


def passes(number: int) -> bool:
    """Return whether a publication passes the filter of the namespace `tags`."""
    return number % 2 == 0


FILTER = {"key": "even", "cmp": "eq", "val": "yes"}


def tags(number: int) -> dict[str, str]:
    return {"even": "yes" if passes(number) else "no"}


def text(channel: str, number: int) -> bytes:
    """Return the data of a publication. Texts of one channel are alike, for the deltas."""
    filling = "x" * (HEAVY if channel.startswith("heavy:") else 40)
    return b'{"n":%d,"channel":"%b","filling":"%b"}' % (number, channel.encode(), filling.encode())


@dataclass(frozen=True, slots=True)
class Place:
    """One client: its name, its transport, and its channels. watches: a room. lies_in: a channel in which it claims
    positions that it can't have."""

    name: str
    transport: str
    channels: tuple[str, ...]
    watches: str = ""
    lies_in: str = ""


@dataclass(slots=True)
class World:
    """All channels and clients of a soak."""

    account: Account
    channels: dict[str, Channel] = field(default_factory=dict)
    rooms: dict[str, Room] = field(default_factory=dict)
    places: list[Place] = field(default_factory=list)


def create(account: Account, seed: int, clients: int, mix: Mix = SOAK) -> World:
    """Distribute `clients` over transports and channels, by the seed."""
    world, random = World(account), Random(f"clients of {seed}")
    numbers = {
        name: max(2, round(clients * share / 100 / (mix.members or size)))
        for name, (_, size) in NAMESPACES.items()
        if (share := mix.first.get(name, 0) + mix.second.get(name, 0))
    }
    for name, number in numbers.items():
        for index in range(number):
            _add_channel(world, name, f"{name}:{index}")

    def pick(shares: Mapping[str, int]) -> str:
        return random.choices(list(shares), list(shares.values()))[0]

    for index in range(clients):
        transport = pick(mix.transports)
        is_unidirectional = transport.startswith("uni_")
        names = [name for name in (pick(mix.first), pick(mix.second)) if name]
        if is_unidirectional:
            names = ["own"]
        channels = tuple(f"{name}:{random.randrange(numbers[name])}" for name in names)
        others = [f"stream:{other}" for other in range(numbers["stream"]) if f"stream:{other}" not in channels]
        lies_in = random.choice(others) if random.random() < mix.liars / 100 and not is_unidirectional else ""
        world.places.append(Place(f"client {index}", transport, channels, lies_in=lies_in))
    for room in world.rooms:
        for index in range(WATCHERS):
            world.places.append(Place(f"watcher {index} of {room}", "websocket", (), room))
    return world


def _add_channel(world: World, namespace: str, channel: str) -> None:
    options = NAMESPACES[namespace][0]
    if namespace == "room":
        world.rooms[channel] = Room(world.account, channel)
    elif namespace != "closed":
        size, ttl = options.get("history_size", 0), float(options.get("history_ttl", "0s").removesuffix("s"))
        channel_passes = passes if namespace == "tags" else bool
        world.channels[channel] = world.account.add_channel(channel, size, ttl, channel_passes)
