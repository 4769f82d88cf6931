"""Real Redis servers under test."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater

POLL = 0.01
LIMIT = 20.0  # seconds for a server to answer, and to be gone after a SIGKILL


def free_port() -> int:
    """A TCP port of the loopback address that is free at this moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


class RedisProcess:
    """One standalone server in a directory of its own. Await `start`, and `stop` at the end.

    options: lines of its configuration, as words of a command line. It keeps its data only with such an option.
    """

    def __init__(self, *options: str) -> None:
        self.port = free_port()
        self.address = f"redis://127.0.0.1:{self.port}"
        self.directory = Path(tempfile.mkdtemp(prefix="redis-"))
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None

    async def start(self, *options: str) -> None:
        """Returns when it answers. Raises TimeoutError. options: besides those of the constructor."""
        fixed = ("--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.directory), "--save", "")
        self._process = subprocess.Popen(
            ["redis-server", *fixed, *self._options, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        await Deferred.fromCoroutine(self._answers()).addTimeout(LIMIT, reactor)

    async def _answers(self) -> None:
        while True:
            try:
                if self.ask("PING") == b"+PONG\r\n":
                    return
            except OSError:
                pass
            await deferLater(reactor, POLL)

    def ask(self, *command: Any) -> bytes:
        """Send a command over a connection of its own, and return the beginning of the answer in RESP2."""
        words = [word if isinstance(word, bytes) else str(word).encode() for word in command]
        with socket.create_connection(("127.0.0.1", self.port), timeout=LIMIT) as connection:
            connection.sendall(
                b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words)
            )
            return connection.recv(65536)

    def signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    async def kill(self) -> None:
        """SIGKILL; returns when it is gone. `start` starts it again, on the same port and in the same directory."""
        if self._process is not None:
            self.signal(signal.SIGCONT)
            self.signal(signal.SIGKILL)
            process, self._process = self._process, None
            await Deferred.fromCoroutine(self._gone(process)).addTimeout(LIMIT, reactor)

    async def _gone(self, process: subprocess.Popen[bytes]) -> None:
        while process.poll() is None:
            await deferLater(reactor, POLL)

    def forget(self) -> None:
        """Delete the data of a server that does not run."""
        shutil.rmtree(self.directory)
        os.mkdir(self.directory)

    async def stop(self) -> None:
        """End it and delete its data; idempotent."""
        await self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)
