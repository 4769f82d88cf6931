"""The page of all benchmarks, docs/benchmarks.md, made of their figures alone: run again, it is written anew.

Beside it, in a folder of the same name, are the figures as JSON and the graphs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

from graph import Point, chart
from tables import Row, Table, brief

# Of a core that is to be used: what is left is for what does not come evenly.
FILLED = 0.7
# The machines of the example: cores, of which one is left to the supervisor and the broker, and GiB.
CORES, GIB = 8, 16
# Seconds between two pings by default.
PING = 25

INTRODUCTION = """\
# Benchmarks

*Written by `scripts/bench all --report docs/benchmarks.md`: do not edit.*

All figures are CPU time of the server, in microseconds, of all its processes taken together, for one unit of work.
Server and load generator have a core each. Everything runs over loopback, with payloads of 128 bytes of text, one
worker, and no TLS and no compression; the clients are bare sockets. The *floor* is a loop in C that reads and sends and
does nothing else: what is above it is what a server adds.

* Each figure is the median of {runs} (growth: of two at most); *spread* is half the distance between the dearest and
  the cheapest.
* *idle* is the part of the cost that the server's processes would have used without any load, such as for watching the
  workers. It is in the cost; take it off to see what one more unit costs.
* *server* and *load* are shares of a core. Where the generator needs over 80 % of its own (!), the server waited for
  it, and the cost has more waking up in it than a busy server's.
* p50 and p99 are milliseconds as a client sees them. In a fan-out they have the generator's own reading in them, one
  message after the other; only the round trips of a bystander are timed by the kernel.
* The peers do less than this server: they pass frames on, without channels, rights, offsets or acknowledgements, except
  for NATS (subjects), nchan (channels and a buffer) and Socket.IO (events).
"""

CAPACITY = """\
## Capacity

One core, used to {filled:.0%}, carries {usable:,.0f} µs of work a second, of any one of these. The costs are those
above without their idle part.

| | µs each | one core carries |
|---|--:|--:|
{figures}

One GiB holds {a_gib:,.0f} connections of {each:.1f} KB. The processes of a server with one worker have {base:,.0f} MB
at the beginning and use {background:.1f} % of a core for themselves.

### Machines

An example: every client gets one message a second, calls once in 10 s, and is pinged each {every} s. In µs a second, it
costs

    {delivery:.2f} + {call:.2f} / 10 + {ping:.2f} / {every} = {client:.2f}

On a machine of {cores} cores and {gib} GiB, {workers} cores are the workers' and one is the broker's and the
supervisor's:

    by CPU:    {workers} cores * {usable:,.0f} µs / {client:.2f} µs = {by_cpu:,.0f} clients
    by memory: ({gib} GiB - {cores} * {base:,.0f} MB) / {each:.1f} KB = {by_memory:,.0f} clients

The smaller of the two is {whole:,.0f}. If all of them come back at once, they are served within
{whole:,.0f} * {arrival:,.0f} µs / ({workers} * {usable:,.0f} µs/s) = {storm:,.0f} s.

The embedded broker belongs to one machine. So machines share nothing, and M of them carry M times as much when each
channel is on one of them, as by a rule in the load balancer. A channel that has to be on all of them is published to
each, by the API.

| machines | clients | deliveries a second at most | publications a second | reconnects a second |
|--:|--:|--:|--:|--:|
{machines}

What was measured is one worker on one core. More workers share the broker and the network card: measure yours.
"""

TITLES = {
    "fanout": "Fan-out",
    "burst": "Fan-out in a burst",
    "rpc": "Round trips: RPC",
    "echo": "Round trips: messages",
    "connect": "Connections",
    "idle": "Idle connections",
    "lag": "Loop lag during a large fan-out",
    "growth": "Growth: subscribers of a channel",
    "publish": "Growth: channels",
}


def write(found: dict[str, Any], target: Path) -> None:
    """found: what `all` has measured. target: the page; what is beside it is written too."""
    folder = target.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    tables = {name: Table(**table) for name, table in found["tables"].items()}
    (folder / "figures.json").write_text(json.dumps(found, indent=1) + "\n")
    parts = [INTRODUCTION.format(runs="one run" if found["runs"] == 1 else f"{found['runs']} runs"), _about(found)]
    parts.append(_targets([*(each for table in tables.values() for each in _verdicts(table)), *found["verdicts"]]))
    for name, table in tables.items():
        parts.append(f"## {TITLES.get(name, name)}\n\n{_table(table)}")
        graph = _graph(table)
        if graph:
            (folder / f"{name}.svg").write_text(graph)
            parts.append(f"![{table.title}]({folder.name}/{name}.svg)\n")
    for scene in found["scenes"]:
        parts.append(f"## {scene['title']}\n\n```\n{scene['text'].strip()}\n```\n")
    if {"fanout", "burst", "rpc", "connect", "idle", "publish"} <= set(tables):
        parts.append(_capacity(tables))
    target.write_text("\n".join(parts))


def _about(found: dict[str, Any]) -> str:
    commands = "\n".join(f"    {command}" for command in found["commands"])
    versions = "\n".join(f"| {name} | {text} |" for name, text in found["versions"].items())
    return f"""\
## This run

{found["date"]}, {found["minutes"]:.0f} minutes, on {found["machine"]}.

{commands}

