"""Clearing a cache reaches all workers, from wherever a handler runs, and one worker computes for all."""

from __future__ import annotations

import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.request import urlopen

from tests.system.serving import HERE, Server, ServerStarter, wait_until


def get(server: Server, path: str) -> dict[str, int]:
    with urlopen(f"{server.http}{path}", timeout=20) as answer:
        found: dict[str, int] = json.load(answer)
        return found


def answers(server: Server) -> dict[int, int]:
    """The computation behind the answer of each worker, by pid."""
    found: dict[int, int] = {}

    def has_both() -> bool:
        answer = get(server, "/answer")
        found[answer["pid"]] = answer["computation"]
        return len(found) == 2

    wait_until(has_both, "answers of both workers")
    return found


def test_clearing_a_cache_in_one_worker_clears_it_in_all(start_server: ServerStarter) -> None:
    server = start_server(app={"module": "caching:app", "path": str(HERE / "apps")}, workers={"processes": 1})
    expected = 1
    assert set(answers(server).values()) == {expected}
    for place in ("loop", "thread", "process"):
        get(server, f"/clear/{place}")
        expected += 1
        wait_until(lambda: set(answers(server).values()) == {expected}, f"new answers after {place}")  # noqa: B023


def test_one_worker_computes_for_all_and_another_one_if_it_dies(start_server: ServerStarter) -> None:
    server = start_server(app={"module": "caching:app", "path": str(HERE / "apps")})
    with ThreadPoolExecutor(16) as callers:
        shared = list(callers.map(lambda _: get(server, "/slow?key=shared&seconds=1"), range(16)))
        assert len({(answer["pid"], answer["computation"]) for answer in shared}) == 1
        assert series(server, "landed") == 1  # the other worker has served it, too

        lost = [callers.submit(get, server, "/slow?key=lost&seconds=3") for _ in range(16)]
        computing = wait_until(lambda: running_at(server, "lost"), "a computation")
        wait_until(lambda: sum(series(server, outcome) for outcome in ("miss", "shared")) == 32, "all callers")
        os.kill(computing, signal.SIGKILL)
        answers = [answer.result()["pid"] for answer in lost if answer.exception() is None]
    assert answers
    assert computing not in answers


def running_at(server: Server, key: str) -> int:
    """The worker that computes this key, 0 if the worker that was asked does not."""
    answer: dict[str, Any] = get(server, "/running")
    return answer["pid"] if key in answer["running"] else 0


def series(server: Server, outcome: str) -> float:
    """The events of the caches with this outcome, over all workers."""
    lines = server.operate("/metrics")[1].splitlines()
    return sum(float(line.split()[-1]) for line in lines if "cache_events" in line and f'outcome="{outcome}"' in line)
