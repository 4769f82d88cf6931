"""Carries the faults of a schedule out: on the server's processes, their descriptors and links, and the clients."""

from __future__ import annotations

import asyncio
import ctypes
import os
import resource
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import suppress
from random import Random
from typing import Any

import psutil

from tests.soak.account import Account
from tests.soak.clients import Connection, Crowd
from tests.soak.holders import sockets
from tests.soak.redis import Redis
from tests.soak.schedule import Fault
from tests.soak.served import Service
from tests.soak.wire import request

PIDFD_GETFD = 438  # the system call; Python has no name for it
SILENT = 200  # connections that say nothing
STARTING = 30.0  # seconds
ORDERS = 8  # attempts

_libc = ctypes.CDLL(None, use_errno=True)


class Faults:
    """Carries faults out, each in a task of its own. latest: the description of the newest one."""

    def __init__(self, account: Account, services: list[Service], crowd: Crowd, redis: Redis | None = None) -> None:
        self.latest = ""
        self.done: Counter[str] = Counter()
        self.impossible: Counter[str] = Counter()
        self._account = account
        self._services = services
        self._redis = redis
        self._crowd = crowd
        self._striking = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._held: Counter[int] = Counter()  # by port

    async def run(self, faults: list[Fault], began: float, tell: Callable[[str], None]) -> None:
        """Carry the faults out at their times after `began`."""
        for fault in faults:
            await asyncio.sleep(max(0.0, began + fault.at - self._account.now()))
            self.latest = str(fault)
            tell(f"fault {sum(self.done.values()) + 1}: {fault}")
            self.done[fault.kind] += 1
            self._spawn(ACTIONS[fault.kind](self, fault))

    async def finish(self) -> None:
        """Wait for the end of the faults that last."""
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _spawn(self, action: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(self._watched(action))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _watched(self, action: Coroutine[Any, Any, None]) -> None:
        try:
            await action
        except (OSError, psutil.NoSuchProcess) as error:
            self.impossible[type(error).__name__] += 1

    # Processes.

    def _node(self, fault: Fault) -> int:
        """Return the number of the node that a fault concerns."""
        return int(1000 * fault.target) % len(self._services)

    def _of(self, fault: Fault) -> Service:
        return self._services[self._node(fault)]

    def _one_of(self, role: str, fault: Fault) -> int | None:
        found = self._of(fault).of(role)
        if not found:
            self.impossible[f"no {role} at the moment"] += 1
            return None
        return found[int(fault.target * len(found))]

    async def _kill(self, fault: Fault, role: str, number: int = signal.SIGKILL) -> None:
        if (pid := self._one_of(role, fault)) is not None:
            self._of(fault).excuse(pid, fault.kind)
            self._of(fault).kill(pid, number)

    async def _stop(self, fault: Fault, role: str, excused: bool = False) -> None:
        if (pid := self._one_of(role, fault)) is not None:
            if excused:
                self._of(fault).excuse(pid, fault.kind)
            await self._pause(self._of(fault), [pid], fault.lasts)

    async def _pause(self, service: Service, pids: list[int], seconds: float) -> None:
        stopped = [pid for pid in pids if service.kill(pid, signal.SIGSTOP)]
        try:
            await asyncio.sleep(seconds)
        finally:
            for pid in stopped:
                service.kill(pid, signal.SIGCONT)

    async def kill_worker(self, fault: Fault) -> None:
        await self._kill(fault, "worker")

    async def stop_worker(self, fault: Fault) -> None:
        await self._stop(fault, "worker")

    async def stop_worker_for_good(self, fault: Fault) -> None:
        await self._stop(fault, "worker", excused=True)

    async def drain_worker(self, fault: Fault) -> None:
        await self._kill(fault, "worker", signal.SIGTERM)

    # Replacements of workers, which no client notices.

    async def _order(self, order: Callable[[], Coroutine[Any, Any, tuple[int, str]]]) -> None:
        """Give an order to the server, several times if another fault comes in between."""
        for _ in range(ORDERS):
            status, said = await order()
            if not status:
                return
            self.impossible[f"{said.splitlines()[-1] if said else status}"] += 1
            await asyncio.sleep(3.0)

    async def reload(self, fault: Fault) -> None:
        await self._order(self._of(fault).reload)

    async def scale(self, fault: Fault) -> None:
        service = self._of(fault)
        await self._order(lambda: service.scale(1 + int(4 * fault.target)))
        await asyncio.sleep(fault.lasts)
        await self._order(lambda: service.scale(2))

    async def recycle(self, fault: Fault) -> None:
        await self._reconfigure(fault, {"workers": {"max_age": "5s"}})

    async def rebalance(self, fault: Fault) -> None:
        await self._reconfigure(fault, {"loop": {"rebalance_difference": 0.01, "rebalance_delay": "1s"}})

    async def _reconfigure(self, fault: Fault, changes: dict[str, Any]) -> None:
        service = self._of(fault)
        with service.replacing(fault.kind):
            await self._order(lambda: service.reload(changes))
            await asyncio.sleep(fault.lasts)
            await self._order(service.reload)

    async def kill_broker(self, fault: Fault) -> None:
        await self._kill(fault, "broker")

    async def stop_broker(self, fault: Fault) -> None:
        await self._stop(fault, "broker")

    async def kill_supervisor(self, fault: Fault) -> None:
        service = self._of(fault)
        service.excuse(service.supervisor, fault.kind)
        service.kill(service.supervisor, signal.SIGKILL)

    async def stop_supervisor(self, fault: Fault) -> None:
        service = self._of(fault)
        await self._pause(service, [service.supervisor], fault.lasts)

    async def stop_all(self, fault: Fault) -> None:
        service = self._of(fault)
        if self._redis is not None:
            self._account.broker_lost()  # Redis may cut its link
        await self._pause(service, service.everyone(), fault.lasts)

    async def restart(self, fault: Fault) -> None:
        service = self._of(fault)
        service.excuse(service.supervisor, fault.kind)
        service.kill(service.supervisor, signal.SIGTERM)

    async def fill_disk(self, fault: Fault) -> None:
        for full in (True, False):
            self._of(fault).fill_disk(full)
            await self.restart(fault)
            await asyncio.sleep(fault.lasts)

    async def hold_output(self, fault: Fault) -> None:
        service = self._of(fault)
        self._held[service.port] += 1
        service.output.may_read.clear()
        await asyncio.sleep(fault.lasts)
        self._held[service.port] -= 1
        if not self._held[service.port]:
            service.output.may_read.set()

    async def kill_handler(self, fault: Fault) -> None:
        await self._compute(fault)
        await self._kill(fault, "handler process")

    async def stop_handler(self, fault: Fault) -> None:
        await self._stop(fault, "handler process")
        await self._compute(fault)

    # Handlers.

    async def _call(self, fault: Fault, path: str, seconds: float) -> None:
        """Call a handler that takes `seconds`, once: HTTP libraries repeat a GET whose connection ends."""
        async with asyncio.timeout(seconds + 20):
            reader, writer = await asyncio.open_connection("127.0.0.1", self._of(fault).port)
            try:
                writer.write(request("GET", path, more="Connection: close\r\n"))
                await reader.read()
            finally:
                writer.transport.abort()

    async def _compute(self, fault: Fault) -> None:
        await asyncio.gather(*(self._call(fault, "/compute", 0) for _ in range(4)), return_exceptions=True)

    async def block_loop(self, fault: Fault) -> None:
        await self._call(fault, f"/block?seconds={fault.lasts}", fault.lasts)

    async def block_loop_for_good(self, fault: Fault) -> None:
        self._of(fault).excuse_one_worker(fault.kind)
        await self.block_loop(fault)

    async def hold_interpreter(self, fault: Fault) -> None:
        await self._call(fault, f"/hold?seconds={fault.lasts}", fault.lasts)

    # Links and descriptors.

    async def cut_link(self, fault: Fault) -> None:
        worker, broker = self._one_of("worker", fault), self._one_of("broker", fault)
        if worker is None or broker is None:
            return
        inodes = set(sockets(worker).values())
        pairs = [fd for fd, inode in sockets(broker).items() if {inode - 1, inode + 1} & inodes]
        if not pairs or not all(_shut(broker, fd) for fd in pairs):
            self.impossible["no link could be cut"] += 1

    async def take_descriptors(self, fault: Fault) -> None:
        if (pid := self._one_of("worker", fault)) is None:
            return
        if time.time() - psutil.Process(pid).create_time() < STARTING:
            self.impossible["the worker is starting, and may fail without descriptors"] += 1
            return
        with suppress(ProcessLookupError):
            before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
            used = len(os.listdir(f"/proc/{pid}/fd"))
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (used + 3, before[1]))
            await asyncio.sleep(fault.lasts)
            resource.prlimit(pid, resource.RLIMIT_NOFILE, before)

    # Clients.

    def _random(self, fault: Fault) -> Random:
        return Random(str(fault))

    async def cut_clients(self, fault: Fault) -> None:
        for client in self._crowd.sample(self._random(fault), 0.02 + 0.3 * fault.target):
            if client.connection:
                client.connection.cut()

    async def cut_all_clients(self, fault: Fault) -> None:
        for client in self._crowd.connected():
            if client.connection:
                client.connection.cut()

    async def forget_clients(self, fault: Fault) -> None:
        some = self._crowd.sample(self._random(fault), 0.05 * fault.target)
        ghosts = [ghost for client in some if (ghost := client.forget())]
        await asyncio.sleep(fault.lasts)
        for ghost in ghosts:
            ghost.cut()

    def _deafen(self, fault: Fault) -> list[Connection]:
        some = self._crowd.sample(self._random(fault), 0.05 * fault.target)
        for client in some:
            client.doubt()
        connections = [client.connection for client in some if client.connection]
        for connection in connections:
            connection.pause()
        return connections

    async def read_nothing(self, fault: Fault) -> None:
        connections = self._deafen(fault)
        await asyncio.sleep(fault.lasts)
        for connection in connections:
            connection.resume()

    async def read_slowly(self, fault: Fault) -> None:
        connections = self._deafen(fault)
        for _ in range(int(fault.lasts)):
            await asyncio.sleep(1.0)
            for connection in connections:
                connection.resume()
            await asyncio.sleep(0)
            for connection in connections:
                connection.pause()
        for connection in connections:
            connection.resume()

    # Redis.

    async def _strike(self, fault: Fault, strike: Callable[[Redis, Account, float], Coroutine[Any, Any, None]]) -> None:
        assert self._redis is not None
        async with self._striking:  # the next begins when Redis is back
            await strike(self._redis, self._account, fault.lasts)

    async def kill_redis(self, fault: Fault) -> None:
        await self._strike(fault, Redis.kill)

    async def stop_redis(self, fault: Fault) -> None:
        await self._strike(fault, Redis.stop)

    async def cut_links_to_redis(self, fault: Fault) -> None:
        await self._strike(fault, Redis.cut_links)

    async def forget_scripts(self, fault: Fault) -> None:
        await self._strike(fault, Redis.forget_scripts)

    async def empty_redis(self, fault: Fault) -> None:
        await self._strike(fault, Redis.empty)

    async def start_redis_empty(self, fault: Fault) -> None:
        await self._strike(fault, Redis.start_empty)

    async def start_redis_old(self, fault: Fault) -> None:
        await self._strike(fault, Redis.start_old)

    async def cut_node(self, fault: Fault) -> None:
        assert self._redis is not None
        await self._redis.cut_node(self._account, self._node(fault), fault.lasts)

    async def say_nothing(self, fault: Fault) -> None:
        sockets = []
        for _ in range(SILENT):
            one = socket.socket()
            one.setblocking(False)
            sockets.append(one)
            with suppress(OSError):
                await asyncio.wait_for(self._crowd.loop.sock_connect(one, ("127.0.0.1", self._of(fault).port)), 5)
        await asyncio.sleep(fault.lasts)
        for one in sockets:
            one.close()


