"""Handlers that block the loop: the right line is named, and the blocked process is not disturbed."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from tests.system.serving import HERE, Server, ServerStarter, wait_until

SOURCE = HERE / "apps" / "blocking.py"
APP = {"module": "blocking:app", "path": str(HERE / "apps")}


def places(mark: str) -> set[str]:
    """The places in the application that carry this mark."""
    lines = SOURCE.read_text().splitlines()
    return {f"{SOURCE}:{number}" for number, line in enumerate(lines, 1) if line.endswith(f"# blocks: {mark}")}


def wait_healthy(server: Server) -> None:
    wait_until(lambda: server.health()["workers"][0]["condition"] == "healthy", "health")


def ask(server: Server, path: str) -> Any:
    """The answer of the worker, which must be healthy for that."""
    wait_healthy(server)
    with urllib.request.urlopen(f"{server.http}{path}", timeout=30) as response:
        return json.load(response)


def incidents(server: Server) -> list[dict[str, Any]]:
    """Those that are over and have a place, newest first."""
    found = json.loads(server.operate("/incidents")[1])["incidents"]
    return [incident for incident in found if not incident["lasts"]]


def wait_incident(server: Server, mark: str) -> dict[str, Any]:
    wanted = places(mark)
    assert wanted

    def look() -> dict[str, Any] | None:
        return next((one for one in incidents(server) if one["place"] in wanted), None)

    try:
        return wait_until(look, f"incident at {wanted}", 10.0)
    except AssertionError as error:
        raise AssertionError(f"{error}: {server.operate('/incidents')[1]}") from None


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    start = ServerStarter(tmp_path_factory.mktemp("blame"))
    yield start(workers={"count": 1}, app=APP)
    start.finish()


@pytest.mark.parametrize(
    ("path", "answer", "handler"),
    [
        ("regex", True, "http GET /regex"),
        ("loop", True, "http GET /loop"),
        ("recv", True, "http GET /recv"),
        ("json", 700_000, "http GET /json"),
        ("after", True, "http GET /after"),
    ],
)
def test_the_line_that_blocks_is_named(server: Server, path: str, answer: object, handler: str) -> None:
    assert ask(server, f"/{path}") == answer
    incident = wait_incident(server, path)
    assert (incident["handler"], incident["subject"]) == (handler, f"/{path}")
    assert incident["function"] in ("regex", "loop", "recv", "load", "block")
    assert incident["duration"] > 0.2
    assert incident["stack"]
    [place] = [one for one in json.loads(server.operate("/incidents")[1])["places"] if one["handler"] == handler]
    assert place["count"] == 1
    assert place["seconds"] == pytest.approx(incident["duration"], abs=0.001)
    series = f'realtime_loop_blocks_total{{handler="{handler}",place="{incident["place"]}",process="supervisor"}} 1.0'
    assert series in server.operate("/metrics")[1]
    assert len(re.findall(rf"worker 0 .* blocked for [\d.]+ s at {re.escape(incident['place'])} in", server.log)) == 1


def test_a_sleep_has_its_full_length_and_the_incident_its_exact_one(server: Server) -> None:
    slept = ask(server, "/sleep")
    assert slept >= 1.0
    incident = wait_incident(server, "sleep")
    assert slept <= incident["duration"] <= slept + 0.2
    assert incident["function"] == "sleep"


def test_a_thread_that_holds_the_interpreter_is_named(server: Server) -> None:
    ask(server, "/thread")
    incident = wait_incident(server, "thread")
    assert incident["thread"]
    wait_until(lambda: "a thread of worker 0 has blocked its loop" in server.log, "log line")


def test_a_line_a_minute(server: Server) -> None:
    before = server.log.count("at " + next(iter(places("sleep"))))
    ask(server, "/sleep")
    wait_until(
        lambda: sum(one["place"] in places("sleep") for one in incidents(server)) >= 2, "a second incident", 10.0
    )
    ask(server, "/sleep")
    assert server.log.count("at " + next(iter(places("sleep")))) == max(before, 1)


def test_a_stopped_worker_that_goes_on_is_not_killed(server: Server) -> None:
    [pid] = server.workers()
    wait_healthy(server)
    began = time.time()
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: server.health()["workers"][0]["condition"] == "pressed", "pressure")
    os.kill(pid, signal.SIGCONT)
    wait_healthy(server)
    assert server.workers() == [pid]
    places = [incident["place"] for incident in incidents(server) if incident["at"] > began - 0.1]
    assert places == ["unknown"]


def test_a_stopped_supervisor_blames_nobody(server: Server) -> None:
    [pid] = server.workers()
    wait_healthy(server)
    began = time.time()
    os.kill(server.pid, signal.SIGSTOP)
    threading.Event().wait(1.0)  # what is tested is a stretch of real time
    os.kill(server.pid, signal.SIGCONT)
    wait_healthy(server)
    assert server.workers() == [pid]
    assert [incident for incident in incidents(server) if incident["at"] > began] == []


def dump(server: Server, what: str) -> str:
    command = [sys.executable, "-m", "realtime", "dump", what, "--worker", "0", "--port", str(server.operator_port)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout


def test_the_command_dumps_stacks_tasks_and_memory(server: Server) -> None:
    assert "Thread MainThread (most recent call last):" in dump(server, "stacks")
    assert "0 tasks" in dump(server, "tasks")
    assert "resident: " in dump(server, "memory")


def test_the_command_shows_where_a_blocked_loop_is(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(b"GET /long HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        wait_until(lambda: server.health()["workers"][0]["handler"] == "http GET /long", "the handler")
        text = dump(server, "stacks")
        assert "The loop does not turn" in text
        [place] = places("long")
        assert f'File "{SOURCE}", line {place.rpartition(":")[2]}, in long' in text
        assert client.makefile("rb").read().endswith(b"true")


# A worker that does not come back, or takes too much.


def test_a_stuck_worker_leaves_all_its_stacks_in_the_log(start_server: ServerStarter) -> None:
    server = start_server(workers={"count": 1}, app=APP, loop={"stuck": "2s"})
    [pid] = server.workers()
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(b"GET /stuck HTTP/1.1\r\nHost: localhost\r\n\r\n")
        server.wait_for_log("did not turn its loop for 2 s and was killed")
    stacks = server.log.partition("worker 0 is stuck; all its threads:")[2].partition("worker 0 did not turn")[0]
    assert "in wait_elsewhere" in stacks
    assert any(f'File "{SOURCE}", line {place.rpartition(":")[2]} in stuck' in stacks for place in places("stuck"))
    wait_until(lambda: server.operate("/ready")[0] == 200 and server.workers() != [pid], "another worker")
    incident = wait_incident(server, "stuck")
    assert (incident["ending"], incident["handler"]) == ("stuck, killed", "http GET /stuck")
    assert "in wait_elsewhere" in incident["stacks"]
    assert incident["duration"] > 1.9
    assert (
        'realtime_process_restarts_total{process="worker",reason="stuck",worker="0"} 1.0'
        in server.operate("/metrics")[1]
    )


def test_a_bloated_worker_is_replaced(start_server: ServerStarter) -> None:
    server = start_server(workers={"count": 2}, app=APP, loop={"max_rss": 400 << 20})
    pids = server.workers()
    answered = ask(server, "/bloat")
    assert answered in pids
    server.wait_for_log(r"uses \d+ MiB of memory \(loop.max_rss\); replacing it")
    wait_until(lambda: server.operate("/ready")[0] == 200 and answered not in server.workers(), "another worker")
    assert len(set(pids) & set(server.workers())) == 1
    assert re.search(
        r'realtime_process_restarts_total\{process="worker",reason="bloated",worker="."\} 1.0',
        server.operate("/metrics")[1],
    )
