"""What is measured: this server, the floor, or a peer. Each is started, pinned to a core, and its CPU time read."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import psutil
from served import HERE, Served

PEERS = HERE / "peers"
# The core of the server and that of the load, so that neither takes from the other.
SERVER_CORE, LOAD_CORE = 0, 1

CONFIG = """
[http_server]
address = "127.0.0.1"
port = 0
internal_port = 0
[workers]
count = {workers}
[client]
insecure = true
ping_interval = "0s"
commands_per_second = 0
[channel.without_namespace]
allow_publish_for_client = true
{options}
[app]
module = "bench_app:app"
path = "{folder}"
[loop]
max_lag = "0s"
"""


class Subject(Protocol):
    """Something that is running. dialect: of its clients, see `load`. port: theirs."""

    dialect: str
    port: int

    def processes(self) -> list[psutil.Process]: ...


def cpu(subject: Subject) -> float:
    """Seconds of CPU time that its processes have used, to the nanosecond (/proc/PID/task/TID/schedstat, proc(5))."""
    total = 0
    for process in subject.processes():
        for path in Path(f"/proc/{process.pid}/task").glob("*/schedstat"):
            try:
                total += int(path.read_text().split()[0])
            except OSError:  # a thread that has ended meanwhile
                continue
    return total / 1e9


def resident(subject: Subject) -> int:
    """Bytes that its processes hold in memory, each page counted once for every process."""
    return sum(process.memory_info().rss for process in subject.processes())


@contextmanager
def ours(workers: int = 1, options: str = "") -> Iterator[Served]:
    """This server. options: of its channels, as TOML."""
    with Served(CONFIG.format(workers=workers, options=options, folder=HERE), core=SERVER_CORE) as server:
        yield server


class Program:
    """A program that says "port N" when it listens."""

    def __init__(self, command: list[str], dialect: str) -> None:
        self.dialect = dialect
        self._process = subprocess.Popen(
            ["taskset", "-c", str(SERVER_CORE), *command], stdout=subprocess.PIPE, text=True, cwd=PEERS
        )
        assert self._process.stdout is not None
        said = self._process.stdout.readline().split()
        if not said:
            raise SystemExit(f"{command[0]} did not start")
        self.port = int(said[1])

    def processes(self) -> list[psutil.Process]:
        process = psutil.Process(self._process.pid)
        return [process, *process.children(recursive=True)]

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


# How each is started, and what its clients speak.
_PYTHON = {"autobahn": "autobahn_peer.py", "websockets": "websockets_peer.py", "picows": "picows_peer.py"}
_NODE = {"ws": ("ws_peer.mjs", "bare"), "socketio": ("socketio_peer.mjs", "socketio")}
NAMES = ("floor", *_PYTHON, *_NODE)


@contextmanager
def peer(name: str) -> Iterator[Program]:
    """The floor or a peer. Raises SystemExit when it can't be run here."""
    with tempfile.TemporaryDirectory() as folder:
        if name == "floor":
            compiler = shutil.which("cc")
            if compiler is None:
                raise SystemExit("the floor needs a C compiler: install gcc")
            program = str(Path(folder, "floor"))
            subprocess.run([compiler, "-O2", "-o", program, str(PEERS / "floor.c")], check=True)
            running = Program([program], "bare")
        elif name in _PYTHON:
            running = Program([sys.executable, _PYTHON[name]], "bare")
        else:
            script, dialect = _NODE[name]
            running = Program(["node", script], dialect)
        try:
            yield running
        finally:
            running.end()


class Run:
    """One run of the load generator against a subject.

    units: deliveries, round trips or connections. server: seconds of its CPU time. growth: bytes that it grew by.
    load: the generator's share of a core. p50, p99: milliseconds, None where nothing was timed.
    """

    def __init__(self, subject: Subject, act: str, **asked: Any) -> None:
        order = {"port": subject.port, "dialect": subject.dialect, "act": act, "core": LOAD_CORE, **asked}
        process = subprocess.Popen(
            [sys.executable, str(HERE / "load.py"), json.dumps(order)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdin is not None and process.stdout is not None
        try:
            _expect(process.stdout.readline(), "ready")
            began, held = cpu(subject), resident(subject)
            process.stdin.write("go\n")
            process.stdin.flush()
            _expect(process.stdout.readline(), "done")
            self.server = cpu(subject) - began
            self.growth = resident(subject) - held
            seen = json.loads(process.stdout.readline())
        finally:
            process.kill()
            process.wait()
        self.units: int = seen["units"]
        self.seconds: float = seen["seconds"]
        self.load: float = seen["share"]
        self.p50: float | None = seen["p50"]
        self.p99: float | None = seen["p99"]

    @property
    def cost(self) -> float:
        """Microseconds of the server's CPU time for each unit."""
        return 1e6 * self.server / self.units


def _expect(line: str, word: str) -> None:
    if line.strip() != word:
        raise SystemExit("the load generator failed")
