"""The operators' port: its pages, its Host rule, and that a process that does not answer delays no page."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Collection, Iterator
from typing import Any

import pytest
from twisted.internet import task
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ClientEndpoint, connectProtocol
from twisted.internet.protocol import Protocol
from twisted.logger import globalLogPublisher
from twisted.python.failure import Failure

from realtime.config.settings import AppSettings, LoopSettings, WorkersSettings
from realtime.metrics import Metrics, Sample
from realtime.operators import site
from realtime.operators.port import OperatorPort
from realtime.supervision.health import Condition, Health
from realtime.supervision.incidents import Incident
from realtime.supervision.pool import Pool
from realtime.supervision.vitals import ProcessState, RunningHandler, Vitals
from realtime.supervisor.health_monitor import HealthMonitor
from realtime.supervisor.listener import CannotListen
from realtime.supervisor.stack_sampler import StackSampler


class Child:
    """Stands for a child process. samples: its answer to `collect`; None: no answer."""

    def __init__(self, pid: int, samples: list[Sample] | None) -> None:
        self.pid = pid
        self.samples = samples
        self.turns = True
        self.vitals: Vitals | None = Vitals(
            int(1e9), 0.002, 40, 70, ProcessState.READY, 0.25, 900, 1000, 11, 12, 13, 14
        )
        self.running: RunningHandler | None = RunningHandler("rpc report", "report")

    def report(self, what: str) -> Deferred[str]:
        answer: Deferred[str] = Deferred()
        if self.turns:
            answer.callback(f"{what} of {self.pid}")
        return answer

    def dump(self, number: int) -> Deferred[str]:
        answer: Deferred[str] = Deferred()
        answer.callback("Stack (most recent call first):")
        return answer

    def collect(self, names: Collection[str] = ()) -> Deferred[list[Sample]]:
        answer: Deferred[list[Sample]] = Deferred()
        if self.samples is not None:
            answer.callback(self.samples)
        return answer


class Server:
    """Stands for the supervisor: a broker and two workers, all ready."""

    port = 8000
    operator_port = 8001

    def __init__(self, reactor: Any) -> None:
        self.pool = Pool(2, WorkersSettings(), LoopSettings(), 30.0)
        self.pool.start(0.0)
        self.processes: dict[int, Any] = {}
        self.children: dict[int, Any] = {}
        for number in self.pool.slots:
            self.pool.process_ready(self.pool.slots[number].process.generation, 0.0)
            sample = Sample("realtime_connections", "gauge", "Open connections.", [], 40 + number)
            child = self.processes[number] = Child(1000 + number, [sample])
            self.children[self.pool.slots[number].process.generation] = child
        self.monitor = HealthMonitor(reactor, LoopSettings(), self.pool, self.processes)
        self.metrics = Metrics()
        self.steering: Any = None
        self.reloads: list[str] = []  # lines of progress; not empty once a reload was requested
        self.sampler = StackSampler(reactor, self.monitor, LoopSettings(), AppSettings(), self.processes)
        self.admin = OperatorPort(self, reactor, "127.0.0.1", 0)
        self.reactor = reactor

    def exchange(self, data: bytes) -> Deferred[bytes]:
        """Send `data`. Returns all bytes until the server closes the connection."""
        answered: Deferred[bytes] = Deferred()

        class Client(Protocol):
            received = b""

            def connectionMade(self) -> None:
                assert self.transport is not None
                self.transport.write(data)

            def dataReceived(self, data: bytes) -> None:
                self.received += data

            def connectionLost(self, reason: Failure) -> None:  # type: ignore[override]
                answered.callback(self.received)

        endpoint = TCP4ClientEndpoint(self.reactor, "127.0.0.1", self.admin.port)
        return connectProtocol(endpoint, Client()).addCallback(lambda _: answered)

    def scale(self, count: int, tell: Callable[[str], None]) -> Deferred[str]:
        return self.reload(lambda line: tell(f"{count}: {line}"))

    def upgrade(self, tell: Callable[[str], None]) -> Deferred[str]:
        return self.reload(lambda line: tell(f"upgrade: {line}"))

    def join_upgrade(self, tell: Callable[[str], None]) -> Deferred[str]:
        return self.reload(lambda line: tell(f"joined: {line}"))

    def reload(self, tell: Callable[[str], None]) -> Deferred[str]:
        """Tell the lines of `reloads`, and fail."""
        for line in self.reloads or ["nothing"]:
            tell(line)
        self.reloads = self.reloads or ["nothing"]
        answer: Deferred[str] = Deferred()
        answer.callback("no more")
        return answer

    async def get(self, path: str, host: str = "localhost", method: str = "GET", headers: str = "") -> tuple[int, str]:
        """Status and body of the answer."""
        request = f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n{headers}\r\n"
        head, _, body = (await self.exchange(request.encode())).decode().partition("\r\n\r\n")
        self.head = head.lower()
        return int(head.split()[1]), body


@pytest.fixture
def server() -> Iterator[Server]:
    from twisted.internet import reactor

    server = Server(reactor)
    yield server
    server.admin.close()


async def test_health_shows_every_process(server: Server) -> None:
    status, body = await server.get("/health")
    health = json.loads(body)
    assert status == 200
    assert (health["status"], health["port"], health["operator_port"]) == ("ok", 8000, 8001)
    assert [worker["slot"] for worker in health["workers"]] == [0, 1]
    assert [worker["pid"] for worker in health["workers"]] == [1000, 1001]
    assert health["broker"]["pid"] == 999
    worker = health["workers"][0]
    assert (worker["state"], worker["connections"], worker["subscriptions"]) == ("ready", 40, 70)
    assert (worker["lag"], worker["restarts"], worker["crash_loop"]) == (0.002, 0, False)


async def test_health_and_metrics_show_vital_signs(server: Server) -> None:
    health = json.loads((await server.get("/health"))[1])
    worker = health["workers"][1]
    assert (worker["utilization"], worker["queued_bytes"], worker["rss"]) == (0.25, 11, 14)
    assert (worker["threads_busy"], worker["threads_waiting"]) == (12, 13)
    assert (worker["handler"], worker["subject"]) == ("rpc report", "report")
    server.processes[1].running = None
    health = json.loads((await server.get("/health"))[1])
    assert health["workers"][1]["handler"] is None
    text = (await server.get("/metrics"))[1]
    for line in (
        'realtime_loop_utilization{process="worker",worker="1"} 0.25',
        'realtime_loop_turns_total{process="worker",worker="1"} 900.0',
        'realtime_loop_callbacks_total{process="worker",worker="1"} 1000.0',
        'realtime_queued_bytes{process="broker"} 11.0',
        'realtime_resident_memory_bytes{process="worker",worker="1"} 14.0',
    ):
        assert line in text


async def test_incidents_are_shown_and_counted(server: Server) -> None:
    ledger = server.sampler.incidents
    for at, place, duration in ((5.0, "/app/chat.py:7", 0.5), (1700000000.123457, "/app/chat.py:9", 2.0)):
        incident = Incident(slot=1, pid=1001, at=at, duration=duration, lasts=False, place=place, handler="rpc f")
        ledger.recent.append(incident)
        ledger.count(incident)
    shown = json.loads((await server.get("/incidents"))[1])
    assert [incident["place"] for incident in shown["incidents"]] == ["/app/chat.py:9", "/app/chat.py:7"]
    for at, places in (
        ("1700000000.123457", ["/app/chat.py:9"]),
        ("5", ["/app/chat.py:7"]),
        ("x", []),
        ("nan", []),
    ):
        found = json.loads((await server.get(f"/incidents?at={at}"))[1])
        assert [incident["place"] for incident in found["incidents"]] == places
    assert shown["places"][0] == {
        "handler": "rpc f",
        "place": "/app/chat.py:9",
        "count": 1,
        "seconds": 2.0,
        "relieved": 0.0,
    }
    text = (await server.get("/metrics"))[1]
    labels = 'handler="rpc f",place="/app/chat.py:9",process="supervisor"'
    assert f"realtime_loop_blocks_total{{{labels}}} 1.0" in text
    assert f"realtime_loop_blocked_seconds_total{{{labels}}} 2.0" in text


async def test_dump_shows_a_report_of_a_process(server: Server) -> None:
    assert await server.get("/dump?worker=1") == (200, "stacks of 1001")
    assert await server.get("/dump?worker=broker&what=memory") == (200, "memory of 999")
    for query in ("", "?worker=7", "?worker=1&what=secrets", "?worker=%ff", "?worker=-1"):
        status, text = await server.get(f"/dump{query}")
        assert (status, text[:6]) == (404, "/dump?")


async def test_dump_of_a_blocked_loop_shows_its_stack(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("realtime.operators.port.REPORT_LIMIT", 0.05)
    server.processes[1].turns = False
    status, text = await server.get("/dump?worker=1")
    assert (status, text.splitlines()[0]) == (200, "The loop does not turn; its stack at this moment:")
    assert await server.get("/dump?worker=1&what=tasks") == (
        503,
        "worker 1 did not answer within 0.05 s; what=stacks shows the line that blocks it\n",
    )


async def test_health_and_metrics_show_each_workers_condition(server: Server) -> None:
    assert json.loads((await server.get("/health"))[1])["workers"][0]["condition"] is None
    server.monitor.check()
    health = json.loads((await server.get("/health"))[1])
    assert [worker["condition"] for worker in health["workers"]] == ["healthy", "healthy"]
    text = (await server.get("/metrics"))[1]
    assert 'realtime_worker_condition{condition="healthy",process="worker",worker="1"} 1.0' in text
    assert 'realtime_worker_condition{condition="pressed",process="worker",worker="1"} 0.0' in text


async def test_health_and_metrics_show_the_lag_that_the_conditions_read(server: Server) -> None:
    vitals = server.processes[0].vitals  # its latest timer was 2 ms late
    server.monitor.health[0] = Health(0, Condition.PRESSED, 0.0, 1.5, vitals=vitals)
    server.monitor.broker = Health(-1, Condition.PRESSED, 0.0, 0.4, vitals=vitals)
    health = json.loads((await server.get("/health"))[1])
    assert (health["workers"][0]["lag"], health["broker"]["lag"]) == (1.5, 0.4)
    assert health["broker"]["condition"] == "pressed"
    text = (await server.get("/metrics"))[1]
    assert 'realtime_loop_lag_seconds{process="worker",worker="0"} 1.5' in text
    assert 'realtime_loop_lag_seconds{process="broker"} 0.4' in text


async def test_health_and_readiness_while_a_worker_is_missing(server: Server) -> None:
    assert (await server.get("/ready")) == (200, '{"ready":true}')
    server.pool.process_exited(server.pool.slots[0].process.generation, 1, 1.0)
    del server.processes[0]
    assert (await server.get("/health"))[0] == 200
    assert (await server.get("/ready")) == (503, '{"ready":false}')
    server.pool.process_exited(server.pool.slots[1].process.generation, 1, 1.0)
    status, body = await server.get("/health")
    assert status == 503
    assert json.loads(body)["status"] == "no worker is ready"


async def test_not_ready_while_every_worker_is_blocked(server: Server) -> None:
    server.pool.tick(4.0, {0: 4.0, 1: 4.0, -1: 4.0})
    assert (await server.get("/ready"))[0] == 200
    server.pool.tick(8.0, {-1: 8.0})
    server.pool.tick(8.1, {-1: 8.1})
    for tick in range(40):
        server.pool.tick(8.2 + tick / 10, {-1: 8.2 + tick / 10})
    assert (await server.get("/ready"))[0] == 503
    status, body = await server.get("/health")
    assert (status, json.loads(body)["status"]) == (503, "no worker's loop turns")


async def test_not_ready_while_stopping(server: Server) -> None:
    server.pool.stop(1.0)
    assert (await server.get("/ready"))[0] == 503


async def test_metrics_of_every_process_with_its_labels(server: Server) -> None:
    server.pool.process_exited(server.pool.slots[1].process.generation, -9, 1.0)
    status, body = await server.get("/metrics")
    assert status == 200
    assert "content-type: text/plain; version=" in server.head
    lines = body.splitlines()
    assert "# TYPE realtime_connections gauge" in lines
    assert 'realtime_connections{process="worker",worker="0"} 40.0' in lines
    assert 'realtime_connections{process="broker"} 39.0' in lines
    assert 'realtime_workers{process="supervisor",state="ready"} 1.0' in lines
    assert 'realtime_process_up{process="worker",worker="1"} 0.0' in lines
    assert 'realtime_process_restarts_total{process="worker",reason="signal",worker="1"} 1.0' in lines
    assert sum(line.startswith("realtime_loop_beat_age_seconds{") for line in lines) == 3


async def test_a_silent_process_keeps_its_previous_metrics(server: Server) -> None:
    await server.get("/metrics")
    server.processes[0].samples = None
    server.processes[1].samples = [Sample("realtime_connections", "gauge", "Open connections.", [], 7)]
    status, body = await server.get("/metrics")
    assert status == 200
    assert 'realtime_connections{process="worker",worker="0"} 40.0' in body
    assert 'realtime_connections{process="worker",worker="1"} 7.0' in body


async def test_metrics_of_an_ended_process_are_not_shown(server: Server) -> None:
    await server.get("/metrics")
    del server.processes[0]
    server.processes[1] = Child(2000, None)
    _, body = await server.get("/metrics")
    assert 'realtime_connections{process="broker"}' in body
    assert 'realtime_connections{process="worker",worker="0"}' not in body
    assert 'realtime_connections{process="worker",worker="1"}' not in body


async def test_a_client_that_leaves_early_does_not_break_the_port(server: Server) -> None:
    server.processes[0].samples = None
    with socket.create_connection(("127.0.0.1", server.admin.port)) as client:
        client.send(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert (await server.get("/metrics"))[0] == 200


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8001", "127.0.0.1", "127.0.0.1:8001", "[::1]", "[::1]:8001"])
async def test_the_ports_own_names_are_accepted(server: Server, host: str) -> None:
    assert (await server.get("/ready", host))[0] == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8001",
        "localhost.evil.example",
        "",
        "10.0.0.1",
        "localhost:8001:1",
        "[::1",
        "a@localhost",
    ],
)
async def test_a_foreign_host_is_refused(server: Server, host: str) -> None:
    status, body = await server.get("/metrics", host)
    assert status in (400, 403)
    assert "realtime_" not in body


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
async def test_pages_of_other_origins_can_not_cause_a_dump(server: Server, site: str) -> None:
    path = "/dump?worker=0&what=memory"
    assert (await server.get(path, headers=f"Sec-Fetch-Site: {site}\r\n"))[0] == 403
    for headers in ("", "Sec-Fetch-Site: none\r\n", "Sec-Fetch-Site: same-origin\r\n"):
        assert await server.get(path, headers=headers) == (200, "memory of 1000")


async def test_an_idle_connection_is_not_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    from twisted.internet import reactor

    monkeypatch.setattr(site, "IDLE", 0.05)
    server = Server(reactor)
    events: list[Any] = []
    globalLogPublisher.addObserver(events.append)
    try:
        assert b"200 OK" in await server.exchange(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    finally:
        globalLogPublisher.removeObserver(events.append)
        server.admin.close()
    assert not [event for event in events if "Channel" in event["log_namespace"]]


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE"])
async def test_only_get_and_head(server: Server, method: str) -> None:
    assert (await server.get("/health", method=method))[0] == 405
    assert "allow: get, head" in server.head


async def test_head_has_no_body(server: Server) -> None:
    assert await server.get("/health", method="HEAD") == (200, "")
    assert "content-length: 0" not in server.head


@pytest.mark.parametrize("headers", ["Content-Length: 5\r\n", "Transfer-Encoding: chunked\r\n"])
async def test_a_body_is_refused(server: Server, headers: str) -> None:
    assert (await server.get("/health", method="POST", headers=headers))[0] == 413


async def test_the_page_and_its_files_are_served_with_their_policy(server: Server) -> None:
    for path, kind in (("/", "text/html"), ("/live.js", "text/javascript"), ("/live.css", "text/css")):
        status, body = await server.get(path)
        assert (status, body[-1]) == (200, "\n")
        assert f"content-type: {kind}; charset=utf-8" in server.head
        assert "content-security-policy: default-src 'none'; script-src 'self'; style-src 'self'; " in server.head
        assert "'unsafe" not in server.head
        assert "http" not in body.replace("http://www.w3.org/2000/svg", ""), "nothing from elsewhere"
    assert (await server.get("/", "evil.example"))[0] == 403


async def test_the_snapshot_is_the_latest(server: Server) -> None:
    assert await server.get("/snapshot") == (200, "null")
    server.admin.start()
    snapshot = json.loads((await server.get("/snapshot"))[1])
    assert [worker["slot"] for worker in snapshot["workers"]] == [0, 1]
    assert (snapshot["places"], snapshot["incidents"]) == ([], [])


async def test_unknown_paths(server: Server) -> None:
    for path in ("/healthz", "/live.html", "/web/live.js", "/..%2fsettings.py", "/health/", "/metrics/../health"):
        assert (await server.get(path))[0] == 404


async def test_the_server_header_has_no_version(server: Server) -> None:
    await server.get("/health")
    assert "server: realtime\r\n" in server.head + "\r\n"
    assert "twisted" not in server.head


def test_a_port_in_use_names_its_key(server: Server) -> None:
    with pytest.raises(CannotListen) as caught:
        OperatorPort(server, server.reactor, "127.0.0.1", server.admin.port)
    assert str(caught.value).startswith(f"http_server.internal_port = {server.admin.port}: another program uses")


@pytest.mark.parametrize("address", ["192.0.2.1", "no.such.name.invalid"])
def test_an_address_that_is_not_ours_names_its_key(server: Server, address: str) -> None:
    with pytest.raises(CannotListen) as caught:
        OperatorPort(server, server.reactor, address, 0)
    assert str(caught.value).startswith(f"http_server.internal_address = '{address}'")


@pytest.mark.parametrize(
    ("host", "headers", "status"),
    [
        ("evil.example", "", 403),
        ("evil.example", "Origin: http://evil.example\r\n", 403),
        ("localhost", "Origin: http://evil.example\r\n", 403),
        ("localhost", "Origin: null\r\n", 403),
        ("localhost", "Origin: http://localhost:1\r\n", 403),
        ("localhost", "Origin: http://localhost\r\nOrigin: http://localhost\r\n", 403),
        ("localhost", "Origin: ftp://localhost\r\n", 403),
        ("localhost", "Sec-Fetch-Site: cross-site\r\n", 403),
        ("localhost", "Sec-Fetch-Site: same-site\r\n", 403),
        ("localhost", "Host: localhost\r\n", 403),
        ("localhost", "Sec-Fetch-Site: same-origin\r\n", 200),
        ("localhost:1", "Origin: http://localhost:1\r\n", 200),
        ("localhost:80", "Origin: http://localhost\r\n", 200),
        ("LocalHost", "Origin: https://localHOST:443\r\n", 200),
        ("localhost", "", 200),
    ],
)
async def test_only_pages_of_this_port_may_watch(server: Server, host: str, headers: str, status: int) -> None:
    assert (await server.get("/live", host, method="HEAD", headers=headers))[0] == status


async def test_closing_the_port_ends_the_viewers_streams(server: Server) -> None:
    server.admin.start()
    stream = server.get("/live")
    closing = task.deferLater(server.reactor, 0.1, server.admin.close)
    status, body = await stream
    await closing
    assert (status, body[-5:]) == (200, "0\r\n\r\n")
    assert '"workers":[{"slot":0,' in body
