"""What one delivery, one round trip or one connection costs the server, in CPU time of all its processes.

Server and load generator have a core each. A figure is compared with the floor (what the kernel alone costs: a C loop
that only sends) and with peers that are named by `--against`, each measured in the same run. What an idle server uses
meanwhile is in the figures.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from subjects import NAMES, Run, Subject, ours, peer, resident

CHANNEL = "bench"
SIZE = 128


class Table:
    """Rows that are printed as they come and kept for the report."""

    def __init__(self, title: str, unit: str) -> None:
        self.title, self.unit = title, unit
        self.rows: list[dict[str, Any]] = []
        print(f"\n{title}\n{'':28}{'µs CPU ' + unit:>20}{'p50 ms':>9}{'p99 ms':>9}{'load':>7}", flush=True)

    def add(self, name: str, run: Run, **more: float) -> None:
        shown = "".join(f"{value:9.2f}" if value is not None else f"{'':9}" for value in (run.p50, run.p99))
        extra = "".join(f"  {key} {value:g}" for key, value in more.items())
        print(f"{name:28}{run.cost:20.2f}{shown}{100 * run.load:6.0f}%{extra}", flush=True)
        self.rows.append({"name": name, "cost": run.cost, "p50": run.p50, "p99": run.p99, "load": run.load, **more})

    def compare(self) -> None:
        """Our cost against each of the others'."""
        own = {row["name"]: row["cost"] for row in self.rows}
        if "realtime" in own:
            for name, cost in own.items():
                if name != "realtime":
                    print(f"    realtime is at {own['realtime'] / cost:.2f} of {name}")


@contextmanager
def started(name: str, options: str = "", workers: int = 1) -> Iterator[Subject]:
    """The subject of this name: "realtime", or one of `NAMES`."""
    with ours(workers, options) if name == "realtime" else peer(name) as subject:
        yield subject


def everyone(chosen: argparse.Namespace) -> list[str]:
    return ["realtime", *chosen.against]


def channel(subject: Subject, echo: bool = False) -> str:
    """Where the load generator goes: a channel of ours, or the path of a bare peer."""
    if subject.dialect == "realtime":
        return "" if echo else CHANNEL
    return "echo" if echo else ""


def deliveries(chosen: argparse.Namespace, title: str, burst: int, rate: float) -> Table:
    table = Table(title.format(chosen.subscribers), "a delivery")
    for name in everyone(chosen):
        with started(name) as subject:
            asked = {"subscribers": chosen.subscribers, "burst": burst, "rate": rate, "size": SIZE}
            times = max(int(chosen.seconds * rate), 5)
            table.add(name, Run(subject, "fanout", channel=channel(subject), times=times, **asked))
    table.compare()
    return table


def fanout(chosen: argparse.Namespace) -> Table:
    """One publication at a time, at a steady pace, to many subscribers."""
    return deliveries(chosen, "fan-out to {} subscribers, 10 messages a second", 1, 10.0)


def burst(chosen: argparse.Namespace) -> Table:
    """Many publications at once to many subscribers."""
    return deliveries(chosen, "fan-out to {} subscribers, 50 messages at once, twice a second", 50, 2.0)


def round_trips(chosen: argparse.Namespace, title: str, call: str) -> Table:
    table = Table(title, "a round trip")
    for name in everyone(chosen):
        with started(name) as subject:
            asked = {"connections": 50, "times": chosen.times, "size": SIZE, "call": call}
            table.add(name, Run(subject, "echo", channel=channel(subject, echo=True), **asked))
    table.compare()
    return table


def echo(chosen: argparse.Namespace) -> Table:
    """A message to the server that comes back: for us, through a handler and without a reply."""
    return round_trips(chosen, "echo, 50 connections", "send")


def rpc(chosen: argparse.Namespace) -> Table:
    """A remote procedure call through the whole client protocol, to a coroutine; peers echo."""
    return round_trips(chosen, "RPC, 50 connections", "rpc")


