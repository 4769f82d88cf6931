"""Real Redis servers under test: standalone, with replicas and Sentinels, or a Cluster, all on free ports.

`RedisStarter` starts them, each in a folder of its own, and ends them all. A server is ready when its start returns.
Programs are `redis-server` from Debian, and `valkey-server` where the machine has it.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis
import trustme

HOST = "127.0.0.1"
START_LIMIT = 60.0  # seconds; a busy machine starts six servers slowly
POLL = 0.01

PROGRAMS = [program for program in ("redis-server", "valkey-server") if shutil.which(program)]

# The rights of docs/redis.md: no administration, no dangerous command but the two that read the state.
RIGHTS = (
    "-@all +@read +@write +@pubsub +@scripting +@connection -@admin -@dangerous"
    " +info +role +time +cluster|slots +cluster|info"
)
USER, PASSWORD = "realtime", "secret-of-realtime"
ADMIN = "admin"
USERS = [
    f"user {USER} on >{PASSWORD} ~realtime.* &realtime.* {RIGHTS}",
    f"user {ADMIN} on >{ADMIN} ~* &* +@all",
    # So that tests with any keys show that no other rights are needed.
    f"user default on nopass ~* &* {RIGHTS}",
]

# A replica has its data at once, and is listed once its master has pinged it.
QUICK_REPLICAS = {"repl-diskless-sync-delay": "0", "repl-ping-replica-period": "1", "repl-timeout": "5"}

Condition = Callable[[], Any]


def wait_for(condition: Condition, what: str, limit: float = START_LIMIT) -> Any:
    """Return the first true result of `condition`. Connection errors count as false. AssertionError after `limit`."""
    deadline = time.monotonic() + limit
    while True:
        try:
            if result := condition():
                return result
        except redis.exceptions.RedisError as error:
            reason = f": {error}"
        else:
            reason = ""
        assert time.monotonic() < deadline, f"no {what} within {limit:g} s{reason}"
        time.sleep(POLL)


def free_port() -> int:
    """Return a port that is free now, outside the range from which the kernel takes ports for clients."""
    while True:
        port = random.randrange(12_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
        return port


@dataclass(frozen=True)
class Place:
    """Where a server runs. host: of its clients. bind: of the server. prefix: of its command line."""

    host: str = HOST
    bind: str = HOST
    prefix: tuple[str, ...] = ()


class RedisProcess:
    """One server process: `port`, `path` of its unix socket, and `client`, a second client with all rights.

    Its folder outlives it, so that `start` continues with the data that it has saved.
    """

    def __init__(self, folder: Path, program: str, options: dict[str, str], tls: TLSFiles | None, place: Place) -> None:
        self.folder = folder
        self.place = place
        self.port = free_port()
        self.path = folder / "s"  # a unix socket's path has 108 bytes at most
        self.tls = tls
        self.client: redis.Redis = redis.Redis()
        self._program = program
        self.options = options
        self._process: subprocess.Popen[bytes] | None = None
        self._password = options.get("requirepass")
        folder.mkdir()

    @property
    def address(self) -> str:
        return f"{self.place.host}:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start the process and wait until it answers. It keeps its port."""
        self.launch()
        wait_for(self._answers, f"answer of {self._program} on port {self.port}")

    def launch(self) -> None:
        """Start the process without waiting for it."""
        plain, encrypted = (0, self.port) if self.tls else (self.port, 0)
        options = {"port": str(plain), "bind": self.place.bind, "dir": str(self.folder), "save": "", "daemonize": "no"}
        options |= {"unixsocket": str(self.path), "logfile": str(self.folder / "log"), "loglevel": "notice"}
        if self.tls:
            options |= {"tls-port": str(encrypted)} | self.tls.server_options()
        lines = [f'{key} "{value}"' for key, value in (options | self.options).items() if key != "user"]
        lines += self.options.get("user", "").splitlines()
        config = self.folder / "redis.conf"
        if not config.exists():  # a Sentinel or a Cluster node writes to its file
            config.write_text("\n".join(lines) + "\n")
        mode = ["--sentinel"] if "sentinel" in self.options.get("#", "") else []
        # The kernel ends the server with the test process, however that ends.
        command = ["setpriv", "--pdeathsig", "KILL", *self.place.prefix, self._program, str(config), *mode]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.client.close()
        self.client = self.connect()

    def connect(self, **arguments: Any) -> redis.Redis:
        """Return another client. arguments: of redis.Redis."""
        known: dict[str, Any] = {"host": self.place.host, "port": self.port, "password": self._password}
        known["socket_timeout"] = 20
        known["protocol"] = 2
        if "user" in self.options:
            known |= {"username": ADMIN, "password": ADMIN}
        if self.tls:
            known |= {"ssl": True, "ssl_ca_certs": str(self.tls.authority)}
            known |= {"ssl_certfile": str(self.tls.client), "ssl_keyfile": str(self.tls.client)}
        return redis.Redis(**known | arguments)

    def command(self, *words: str | bytes | int) -> Any:
        """Carry out a command with all rights and return its answer as RESP2 has it, with text for bytes."""
        connection = self.client.connection_pool.get_connection()
        try:
            connection.send_command(*words)
            return _text(connection.read_response())
        finally:
            self.client.connection_pool.release(connection)

    def info(self, section: str) -> dict[str, Any]:
        found: Any = self.client.info(section)
        return dict(found)

    def pause(self) -> None:
        """Stop the process by a signal: it keeps its connections and answers nothing."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        """End the process at once, without saving."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        self.client.close()

    def restart(self) -> None:
        """Kill the process and start it again with the data that is on disk."""
        self.kill()
        self.start()

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self._failure()
        return bool(self.client.ping())

    def _failure(self) -> str:
        log = self.folder / "log"
        return f"{self._program} ended:\n" + (log.read_text()[-2000:] if log.exists() else "no log")