def _shut(pid: int, fd: int) -> bool:
    """Shut a socket of another process down."""
    pidfd = os.pidfd_open(pid)
    try:
        copy = _libc.syscall(PIDFD_GETFD, pidfd, fd, 0)
    finally:
        os.close(pidfd)
    if copy < 0:
        return False
    with socket.socket(fileno=copy) as sock, suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    return True


ACTIONS: dict[str, Callable[[Faults, Fault], Coroutine[Any, Any, None]]] = {
    "kill a worker": Faults.kill_worker,
    "stop a worker": Faults.stop_worker,
    "stop a worker for good": Faults.stop_worker_for_good,
    "drain a worker": Faults.drain_worker,
    "reload": Faults.reload,
    "scale": Faults.scale,
    "recycle workers": Faults.recycle,
    "rebalance": Faults.rebalance,
    "kill the broker": Faults.kill_broker,
    "stop the broker": Faults.stop_broker,
    "kill the supervisor": Faults.kill_supervisor,
    "stop the supervisor": Faults.stop_supervisor,
    "stop all processes": Faults.stop_all,
    "restart the service": Faults.restart,
    "fill the disk of the output": Faults.fill_disk,
    "leave the output unread": Faults.hold_output,
    "kill a handler process": Faults.kill_handler,
    "stop a handler process": Faults.stop_handler,
    "block a loop": Faults.block_loop,
    "block a loop for good": Faults.block_loop_for_good,
    "hold the interpreter's lock": Faults.hold_interpreter,
    "cut a link to the broker": Faults.cut_link,
    "take a worker's descriptors": Faults.take_descriptors,
    "cut clients": Faults.cut_clients,
    "cut all clients": Faults.cut_all_clients,
    "forget clients": Faults.forget_clients,
    "read nothing": Faults.read_nothing,
    "read slowly": Faults.read_slowly,
    "open clients and say nothing": Faults.say_nothing,
    "kill Redis": Faults.kill_redis,
    "stop Redis": Faults.stop_redis,
    "cut the links to Redis": Faults.cut_links_to_redis,
    "forget Redis' scripts": Faults.forget_scripts,
    "empty Redis": Faults.empty_redis,
    "start Redis without its data": Faults.start_redis_empty,
    "start Redis from an old snapshot": Faults.start_redis_old,
    "cut a node from Redis": Faults.cut_node,
}