| | version |
|---|---|
{versions}
"""


def _verdicts(table: Table) -> list[dict[str, Any]]:
    return [vars(verdict) for verdict in table.verdicts]


def _targets(verdicts: list[dict[str, Any]]) -> str:
    lines = ["## Targets\n", "| | target | found | |", "|---|---|---|---|"]
    for one in verdicts:
        mark = "met" if one["met"] else "**not met**"
        lines.append(f"| {one['what']} | {one['target']} | {one['found']} | {mark} |")
    return "\n".join(lines) + "\n"


def _table(table: Table) -> str:
    more = list(dict.fromkeys(name for row in table.rows for name in row.more))
    timed = any(row.p50 for row in table.rows)
    compared = any(table.ratio(row.name) is not None for row in table.rows)
    heads = [f"µs {table.unit}", "spread", "idle", *(["ours by it"] if compared else [])]
    heads += [*(["p50 ms", "p99 ms"] if timed else []), "server", "load", *more]
    lines = [
        f"{table.title[0].upper()}{table.title[1:]}.\n",
        f"| | {' | '.join(heads)} |",
        "|---" + "|--:" * len(heads) + "|",
    ]
    for row in table.rows:
        ratio = table.ratio(row.name)
        cells = [f"{row.cost:,.2f}", f"± {row.spread:.0%}", f"{median(row.idle):,.2f}"]
        cells += ["" if ratio is None else f"{ratio:.2f}"] if compared else []
        cells += [f"{median(each):,.2f}" if each else "" for each in (row.p50, row.p99)] if timed else []
        cells += [f"{median(row.busy):.0%}", f"{median(row.load):.0%}{' !' if row.drowned else ''}"]
        cells += [f"{brief(median(row.more[name]))}" if name in row.more else "" for name in more]
        lines.append(f"| {row.name} | {' | '.join(cells)} |")
    lines += [f"\n{name} is left out: {why}." for name, why in table.left_out.items()]
    return "\n".join(lines) + "\n"


def _graph(table: Table) -> str:
    """The cost, or the memory, against the size; "" for a table that has no sizes."""
    sized = [row for row in table.rows if row.size]
    if len(sized) < 2:
        return ""
    if table.name == "idle":
        points = [_point(row, row.more["MB"]) for row in sized]
        return chart("Memory of idle connections", "connections", "MB more than without", points, logarithmic=False)
    noun = sized[-1].name.partition(" ")[2]
    points = [_point(row, row.costs) for row in sized]
    return chart(f"Cost of {table.unit} against {noun}", noun, f"CPU µs {table.unit}", points)


def _point(row: Row, values: list[float]) -> Point:
    return Point(row.size, median(values), min(values), max(values))


def _capacity(tables: dict[str, Table]) -> str:
    """What one core and one GiB carry, and from that what machines carry."""

    def own(name: str) -> Row:
        return tables[name].rows[0]

    def marginal(row: Row) -> float:
        return max(row.cost - median(row.idle), 0.01)

    idle_rows = [row for row in tables["idle"].rows if row.size]
    base = median(own("idle").more["MB"])
    delivery, together, call, arrival = (marginal(own(name)) for name in ("fanout", "burst", "rpc", "connect"))
    ping = median(median(row.more["µs a ping"]) for row in idle_rows)
    each = idle_rows[-1].more["MB"][0] * 1024 / idle_rows[-1].size
    broker = median(tables["publish"].rows[-1].more["broker µs"])
    usable, workers = FILLED * 1e6, CORES - 1
    figures = (
        ("deliveries, one publication at a time", delivery, "a second"),
        ("deliveries in bursts", together, "a second"),
        ("RPC round trips", call, "a second"),
        ("clients that connect and subscribe", arrival, "a second"),
        (f"idle connections, a ping each {PING} s", ping / PING, "held"),
        ("publications, on the broker's core", broker, "a second"),
    )
    client = delivery + call / 10 + ping / PING
    by_cpu, by_memory = workers * usable / client, (GIB * 1024 - CORES * base) * 1024 / each
    whole = min(by_cpu, by_memory)
    machines = []
    for number in (1, 2, 4, 8, 16):
        core = number * workers * usable
        rates = (number * whole, core / delivery, number * usable / broker, core / arrival)
        machines.append(f"| {number} | {' | '.join(f'{rate:,.0f}' for rate in rates)} |")
    return CAPACITY.format(
        filled=FILLED,
        usable=usable,
        figures="\n".join(f"| {what} | {cost:,.2f} | {usable / cost:,.0f} {unit} |" for what, cost, unit in figures),
        a_gib=1024 * 1024 / each,
        each=each,
        base=base,
        background=own("idle").cost / 1e4,
        every=PING,
        delivery=delivery,
        call=call,
        ping=ping,
        client=client,
        cores=CORES,
        gib=GIB,
        workers=workers,
        by_cpu=by_cpu,
        by_memory=by_memory,
        whole=whole,
        arrival=arrival,
        storm=whole * arrival / (workers * usable),
        machines="\n".join(machines),
    )


def main(arguments: list[str]) -> int:
    """Write the page again from figures that were measured before."""
    options = argparse.ArgumentParser(prog="scripts/bench page", description=main.__doc__)
    options.add_argument("figures", type=Path, help="the JSON beside a page")
    options.add_argument("page", type=Path)
    chosen = options.parse_args(arguments)
    write(json.loads(chosen.figures.read_text()), chosen.page)
    return 0
