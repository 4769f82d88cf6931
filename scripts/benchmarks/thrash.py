"""Load a route that waits 10 ms and then blocks for 20 ms, in five variants, beside a server on Node.

npm autocannon keeps 50 connections busy for 10 s, with a time-out of one second for each request. Each server has one
core. The variants are the routes of thrash_app.py and of peers/thrash_peer.mjs: without protection; refused while the
worker is under pressure; with a cache (ttl 1 s, stale 30 s); as a plain function in threads; threads and cache.
`time.sleep` blocks. CPU time is that of all processes of a server.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import time
from contextlib import ExitStack
from typing import Any

from served import HERE, Served
from subjects import LOAD_CORE, NODE_MODULES, SERVER_CORE, Program, Subject, cpu

VARIANTS = ("bare", "shedding", "load-aware", "threaded", "threaded-load-aware")
# Seconds between two variants, in which the pressure of the first one ends.
REST = 1.5

CONFIG = """
[http_server]
address = "127.0.0.1"
port = 0
internal_port = 0
[workers]
count = {workers}
[app]
module = "thrash_app:app"
path = "{folder}"
"""


def main(arguments: list[str]) -> int:
    options = argparse.ArgumentParser(prog="scripts/bench thrash", description=__doc__)
    options.add_argument("--seconds", type=int, default=10, help="duration of each variant (default 10)")
    options.add_argument("--connections", type=int, default=50)
    options.add_argument("--limit", type=int, default=1, help="time limit of a request, in seconds (default 1)")
    options.add_argument("--workers", type=int, default=1, help="with more than one, all cores serve (default 1)")
    options.add_argument("--only", choices=VARIANTS, action="append", help="run only this variant; may be repeated")
    chosen = options.parse_args(arguments)
    if not shutil.which("node") or not (NODE_MODULES / "autocannon").exists():
        print("no Node.js, or no autocannon; install Node.js and npm (Debian: nodejs npm)")
        return 0
    print(f"{chosen.connections} connections, {chosen.seconds} s each, {chosen.workers} worker(s)")
    print(
        f"{'variant':20}{'server':>10}{'answers':>9}{'refused':>9}{'time-outs':>10}{'other':>7}"
        f"{'p50 ms':>8}{'p99 ms':>8}{'max ms':>8}{'CPU %':>7}{'CPU us each':>12}"
    )
    with ExitStack() as running:
        core = SERVER_CORE if chosen.workers == 1 else None
        config = CONFIG.format(workers=chosen.workers, folder=HERE)
        node = Program(["node", "thrash_peer.mjs"], "http")
        running.callback(node.end)
        servers: dict[str, Subject] = {"realtime": running.enter_context(Served(config, core)), "node": node}
        for variant in chosen.only or VARIANTS:
            for name, server in servers.items():
                _measure(variant, name, server, chosen)
    return 0


def _measure(variant: str, name: str, server: Subject, chosen: argparse.Namespace) -> None:
    before = cpu(server)
    seen = _load(f"http://127.0.0.1:{server.port}/{variant}", chosen)
    used = sum(seconds - before.get(pid, 0.0) for pid, seconds in cpu(server).items())
    answers, refused, late = seen["2xx"], seen["statusCodeStats"].get("503", {}).get("count", 0), seen["timeouts"]
    other = seen["non2xx"] - refused + seen["errors"] - late
    latency = "".join(f"{seen['latency'][name]:8.0f}" for name in ("p50", "p99", "max"))
    print(
        f"{variant:20}{name:>10}{answers:9,}{refused:9,}{late:10,}{other:7,}{latency}"
        f"{100 * used / seen['duration']:7.0f}{1e6 * used / max(answers + refused, 1):12.0f}",
        flush=True,
    )
    time.sleep(REST)


def _load(url: str, chosen: argparse.Namespace) -> dict[str, Any]:
    """Return what autocannon saw; its `errors` include the time-outs."""
    counts = ["-c", str(chosen.connections), "-d", str(chosen.seconds), "-t", str(chosen.limit)]
    core = sorted(os.sched_getaffinity(0))[LOAD_CORE]
    command = ["taskset", "-c", str(core), "node", str(NODE_MODULES / "autocannon" / "autocannon.js")]
    seen = subprocess.run([*command, *counts, "--json", url], stdout=subprocess.PIPE, check=True)
    result: dict[str, Any] = json.loads(seen.stdout)
    return result