@dataclass(frozen=True)
class TLSFiles:
    """Certificates in a folder. client, server: certificate and key in one file, both by `authority`."""

    authority: Path
    server: Path
    client: Path

    @classmethod
    def make(cls, folder: Path) -> TLSFiles:
        authority = trustme.CA()
        files = cls(folder / "authority.pem", folder / "server.pem", folder / "client.pem")
        authority.cert_pem.write_to_path(str(files.authority))
        issued = authority.issue_cert("localhost", HOST, "redis.test")
        issued.private_key_and_cert_chain_pem.write_to_path(str(files.server))
        authority.issue_cert("realtime.test").private_key_and_cert_chain_pem.write_to_path(str(files.client))
        return files

    def server_options(self) -> dict[str, str]:
        return {
            "tls-cert-file": str(self.server),
            "tls-key-file": str(self.server),
            "tls-ca-cert-file": str(self.authority),
            "tls-replication": "yes",
        }


@dataclass(frozen=True)
class SentinelSet:
    """A master with replicas, watched by Sentinels under the name `name`."""

    servers: list[RedisProcess]
    sentinels: list[RedisProcess]
    name: str = "main"

    @property
    def addresses(self) -> str:
        """Of the Sentinels, as `sentinel_address` has them."""
        return ",".join(sentinel.address for sentinel in self.sentinels)

    @property
    def master(self) -> RedisProcess:
        """The server that most Sentinels name as master."""
        named = [self._named_by(sentinel) for sentinel in self.sentinels]
        port = max(set(named), key=named.count)
        return next(server for server in self.servers if server.port == port)

    @property
    def replicas(self) -> list[RedisProcess]:
        master = self.master
        return [server for server in self.servers if server is not master]

    def fail_over(self) -> RedisProcess:
        """Have the Sentinels promote a replica while the master lives, and return the new master."""
        before = self.master
        wait_for(lambda: self.sentinels[0].command("SENTINEL", "FAILOVER", self.name), "failover")
        return self.wait_for_other_master(before)

    def wait_for_other_master(self, before: RedisProcess) -> RedisProcess:
        return wait_for(lambda: (now := self.master) is not before and _is_master(now) and now, "new master")

    def _named_by(self, sentinel: RedisProcess) -> int:
        try:
            found = sentinel.command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.name)
        except redis.exceptions.ConnectionError:
            return 0
        return int(found[1])


