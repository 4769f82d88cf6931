"""The measured subjects: this server, the floor and the peers; starting them on a core, and reading their CPU time."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import psutil
from served import HERE, Served

PEERS = HERE / "peers"
NODE_MODULES = PEERS / "node_modules"
NCHAN = Path("/usr/lib/nginx/modules/ngx_nchan_module.so")
START_LIMIT = 30.0
# Separate cores for the server and the load generator, so that neither slows the other down.
SERVER_CORE, LOAD_CORE = 0, -1
# Seconds before the load, in which the idle use of a subject is measured.
CALM = 0.5

CONFIG = """
[http_server]
address = "127.0.0.1"
port = 0
internal_port = 0
[workers]
count = 1
[client]
insecure = true
commands_per_second = 0
{client}
[channel.without_namespace]
allow_publish_for_client = true
{channel}
[engine]
{engine}
[http_api]
key = "{key}"
max_body_size = 16777216
[app]
module = "bench_app:app"
path = "{folder}"
[loop]
max_lag = "0s"
"""
API_KEY = "bench"
NGINX = """
daemon off;
worker_processes 1;
worker_rlimit_nofile 65536;
pid {folder}/nginx.pid;
error_log stderr crit;
load_module {module};
events {{ worker_connections 60000; }}
http {{
    access_log off;
    client_body_temp_path {folder}/a; proxy_temp_path {folder}/b; fastcgi_temp_path {folder}/c;
    uwsgi_temp_path {folder}/d; scgi_temp_path {folder}/e;
    nchan_shared_memory_size 256M;
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location = / {{ nchan_pubsub websocket; nchan_channel_id bench; nchan_message_buffer_length 100; }}
    }}
}}
"""
NATS = """
listen: 127.0.0.1:-1
max_connections: 65536
websocket {{ listen: "127.0.0.1:{port}", no_tls: true, compression: false }}
"""


class Subject(Protocol):
    """A running server. dialect: the protocol of its clients, see `load`. port: for its clients; those of several nodes
    are in `ports`."""

    dialect: str
    port: int

    def processes(self) -> list[psutil.Process]: ...


def cpu(subject: Subject) -> dict[int, float]:
    """Return the CPU time of each process of the subject, in seconds by pid, with nanosecond resolution.

    The scheduler keeps this sum; the function reads it through the process's CPU clock (clock_getcpuclockid(3)). The
    times in /proc/PID/stat have a resolution of only 10 ms.
    """
    return {process.pid: time.clock_gettime_ns(~process.pid << 3 | 2) / 1e9 for process in subject.processes()}


def resident(subject: Subject) -> int:
    """Return the resident memory of the subject's processes in bytes; a shared page counts once for each process."""
    return sum(process.memory_info().rss for process in subject.processes())


def occupied(subject: Subject) -> int:
    """Return the memory that the subject's processes occupy together in bytes; a shared page counts once (PSS)."""
    return sum(process.memory_full_info().pss for process in subject.processes())


@contextmanager
def ours(client: str = 'ping_interval = "0s"', channel: str = "", engine: str = "") -> Iterator[Served]:
    """Run this server with one worker. client, channel, engine: additional lines of TOML for these sections.

    By default the server sends no pings, like the peers.
    """
    config = CONFIG.format(client=client, channel=channel, engine=engine, folder=HERE, key=API_KEY)
    with Served(config, core=SERVER_CORE) as server:
        yield server


