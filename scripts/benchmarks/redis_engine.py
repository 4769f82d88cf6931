"""Measure the price of Redis as the engine: publications, deliveries, connections and a storm of reconnects.

One node and two stand beside one with the embedded broker. Nodes, and Redis, share one core; the load generator has
the other. The CPU time is that of all processes of the nodes, and of Redis in a column of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import math
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import IO, Any

import psutil
from subjects import SERVER_CORE, Run, ours
from tables import Row, Table, Verdict, print_verdicts

from tests.soak import world as worlds
from tests.soak.account import Subscription
from tests.soak.redis import Redis, call
from tests.soak.run import Load
from tests.soak.run import Run as AccountedRun
from tests.soak.served import Service

EMBEDDED = "embedded broker"
SETUPS = {EMBEDDED: 0, "Redis, one node": 1, "Redis, two nodes": 2}
CHANNEL, SIZE, CHANNELS = "bench", 128, 1000
HISTORY = 'history_size = 100\nhistory_ttl = "3600s"'
RATE = 20.0
START_LIMIT = 30.0
# Up to these ratios, the price of Redis counts as small.
PUBLISH_MOST, DELIVERY_MOST = 1.5, 1.05
REDIS_PLAIN_MOST, REDIS_HISTORY_MOST = 2.0, 10.0  # microseconds of Redis
# The clients of the storm, all with positions.
MIX = worlds.Mix({"stream": 100}, {"": 100}, {"websocket": 100})


class Nodes:
    """One or two nodes, and their Redis. See `subjects.Subject`."""

    dialect = "realtime"

    def __init__(self, nodes: list[Any], redis: subprocess.Popen[bytes] | None) -> None:
        self.ports = [node.port for node in nodes]
        self.port = self.ports[0]
        self.redis = redis.pid if redis else 0
        self._nodes = nodes

    def processes(self) -> list[psutil.Process]:
        own = [process for node in self._nodes for process in node.processes()]
        return [*own, psutil.Process(self.redis)] if self.redis else own


@contextmanager
def running(name: str, channel: str) -> Iterator[Nodes]:
    """Run the nodes of a set-up. channel: additional lines of TOML."""
    with ExitStack() as ends:
        redis, engine = None, ""
        if SETUPS[name]:
            with socket.create_server(("127.0.0.1", 0)) as free:
                port = free.getsockname()[1]
            redis = ends.enter_context(redis_server(port))
            engine = f'type = "redis"\n[engine.redis]\naddress = ["redis://127.0.0.1:{port}"]'
        yield Nodes(
            [ends.enter_context(ours(channel=channel, engine=engine)) for _ in range(max(1, SETUPS[name]))], redis
        )


@contextmanager
def redis_server(port: int) -> Iterator[subprocess.Popen[bytes]]:
    """Run a Redis server without persistence on the core of the nodes."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--bind", "127.0.0.1", "--port", str(port), "--dir", folder, "--save", "", "--appendonly", "no"]
        command = ["taskset", "-c", str(SERVER_CORE), "redis-server", *options]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        try:
            until = time.monotonic() + START_LIMIT
            while not answers(port):
                if time.monotonic() > until or process.poll() is not None:
                    raise SystemExit("redis-server did not start")
                time.sleep(0.02)
            yield process
        finally:
            process.kill()
            process.wait()


def answers(port: int) -> bool:
    try:
        return call(port, "PING").startswith(b"+PONG")
    except OSError:
        return False


def rows(table: Table, asked: argparse.Namespace) -> Iterator[Row]:
    """Yield each row once per run; print it after its last run."""
    table.print_head()
    for run in range(asked.runs):
        for name in SETUPS:
            row = table.row(name)
            yield row
            if run == asked.runs - 1:
                table.print_row(row)


def record(row: Row, nodes: Nodes, run: Run, units: int) -> None:
    """Add a run to a row: the costs of the nodes, and beside them those of Redis."""
    more = {}
    if nodes.redis:
        used = run.parts[nodes.redis]
        run.server -= used
        more["Redis µs"] = 1e6 * used / units
    row.add(run, units, **more)


def judge(table: Table, most: float, what: str, redis_most: float | None = None) -> None:
    """Compare the nodes' costs with those of the embedded broker, and those of Redis with `redis_most`, in µs."""
    own = table.row(EMBEDDED)
    for row in table.rows[1:]:
        ratio = median(one / two for one, two in zip(row.costs, own.costs, strict=True))
        table.judge(f"{what}, {row.name}: relative to the {EMBEDDED}", ratio, most, digits=2)
        if redis_most is not None:
            table.judge(f"{what}, {row.name}: Redis", median(row.more["Redis µs"]), redis_most, " µs")
    print_verdicts(table.verdicts)


