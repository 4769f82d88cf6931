"""Load, faults and bad input at once on a server of its own, and an account of every publication at the end.

Exit status: 0 if every publication is accounted for, 1 if one is silently lost, repeated or reordered, if a process
ends without a fault that ends it, or if another rule of tests/soak/README.md is broken.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import resource
import signal
import sys
import tempfile
from pathlib import Path

from tests.soak.hand_over import HandOverFaults, cases
from tests.soak.run import ENGINES, Options, Run, Soak
from tests.soak.schedule import KINDS, REDIS_KINDS, schedule


def parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/soak", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, help="of clients, faults and bad input; by chance if absent, and printed")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--clients", type=int, default=500)
    parser.add_argument("--faults", type=int, help="one every 15 seconds if absent")
    parser.add_argument(
        "--only", action="append", default=[], choices=[*KINDS, *REDIS_KINDS], help="a kind of fault; repeatable"
    )
    parser.add_argument("--publications", type=float, default=20.0, help="a second")
    parser.add_argument("--bad-inputs", type=float, default=40.0, help="a second")
    parser.add_argument("--workers", type=int, default=2, help="of each node")
    parser.add_argument("--engine", choices=list(ENGINES), default="memory", help="redis: two nodes and a Redis server")
    parser.add_argument("--log", type=Path, help="a file for the server's log")
    parser.add_argument(
        "--hand-over",
        type=int,
        metavar="CASES",
        help="in place of the faults, kill a process at so many steps of hand-overs, 0 for all",
    )
    parser.add_argument("--schedule", action="store_true", help="print the faults; start nothing")
    return parser.parse_args(arguments)


async def until_signal(run: Run) -> None:
    """Carry out a run. SIGINT and SIGTERM end it, and its server."""
    task = asyncio.current_task()
    assert task
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    await run.run()


def main(arguments: list[str]) -> int:
    asked = parsed(arguments)
    seed = random.randrange(1_000_000) if asked.seed is None else asked.seed
    faults = round(asked.seconds / 15) if asked.faults is None else asked.faults
    if asked.schedule:
        kinds = KINDS if asked.engine == "memory" else KINDS | REDIS_KINDS
        print(*schedule(seed, asked.seconds, faults, asked.only, kinds), sep="\n")
        return 0
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    print(f"scripts/soak --seed {seed}: {asked}", flush=True)
    with open(asked.log or "/dev/null", "w", buffering=1) as copy, tempfile.TemporaryDirectory() as folder:
        if asked.hand_over is None:
            run: Run = Soak(options(asked, seed, faults), tell, copy)
        else:
            chosen = cases(seed, asked.hand_over or None)
            run = HandOverFaults(seed, asked.clients, asked.workers, chosen, Path(folder), tell, copy)
        asyncio.run(until_signal(run))
    return 1 if run.failed else 0


def options(asked: argparse.Namespace, seed: int, faults: int) -> Options:
    return Options(
        seed,
        asked.seconds,
        asked.clients,
        faults,
        tuple(asked.only),
        asked.publications,
        asked.bad_inputs,
        asked.workers,
        asked.engine,
    )


def tell(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