class Program:
    """A program that serves on `port`, or prints "port N" when it listens on a port of its choice."""

    def __init__(self, command: list[str], dialect: str, port: int | None = None) -> None:
        self.dialect = dialect
        self._process = subprocess.Popen(
            ["taskset", "-c", str(SERVER_CORE), *command],
            stdout=subprocess.PIPE,
            stderr=None if port is None else subprocess.DEVNULL,
            text=True,
            cwd=PEERS,
        )
        assert self._process.stdout is not None
        if port is None:
            said = self._process.stdout.readline().split()
            if not said:
                raise SystemExit(f"{command[0]} did not start")
            port = int(said[1])
        self.port = port
        self._wait_for_port()

    def processes(self) -> list[psutil.Process]:
        process = psutil.Process(self._process.pid)
        return [process, *process.children(recursive=True)]

    def end(self) -> None:
        for process in reversed(self.processes()):
            process.kill()
        self._process.wait()

    def _wait_for_port(self) -> None:
        """Wait for a listener, by /proc/net/tcp; a trial connection would count as a client."""
        listening = re.compile(rf":{self.port:04X} 00000000:0000 0A ")
        until = time.monotonic() + START_LIMIT
        while not listening.search(Path("/proc/net/tcp").read_text()):
            if time.monotonic() > until or self._process.poll() is not None:
                self._process.kill()
                raise SystemExit(f"the program does not listen on port {self.port}")
            time.sleep(0.02)


def _floor(folder: Path) -> Program:
    program = str(folder / "floor")
    subprocess.run(["cc", "-O2", "-o", program, str(PEERS / "floor.c")], check=True)
    return Program([program], "bare")


def _python(script: str) -> Callable[[Path], Program]:
    return lambda folder: Program([sys.executable, script], "bare")


def _node(script: str, dialect: str) -> Callable[[Path], Program]:
    return lambda folder: Program(["node", script], dialect)


def _nats(folder: Path) -> Program:
    port, config = _free_port(), folder / "nats.conf"
    config.write_text(NATS.format(port=port))
    return Program(["nats-server", "--config", str(config)], "nats", port)


def _nchan(folder: Path) -> Program:
    port, config = _free_port(), folder / "nginx.conf"
    folder.chmod(0o755)
    config.write_text(NGINX.format(folder=folder, port=port, module=NCHAN))
    return Program([_nginx(), "-c", str(config)], "bare", port)


def _nginx() -> str:
    return shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin") or ""


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


# Start functions of the floor and the peers.
_STARTS: dict[str, Callable[[Path], Program]] = {
    "floor": _floor,
    "nchan": _nchan,
    "picows": _python("picows_peer.py"),
    "ws": _node("ws_peer.mjs", "bare"),
    "nats": _nats,
    "websockets": _python("websockets_peer.py"),
    "socketio": _node("socketio_peer.mjs", "socketio"),
    "autobahn": _python("autobahn_peer.py"),
}
NAMES = tuple(_STARTS)
# Peers that can't reply to a single client.
NO_ECHO = {"nats", "nchan"}


def lack(name: str) -> str:
    """Return the reason why a peer can't run here, with the remedy; "" if it can run."""
    pip, npm = "scripts/bench installs it if it can", "install Node.js and npm (Debian: nodejs npm)"
    match name:
        case "floor" if not shutil.which("cc"):
            return "no C compiler; install one (Debian: gcc libc6-dev)"
        case "picows" | "websockets" if not _version(name):
            return f"the Python package {name} is not installed; {pip}"
        case "ws" | "socketio" if not shutil.which("node"):
            return f"no Node.js; {npm}"
        case "ws" | "socketio" if not (NODE_MODULES / _PACKAGES[name]).exists():
            return f"its npm package is not installed; {npm}"
        case "nats" if not shutil.which("nats-server"):
            return "no nats-server; install it (Debian: nats-server)"
        case "nchan" if not (_nginx() and NCHAN.exists()):
            return "no nginx with nchan; install them (Debian: nginx-light libnginx-mod-nchan)"
    return ""


_PACKAGES = {"ws": "ws", "socketio": "socket.io"}