@dataclass(frozen=True)
class RedisCluster:
    """A Cluster. servers: first the masters of the start, then a replica of each in the same order."""

    servers: list[RedisProcess]

    @property
    def addresses(self) -> str:
        return ",".join(server.address for server in self.servers)

    def owner(self, key: str) -> RedisProcess:
        """Return the master of a key's slot, as the nodes tell it."""
        slot = self.living.command("CLUSTER", "KEYSLOT", key)
        for first, last, (_, port, *_), *_ in self.living.command("CLUSTER", "SLOTS"):
            if first <= slot <= last:
                return self.at(port)
        raise AssertionError(f"slot {slot} has no master")

    @property
    def living(self) -> RedisProcess:
        return next(server for server in self.servers if _is_alive(server))

    def at(self, port: int) -> RedisProcess:
        return next(server for server in self.servers if server.port == port)

    def replica_of(self, master: RedisProcess) -> RedisProcess:
        """Return a living replica of a master."""
        ports = [server for server in self.servers if server is not master and _is_alive(server)]
        return next(server for server in ports if server.info("replication").get("master_port") == master.port)

    def fail_over(self, master: RedisProcess) -> RedisProcess:
        """Promote the replica of a living master without loss, and return it."""
        replica = self.replica_of(master)
        replica.command("CLUSTER", "FAILOVER")
        wait_for(lambda: _is_master(replica) and self._agree_on(replica), "promotion")
        return replica

    def _agree_on(self, master: RedisProcess) -> bool:
        views = [server.command("CLUSTER", "SLOTS") for server in self.servers if _is_alive(server)]
        return all(any(slots[2][1] == master.port for slots in view) for view in views)

    def move_slot(self, key: str, target: RedisProcess) -> None:
        """Move the slot of a key to another master with everything in it, as `redis-cli --cluster reshard` does."""
        source = self.owner(key)
        slot = source.command("CLUSTER", "KEYSLOT", key)
        source_id, target_id = (node.command("CLUSTER", "MYID") for node in (source, target))
        target.command("CLUSTER", "SETSLOT", slot, "IMPORTING", source_id)
        source.command("CLUSTER", "SETSLOT", slot, "MIGRATING", target_id)
        while keys := source.command("CLUSTER", "GETKEYSINSLOT", slot, 100):
            source.command("MIGRATE", HOST, target.port, "", 0, 5000, "KEYS", *keys)
        for node in (target, source, *self.servers):
            if _is_alive(node) and _is_master(node):
                node.command("CLUSTER", "SETSLOT", slot, "NODE", target_id)


def _is_alive(server: RedisProcess) -> bool:
    try:
        return bool(server.connect(socket_timeout=1).ping())
    except redis.exceptions.RedisError:
        return False


def _is_master(server: RedisProcess) -> bool:
    return bool(server.info("replication")["role"] == "master")


