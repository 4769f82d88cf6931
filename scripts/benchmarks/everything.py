"""Run all benchmarks one after another, and write the page."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import platform
import shlex
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import autobahn
import blocked
import interpreter
import page
import psutil
import thrash
from costs import COSTS, add_options, parsed
from served import HERE
from subjects import lack, version
from tables import Table, Verdict, print_verdicts

import realtime
import twisted

CHECKOUT = HERE.parent.parent
# Benchmarks with all peers. The others are compared only with the floor.
WITH_PEERS = {"fanout", "room", "rpc", "connect"}


class Both(io.StringIO):
    """A buffer that also writes everything to `shown` at once."""

    def __init__(self, shown: TextIO) -> None:
        super().__init__()
        self._shown = shown

    def write(self, text: str) -> int:
        self._shown.write(text)
        self._shown.flush()
        return super().write(text)


def main(arguments: list[str]) -> int:
    options = argparse.ArgumentParser(prog="scripts/bench all", description=__doc__)
    add_options(options, "all")
    options.add_argument("--report", type=Path, help="path of the page; figures and graphs go to a folder beside it")
    chosen = parsed(options, arguments)
    began = time.monotonic()
    date = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    tables: dict[str, Table] = {}
    for name, measure in COSTS.items():
        mine = argparse.Namespace(**vars(chosen))
        mine.against = chosen.against if name in WITH_PEERS else [one for one in chosen.against if one == "floor"]
        tables[name] = measure(mine)
        tables[name].print_foot()
    scenes, verdicts = scenery(chosen.quick)
    peers = {name: version(name) for name in chosen.against if not lack(name)}
    found = {
        "date": date,
        "minutes": (time.monotonic() - began) / 60,
        "machine": machine(),
        "runs": chosen.runs,
        "versions": {**own_versions(), **peers},
        "commands": [shlex.join(["scripts/bench", "all", *arguments])],
        "tables": {name: table.as_json() for name, table in tables.items()},
        "scenes": scenes,
        "verdicts": [vars(one) for one in verdicts],
    }
    if chosen.report:
        page.write(found, chosen.report)
        print(f"\nwrote {chosen.report}")
    print(f"{found['minutes']:.1f} minutes")
    return 0


def scenery(quick: bool) -> tuple[list[dict[str, str]], list[Verdict]]:
    """Run the benchmarks with text output; return their texts and their verdicts."""
    title, second = "A blocked worker", "Pressure: a route that blocks"
    print(f"\n{title}")
    with contextlib.redirect_stdout(Both(sys.stdout)) as blocking:
        verdicts = blocked.measure(["--rounds", "1" if quick else "2"])
    print_verdicts(verdicts)
    print(f"\n{second}")
    with contextlib.redirect_stdout(Both(sys.stdout)) as thrashing:
        thrash.main(["--seconds", "2" if quick else "4"])
    said = {title: blocking.getvalue(), second: thrashing.getvalue()}
    return [{"title": one, "text": text.replace(f"{CHECKOUT}/", "")} for one, text in said.items()], verdicts


def machine() -> str:
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), model)
    cores, memory = len(os.sched_getaffinity(0)), psutil.virtual_memory().total / 1024**3
    return f"{model}, {cores} cores, {memory:.0f} GiB, {platform.system()} {platform.release()}"


def own_versions() -> dict[str, Any]:
    return {
        "realtime": realtime.__version__,
        "Python": interpreter.describe(),
        "Twisted": twisted.__version__,
        "Autobahn": autobahn.__version__,
    }
