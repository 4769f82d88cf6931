"""A real server under test: `twistd -n realtime` in a session of its own, on ports of the kernel's choice.

The test learns the ports from the server's log, waits until it is ready, and at the end asks for three things: that
SIGTERM ended it with status 0, that no process of it is left, and that no traceback was logged which the test did not
announce with `expect_traceback`.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).parent
CHECKOUT = HERE.parent.parent
TWISTD = Path(sys.executable).with_name("twistd")

START_LIMIT = 30.0
STOP_LIMIT = 20.0
POLL = 0.02  # between two looks at something that can't notify us

SERVING = re.compile(r"serving clients on http://[^ ]*?:(\d+)/, operators on http://[^ ]*?:(\d+)")
TRACEBACK = "Traceback (most recent call last)"

Sections = dict[str, Any]

BASE: Sections = {
    "http_server": {"address": "127.0.0.1", "port": 0, "internal_port": 0},
    "workers": {"count": 2},
    "shutdown": {"timeout": "10s", "spread": "0s"},
    "app": {"module": "everything:app", "path": str(HERE / "apps")},
    "client": {
        "allowed_origins": ["*"],
        "token": {"hmac_secret_key": "secret"},
        # The streams of these tests are longer than the 300 publications of the default.
        "recovery_max_publication_limit": 100_000,
        "history_max_publication_limit": 1_000,
    },
    "http_api": {"key": "test-key"},
    "channel": {
        "without_namespace": {
            "allow_subscribe_for_client": True,
            "allow_publish_for_subscriber": True,
        },
        "namespaces": [
            {"name": "checked", "allow_subscribe_for_client": True},
            {
                "name": "stream",
                "publication_data_format": "binary",
                "history_size": 100_000,
                "history_ttl": "600s",
                "force_recovery": True,
                "presence": True,
                "join_leave": True,
                "force_push_join_leave": True,
                "allow_subscribe_for_client": True,
                "allow_publish_for_subscriber": True,
                "allow_presence_for_subscriber": True,
                "allow_history_for_subscriber": True,
            },
        ],
    },
}


def toml(value: Any) -> str:
    """A value as TOML: tables inline, strings as in JSON, whose escapes TOML shares."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value)


def merged(base: Sections, over: Sections) -> Sections:
    """`base` with the values of `over` laid over it, table by table."""
    result = dict(base)
    for key, value in over.items():
        below = result.get(key)
        result[key] = merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return result


def wait_until(condition: Callable[[], Any], what: str, limit: float = START_LIMIT) -> Any:
    """The first true result of `condition`, which is asked again and again; AssertionError after `limit` seconds."""
    deadline = time.monotonic() + limit
    while not (result := condition()):
        assert time.monotonic() < deadline, f"no {what} within {limit:g} s"
        time.sleep(POLL)
    return result


