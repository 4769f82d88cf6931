"""Measure the cost of one delivery, round trip or connection: CPU time of all processes of the server.

Server and load generator have one core each. The same run measures, in turn, the floor (a C loop that only sends, the
cost of the kernel) and the peers named by `--against`. Each measurement starts with some unmeasured repetitions. The
figures include the cost of an idle server, and the output also shows it separately.
"""

from __future__ import annotations

import argparse
import http.client
import json
import math
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import system_calls
from subjects import API_KEY, NAMES, NO_ECHO, Run, Subject, lack, occupied, ours, resident, started
from tables import OURS, Row, Table

CHANNEL = "bench"
SIZE = 128
# Deliveries a second at every size of the fan-out, so that the idle share stays the same.
PACE = 20_000
# Publications a second to a room of two. While strace counts system calls, the server is slower: publications must not
# queue, or one turn of the loop would serve several.
ROOM_RATE = 2000
TRACED, TRACED_RATE = 600, 200.0
# Interval between two pings in the idle benchmark, in seconds.
PING = 5
# Up to this ratio, the cost counts as equal to a peer's.
LEVEL = 1.15


def subjects(table: Table, chosen: argparse.Namespace) -> list[str]:
    """Return this server and the available peers; record in the table why other peers are missing."""
    found = [OURS]
    for name in chosen.against:
        why = lack(name)
        if not why and table.name == "rpc" and name in NO_ECHO:
            why = "it can't reply to a single client"
        if why:
            table.left_out[name] = why
        else:
            found.append(name)
    return found


def by_turns(chosen: argparse.Namespace, table: Table, names: list[str]) -> Iterator[Row]:
    """Yield each row once per run, to record that run; print the row after its last run."""
    table.print_head()
    for run in range(chosen.runs):
        for name in names:
            row = table.row(name)
            yield row
            if run == chosen.runs - 1:
                table.print_row(row)


def channel(subject: Subject, echo: bool = False) -> str:
    """Return the load generator's destination: a channel of this server, or the path of a bare peer."""
    if subject.dialect == "realtime":
        return "" if echo else CHANNEL
    return "echo" if echo else ""


def named(noun: str, chosen: argparse.Namespace, *sizes: int) -> dict[str, int]:
    """Return the sizes by the names of their rows; a quick run omits the largest, slowest size."""
    return {
        f"{size:,} {noun if size != 1 else noun.removesuffix('s')}": size
        for size in (sizes[:-1] if chosen.quick else sizes)
    }


def deliveries(chosen: argparse.Namespace, table: Table, burst: int, rate: float) -> Table:
    times, warm = max(int(chosen.seconds * rate), 3), math.ceil(rate)
    for row in by_turns(chosen, table, subjects(table, chosen)):
        with started(row.name) as subject:
            asked: dict[str, Any] = {"subscribers": chosen.subscribers, "burst": burst, "rate": rate, "size": SIZE}
            run = Run(subject, "fanout", channel=channel(subject), warm=warm, times=times, **asked)
            row.add(run, chosen.subscribers * burst * times)
    return table


def fanout(chosen: argparse.Namespace) -> Table:
    """Single publications to many subscribers, at a steady pace."""
    title = f"fan-out to {chosen.subscribers:,} subscribers, 20 messages a second"
    table = deliveries(chosen, Table("fanout", title, "a delivery"), 1, 20.0)
    table.judge_ratio("floor", 1.3)
    for name in ("ws", "nats", "websockets", "socketio"):
        table.judge_ratio(name, 1.0)
    table.judge_ratio("nchan", LEVEL)
    return table


def burst(chosen: argparse.Namespace) -> Table:
    """Simultaneous publications of many clients to many subscribers."""
    title = f"fan-out to {chosen.subscribers:,} subscribers; once a second, 50 of them publish at the same moment"
    table = deliveries(chosen, Table("burst", title, "a delivery"), 50, 1.0)
    table.judge_ratio("floor", 0.5)
    return table