def connect(chosen: argparse.Namespace) -> Table:
    """A connection that is opened, connects and subscribes; peers only open."""
    table = Table(f"{chosen.connections} connections", "a connection")
    for name in everyone(chosen):
        with started(name) as subject:
            Run(subject, "connect", connections=200, channel=channel(subject))  # what comes once is paid
            run = Run(subject, "connect", connections=chosen.connections, channel=channel(subject))
            table.add(
                name, run, a_second=round(run.units / run.seconds), KB_each=round(run.growth / run.units / 1024, 1)
            )
    table.compare()
    return table


def idle(chosen: argparse.Namespace) -> Table:
    """An idle server, with and without connections: CPU time a second."""
    table = Table(f"idle for {chosen.seconds:g} s", "a second")
    for connections in (0, chosen.connections):
        with started("realtime") as subject:
            held = resident(subject)
            run = Run(subject, "idle", connections=connections, seconds=chosen.seconds, channel=CHANNEL)
            grown = round((resident(subject) - held) / 1024**2)
            table.add(f"realtime, {connections} connections", run, MB=grown)
    return table


def growth(chosen: argparse.Namespace) -> Table:
    """How the cost of a delivery changes with the number of subscribers."""
    table = Table("fan-out, 5 messages a second", "a delivery")
    for subscribers in (100, 1_000, 5_000, 20_000):
        with started("realtime") as subject:
            times = max(int(200_000 / subscribers), 10)
            asked = {"subscribers": subscribers, "burst": 1, "rate": 5.0, "size": SIZE, "times": min(times, 50)}
            table.add(f"realtime, {subscribers:,}", Run(subject, "fanout", channel=CHANNEL, **asked))
    return table


def publish(chosen: argparse.Namespace) -> Table:
    """A publication from a client on one worker, by way of the broker, over many channels that nobody hears."""
    table = Table("publications without a subscriber", "a publication")
    for channels in (1, 1_000, 100_000, 1_000_000):
        with started("realtime", "history_size = 1\nhistory_ttl = '300s'\n") as subject:
            asked = {"connections": 20, "times": max(chosen.times, channels), "size": SIZE, "channels": channels}
            table.add(f"realtime, {channels:,} channels", Run(subject, "publish", channel="", **asked))
    return table


def lag(chosen: argparse.Namespace) -> Table:
    """Round trips on one connection while the same worker fans out to 10,000 others."""
    table = Table("fan-out to 10,000 subscribers, 2 messages a second", "a delivery")
    with started("realtime") as subject:
        asked = {"subscribers": 10_000, "burst": 1, "rate": 2.0, "size": SIZE, "times": 20, "bystander": True}
        table.add("realtime (ms: bystander)", Run(subject, "fanout", channel=CHANNEL, **asked))
    return table


COSTS: dict[str, Callable[[argparse.Namespace], Table]] = {
    one.__name__: one for one in (fanout, burst, echo, rpc, connect, idle, lag, growth, publish)
}


def main(name: str, arguments: list[str]) -> int:
    options = argparse.ArgumentParser(prog=f"scripts/bench {name}", description=COSTS[name].__doc__)
    options.add_argument(
        "--against", type=lambda text: text.split(","), default=["floor"], help=f"of {','.join(NAMES)} (default floor)"
    )
    options.add_argument("--subscribers", type=int, default=1000)
    options.add_argument("--connections", type=int, default=2000)
    options.add_argument("--times", type=int, default=20_000, help="round trips or publications")
    options.add_argument("--seconds", type=float, default=10.0)
    options.add_argument("--json", help="a file to write the rows to")
    chosen = options.parse_args(arguments)
    unknown = set(chosen.against) - {*NAMES, ""}
    if unknown:
        options.error(f"--against knows {', '.join(NAMES)}, not {', '.join(sorted(unknown))}")
    chosen.against = [one for one in chosen.against if one]
    table = COSTS[name](chosen)
    if chosen.json:
        with open(chosen.json, "w") as file:
            json.dump({"title": table.title, "unit": table.unit, "at": time.time(), "rows": table.rows}, file, indent=1)
    return 0
