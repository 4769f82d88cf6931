"""Real processes that die, hang and are told to stop: the supervisor replaces, reports, ends, and leaves nobody behind.

Most tests run the supervisor with stand-in children (stand_in.py), which start in a fraction of a second and misbehave
on demand; the last ones run the whole server.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from realtime.config import settings as configuration
from realtime.config.settings import (
    AppSettings,
    HTTPServerSettings,
    LoopSettings,
    Settings,
    ShutdownSettings,
    WorkersSettings,
)
from tests.system.serving import CHECKOUT, HERE, TWISTD, Server, ServerStarter, wait_until

# Within which every child of a supervisor that was killed must be gone.
ORPHAN_LIMIT = 15.0


class StandIns(Server):
    """A supervisor with stand-in children, under twistd."""

    def __init__(self, settings: Settings, *twistd: str, environment: dict[str, str] | None = None) -> None:
        path = os.pathsep.join([str(CHECKOUT), str(HERE)])
        stand_in = configuration.dump(settings).hex()
        self.process = subprocess.Popen(
            [str(TWISTD), *(twistd or ("--nodaemon", "--pidfile=")), "--python", str(HERE / "stand_in.tac")],
            env={**os.environ, "PYTHONPATH": path, "STAND_IN": stand_in, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.pid = self.process.pid
        self.lines = []
        self.port = self.operator_port = 0
        self._tracebacks_expected = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def slot(self, name: str) -> dict[str, Any]:
        """What /health says of "broker", "worker 0" ..."""
        health = self.health()
        return health["broker"] if name == "broker" else health["workers"][int(name.split()[1])]

    def pid_of(self, name: str) -> int:
        return int(self.slot(name)["pid"])

    def wait_replaced(self, name: str, pid: int) -> None:
        def replaced() -> bool:
            slot = self.slot(name)
            return slot["state"] == "ready" and slot["pid"] != pid

        wait_until(replaced, f"new {name}")

    def metric(self, series: str) -> float:
        """The value of one series, 0 when there is none."""
        found = re.search(rf"^{re.escape(series)} (\S+)$", self.operate("/metrics")[1], re.MULTILINE)
        return float(found[1]) if found else 0.0

    def greeting(self) -> tuple[int, int]:
        """Slot and pid of the worker that serves a new connection."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=20) as client:
            slot, pid = client.makefile().readline().split()
            return int(slot), int(pid)


def settings(options: dict[str, object] | None = None, stuck: float = 10.0, **given: Any) -> Settings:
    return Settings(
        http_server=given.get("http_server", HTTPServerSettings(address="127.0.0.1", port=0, internal_port=0)),
        workers=given.get("workers", WorkersSettings(count=2)),
        shutdown=ShutdownSettings(timeout=given.get("timeout", 10.0), spread=0.0),
        # On a busy machine a loop is late without being blocked.
        loop=LoopSettings(stuck=stuck, lagging=2.0, max_lag=5.0),
        app=AppSettings(options=options or {}),
    )


