"""Clearing a cache reaches all workers, from wherever a handler runs."""

from __future__ import annotations

import json
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