def version(name: str) -> str:
    """Return the version of an available peer and of its runtime, as text."""
    match name:
        case "floor":
            return _first_line(["cc", "--version"])
        case "ws" | "socketio":
            found = json.loads((NODE_MODULES / _PACKAGES[name] / "package.json").read_text())["version"]
            return f"{found} on Node {_first_line(['node', '--version'])}"
        case "nats":
            return _first_line(["nats-server", "--version"]).removeprefix("nats-server: ")
        case "nchan":
            return (
                _first_line(["dpkg-query", "-W", "-f", "${Version}", "libnginx-mod-nchan"]) + " on " + _nginx_version()
            )
        case "autobahn":
            return f"{_version('autobahn')} on Twisted {_version('twisted')}"
    loop = f"uvloop {_version('uvloop')}" if _version("uvloop") else "asyncio"
    return f"{_version(name)} on {loop}"


def _nginx_version() -> str:
    return (
        subprocess.run([_nginx(), "-v"], capture_output=True, text=True).stderr.strip().removeprefix("nginx version: ")
    )


def _first_line(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip().partition("\n")[0]
    except OSError:
        return "?"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


@contextmanager
def started(name: str) -> Iterator[Subject]:
    """Run the subject with this name: "realtime", or one of `NAMES`."""
    if name == "realtime":
        with ours() as server:
            yield server
        return
    with tempfile.TemporaryDirectory() as folder:
        running = _STARTS[name](Path(folder))
        try:
            yield running
        finally:
            running.end()


class Generator:
    """A load generator, ready to begin. asked: see `load`."""

    def __init__(self, subject: Subject, act: str, **asked: Any) -> None:
        core = sorted(os.sched_getaffinity(0))[LOAD_CORE]
        ports = getattr(subject, "ports", [subject.port])
        order = {"ports": ports, "dialect": subject.dialect, "act": act, "core": core, "warm": 0, **asked}
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "load.py"), json.dumps(order)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            self._expect("ready")
        except BaseException:
            self.end()
            raise

    def begin(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()

    def wait(self) -> None:
        self._expect("done")

    def seen(self) -> dict[str, Any]:
        result: dict[str, Any] = json.loads(self._line())
        return result

    def end(self) -> None:
        self._process.kill()
        self._process.wait()

    def _expect(self, word: str) -> None:
        if self._line().strip() != word:
            raise SystemExit("the load generator failed")

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()


class Run:
    """One run of the load generator against a subject.

    seconds: the duration. server: CPU time of the subject's processes in that time, in seconds; parts: the same by pid.
    idle: their CPU time a second just before the run, without load. growth: of their memory, in bytes. load: the
    generator's share of its core. quantiles: p50 and p99 in milliseconds, or an empty list. asked: see `load`. beside:
    the arguments of a second, simultaneous generator; the quantiles then come from it.
    """

    def __init__(self, subject: Subject, act: str, beside: dict[str, Any] | None = None, **asked: Any) -> None:
        generators = [Generator(subject, act, **asked)]
        try:
            if beside is not None:
                generators.append(Generator(subject, **beside))
            self.idle = self._calm(subject)
            began, held = cpu(subject), resident(subject)
            for generator in generators:
                generator.begin()
            generators[0].wait()
            self.parts = _used(began, cpu(subject))
            self.server = sum(self.parts.values())
            self.growth = resident(subject) - held
            seen = generators[0].seen()
            if beside is not None:
                generators[1].wait()
                seen["quantiles"] = generators[1].seen()["quantiles"]
        finally:
            for generator in generators:
                generator.end()
        self.seconds: float = seen["seconds"]
        self.load: float = seen["load"]
        self.quantiles: list[float] = seen["quantiles"]

    def _calm(self, subject: Subject) -> float:
        began, at = cpu(subject), time.monotonic()
        time.sleep(CALM)
        return sum(_used(began, cpu(subject)).values()) / (time.monotonic() - at)


def _used(before: dict[int, float], after: dict[int, float]) -> dict[int, float]:
    return {pid: seconds - before.get(pid, 0.0) for pid, seconds in after.items()}
