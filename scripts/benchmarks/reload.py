"""Reload a server under load, and account for every connection, publication, join and leave.

Thousands of clients over all transports, in JSON and Protobuf, half of them with deltas, in channels with and without
history, receive publications while the server is reloaded again and again. Nothing of a reload may reach them: no
disconnect, no loss, no repeat, no change of order, no join, no leave. The clients and the account are those of
scripts/soak. Delays include the delay of this process, which has all clients on one loop.

The CPU time of the server is that in /proc of all its processes, those that have ended included. From the CPU time
during a reload, this benchmark subtracts that of the load outside of reloads, and that of a reload without clients.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import resource
import sys
import time
from array import array
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from tables import Verdict, print_verdicts

from tests.soak import world as worlds
from tests.soak.account import BROKEN, LOST, REORDERED, REPEATED
from tests.soak.run import Load, Run
from tests.soak.served import Service

MIX = worlds.Mix(
    first={"delta": 50, "stream": 15, "talk": 10, "tags": 10, "own": 15},
    second={"plain": 40, "room": 20, "": 40},
    transports={
        "websocket": 42, "websocket protobuf": 42, "http_stream": 3, "http_stream protobuf": 3, "sse": 4,
        "uni_websocket": 2, "uni_http_stream": 2, "uni_sse": 2,
    },
    members=10,
)  # fmt: skip
# Reloads without clients, which show the CPU time for the start of the processes.
BARE = 3
WARM = 3.0  # seconds of load before it is measured
CONNECTIONS, BYTES = "realtime_handed_over_connections", "realtime_handed_over_bytes"


class Phase:
    """What clients and server did while no reload was under way, or while one was.

    delays: of the deliveries, in seconds. cpu: of the server's processes, in seconds. counts: of the crowd.
    """

    def __init__(self) -> None:
        self.delays = array("d")
        self.seconds = self.cpu = 0.0
        self.counts: Counter[str] = Counter()

    def quantile(self, share: float) -> float:
        """Return a quantile of the delays in milliseconds."""
        ordered = sorted(self.delays)
        return 1000 * ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else float("nan")


def cpu(service: Service) -> float:
    """Return the CPU time of the server's processes since its start, in seconds; that of ended ones is with their
    parents (proc(5), cutime and cstime)."""
    ticks = 0
    for name in os.listdir("/proc"):
        try:
            if name.isdigit() and os.getsid(int(name)) == service.supervisor:
                fields = Path("/proc", name, "stat").read_text().rpartition(")")[2].split()
                ticks += sum(map(int, fields[11:15]))
        except (OSError, ValueError):
            continue
    return ticks / os.sysconf("SC_CLK_TCK")


class Reloads(Run):
    """One run. calm, busy: outside of reloads, and during them. bare: CPU seconds of one reload without clients."""

    publishers = 32

    def __init__(self, asked: argparse.Namespace, copy: IO[str]) -> None:
        super().__init__(asked.seed, asked.workers, lambda text: print(text, flush=True), copy)
        self._asked = asked
        self.calm, self.busy = Phase(), Phase()
        self.bare = self._own_share = 0.0
        self.reloads: list[float] = []  # seconds of each
        self.handed_over: dict[str, float] = {}
        self.verdicts: list[Verdict] = []

    def _settings(self, port: int, operator_port: int) -> dict[str, Any]:
        settings = super()._settings(port, operator_port)
        del settings["shutdown"]  # the default time
        return settings

    def _create_world(self) -> worlds.World:
        return worlds.create(self.account, self._seed, self._asked.clients, MIX)

    async def _prepare(self, service: Service) -> None:
        began = cpu(service)
        for _ in range(BARE):
            await self._reload(service)
        self.bare = (cpu(service) - began) / BARE

    async def _reload(self, service: Service) -> None:
        status, said = await (service.upgrade() if self._asked.upgrade else service.reload())
        if status:
            self._report("reload", f"the command ended with status {status}: {said}")

    async def _strain(self, load: Load) -> None:
        began = time.process_time(), self._now()
        publishing = self._publish(load, self._asked.rate)
        await asyncio.sleep(WARM)
        await self._measure(load, self.calm, asyncio.sleep(self._asked.idle))
        for number in range(self._asked.reloads):
            at = self._now()
            await self._measure(load, self.busy, self._reload(load.service))
            self.reloads.append(self._now() - at)
            self._say(
                f"reload {number + 1}: {self.reloads[-1]:.2f} s, {self.busy.counts['connections lost']} disconnects"
            )
            await self._measure(load, self.calm, asyncio.sleep(self._asked.pause))
        self._own_share = (time.process_time() - began[0]) / (self._now() - began[1])
        self.handed_over = await load.service.read_metrics(CONNECTIONS, BYTES)
        await self._stop_publishing(load, publishing)

    async def _measure(self, load: Load, phase: Phase, part: object) -> None:
        """Add to `phase` what happens until `part` is done."""
        channels, delays, now = self.account.channels, phase.delays, self.account.now
        load.crowd.on_delivery = lambda name, number: delays.append(now() - channels[name].asked[number])
        began, used, before = now(), cpu(load.service), Counter(load.crowd.counts)
        await part  # type: ignore[misc]
        phase.seconds += now() - began
        phase.cpu += cpu(load.service) - used
        phase.counts += load.crowd.counts - before

    # Results.

    def _report_all(self, load: Load, totals: Mapping[str, int]) -> None:
        calm, busy, counts = self.calm, self.busy, self.calm.counts + self.busy.counts
        deliveries = len(calm.delays) / calm.seconds
        print(
            f"\n{self._asked.clients:,} clients, {deliveries:,.0f} deliveries a second, {self._asked.workers} workers"
        )
        print(f"{'':24}{'deliveries':>12}{'p50 ms':>9}{'p99 ms':>9}{'max ms':>9}{'server CPU':>12}")
        for name, phase in (("no reload", calm), ("while reloading", busy)):
            times = "".join(f"{phase.quantile(share):9.1f}" for share in (0.5, 0.99, 1.0))
            print(f"{name:24}{len(phase.delays):12,}{times}{phase.cpu / max(phase.seconds, 1e-9):12.0%}")
        print(f"    this process used {self._own_share:.0%} of a core")
        self._print_cost()
        for name in sorted(counts):
            print(f"    {counts[name]:9,}  {name}")
        for name in ("accepted", "promised", "delivered", "recovered", "plain delivered", "plain dropped and counted"):
            print(f"    {totals[name]:9,}  {name}")
        lost = counts["connections lost"]
        presence = counts["joins seen"] + counts["leaves seen"]
        failed = sum(number for one in load.publishers for name, number in one.counts.items() if name != "attempts")
        failed += sum(number for name, number in load.speakers.counts.items() if name != "attempts")
        found = {"disconnects": lost, "presence events": presence, "publications without an answer": failed}
        found |= {"lost": self.account.effects[LOST], "repeated": self.account.effects[REPEATED]}
        found |= {"reordered": self.account.effects[REORDERED], "other broken rules": self.account.effects[BROKEN]}
        for name, number in found.items():
            self.verdicts.append(Verdict(f"{len(self.reloads)} reloads: {name}", "0", f"{number:,}", not number))

    def _print_cost(self) -> None:
        reloads, busy, calm = len(self.reloads), self.busy, self.calm
        if not reloads:
            return
        spent = busy.cpu - busy.seconds * calm.cpu / calm.seconds - reloads * self.bare
        seconds = sum(self.reloads) / reloads
        took = f"a reload took {seconds:.2f} s (longest {max(self.reloads):.2f} s)"
        print(f"    {took}; one without clients used {self.bare:.2f} s of CPU")
        connections = max(self.handed_over[CONNECTIONS], 1)
        print(f"    {connections / reloads:,.0f} connections handed over by each reload, each for ", end="")
        print(
            f"{1e6 * spent / connections:.0f} CPU µs and {self.handed_over[BYTES] / connections:,.0f} bytes", flush=True
        )


def main(arguments: list[str]) -> int:
    run = measure(arguments)
    print_verdicts(run)
    return 0 if all(one.met for one in run) else 1


def measure(arguments: list[str]) -> list[Verdict]:
    """Reload under load and print the figures; return the verdicts."""
    options = argparse.ArgumentParser(
        prog="scripts/bench reload", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--clients", type=int, default=5000)
    options.add_argument("--rate", type=float, default=500.0, help="publications a second (default 500)")
    options.add_argument("--reloads", type=int, default=20)
    options.add_argument("--workers", type=int, default=2)
    options.add_argument(
        "--idle", type=float, default=15.0, help="seconds of load before the first reload (default 15)"
    )
    options.add_argument("--pause", type=float, default=2.0, help="seconds between two reloads (default 2)")
    options.add_argument("--seed", type=int, default=1, help="of the clients (default 1)")
    options.add_argument("--upgrade", action="store_true", help="upgrade in place of each reload: the broker too")
    options.add_argument("--log", type=Path, help="a file for the server's log")
    asked = options.parse_args(arguments)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    gc.disable()  # keeps collections of this process out of the figures
    with open(asked.log or "/dev/null", "w", buffering=1) as copy:
        run = Reloads(asked, copy)
        asyncio.run(run.run())
    return run.verdicts


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
