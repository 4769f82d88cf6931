"""Facts that a Redis server tells about itself, and the meaning of its refusals. No I/O."""

from __future__ import annotations

import re
from dataclasses import dataclass
from hashlib import blake2b

from realtime.metrics import Metrics
from realtime.redis.connection import TEMPORARY_CODES, RedisError
from realtime.redis.endpoints import RedisAccess

OLDEST = (6, 2)
"""The oldest version with all commands that the server uses."""

# The first releases of each line without known faults in scripts (CVE-2025-49844). Source: the advisories of both
# projects. A line that is not here and is older than the newest one gets no fixes any more.
_PATCHED: dict[str, dict[tuple[int, ...], int]] = {
    "Redis": {(6, 2): 20, (7, 2): 11, (7, 4): 6, (8, 0): 4, (8, 2): 2},
    "Valkey": {(7, 2): 11, (8, 0): 6, (8, 1): 4},
}

# Other codes may be a script's own.
_COUNTED = TEMPORARY_CODES | {"NOAUTH", "WRONGPASS", "NOPERM", "WRONGTYPE", "NOPROTO", "ERR"}


class ErrorCounters:
    """Counts refused commands by the code of Redis."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def count(self, code: str) -> None:
        kind = code.lower() if code in _COUNTED else "other"
        self._metrics.counter("realtime_redis_errors", "Commands that Redis refused.", kind=kind).value += 1


def explain_refusal(error: RedisError, access: RedisAccess) -> str:
    """Return the reason why a server does not let us in, with the key to correct."""
    table = access.tls_key.rpartition(".")[0]
    is_sentinel = access.tls_key.endswith("sentinel_tls")
    user, password = (f"{table}.{'sentinel_' if is_sentinel else ''}{name}" for name in ("user", "password"))
    if error.code == "NOAUTH":
        return f"{password}: the server wants a password; set it"
    if error.code == "WRONGPASS":
        return f"{password}: wrong, or the user does not exist or is off; correct it and {user}"
    if "without any password configured" in error.text:
        return f"{password}: the server has no password; remove the key"
    if error.code == "NOPERM":
        return f"{user}: {error.text.partition(' ')[2]}; give the user the rights of docs/redis.md"
    if "max number of clients" in error.text:
        return f"{error.text}; raise maxclients in the server's configuration"
    if error.code == "NOPROTO" or "unknown command" in error.text:
        return f"older than Redis {'.'.join(map(str, OLDEST))}: {error.text}; upgrade it"
    if "DB index is out of range" in error.text:
        return f"{table}.db: {error.text}; choose a smaller number, or raise `databases` of the server"
    return f"refused: {error.text}"


def explain_loss(reason: str, access: RedisAccess) -> str:
    """Return the reason of a lost connection, with the key to correct where TLS was refused."""
    if access.tls is not None and "certificate verify failed" in reason:
        return f"{access.tls_key}.server_ca_pem: its authority has not signed the server's certificate; correct it"
    if access.tls is not None and "VerificationError" in reason:
        return f"{access.tls_key}.server_name: the server's certificate has another name; set its name"
    return reason


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """Fields of an answer to INFO, and to CLUSTER INFO behind it; "" for those that it does not have."""

    product: str
    version: str
    mode: str
    role: str
    run_id: str
    replication_id: str
    loading: str
    eviction: str
    cluster_state: str

    @classmethod
    def parse(cls, info: bytes) -> ServerFacts:
        """Return the facts of an answer to INFO, with all sections or some."""
        text = info.decode(errors="replace")
        fields = dict(line.partition(":")[::2] for line in text.splitlines() if ":" in line)
        is_valkey = fields.get("server_name") == "valkey"
        return cls(
            product="Valkey" if is_valkey else "Redis",
            version=fields.get("valkey_version" if is_valkey else "redis_version", ""),
            mode=fields.get("redis_mode") or fields.get("server_mode", ""),
            role=fields.get("role", ""),
            run_id=fields.get("run_id", ""),
            replication_id=fields.get("master_replid", ""),
            loading=fields.get("loading", ""),
            eviction=fields.get("maxmemory_policy", ""),
            cluster_state=fields.get("cluster_state", ""),
        )

    @property
    def program(self) -> str:
        return f"{self.product} {self.version}"

    @property
    def line(self) -> tuple[int, ...]:
        """Major and minor version."""
        return tuple(map(int, re.findall(r"\d+", self.version)[:2]))

    @property
    def generation(self) -> str:
        """See `RedisServer.generation`. A digest, as the metadata of each channel have it."""
        return blake2b(f"{self.run_id}/{self.replication_id}".encode(), digest_size=8).hexdigest()

    @property
    def has_sharded_channels(self) -> bool:
        """Whether the server knows SSUBSCRIBE and SPUBLISH, and is a node of a Cluster."""
        return self.mode == "cluster" and self.line >= (7, 0)

    @property
    def unfitness(self) -> str:
        """Why the server can't be used now, "" if it can."""
        if not self.run_id or not self.replication_id:
            return "engine.redis.user: INFO has no run id; give the user the rights of docs/redis.md"
        if self.line < OLDEST:
            return f"{self.program} is too old; upgrade it to {'.'.join(map(str, OLDEST))} or later"
        if self.loading == "1":
            return "the server is loading its data"
        if self.cluster_state not in ("ok", ""):
            return "its Cluster is down"
        if self.mode == "sentinel":
            return "engine.redis.address: this is a Sentinel; use engine.redis.sentinel_address"
        return ""

    @property
    def warnings(self) -> list[str]:
        """Allowed but risky properties of the server, one line each."""
        found = []
        if self.eviction not in ("noeviction", ""):
            found.append(
                f"maxmemory-policy is {self.eviction}: when its memory is full it forgets channels, and their"
                " subscribers start again with a new epoch; set maxmemory-policy noeviction"
            )
        lines = _PATCHED[self.product]
        patched = lines.get(self.line)
        if patched is None and self.line < max(lines):
            found.append(f"{self.program} gets no fixes from its authors; upgrade it unless your distribution fixes it")
        elif patched is not None and int(([*re.findall(r"\d+", self.version), 0, 0, 0])[2]) < patched:
            release = ".".join(map(str, (*self.line, patched)))
            found.append(f"{self.program} has known faults in scripts; upgrade it to {release} or later")
        return found