def publish(asked: argparse.Namespace, history: bool) -> Table:
    kind = "with" if history else "without"
    table = Table("redis publish", f"publications {kind} history and subscribers, 20 connections", "a publication")
    given: dict[str, Any] = {"connections": 20, "size": SIZE, "channels": CHANNELS}
    for row in rows(table, asked):
        with running(row.name, HISTORY if history else "") as nodes:
            record(row, nodes, Run(nodes, "publish", warm=asked.times // 5, times=asked.times, **given), asked.times)
    judge(table, PUBLISH_MOST, f"publish {kind} history", REDIS_HISTORY_MOST if history else REDIS_PLAIN_MOST)
    return table


def fanout(asked: argparse.Namespace) -> Table:
    title = f"fan-out to {asked.subscribers:,} subscribers on all nodes together, {RATE:g} messages a second"
    table = Table("redis fanout", title, "a delivery")
    times = max(int(asked.seconds * RATE), 3)
    given: dict[str, Any] = {"subscribers": asked.subscribers, "burst": 1, "rate": RATE, "size": SIZE}
    for row in rows(table, asked):
        with running(row.name, HISTORY) as nodes:
            run = Run(nodes, "fanout", channel=CHANNEL, warm=math.ceil(RATE), times=times, **given)
            record(row, nodes, run, asked.subscribers * times)
    judge(table, DELIVERY_MOST, "a delivery")
    return table


def connect(asked: argparse.Namespace) -> Table:
    number = asked.connections
    title = f"{number:,} connections that subscribe to a channel with history, 64 at a time"
    table = Table("redis connect", title, "a connection")
    for row in rows(table, asked):
        with running(row.name, HISTORY) as nodes:
            record(row, nodes, Run(nodes, "connect", warm=300, times=number, channel=CHANNEL), number)
    return table


class Storm(AccountedRun):
    """One node of two dies, or the workers of the only one; all clients come back and recover.

    back: seconds until then. spent: CPU µs of the surviving processes for each client that came back.
    """

    def __init__(self, clients: int, redis: Redis | None, copy: IO[str]) -> None:
        super().__init__(1, 2, lambda text: print(text, flush=True), copy, redis)
        self._clients = clients
        self.back = self.spent = 0.0
        self.returned = self.told = self.recovered = 0

    def _create_world(self) -> worlds.World:
        return worlds.create(self.account, self._seed, self._clients, MIX)

    async def _strain(self, load: Load) -> None:
        publishing = self._publish(load, 50.0)
        await asyncio.sleep(3.0)
        survivor, before = load.service, self._count()
        self._end_node(load.services)
        began, lost = self._now(), load.crowd.counts["connections lost"]
        used = _cpu(survivor.everyone())
        await asyncio.sleep(0.5)
        await self._wait_back(load.crowd)
        self.back = self._now() - began
        self.returned = load.crowd.counts["connections lost"] - lost
        self.spent = 1e6 * (_cpu(survivor.everyone()) - used) / max(self.returned, 1)
        await self._stop_publishing(load, publishing)
        told, recovered = self._count()
        self.told, self.recovered = told - before[0], recovered - before[1]

    def _end_node(self, services: list[Service]) -> None:
        service = services[-1]
        if len(services) > 1:
            service.excuse(service.supervisor, "the storm")
            for pid in service.everyone():
                service.kill(pid, signal.SIGKILL)
        else:
            for pid in service.of("worker"):
                service.excuse(pid, "the storm")
                service.kill(pid, signal.SIGKILL)

    def _count(self) -> tuple[int, int]:
        books: list[Subscription] = self.account.subscriptions
        return sum(one.told_times for one in books), sum(one.recovered for one in books)

    def _report_all(self, load: Load, totals: Any) -> None:
        print(
            f"    {self.returned:,} clients were back within {self.back:.1f} s, {self.spent:.0f} CPU µs each;"
            f" {self.recovered:,} publications recovered, {self.told:,} times told lost,"
            f" {totals['silently lost']:,} silently lost"
        )


def _cpu(pids: list[int]) -> float:
    """Return the CPU time of the running ones of these processes, in seconds."""
    total = 0.0
    for pid in pids:
        try:
            total += time.clock_gettime_ns(~pid << 3 | 2) / 1e9
        except OSError:
            continue
    return total


def storm(asked: argparse.Namespace) -> list[Verdict]:
    verdicts = []
    for name, redis in ((EMBEDDED, None), ("Redis, two nodes", Redis)):
        print(f"\nstorm of reconnects of {asked.storm:,} clients, {name}")
        with open(os.devnull, "w") as copy:
            run = Storm(asked.storm, redis() if redis else None, copy)
            asyncio.run(run.run())
        verdicts.append(Verdict(f"storm, {name}: clients told lost", "0", str(run.told), run.told == 0))
        verdicts.append(Verdict(f"storm, {name}: broken rules", "0", str(len(run.account.findings)), not run.failed))
    print_verdicts(verdicts)
    return verdicts


def main(arguments: list[str]) -> int:
    options = argparse.ArgumentParser(
        prog="scripts/bench redis", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--runs", type=int, default=3)
    options.add_argument("--seconds", type=float, default=3.0)
    options.add_argument("--subscribers", type=int, default=1000)
    options.add_argument("--connections", type=int, default=2000)
    options.add_argument("--times", type=int, default=20_000, help="publications in each run (default 20000)")
    options.add_argument("--storm", type=int, default=5000, help="clients of the storm; 0 for none (default 5000)")
    options.add_argument("--only", choices=("publish", "fanout", "connect", "storm"), help="one part alone")
    asked = options.parse_args(arguments)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    gc.disable()  # keeps collections of this process out of the figures
    parts = {
        "publish": lambda: [*publish(asked, False).verdicts, *publish(asked, True).verdicts],
        "fanout": lambda: fanout(asked).verdicts,
        "connect": lambda: connect(asked).verdicts,
        "storm": lambda: storm(asked) if asked.storm else [],
    }
    chosen = [part for name, part in parts.items() if asked.only in (None, name)]
    verdicts = [verdict for part in chosen for verdict in part()]
    return 0 if all(one.met for one in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