@dataclass
class RedisStarter:
    """Starts servers, each in a folder of its own below `folder`, and ends them all in `finish`."""

    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="redis-", dir="/tmp")))
    program: str = "redis-server"
    place: Place = Place()
    processes: list[RedisProcess] = field(default_factory=list)

    def standalone(
        self, *, aof: bool = False, tls: bool = False, client_certificates: bool = True, **options: str
    ) -> RedisProcess:
        """Start one server, whose default user has the rights of docs/redis.md, as has USER for names of realtime.

        aof: every write is on disk before its answer. options: of redis.conf, with _ for each -. With requirepass="p"
        the default user has all rights.
        """
        given = {name.replace("_", "-"): value for name, value in options.items()}
        if aof:
            given |= {"appendonly": "yes", "appendfsync": "always"}
        if "requirepass" not in given:
            given |= {"user": "\n".join([*USERS, given.get("user", "")]), "masteruser": ADMIN, "masterauth": ADMIN}
        if tls and not client_certificates:
            given |= {"tls-auth-clients": "no"}
        server = self._prepare(given, self._certificates() if tls else None)
        server.start()
        return server

    def sentinels(
        self, replicas: int = 2, sentinels: int = 3, *, tls: bool = False, sentinel_password: str = "", **options: str
    ) -> SentinelSet:
        """Start a master, its replicas, and Sentinels that replace a silent master within a second.

        options: of the servers' redis.conf, with _ for each -.
        """
        given = {name.replace("_", "-"): value for name, value in options.items()}
        given |= QUICK_REPLICAS
        if password := given.get("requirepass"):
            given["masterauth"] = password
        files = self._certificates() if tls else None
        master = self._prepare(given, files)
        master.start()
        found = SentinelSet([master], [])
        for _ in range(replicas):
            server = self._prepare(given | {"replicaof": f"{HOST} {master.port}"}, files)
            server.start()
            found.servers.append(server)
        for server in found.servers[1:]:
            wait_for(lambda server=server: server.info("replication")["master_link_status"] == "up", "replica")
        for _ in range(sentinels):
            found.sentinels.append(self._sentinel(found, files, password, sentinel_password))
        for sentinel in found.sentinels:
            wait_for(lambda sentinel=sentinel: _knows(sentinel, found.name, replicas, sentinels - 1), "agreement")
        return found

    def cluster(self, masters: int = 3, replicas: int = 3, **options: str) -> RedisCluster:
        """Start a Cluster whose nodes replace a silent master within two seconds.

        options: of redis.conf, with _ for each -.
        """
        given = {name.replace("_", "-"): value for name, value in options.items()}
        given |= {"cluster-enabled": "yes", "cluster-node-timeout": "1000"} | QUICK_REPLICAS
        given |= {"cluster-replica-validity-factor": "0"}
        servers = []
        for _ in range(masters + replicas):
            # The bus has a port of its own, which must be free too.
            server = self._prepare(given | {"cluster-port": str(free_port())}, None)
            server.start()
            servers.append(server)
        bounds = [16384 * index // masters for index in range(masters + 1)]
        for master, first, after in zip(servers, bounds, bounds[1:], strict=False):
            master.command("CLUSTER", "ADDSLOTSRANGE", first, after - 1)
        for index, server in enumerate(servers):
            server.command("CLUSTER", "SET-CONFIG-EPOCH", index + 1)
        for index, server in enumerate(servers):
            for other in servers[index + 1 :]:  # gossip alone would take seconds
                server.command("CLUSTER", "MEET", HOST, other.port, other.options["cluster-port"])
        for server in servers:
            wait_for(lambda server=server: _count_nodes(server) == len(servers), "meeting of all nodes")
        for index, server in enumerate(servers[masters:]):
            master_id = servers[index % masters].command("CLUSTER", "MYID")
            wait_for(lambda server=server, known=master_id: server.command("CLUSTER", "REPLICATE", known), "replica")
        for server in servers:
            wait_for(lambda server=server: _is_settled(server, replicas), "Cluster in state ok")
        return RedisCluster(servers)

    def finish(self) -> None:
        """End all servers and remove their folders."""
        for process in self.processes:
            process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _prepare(self, options: dict[str, str], tls: TLSFiles | None) -> RedisProcess:
        process = RedisProcess(self.folder / str(len(self.processes)), self.program, options, tls, self.place)
        self.processes.append(process)
        return process

    def _sentinel(
        self, watched: SentinelSet, tls: TLSFiles | None, password: str | None, own_password: str
    ) -> RedisProcess:
        sentinel = self._prepare({"#": "sentinel"} | ({"requirepass": own_password} if own_password else {}), tls)
        lines = [
            f"port {0 if tls else sentinel.port}",
            f"bind {HOST}",
            f"dir {sentinel.folder}",
            f"logfile {sentinel.folder / 'log'}",
            f"sentinel monitor {watched.name} {HOST} {watched.servers[0].port} 2",
            f"sentinel down-after-milliseconds {watched.name} 700",
            f"sentinel failover-timeout {watched.name} 5000",
            f"sentinel parallel-syncs {watched.name} 2",
        ]
        if own_password:
            lines += [f"requirepass {own_password}", f"sentinel sentinel-pass {own_password}"]
        if password:
            lines.append(f"sentinel auth-pass {watched.name} {password}")
        if tls:
            lines += [f"tls-port {sentinel.port}", *(f"{key} {value}" for key, value in tls.server_options().items())]
        (sentinel.folder / "redis.conf").write_text("\n".join(lines) + "\n")
        sentinel.start()
        return sentinel

    def _certificates(self) -> TLSFiles:
        if not (self.folder / "authority.pem").exists():
            return TLSFiles.make(self.folder)
        names = ("authority.pem", "server.pem", "client.pem")
        return TLSFiles(*(self.folder / name for name in names))


def _knows(sentinel: RedisProcess, name: str, replicas: int, others: int) -> bool:
    words = sentinel.command("SENTINEL", "MASTER", name)
    state = dict(zip(words[::2], words[1::2], strict=True))
    return int(state["num-slaves"]) == replicas and int(state["num-other-sentinels"]) == others


def _count_nodes(server: RedisProcess) -> int:
    return sum("handshake" not in line for line in server.command("CLUSTER", "NODES").splitlines())


def _is_settled(server: RedisProcess, replicas: int) -> bool:
    is_ok = "cluster_state:ok" in server.command("CLUSTER", "INFO")
    listed = sum(len(entry) - 3 for entry in server.command("CLUSTER", "SLOTS"))
    return is_ok and listed == replicas and server.info("replication").get("master_link_status", "up") == "up"


def _text(answer: Any) -> Any:
    """Return an answer with text in place of its bytes; undecodable bytes stay."""
    if isinstance(answer, list):
        return [_text(item) for item in answer]
    try:
        return answer.decode() if isinstance(answer, bytes) else answer
    except UnicodeDecodeError:
        return answer
