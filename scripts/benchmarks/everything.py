"""Run all benchmarks one after another, and write the page."""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TextIO

import attack
import autobahn
import blocked
import http_requests
import interpreter
import page
import psutil
import reload
import thrash
from costs import COSTS, add_options, parsed
from served import HERE
from subjects import lack, version
from tables import Table, Verdict, print_verdicts

import realtime
import twisted

CHECKOUT = HERE.parent.parent


class Scene(NamedTuple):
    """A benchmark with text output. measure: runs it; returns verdicts or an exit status. quick: short arguments."""

    title: str
    module: ModuleType
    measure: Callable[[list[str]], Any]
    arguments: str = ""
    quick: str = ""


SCENES = (
    Scene("HTTP requests", http_requests, http_requests.main, "--runs 5", "--runs 1 --requests 2000"),
    Scene("Attacks", attack, attack.measure, "--seconds 5", "--seconds 1"),
    Scene(
        "A blocked worker", blocked, blocked.measure, "--rounds 2", "--rounds 1 --price-rounds 3 --price-seconds 0.5"
    ),
    Scene("Pressure: a route that blocks", thrash, thrash.main, "--seconds 4", "--seconds 2"),
    Scene("Reloads under load", reload, reload.measure, "", "--clients 500 --reloads 3 --idle 5"),
)
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
    scenes, verdicts = [], []
    for scene in SCENES:
        print(f"\n{scene.title}")
        with contextlib.redirect_stdout(Both(sys.stdout)) as said:
            found = scene.measure((scene.quick if quick else scene.arguments).split())
        verdicts += found if isinstance(found, list) else []
        about = inspect.getdoc(scene.module) or ""
        text = said.getvalue().replace(f"{CHECKOUT}/", "")
        scenes.append({"title": scene.title, "about": about, "text": text})
    print_verdicts(verdicts)
    return scenes, verdicts


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
