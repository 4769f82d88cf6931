"""The server of a soak, under the care that systemd would give it: started again after a second, when it has ended.

It knows which process ended by a fault of the soak. Every other end of a worker or of the broker is a finding.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import aiohttp
import psutil
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from tests.soak.account import BROKEN, Account
from tests.system.serving import CHECKOUT, TWISTD, belongs, merged, toml

REALTIME = TWISTD.with_name("realtime")
HANDLER, OTHER = "handler process", "other"
ROLES = {
    "realtime.worker.process": "worker",
    "realtime.broker.process": "broker",
    "realtime.broker.redis_process": "broker",
    "realtime.handlers.compute_process": HANDLER,
}
CENSUS = 0.5  # seconds between two looks at the processes
RESTART = 1.0  # RestartSec of scripts/systemd/realtime.service
STOP_LIMIT = 40.0  # its TimeoutStopSec
EXCUSE = 25.0  # seconds in which a fault without a known victim may end one worker
UNEXPECTED = re.compile(r"Traceback \(most recent call last\)|Unhandled|was never awaited")


def free_ports() -> tuple[int, int]:
    """Return two free ports."""
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        return one.getsockname()[1], other.getsockname()[1]


def write_settings(config: Path, settings: Mapping[str, Any]) -> None:
    config.write_text("".join(f"{key} = {toml(value)}\n" for key, value in settings.items()))


class Output:
    """Reads the server's output in a thread. is_held: it is not read now."""

    def __init__(self, copy: IO[str] | None) -> None:
        self.lines: deque[str] = deque(maxlen=4000)
        self.tracebacks: list[str] = []
        self.may_read = threading.Event()
        self.may_read.set()
        self._copy = copy

    def follow(self, pipe: IO[str]) -> None:
        threading.Thread(target=self._read, args=(pipe,), daemon=True).start()

    def _read(self, pipe: IO[str]) -> None:
        with pipe:
            after = 0
            for line in pipe:
                self.may_read.wait()
                self.lines.append(line)
                if self._copy:
                    self._copy.write(line)
                if UNEXPECTED.search(line):
                    after = 25
                    self.tracebacks.append("")
                if after and len(self.tracebacks) <= 20:
                    after -= 1
                    self.tracebacks[-1] += line