class Server:
    """One running server. Its methods are synchronous: system tests do not run the test process's reactor."""

    def __init__(
        self,
        config: Path,
        arguments: tuple[str, ...] = (),
        environment: dict[str, str] | None = None,
        cwd: Path = CHECKOUT,
        descriptors: int = 0,
        prefix: tuple[str, ...] = (),
        twistd: tuple[str, ...] = (),
    ) -> None:
        """descriptors: limit of open files of each process, 0 for that of the tests. prefix: a command that runs the
        server. twistd: options of twistd's own."""

        def limit_descriptors() -> None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))

        command = [*prefix, str(TWISTD), "--nodaemon", "--pidfile=", *twistd, "realtime", "--config", str(config)]
        command += arguments
        self.process = subprocess.Popen(
            command,
            cwd=cwd,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="backslashreplace",
            start_new_session=True,
            preexec_fn=limit_descriptors if descriptors else None,
        )
        self.pid = self.process.pid
        self.lines: list[str] = []
        self.port = self.operator_port = 0
        self._tracebacks_expected = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout:
            for line in self.process.stdout:
                self.lines.append(line)

    @property
    def log(self) -> str:
        return "".join(self.lines)

    @property
    def endpoint(self) -> str:
        return f"ws://127.0.0.1:{self.port}/connection/websocket"

    @property
    def http(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait_for_log(self, pattern: str | re.Pattern[str], limit: float = START_LIMIT) -> re.Match[str]:
        """The first match of `pattern` in the log, now or later."""

        def look() -> re.Match[str] | None:
            found = re.search(pattern, self.log)
            assert found or self.process.poll() is None, f"the server ended with {self.process.poll()}:\n{self.log}"
            return found

        return wait_until(look, f"{pattern!r} in the log", limit)

    def wait_ready(self) -> None:
        serving = self.wait_for_log(SERVING)
        self.port, self.operator_port = int(serving[1]), int(serving[2])
        try:
            wait_until(lambda: self.operate("/ready")[0] == 200, "readiness")
        except AssertionError as error:
            raise AssertionError(f"{error}:\n{self.log}") from None

    def operate(self, path: str) -> tuple[int, str]:
        """Status and body of a GET on the operators' port; (0, reason) when nobody answers."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.operator_port}{path}", timeout=5) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()
        except OSError as error:
            return 0, str(error)

    def health(self) -> dict[str, Any]:
        return json.loads(self.operate("/health")[1])

    def family(self) -> list[psutil.Process]:
        """All live processes of this server, the supervisor included, also those whose parent is gone."""
        return [process for process in psutil.process_iter() if belongs(process, self.pid)]

    def processes(self, module: str) -> list[int]:
        """The pids of the children that run `module`, such as realtime.worker.process."""
        return [process.pid for process in self.family() if module in _arguments(process)]

    def workers(self) -> list[int]:
        return self.processes("realtime.worker.process")

    def broker(self) -> int:
        (pid,) = self.processes("realtime.broker.process") or self.processes("realtime.broker.redis_process")
        return pid

    def expect_traceback(self) -> None:
        """This test makes user code or the server fail on purpose."""
        self._tracebacks_expected = True

    def stop(self) -> None:
        """SIGTERM, and the three demands of this module."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            status = self.process.wait(STOP_LIMIT)
        except subprocess.TimeoutExpired:
            status = None
        orphans = self._end_orphans()
        self._reader.join(STOP_LIMIT)
        assert status == 0, f"the server ended with {status} (None: not within {STOP_LIMIT:g} s):\n{self.log}"
        assert not orphans, f"left behind: {orphans}\n{self.log}"
        assert self._tracebacks_expected or TRACEBACK not in self.log, f"an unexpected traceback:\n{self.log}"

    def kill(self) -> None:
        """End whatever still runs, without asking anything of it."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._end_orphans()

    def _end_orphans(self) -> list[str]:
        orphans = self.family()
        names = [" ".join(_arguments(process)) for process in orphans]
        for process in orphans:
            process.kill()
        psutil.wait_procs(orphans, timeout=STOP_LIMIT)
        return names


def belongs(process: psutil.Process, session: int) -> bool:
    """Return whether a live process is in this session."""
    try:
        return os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False


def _arguments(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


class ServerStarter:
    """Starts servers for one test, and ends them all."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.started: list[Server] = []

    def __call__(
        self,
        *arguments: str,
        config: Path | None = None,
        environment: dict[str, str] | None = None,
        cwd: Path = CHECKOUT,
        descriptors: int = 0,
        prefix: tuple[str, ...] = (),
        twistd: tuple[str, ...] = (),
        **sections: Any,
    ) -> Server:
        """A ready server. sections: laid over BASE. config: a file to use instead. arguments: further options. cwd:
        its working directory. descriptors, prefix, twistd: see `Server`."""
        path = config or self._write(merged(BASE, sections))
        server = Server(path, arguments, environment, cwd, descriptors, prefix, twistd)
        self.started.append(server)
        server.wait_ready()
        return server

    def _write(self, settings: Sections) -> Path:
        path = self.directory / f"realtime-{len(self.started)}.toml"
        path.write_text("".join(f"{key} = {toml(value)}\n" for key, value in settings.items()))
        return path

    def finish(self) -> None:
        try:
            for server in self.started:
                server.stop()
        finally:
            for server in self.started:
                server.kill()


def run_node(script: str, *arguments: Any, limit: float = 100.0) -> Any:
    """Run tests/system/js/`script` in Node and return the JSON value that it prints on its last line.

    The arguments reach it as JSON. AssertionError with everything it said when it fails or takes over `limit` seconds.
    """
    command = ["node", str(HERE / "js" / script), *(json.dumps(argument) for argument in arguments)]
    try:
        done = subprocess.run(
            command, cwd=HERE.parent, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired as error:
        said = b"".join(part for part in (error.stdout, error.stderr) if part).decode(errors="replace")
        raise AssertionError(f"{script} did not end within {limit:g} s:\n{said}") from None
    assert done.returncode == 0, f"{script} failed:\n{done.stdout}\n{done.stderr}"
    return json.loads(done.stdout.splitlines()[-1])
