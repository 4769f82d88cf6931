"""A server for a benchmark: starts it with a configuration, measures it, and stops it."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil

HERE = Path(__file__).parent
TWISTD = Path(sys.executable).with_name("twistd")
SERVING = re.compile(r"serving clients on http://[^ ]*?:(\d+)/, operators on http://[^ ]*?:(\d+)")
START_LIMIT = 30.0
STOP_LIMIT = 15.0


class Served:
    """`with Served(toml) as server:` - a running server on free ports. toml: its configuration.

    core: the number of its only core; None for all cores.
    """

    dialect = "realtime"

    def __init__(self, toml: str, core: int | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory()
        config = Path(self._folder.name, "realtime.toml")
        config.write_text(toml)
        self.lines: list[str] = []
        self.port = self.operator_port = 0
        pin = [] if core is None else ["taskset", "-c", str(core)]
        self._process = subprocess.Popen(
            [*pin, str(TWISTD), "--nodaemon", "--pidfile=", "realtime", "--config", str(config)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
        )
        threading.Thread(target=self._read, daemon=True).start()

    def __enter__(self) -> Served:
        until = time.monotonic() + START_LIMIT
        while not self._is_ready():
            if time.monotonic() > until or self._process.poll() is not None:
                self.__exit__()
                raise SystemExit("the server did not start:\n" + self.log)
            time.sleep(0.05)
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_LIMIT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()

    @property
    def log(self) -> str:
        return "".join(self.lines)

    def processes(self) -> list[psutil.Process]:
        """Return the supervisor, the broker and the workers."""
        supervisor = psutil.Process(self._process.pid)
        return [supervisor, *supervisor.children(recursive=True)]

    def workers(self) -> list[psutil.Process]:
        return [process for process in self.processes() if "realtime.worker.process" in process.cmdline()]

    def broker(self) -> psutil.Process:
        names = {"realtime.broker.process", "realtime.broker.redis_process"}
        (found,) = (process for process in self.processes() if names & set(process.cmdline()))
        return found

    def cpu(self) -> float:
        """Return the CPU time of all processes, in seconds."""
        return sum(sum(process.cpu_times()[:2]) for process in self.processes())

    def metric(self, name: str, worker: int = 0) -> float:
        """Return the value of a worker's metric without further labels."""
        until = time.monotonic() + START_LIMIT
        while time.monotonic() < until:  # a busy worker answers late
            with urllib.request.urlopen(f"http://127.0.0.1:{self.operator_port}/metrics", timeout=5) as answer:
                found = re.search(
                    rf'^{name}{{process="worker",worker="{worker}"}} (.+)$', answer.read().decode(), re.MULTILINE
                )
            if found is not None:
                return float(found[1])
            time.sleep(0.5)
        raise SystemExit(f"the server has no metric {name}")

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.append(line)

    def _is_ready(self) -> bool:
        found = SERVING.search(self.log)
        if found is None:
            return False
        self.port, self.operator_port = int(found[1]), int(found[2])
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.operator_port}/ready", timeout=5):
                return True
        except (urllib.error.URLError, OSError):
            return False
