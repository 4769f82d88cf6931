"""Write the page of all benchmarks, docs/benchmarks.md, from their figures.

The folder beside the page has the same name and contains the figures as JSON and the graphs as SVG.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

from graph import Point, chart
from tables import Row, Table, brief

# Planned utilization of a core. The remainder is headroom for uneven load.
FILLED = 0.7
# The machine of the example: cores (one is reserved for the supervisor and the broker) and GiB of memory.
CORES, GIB = 8, 16
# Default interval between two pings, in seconds.
PING = 25

INTRODUCTION = """\
# Benchmarks

*`scripts/bench all --report docs/benchmarks.md` writes this page. Do not edit it.*

This page is for operators who plan capacity, and for developers who change fast paths. It shows the measured cost of
each operation, compares it with other servers, and derives the capacity of a machine.

## Method

A cost is the CPU time of all processes of the server for one unit of work, in microseconds. Server and load generator
have one core each. All traffic runs over loopback with 128 bytes of text as payload, one worker, no TLS and no
compression. The clients are bare sockets. The *floor* is a loop in C that only reads and sends; the difference from
it is the cost of the server's own work.

* Each figure is the median of {runs} (growth: at most two runs). *spread* is half the difference between the most
  expensive and the cheapest run.
* The build of the interpreter matters. Debian's CPython 3.11 (PGO, LTO) needed 5 to 12 % less CPU time than a plain
  build of it from source. Every benchmark prints the build, and the table below names it.
* *ratio* is the cost of this server divided by the cost in that row, from the same runs.
* *idle* is the part of the cost that the server's processes would also use without load, for example to watch the
  workers. The cost includes it. Subtract it to get the cost of one more unit.
* *server* and *load* are shares of a core. An exclamation mark shows a generator that used over 80 % of its own core.
  The server then waited for the generator, and its cost contains more wake-ups than that of a busy server.
* p50 and p99 are latencies of clients in milliseconds. In a fan-out they include the generator's own time, because it
  reads one message after another. For the round trips of a client outside a fan-out, the kernel takes the time.
* The peers do less than this server. They forward frames without channels, permissions, offsets or acknowledgements.
  Exceptions are NATS (subjects), nchan (channels and a buffer) and Socket.IO (events).
"""

CAPACITY = """\
## Capacity

One core at {filled:.0%} utilization provides {usable:,.0f} µs of work a second. The table shows the capacity if a
core does only one kind of work. The costs are the costs above without their idle part.

| | µs each | capacity of one core |
|---|--:|--:|
{figures}

One GiB holds {a_gib:,.0f} connections of {each:.1f} KB. The processes of a server with one worker start with
{base:,.0f} MB and use {background:.1f} % of a core for themselves.

### Machines

In this example each client receives one message a second, makes one call every 10 s, and is pinged every {every} s. A
client costs, in µs a second:

    {delivery:.2f} + {call:.2f} / 10 + {ping:.2f} / {every} = {client:.2f}

A machine has {cores} cores and {gib} GiB. {workers} cores run workers; one core runs the broker and the
supervisor:

    by CPU:    {workers} cores * {usable:,.0f} µs / {client:.2f} µs = {by_cpu:,.0f} clients
    by memory: ({gib} GiB - {cores} * {base:,.0f} MB) / {each:.1f} KB = {by_memory:,.0f} clients

The smaller number, {whole:,.0f}, is the capacity. If all these clients reconnect at once, the server accepts them
within {whole:,.0f} * {arrival:,.0f} µs / ({workers} * {usable:,.0f} µs/s) = {storm:,.0f} s.

The embedded broker belongs to one machine, so machines share no state. M machines have M times the capacity if each
channel lives on one machine, for example by a rule in the load balancer. To use a channel on all machines, publish to
each machine with the API.

| machines | clients | deliveries a second at most | publications a second | reconnects a second |
|--:|--:|--:|--:|--:|
{machines}

These figures extrapolate from one worker on one core. More workers share the broker and the network card. Measure
your own machine.
"""

TITLES = {
    "fanout": "Fan-out",
    "burst": "Fan-out in a burst",
    "room": "Small rooms",
    "rpc": "Round trips: RPC",
    "echo": "Round trips: messages",
    "connect": "Connections",
    "idle": "Idle connections",
    "lag": "Loop lag during a large fan-out",
    "growth": "Growth: subscribers of a channel",
    "publish": "Growth: channels",
}


def write(found: dict[str, Any], target: Path) -> None:
    """Write the page and its folder. found: the figures from `all`. target: the path of the page."""
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
        about = f"{scene['about']}\n\n" if scene.get("about") else ""
        parts.append(f"## {scene['title']}\n\n{about}```\n{scene['text'].strip()}\n```\n")
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
    heads = [f"µs {table.unit}", "spread", "idle", *(["ratio"] if compared else [])]
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
    """Return a graph of the cost, or of the memory, by size; "" for a table without sizes."""
    sized = [row for row in table.rows if row.size]
    if len(sized) < 2:
        return ""
    if table.name == "idle":
        points = [_point(row, row.more["MB"]) for row in sized]
        return chart("Memory of idle connections", "connections", "additional MB", points, logarithmic=False)
    noun = sized[-1].name.partition(" ")[2]
    points = [_point(row, row.costs) for row in sized]
    return chart(f"Cost of {table.unit} by number of {noun}", noun, f"CPU µs {table.unit}", points)


def _point(row: Row, values: list[float]) -> Point:
    return Point(row.size, median(values), min(values), max(values))


def _capacity(tables: dict[str, Table]) -> str:
    """Return the section on the capacity of one core, of one GiB and of machines."""

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
        ("new clients with a subscription", arrival, "a second"),
        (f"idle connections, a ping every {PING} s", ping / PING, "held"),
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
    """Write the page again from existing figures."""
    options = argparse.ArgumentParser(prog="scripts/bench page", description=main.__doc__)
    options.add_argument("figures", type=Path, help="the JSON beside a page")
    options.add_argument("page", type=Path)
    chosen = options.parse_args(arguments)
    write(json.loads(chosen.figures.read_text()), chosen.page)
    return 0
