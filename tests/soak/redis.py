"""The Redis server of a soak whose engine is Redis: its process, its faults, and one relay between it and each node."""

from __future__ import annotations

import asyncio
import shutil
import signal
import socket
import subprocess
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from tests.soak.account import Account

START_LIMIT = 30.0
CHUNK = 65536


def call(port: int, *command: str) -> bytes:
    """Send a command to the server at this port; return the beginning of its answer. Raises OSError."""
    with closing(socket.create_connection(("127.0.0.1", port), 5)) as one:
        parts = "".join(f"${len(part)}\r\n{part}\r\n" for part in command)
        one.sendall(f"*{len(command)}\r\n{parts}".encode())
        return one.recv(CHUNK)


class Relay:
    """Passes bytes between a node and Redis; a cut one passes nothing on, and ends no connection."""

    def __init__(self, port: int) -> None:
        """port: of Redis."""
        self.port = 0
        self._target = port
        self._passes = asyncio.Event()
        self._passes.set()
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    def cut(self) -> None:
        self._passes.clear()

    def restore(self) -> None:
        self._passes.set()

    def end(self) -> None:
        if self._server:
            self._server.close()
        for task in self._tasks:
            task.cancel()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._passes.wait()
            onward_reader, onward_writer = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.close()
            return
        for source, target in ((reader, onward_writer), (onward_reader, writer)):
            task = asyncio.create_task(self._pump(source, target))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pump(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(CHUNK):
                await self._passes.wait()
                target.write(data)
                await target.drain()
        except OSError:
            pass
        finally:
            target.close()


class Redis:
    """One server with an append-only file, and a relay for each node.

    What a fault may lose is noted in the account before the fault.
    """

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self.relays: list[Relay] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._folder = Path()

    async def start(self, folder: Path, nodes: int) -> None:
        """Start the server, and a relay for each node. folder: for its data."""
        self._folder = folder / "redis"
        self._folder.mkdir()
        self._start_process()
        for _ in range(nodes):
            relay = Relay(self.port)
            await relay.start()
            self.relays.append(relay)

    def settings(self, node: int) -> dict[str, Any]:
        """Return the section `engine` of a node's configuration."""
        return {"type": "redis", "redis": {"address": [f"redis://127.0.0.1:{self.relays[node].port}"]}}

    def end(self) -> None:
        for relay in self.relays:
            relay.end()
        self._kill()

    def _start_process(self, *options: str) -> None:
        command = ["redis-server", "--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(self._folder)]
        command += ["--save", "", *(options or ("--appendonly", "yes"))]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        until = time.monotonic() + START_LIMIT
        while time.monotonic() < until:
            with suppress(OSError):
                if call(self.port, "PING").startswith(b"+PONG"):
                    return
            time.sleep(0.02)
        raise SystemExit("redis-server did not start")

    def _kill(self) -> None:
        if self._process:
            self._process.kill()
            self._process.wait()

    # Faults. lasts: seconds.

    async def kill(self, account: Account, lasts: float) -> None:
        """Kill the server, and start it again with its data."""
        account.data_lost()  # the strict epoch tells each client, also where nothing was lost
        self._kill()
        await asyncio.sleep(lasts)
        self._start_process()
        account.data_lost()

    async def stop(self, account: Account, lasts: float) -> None:
        account.broker_lost()
        assert self._process
        self._process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(lasts)
        account.broker_lost()
        self._process.send_signal(signal.SIGCONT)

    async def cut_links(self, account: Account, lasts: float) -> None:
        account.broker_lost()
        call(self.port, "CLIENT", "KILL", "TYPE", "pubsub")
        call(self.port, "CLIENT", "KILL", "TYPE", "normal")

    async def forget_scripts(self, account: Account, lasts: float) -> None:
        call(self.port, "SCRIPT", "FLUSH")

    async def empty(self, account: Account, lasts: float) -> None:
        account.data_lost()
        call(self.port, "FLUSHALL")

    async def start_empty(self, account: Account, lasts: float) -> None:
        """Kill the server, and start it again without data."""
        account.data_lost()
        self._kill()
        shutil.rmtree(self._folder)
        self._folder.mkdir()
        await asyncio.sleep(lasts)
        self._start_process()
        account.data_lost()

    async def start_old(self, account: Account, lasts: float) -> None:
        """Take a snapshot; after some time, kill the server and start it again from that."""
        call(self.port, "SAVE")
        await asyncio.sleep(2 * lasts)
        account.data_lost()
        self._kill()
        shutil.rmtree(self._folder / "appendonlydir")
        self._start_process("--appendonly", "no")
        call(self.port, "CONFIG", "SET", "appendonly", "yes")
        account.data_lost()

    async def cut_node(self, account: Account, node: int, lasts: float) -> None:
        """Pass nothing between a node and the server."""
        account.broker_lost()
        self.relays[node].cut()
        await asyncio.sleep(lasts)
        account.broker_lost()
        self.relays[node].restore()