Start = Callable[..., StandIns]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start stand-ins; ready=False does not wait for them. All are ended afterwards, by force if need be."""
    started: list[StandIns] = []

    def begin(*arguments: Any, ready: bool = True, **given: Any) -> StandIns:
        server = StandIns(settings(*arguments, **given))
        started.append(server)
        if ready:
            server.wait_ready()
        return server

    yield begin
    for server in started:
        server.kill()


def signal_all(server: Server, number: int) -> None:
    """Send a signal to all processes. The group of the supervisor does not contain its children."""
    for process in server.family():
        process.send_signal(number)


def ended(server: Server, limit: float = 20.0) -> int:
    """The status with which the supervisor ended; AssertionError when a process is left."""
    status = server.process.wait(limit)
    server._reader.join(limit)
    assert server.family() == [], server.log
    return status


# Replacing.


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM], ids=lambda n: n.name)
def test_a_worker_that_ends_is_replaced_and_nobody_at_its_port_is_refused(start: Start, number: int) -> None:
    server = start()
    pid = server.pid_of("worker 0")
    os.kill(pid, number)
    # What waits in its slot's queue is rescued, or served by the next worker; and new ones go elsewhere.
    assert {slot for slot, _ in [server.greeting() for _ in range(40)]} <= {0, 1}
    server.wait_replaced("worker 0", pid)
    greeted: list[tuple[int, int]] = []

    def both_serve() -> bool:
        greeted.append(server.greeting())
        return {slot for slot, _ in greeted} == {0, 1}

    wait_until(both_serve, "connections at both workers")
    assert pid not in {greeting[1] for greeting in greeted}
    server.expect_traceback()  # faulthandler's, for SIGSEGV
    server.stop()


def test_a_killed_broker_is_replaced_and_introduced_to_every_worker(start: Start) -> None:
    server = start()
    wait_until(lambda: server.metric('realtime_links_total{process="broker"}') == 2, "two streams")
    pid = server.pid_of("broker")
    os.kill(pid, signal.SIGKILL)
    server.wait_replaced("broker", pid)
    wait_until(lambda: server.metric('realtime_links_total{process="broker"}') == 2, "two streams to the new broker")
    for worker in ("0", "1"):
        assert server.metric(f'realtime_links_total{{process="worker",worker="{worker}"}}') == 2
    assert server.metric('realtime_process_restarts_total{process="broker",reason="signal"}') == 1
    server.stop()


def test_no_zombie_is_left(start: Start) -> None:
    server = start(workers=WorkersSettings(count=2, restart_delay=0.01, restart_delay_max=0.01))
    for _ in range(5):
        pid = server.pid_of("worker 1")
        os.kill(pid, signal.SIGKILL)
        server.wait_replaced("worker 1", pid)
    children = psutil.Process(server.pid).children()
    assert len(children) == 4  # the zygote, the broker and the workers
    assert all(child.status() != psutil.STATUS_ZOMBIE for child in children)
    server.stop()


def test_a_stopped_worker_is_killed_and_replaced(start: Start) -> None:
    server = start(stuck=1.0)
    pid = server.pid_of("worker 0")
    os.kill(pid, signal.SIGSTOP)
    server.wait_replaced("worker 0", pid)
    assert server.metric('realtime_process_restarts_total{process="worker",reason="stuck",worker="0"}') == 1
    assert "worker 0 is stuck and wrote no stacks: it is stopped, or deep in the kernel" in server.log
    assert "worker 0 did not turn its loop for 1 s and was killed" in server.log
    server.stop()


def test_after_a_pause_of_all_processes_nobody_is_killed(start: Start) -> None:
    server = start(stuck=1.0)
    pids = [process.pid for process in server.family()]
    signal_all(server, signal.SIGSTOP)
    # What is tested is a stretch of real time in which nothing runs.
    threading.Event().wait(2.5)
    signal_all(server, signal.SIGCONT)
    wait_until(lambda: all(server.slot(name)["beat_age"] < 0.5 for name in ("worker 0", "worker 1", "broker")), "beats")
    assert sorted(process.pid for process in server.family()) == sorted(pids)
    server.stop()


def test_with_a_tenth_of_a_core_for_all_processes_nobody_is_killed(start: Start) -> None:
    # Row S7 of the bad inputs: a CPU quota stops all processes for most of each period.
    server = start(stuck=1.0)
    pids = sorted(process.pid for process in server.family())
    for _ in range(12):
        signal_all(server, signal.SIGSTOP)
        threading.Event().wait(0.45)
        signal_all(server, signal.SIGCONT)
        threading.Event().wait(0.05)
    assert {slot for slot, _ in [server.greeting() for _ in range(20)]} <= {0, 1}
    wait_until(lambda: all(server.slot(name)["beat_age"] < 0.5 for name in ("worker 0", "worker 1", "broker")), "beats")
    assert sorted(process.pid for process in server.family()) == pids
    assert "was killed" not in server.log
    server.stop()


def test_a_worker_that_dies_again_and_again_is_one_line_and_the_others_serve(start: Start) -> None:
    server = start({"only": "worker 1", "crash": 3}, ready=False, workers=WorkersSettings(count=2, restart_delay=0.05))
    loop = server.wait_for_log(r"crash loop: worker 1 exited with status 3, 3 times in a row; next attempt in [\d.]+ s")
    assert loop
    server.wait_for_log("serving clients on")
    wait_until(lambda: len(re.findall("worker 1 exited", server.log)) >= 3, "deaths")
    found = re.search(r"http://127.0.0.1:(\d+)/, operators on http://127.0.0.1:(\d+)/", server.log)
    assert found
    server.port, server.operator_port = int(found[1]), int(found[2])
    assert server.operate("/ready")[0] == 503
    assert server.operate("/health")[0] == 200
    wait_until(lambda: server.slot("worker 1")["restarts"] >= 5, "more deaths")
    assert server.slot("worker 1")["crash_loop"]
    assert server.log.count("crash loop") == 1
    assert server.log.count("worker 1 exited") == 3
    server.stop()


# Not starting.


def test_an_application_that_can_not_start_ends_the_first_start_with_78(start: Start) -> None:
    server = start({"only": "worker 1", "fail": "app.module: no module named chat"}, ready=False)
    assert ended(server) == 78
    assert server.log.count("worker 1 can't start: app.module: no module named chat") == 1
    assert "Traceback" not in server.log
    assert "the supervisor has ended" not in server.log


def test_an_application_that_fails_at_the_first_start_ends_it_with_a_status_for_a_restart(start: Start) -> None:
    server = start({"only": "worker 1", "fail_for_now": "chat.py:3: on_start failed: no database"}, ready=False)
    assert ended(server) == 75
    assert server.log.count("worker 1 can't start: chat.py:3: on_start failed: no database") == 1


def test_a_start_that_hangs_is_logged_with_its_line(start: Start) -> None:
    workers = WorkersSettings(count=2, start_timeout=15.0)
    server = start({"only": "worker 1", "hang": True}, ready=False, workers=workers)
    server.wait_for_log(r"worker 1 is stuck; all its threads:(?s:.*)stand_in.py\", line \d+ in hang", 60)
    server.wait_for_log(r"worker 1 was not ready within 15 s and was killed \(workers.start_timeout\)")
    server.process.send_signal(signal.SIGTERM)
    assert ended(server) == 0


def test_later_it_is_a_failed_slot(start: Start, tmp_path: Path) -> None:
    marker = tmp_path / "broken"
    server = start({"only": "worker 1", "fail": "a syntax error", "fail_if": str(marker)})
    marker.touch()
    os.kill(server.pid_of("worker 1"), signal.SIGKILL)
    server.wait_for_log("worker 1 can't start: a syntax error; restarting it")
    assert server.operate("/health")[0] == 200
    marker.unlink()
    wait_until(lambda: server.operate("/ready")[0] == 200, "recovery")
    server.stop()


def test_a_port_in_use_is_one_line(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        for http_server, key in (
            (HTTPServerSettings(address="127.0.0.1", port=port, internal_port=0), "http_server.port"),
            (HTTPServerSettings(address="127.0.0.1", port=0, internal_port=port), "http_server.internal_port"),
        ):
            server = start(ready=False, http_server=http_server)
            assert ended(server) == 1
            assert server.log.count(f"can't start: {key} = {port}: another program uses this port") == 1
            assert "Traceback" not in server.log
            assert "error" not in server.log


def test_a_second_server_does_not_share_the_port(start: Start) -> None:
    first = start()
    http_server = HTTPServerSettings(address="127.0.0.1", port=first.port, internal_port=0)
    second = start(ready=False, http_server=http_server)
    assert ended(second) == 1
    assert f"http_server.port = {first.port}: another program uses this port" in second.log
    first.stop()


# Stopping.


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_a_signal_stops_all_with_status_0(start: Start, number: int) -> None:
    server = start()
    server.process.send_signal(number)
    assert ended(server) == 0


def test_sigint_to_all_processes_is_orderly(start: Start) -> None:
    server = start()
    signal_all(server, signal.SIGINT)
    assert ended(server) == 0
    assert "was killed by" not in server.log


def test_a_worker_that_does_not_finish_is_killed_at_the_deadline(start: Start) -> None:
    server = start({"only": "worker 0", "ignore_drain": True}, timeout=2.0)
    server.process.send_signal(signal.SIGTERM)
    assert ended(server) == 0
    assert "did not finish its drain in" in server.log


def test_a_stopped_worker_does_not_delay_the_stop(start: Start) -> None:
    server = start(timeout=2.0)
    os.kill(server.pid_of("worker 0"), signal.SIGSTOP)
    server.process.send_signal(signal.SIGTERM)
    assert ended(server) == 0
    assert "worker 0 did not finish in time and was killed" in server.log


def test_a_second_signal_stops_at_once(start: Start) -> None:
    server = start({"ignore_drain": True}, timeout=300.0)
    server.process.send_signal(signal.SIGTERM)
    server.wait_for_log("SIGTERM: stopping")
    server.process.send_signal(signal.SIGTERM)
    assert ended(server) == 0


def test_stop_while_starting(start: Start) -> None:
    server = start({"slow_start": 300}, ready=False)
    server.wait_for_log("serving clients on")
    server.process.send_signal(signal.SIGTERM)
    assert ended(server) == 0


def test_a_worker_that_is_asked_to_end_is_replaced_without_an_error(start: Start) -> None:
    server = start()
    pid = server.pid_of("worker 0")
    os.kill(pid, signal.SIGTERM)
    server.wait_replaced("worker 0", pid)
    assert re.search(r"#info\] worker 0 has drained and exited, .*; restarting it in", server.log)
    assert "#error" not in server.log
    server.stop()


def test_a_reload_of_a_server_without_a_configuration_is_answered_in_the_log(start: Start) -> None:
    server = start()
    server.process.send_signal(signal.SIGHUP)
    server.wait_for_log("the reload failed: this server was started without a configuration to read again")
    server.stop()


def test_signals_of_strangers_are_harmless(start: Start) -> None:
    server = start()
    pids = sorted(process.pid for process in server.family())
    for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGPIPE):
        signal_all(server, number)
    for pid in pids:
        if pid != server.pid:
            os.kill(pid, signal.SIGINT)
    # A worker that lacks the processor gets no clients for half a second.
    wait_until(lambda: {server.greeting()[0] for _ in range(40)} == {0, 1}, "greetings of both workers")
    assert sorted(process.pid for process in server.family()) == pids
    server.stop()


# The supervisor dies.


def wait_gone(server: Server, limit: float = ORPHAN_LIMIT) -> None:
    wait_until(lambda: not server.family(), "end of every process", limit)


def test_nobody_survives_a_killed_supervisor(start: Start) -> None:
    server = start()
    os.kill(server.pid, signal.SIGKILL)
    wait_gone(server)


def test_nobody_survives_a_supervisor_killed_while_they_start(start: Start) -> None:
    server = start({"slow_start": 300}, ready=False)
    server.wait_for_log("serving clients on")
    wait_until(lambda: len(server.family()) == 5, "children")
    os.kill(server.pid, signal.SIGKILL)
    wait_gone(server)


def test_a_worker_that_is_blocked_with_the_gil_held_does_not_survive_either(start: Start) -> None:
    server = start({"only": "worker 0", "block": True}, stuck=0.0)
    wait_until(lambda: server.slot("worker 0")["beat_age"] > 0.5, "a blocked loop")
    os.kill(server.pid, signal.SIGKILL)
    wait_gone(server)


def test_a_worker_that_does_not_drain_does_not_survive_either(start: Start) -> None:
    server = start({"ignore_drain": True}, timeout=300.0)
    os.kill(server.pid, signal.SIGKILL)
    wait_gone(server)


def test_a_new_supervisor_can_bind_at_once(start: Start) -> None:
    first = start({"ignore_drain": True})
    os.kill(first.pid, signal.SIGKILL)
    second = start(http_server=HTTPServerSettings(address="127.0.0.1", port=first.port, internal_port=0))
    assert first.family(), "the first server's children drain still"
    second.stop()


# As a daemon.


def test_as_a_daemon(tmp_path: Path) -> None:
    pidfile, log = tmp_path / "twistd.pid", tmp_path / "twistd.log"
    launcher = StandIns(settings(), f"--pidfile={pidfile}", f"--logfile={log}", f"--rundir={tmp_path}")
    assert launcher.process.wait(30) == 0
    wait_until(lambda: "ready: 2 workers" in log.read_text(), "readiness")
    supervisor = psutil.Process(int(pidfile.read_text()))
    family = [supervisor, *supervisor.children()]
    assert len(family) == 5
    supervisor.terminate()
    _, left = psutil.wait_procs(family, timeout=20)
    assert left == []
    assert "[worker 0 " in log.read_text()  # what the children write is in the log
    assert not pidfile.exists()


# The whole server.


def test_the_whole_server_leaves_nobody_behind_when_its_supervisor_is_killed(start_server: ServerStarter) -> None:
    server = start_server()
    server.process.kill()
    server.process.wait()
    wait_gone(server)
    server.process.wait(5)
    start_server.started.remove(server)


@pytest.mark.parametrize(("code", "status"), [("raise OSError('no database')", 75), ("import no_such_module", 78)])
def test_an_import_that_may_succeed_later_ends_the_first_start_with_a_status_for_a_restart(
    tmp_path: Path, code: str, status: int
) -> None:
    (tmp_path / "chat.py").write_text(code)
    config = tmp_path / "realtime.toml"
    config.write_text(
        "workers.count = 1\nhttp_server.port = 0\nhttp_server.internal_port = 0\napp.module = 'chat:app'\n"
    )
    server = Server(config, cwd=tmp_path, environment={"REALTIME_APP_PATH": str(tmp_path)})
    assert ended(server, 60) == status, server.log


@pytest.mark.parametrize("victim", ["worker", "broker"])
def test_the_whole_server_replaces_what_is_killed(start_server: ServerStarter, victim: str) -> None:
    server = start_server()
    pid = server.broker() if victim == "broker" else server.workers()[0]
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: server.operate("/ready")[0] == 503, "a missing process")
    wait_until(lambda: server.operate("/ready")[0] == 200, "its replacement")
    assert pid not in [process.pid for process in server.family()]


def test_a_signal_to_all_processes_takes_no_engine_from_under_the_workers(start_server: ServerStarter) -> None:
    server = start_server()
    signal_all(server, signal.SIGTERM)
    assert server.process.wait(20) == 0
    assert "the stream to worker 0 ended" in server.log
    assert "the stream to the broker ended" not in server.log


def test_a_stop_waits_for_handlers_and_tells_those_who_come_late(start_server: ServerStarter) -> None:
    server = start_server(workers={"count": 1})
    address = ("127.0.0.1", server.port)
    with socket.create_connection(address) as late, socket.create_connection(address) as asking:
        asking.sendall(b"GET /slowly HTTP/1.1\r\nHost: localhost\r\n\r\n")
        server.wait_for_log("/slowly has begun")
        server.process.send_signal(signal.SIGTERM)
        server.wait_for_log("SIGTERM: stopping")
        with connect(server.endpoint, sock=late) as websocket, pytest.raises(ConnectionClosed) as closed:
            websocket.send('{"id":1,"connect":{}}')
            while True:
                websocket.recv(timeout=5)
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 3001
        answer = b""
        while not answer.endswith(b"done"):
            data = asking.recv(4096)
            assert data, answer
            answer += data
    assert server.process.wait(8) == 0


def test_a_stop_runs_finally_blocks_and_on_stop_in_order(start_server: ServerStarter) -> None:
    server = start_server(workers={"count": 1}, shutdown={"timeout": "4s"})
    with socket.create_connection(("127.0.0.1", server.port)) as asking:
        asking.sendall(b"GET /slowly?seconds=60 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        server.wait_for_log("/slowly has begun")
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(8) == 0
    # Each `finally` block has run, of calls, then of tasks.
    found = re.findall(r"/slowly has ended|on_stop has run|the task has ended", server.log)
    assert found == ["/slowly has ended", "on_stop has run", "the task has ended"]