class Service:
    """The server's processes. pids: the running ones by pid, with their roles. is_restarting: the server has ended, and
    is about to start again.
    """

    def __init__(
        self,
        account: Account,
        config: Path,
        settings: dict[str, Any],
        copy: IO[str] | None = None,
        name: str = "server",
    ) -> None:
        """name: in findings."""
        self._name = name
        write_settings(config, settings)
        self._settings = settings
        self.port: int = settings["http_server"]["port"]
        self.operator_port: int = settings["http_server"]["internal_port"]
        self.output = Output(copy)
        self.pids: dict[int, str] = {}
        self.supervisor = 0
        self.deaths: Counter[str] = Counter()
        self.largest: Counter[str] = Counter()
        self.is_stopping = False
        self.is_restarting = False
        self.dropped: Counter[tuple[tuple[str, str], ...]] = Counter()
        self._dropped_before: dict[tuple[tuple[str, str], ...], float] = {}
        self._account = account
        self._config = config
        self._process: subprocess.Popen[str] | None = None
        self._full_disk = False
        self._excused: dict[int, str] = {}
        self._replacing: Counter[str] = Counter()  # reasons
        self._wild: list[tuple[float, str]] = []
        self._sessions: list[int] = []

    # Life.

    def start(self) -> None:
        command = [str(TWISTD), "--nodaemon", "--pidfile=", "realtime", "--config", str(self._config)]
        with open("/dev/full", "w") as full:
            self._process = subprocess.Popen(
                command, cwd=CHECKOUT, stdin=subprocess.DEVNULL, stdout=full if self._full_disk else subprocess.PIPE,
                stderr=subprocess.STDOUT, text=True, errors="backslashreplace", start_new_session=True,
            )  # fmt: skip
        self.supervisor = self._process.pid
        self._sessions.append(self.supervisor)
        if self._process.stdout:
            self.output.follow(self._process.stdout)

    async def care(self) -> None:
        """Take a census of the processes, and start the server again after its end, until cancelled."""
        while True:
            assert self._process
            if self._process.poll() is not None and not self.is_stopping:
                await self._restart(self._process.returncode)
            self.census()
            await asyncio.sleep(CENSUS)

    async def _restart(self, status: int) -> None:
        self.is_restarting = True
        excuse = self._excused.pop(self.supervisor, None)
        self.deaths[f"supervisor: {excuse or 'unexpected'}"] += 1
        text = f"the supervisor ended with status {status}"
        self._account.require(excuse is not None, "death", BROKEN, self._name, "supervisor", text)
        self._account.broker_lost()
        until = time.monotonic() + STOP_LIMIT
        while (rest := self.family()) and time.monotonic() < until:
            await asyncio.sleep(0.2)
        names = [" ".join(process.cmdline()[-1:]) for process in rest if process.is_running()]
        self._account.require(not rest, "death", BROKEN, self._name, "supervisor", f"left processes behind: {names}")
        for process in rest:
            process.kill()
        self.pids.clear()
        self._excused.clear()
        await asyncio.sleep(RESTART)
        self._account.broker_lost()
        self.start()
        self.is_restarting = False

    def family(self) -> list[psutil.Process]:
        """All processes of this server, also those whose parent is gone."""
        return [process for process in psutil.process_iter() if belongs(process, self._sessions[-1])]

    def census(self) -> None:
        """Look at the processes: `pids`, and the ends since the last census."""
        if self._process is None or self._process.poll() is not None:
            return
        try:
            children = psutil.Process(self.supervisor).children(recursive=True)
        except psutil.NoSuchProcess:
            return
        alive = {process.pid for process in children if _is_alive(process)}
        for process in children:
            if process.pid in alive:
                self._measure(process)
        for pid in self.pids.keys() - alive:
            role = self.pids.pop(pid)
            self._note_death(pid, role)
        self._measure(psutil.Process(self.supervisor), "supervisor")

    def _measure(self, process: psutil.Process, role: str = "") -> None:
        try:
            role = role or self._role(process)
            if process.pid != self.supervisor:
                self.pids[process.pid] = role
            self.largest[role] = max(self.largest[role], process.memory_info().rss)
        except psutil.NoSuchProcess:
            pass

    def _role(self, process: psutil.Process) -> str:
        """Return a process's role. A child has the command line of the process that forked it for a moment."""
        known = self.pids.get(process.pid, OTHER)
        if known != OTHER:
            return known
        _, _, module = " ".join(process.cmdline()).partition(" -m ")
        role = ROLES.get(module.partition(" ")[0], OTHER)
        return role if (role == HANDLER) is (process.ppid() != self.supervisor) else OTHER

    def _note_death(self, pid: int, role: str) -> None:
        excuse = self._excused.pop(pid, None)
        now = self._account.now()
        self._wild = [(until, text) for until, text in self._wild if until > now]
        if excuse is None and role == "worker" and self._wild:
            excuse = self._wild.pop(0)[1]
        if excuse is None and role == "worker":
            excuse = next(iter(+self._replacing), None)
        if excuse is None and role == "broker" and self._replacing["upgrade"]:
            excuse = "upgrade"
        excuse = excuse or self._excused.get(self.supervisor)
        if role in ("worker", "broker"):
            self.deaths[f"{role}: {excuse or 'unexpected'}"] += 1
            if not self.is_stopping and self.supervisor not in self._excused:
                text = f"{role} {pid} ended without a fault that ends it:\n" + "".join(list(self.output.lines)[-12:])
                self._account.require(excuse is not None, "death", BROKEN, self._name, role, text)
        if role == "broker":
            self._account.broker_lost()

    async def sample(self) -> None:
        """Add up the messages that the server says it dropped, over the lives of its processes."""
        for sample in await self._read_samples("realtime_messages_dropped"):
            key = tuple(sorted(sample.labels.items()))
            before = self._dropped_before.get(key, 0.0)
            self.dropped[key] += round(sample.value - before if sample.value >= before else sample.value)
            self._dropped_before[key] = sample.value

    async def read_metrics(self, *names: str) -> dict[str, float]:
        """Return the values of these metrics of the supervisor, without `_total`."""
        return {sample.name.removesuffix("_total"): sample.value for sample in await self._read_samples(*names)}

    async def _read_samples(self, *names: str) -> list[Sample]:
        url, limit = f"http://127.0.0.1:{self.operator_port}/metrics", aiohttp.ClientTimeout(total=5)
        try:
            async with aiohttp.ClientSession(timeout=limit) as http, http.get(url) as answer:
                text = await answer.text()
        except (OSError, aiohttp.ClientError):
            return []
        families = text_string_to_metric_families(text)
        return [sample for family in families if family.name in names for sample in family.samples]

    def everyone(self) -> list[int]:
        """Return all processes, the supervisor included."""
        return [self.supervisor, *self.pids]

    # Faults.

    def of(self, role: str) -> list[int]:
        return sorted(pid for pid, known in self.pids.items() if known == role)

    def excuse(self, pid: int, fault: str) -> None:
        """The end of this process is a fault of the soak."""
        self._excused[pid] = fault
        if self.pids.get(pid) == "broker" or pid == self.supervisor:
            self._account.broker_lost()

    def excuse_one_worker(self, fault: str) -> None:
        self._wild.append((self._account.now() + EXCUSE, fault))

    def kill(self, pid: int, number: int) -> bool:
        """Send a signal; returns whether the process was there."""
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return False
        return True

    def fill_disk(self, full: bool) -> None:
        """From its next start on, the server's output is a full disk, or a pipe again."""
        self._full_disk = full

    # Replacing workers.

    async def reload(self, changes: Mapping[str, Any] | None = None) -> tuple[int, str]:
        """Replace every worker; returns the exit status of the command, and its output. changes: to the configuration
        of the start."""
        write_settings(self._config, merged(self._settings, dict(changes or {})))
        return await self._command("reload")

    async def upgrade(self) -> tuple[int, str]:
        """Replace all processes; returns the exit status of the command, and its output."""
        return await self._command("upgrade")

    async def scale(self, workers: int) -> tuple[int, str]:
        """Change the number of workers; returns the exit status of the command, and its output."""
        return await self._command("scale", str(workers))

    async def _command(self, name: str, *arguments: str) -> tuple[int, str]:
        command = [str(REALTIME), name, "--config", str(self._config), *arguments]
        with self.replacing(name):
            process = await asyncio.create_subprocess_exec(
                *command, cwd=CHECKOUT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
            said, _ = await process.communicate()
        return process.returncode or 0, said.decode()

    @contextmanager
    def replacing(self, reason: str) -> Iterator[None]:
        """Workers may end for this reason meanwhile, also those that start because of another fault."""
        self._replacing[reason] += 1
        try:
            yield
        finally:
            self._replacing[reason] -= 1
            self._wild.extend((self._account.now() + 2 * CENSUS, reason) for _ in self.of("worker"))

    # The end.

    async def stop(self, report: Callable[[str, str], None]) -> None:
        """Stop the server. report: takes place and text of what is not as it should be."""
        self.is_stopping = True
        assert self._process
        self.kill(self.supervisor, signal.SIGTERM)
        until = time.monotonic() + STOP_LIMIT
        while self._process.poll() is None and time.monotonic() < until:
            await asyncio.sleep(0.1)
        if self._process.returncode != 0:
            report("stop", f"the server ended with status {self._process.returncode}")
        if rest := self.family():
            report("stop", f"the server left {len(rest)} processes behind")
        self.end()

    def end(self) -> None:
        """Kill the rest."""
        self.is_stopping = True
        self.output.may_read.set()
        if self._process and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        if self._sessions:
            for process in self.family():
                process.kill()


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
