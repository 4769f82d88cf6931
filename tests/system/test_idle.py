"""Idle connections stay up, pings and all. The figures that it prints are for a person to judge.

A part of a minute with 1,000 connections by default; the whole measurement is
    scripts/test tests/system/test_idle.py --idle-connections 5000 --idle-seconds 60
"""

from __future__ import annotations

import json
import subprocess
import sys

import psutil
import pytest

from tests.system.serving import HERE, ServerStarter

PING_INTERVAL = 1


def memory_and_time(pids: list[int]) -> tuple[list[float], list[float]]:
    """RSS in MB and CPU time in seconds of each process."""
    processes = [psutil.Process(pid) for pid in pids]
    times = [process.cpu_times() for process in processes]
    return [process.memory_info().rss / 1e6 for process in processes], [spent.user + spent.system for spent in times]


@pytest.mark.timeout(400)
def test_idle_connections_stay_up(
    start_server: ServerStarter, pytestconfig: pytest.Config, capsys: pytest.CaptureFixture[str]
) -> None:
    count, seconds = pytestconfig.getoption("idle_connections"), pytestconfig.getoption("idle_seconds")
    server = start_server(client={"ping_interval": f"{PING_INTERVAL}s", "pong_timeout": "900ms"})
    workers = server.workers()
    rss_before, _ = memory_and_time(workers)

    clients = subprocess.Popen(
        [sys.executable, str(HERE / "idle_clients.py"), str(server.port), str(count), str(seconds)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert clients.stdout is not None and clients.stdin is not None
        assert clients.stdout.readline() == "holding\n"
        rss, cpu_before = memory_and_time(workers)
        clients.stdin.write("\n")
        clients.stdin.flush()
        seen = json.loads(clients.stdout.readline())
        _, cpu = memory_and_time(workers)
    finally:
        clients.kill()
        clients.communicate()

    grown = sum(rss) - sum(rss_before)
    spent = sum(cpu) - sum(cpu_before)
    with capsys.disabled():
        print(
            f"\n{count} idle connections for {seconds:g} s on {len(workers)} workers, a ping each {PING_INTERVAL} s: "
            f"RSS {' + '.join(f'{mb:.0f}' for mb in rss)} MB, {1000 * grown / count:.1f} KB a connection; "
            f"CPU {100 * spent / seconds:.1f} % of a core, {1e6 * spent / max(seen['pings'], 1):.0f} µs a ping"
        )
    assert seen["connected"] == count
    assert seen["open"] == count, "connections were closed while idle"
    # A busy machine may be late with them, but a client that is not pinged at all would be noticed here.
    assert seen["pings"] >= count * seconds / PING_INTERVAL / 2, "pings stayed away"
    assert server.workers() == workers
