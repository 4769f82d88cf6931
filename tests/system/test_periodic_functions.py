"""`App.every` on a real server with two workers: a worker and the broker are killed, and a reload replaces all."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from tests.system.serving import HERE, ServerStarter, wait_until


def test_one_worker_ticks_at_a_time_through_deaths_and_a_reload(start_server: ServerStarter, tmp_path: Path) -> None:
    noted = tmp_path / "noted"
    noted.touch()
    app = {"module": "ticking:app", "path": str(HERE / "apps"), "options": {"file": str(noted)}}
    server = start_server(app=app, workers={"task_lease": "1s"})

    def runs(kind: str) -> list[list[int]]:
        lines = [line.split(" ") for line in noted.read_text().splitlines()]
        return [[int(number) for number in rest] for name, *rest in lines if name == kind]

    def ticks_of(term: int) -> list[list[int]]:
        return [run for run in runs("once") if run[1] == term]

    wait_until(lambda: len(ticks_of(1)) > 2, "a run on one worker")
    wait_until(lambda: {slot for _, slot, _ in runs("each")} == {0, 1}, "runs on each worker")
    assert {count for _, _, count in runs("each")} == {2}

    holder = ticks_of(1)[0][0]
    os.kill(holder, signal.SIGKILL)
    wait_until(lambda: ticks_of(2), "a run on another worker")

    os.kill(server.broker(), signal.SIGKILL)
    begun = len(runs("once"))
    wait_until(lambda: len(runs("once")) > begun + 2, "a run after the death of the broker")

    before = set(server.workers())
    os.kill(server.process.pid, signal.SIGHUP)
    wait_until(lambda: set(server.workers()).isdisjoint(before), "a reload")
    begun = len(runs("once"))
    wait_until(lambda: len(runs("once")) > begun + 2, "a run after the reload")
    assert runs("once")[-1][0] not in before

    once = runs("once")
    assert len({number for _, _, number in once}) == len(once), "a run was made twice"
    terms = [term for _, term, _ in once]
    assert terms == sorted(terms)
    assert len({(pid, term) for pid, term, _ in once}) == len(set(terms)), "two workers in one term"