def room(chosen: argparse.Namespace) -> Table:
    """Publications of one client to a room of two, at a steady pace, on an otherwise idle server."""
    table = Table("room", f"a room of two, {ROOM_RATE:,} publications a second", "a publication")
    times = max(int(chosen.seconds * ROOM_RATE), 3)
    for row in by_turns(chosen, table, subjects(table, chosen)):
        with started(row.name) as subject:
            asked: dict[str, Any] = {"subscribers": 2, "burst": 1, "size": SIZE, "channel": channel(subject)}
            row.add(Run(subject, "fanout", warm=ROOM_RATE // 2, times=times, rate=float(ROOM_RATE), **asked), times)
        if not row.more:
            with started(row.name) as subject:  # anew: the floor serves one measurement
                calls = system_calls.count(subject, "fanout", times=TRACED, rate=TRACED_RATE, **asked)
            turns = sum(number for name, number in calls.items() if name.startswith("epoll_") and "wait" in name)
            more = {"system calls": sum(calls.values()), "of these waits for events": turns}
            row.more = {name: [number / TRACED] for name, number in more.items() if calls}
    table.judge("publication to a room of two", table.rows[0].cost, 80.0, " µs")
    return table


def round_trips(chosen: argparse.Namespace, table: Table, call: str) -> Table:
    for row in by_turns(chosen, table, subjects(table, chosen)):
        with started(row.name) as subject:
            asked: dict[str, Any] = {
                "connections": 50,
                "warm": chosen.times // 5,
                "times": chosen.times,
                "size": SIZE,
                "call": call,
            }
            row.add(Run(subject, "echo", channel=channel(subject, echo=True), **asked), chosen.times)
    return table


def echo(chosen: argparse.Namespace) -> Table:
    """Round trips of messages; on this server through a handler, by `send` instead of a command with a reply."""
    chosen.against = [name for name in chosen.against if name == "floor"]
    return round_trips(chosen, Table("echo", "echo, 50 connections, without pause", "a round trip"), "send")


def rpc(chosen: argparse.Namespace) -> Table:
    """Remote procedure calls of a coroutine, through the whole client protocol; peers echo."""
    table = Table("rpc", "RPC, 50 connections, without pause (peers: bare echo)", "a round trip")
    round_trips(chosen, table, "rpc")
    table.judge("RPC round trip", table.rows[0].cost, 25.0, " µs")
    table.judge_ratio("socketio", 1.0)
    return table


def connect(chosen: argparse.Namespace) -> Table:
    """New connections with connect and subscribe commands; peers only open connections."""
    number = chosen.connections
    table = Table("connect", f"{number:,} connections, 64 at a time", "a connection")
    for row in by_turns(chosen, table, subjects(table, chosen)):
        with started(row.name) as subject:
            run = Run(subject, "connect", warm=300, times=number, channel=channel(subject))
            more = {"a second": number / run.seconds, "KB each": run.growth / number / 1024}
            row.add(run, number, **more)
    own = table.rows[0]
    rate = median(own.more["a second"])
    table.judge("connect and subscribe", own.cost, 500.0, " µs")
    table.judge("memory of a connection with one subscription", median(own.more["KB each"]), 12.0, " KB")
    table.judge_least("reconnect storm: clients connected and subscribed by one core", rate, 2000, " a second")
    return table


def idle(chosen: argparse.Namespace) -> Table:
    """CPU time a second and memory of an idle server, with and without pinged connections."""
    seconds = PING
    table = Table("idle", f"idle connections with one subscription, a ping every {PING} s", "a second")
    table.print_head()
    base = 0.0
    for name, connections in named("connections", chosen, 0, 1_000, 5_000, 15_000).items():
        row = table.row(name, connections)
        with ours(f'ping_interval = "{PING}s"\npong_timeout = "3s"') as server:
            held, empty = resident(server), occupied(server)
            run = Run(server, "idle", connections=connections, warm=seconds, times=seconds, channel=CHANNEL)
            cost, grown = run.server / seconds, resident(server) - held
            base = cost if not connections else base
            # Without connections: the memory of the processes at the beginning.
            more = {"MB": (grown if connections else empty) / 1024**2}
            if connections:
                more["µs a ping"] = max(0.0, 1e6 * (cost - base) * PING / connections)
            row.add(run, seconds, **more)
        table.print_row(row)
    return table


def growth(chosen: argparse.Namespace) -> Table:
    """Cost of a delivery by number of subscribers."""
    sizes = named("subscribers", chosen, 100, 1_000, 5_000, 15_000)
    table = Table("growth", f"fan-out, {PACE:,} deliveries a second", "a delivery")
    chosen.runs = min(chosen.runs, 2)
    for row in by_turns(chosen, table, list(sizes)):
        row.size = sizes[row.name]
        rate = PACE / row.size
        times = max(int(chosen.seconds * rate), 5)
        asked: dict[str, Any] = {"subscribers": row.size, "burst": 1, "rate": rate, "size": SIZE, "channel": CHANNEL}
        with started(OURS) as subject:
            row.add(Run(subject, "fanout", warm=math.ceil(rate), times=times, **asked), row.size * times)
    table.judge_flat(f"cost of a delivery to {min(sizes.values()):,} … {max(sizes.values()):,} subscribers", 0.15)
    return table


def publish(chosen: argparse.Namespace) -> Table:
    """Publications of clients through the broker, to channels with history and without subscribers."""
    sizes = named("channels", chosen, 1, 1_000, 100_000, 1_000_000)
    table = Table(
        "publish", "publications to channels with history and without subscribers, 20 connections", "a publication"
    )
    table.print_head()
    for name, size in sizes.items():
        row = table.row(name, size)
        with ours(channel='history_size = 1\nhistory_ttl = "3600s"') as server:
            held = resident(server)
            fill(server.port, size)
            grown = (resident(server) - held) / 1024**2
            asked: dict[str, Any] = {"connections": 20, "size": SIZE, "channels": size}
            for _ in range(chosen.runs):
                run = Run(server, "publish", warm=chosen.times // 5, times=chosen.times, **asked)
                broker = 1e6 * run.parts[server.broker().pid] / chosen.times
                row.add(run, chosen.times, **{"broker µs": broker, "MB": grown})
        table.print_row(row)
    table.judge_flat(f"cost of a publication over {min(sizes.values()):,} … {max(sizes.values()):,} channels", 0.15)
    return table


def fill(port: int, channels: int, at_once: int = 10_000) -> None:
    """Publish once to each channel through the HTTP API."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    for first in range(0, channels, at_once):
        names = [f"c{number}" for number in range(first, min(first + at_once, channels))]
        body = json.dumps({"channels": names, "data": "x" * SIZE})
        connection.request("POST", "/api/broadcast", body, {"X-API-Key": API_KEY, "Content-Type": "application/json"})
        answer = json.loads(connection.getresponse().read())
        if any("error" in each for each in answer["result"]["responses"]):
            raise SystemExit(f"the server refused a channel: {str(answer)[:200]}")
    connection.close()


def lag(chosen: argparse.Namespace) -> Table:
    """Round trips on one connection while the same worker fans out to 10,000 other connections."""
    subscribers, rate = 10_000, 2.0
    title = (
        f"fan-out to {subscribers:,} subscribers, {rate:g} messages a second; p50, p99: round trips of another client"
    )
    table = Table("lag", title, "a delivery")
    times = max(int(chosen.seconds * rate), 4)
    beside = {"act": "bystander", "size": SIZE, "rate": 200, "times": int(200 * times / rate), "warm": 100}
    for row in by_turns(chosen, table, [OURS]):
        with ours() as server:
            asked: dict[str, Any] = {
                "subscribers": subscribers,
                "burst": 1,
                "rate": rate,
                "size": SIZE,
                "channel": CHANNEL,
            }
            run = Run(server, "fanout", beside=beside, warm=2, times=times, **asked)
            collecting = 1000 * server.metric("realtime_gc_pause_seconds")
            row.add(run, subscribers * times, **{"GC pause ms": collecting})
    row = table.rows[0]
    pause = max(row.more["GC pause ms"])
    table.judge("longest pause of the garbage collector while 10,000 subscribers connect", pause, 5.0, " ms")
    table.judge("p99 of another client's round trip during fan-out", median(row.p99), 10.0, " ms")
    return table


COSTS: dict[str, Callable[[argparse.Namespace], Table]] = {
    one.__name__: one for one in (fanout, burst, room, echo, rpc, connect, idle, lag, growth, publish)
}


def add_options(options: argparse.ArgumentParser, against: str) -> None:
    options.add_argument(
        "--against", default=against, help=f"peers from {','.join(NAMES)}; 'all'; '' for none (default {against})"
    )
    options.add_argument(
        "--runs", type=int, default=3, help="runs of each measurement; the output shows median and spread (default 3)"
    )
    options.add_argument(
        "--seconds", type=float, default=3.0, help="duration of each run with a steady pace (default 3)"
    )
    options.add_argument("--subscribers", type=int, default=1000, help="subscribers in fanout and burst (default 1000)")
    options.add_argument("--connections", type=int, default=2000, help="connections in connect (default 2000)")
    options.add_argument(
        "--times", type=int, default=20_000, help="number of round trips or publications (default 20000)"
    )
    options.add_argument("--quick", action="store_true", help="one run of each measurement, without the largest sizes")


def parsed(options: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    chosen = options.parse_args(arguments)
    named = NAMES if chosen.against == "all" else [one for one in chosen.against.split(",") if one]
    unknown = set(named) - set(NAMES)
    if unknown:
        options.error(f"--against accepts {', '.join(NAMES)}, not {', '.join(sorted(unknown))}")
    chosen.against = list(named)
    if chosen.quick:
        chosen.runs, chosen.seconds = 1, min(chosen.seconds, 2.0)
    return chosen


def main(name: str, arguments: list[str]) -> int:
    options = argparse.ArgumentParser(prog=f"scripts/bench {name}", description=COSTS[name].__doc__)
    add_options(options, "floor")
    options.add_argument("--json", help="file for the rows, as JSON")
    chosen = parsed(options, arguments)
    table = COSTS[name](chosen)
    table.print_foot()
    if chosen.json:
        with open(chosen.json, "w") as file:
            json.dump(table.as_json(), file, indent=1)
    return 0
