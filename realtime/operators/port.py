"""The operators' port: a live page, /health, /ready, /metrics and /incidents, served by the supervisor.

So it answers while every worker is blocked. What only a worker knows is asked of it with a limit in time; of one that
does not answer in time, the previous figures are shown.

A page of the operator's browser must not reach this port: the Host header has to be one of its own names (which stops
DNS rebinding), and nothing here changes state. What takes a process's time is not done for other pages at all.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Protocol

import msgspec
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector
from twisted.internet.defer import Deferred, DeferredList
from twisted.internet.error import CannotListenError
from twisted.logger import Logger, LogPublisher
from twisted.python.failure import Failure
from twisted.web.http import FORBIDDEN, NOT_ALLOWED, NOT_FOUND, OK, SERVICE_UNAVAILABLE, HTTPChannel
from twisted.web.http import Request as HTTPRequest
from twisted.web.server import Request, Site

from realtime.deadlines import RESOLUTION
from realtime.metrics import Metrics, Sample
from realtime.operators import page
from realtime.operators.live import LiveFigures, worst_places
from realtime.operators.viewers import Viewers
from realtime.process import log, stack_dumps
from realtime.process.diagnostics import REPORTS
from realtime.supervision.health import Condition
from realtime.supervision.pool import BROKER, Pool, Slot, SlotState
from realtime.supervision.vitals import Vitals
from realtime.supervisor.child_process import ChildProcess
from realtime.supervisor.health_monitor import HealthMonitor
from realtime.supervisor.listener import CannotListen, explain
from realtime.supervisor.stack_sampler import StackSampler
from realtime.supervisor.steering import Steering

# Seconds that a process has to answer for its metrics.
COLLECT_LIMIT = 0.25
# Seconds that a process has to tell of itself.
REPORT_LIMIT = 2.0
# Seconds that a connection may be idle.
_IDLE = 30.0
_JSON = "application/json"
# How a browser says that a request comes from another page than ours (Fetch Metadata, Sec-Fetch-Site).
_FOREIGN = ("cross-site", "same-site")
_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_LABEL = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")

_log = Logger(observer=log.observer)


class Overview(Protocol):
    """What is shown; the supervisor has it. metrics: its own series. steering: None until the port is open."""

    pool: Pool
    processes: dict[int, ChildProcess]
    monitor: HealthMonitor
    sampler: StackSampler
    metrics: Metrics
    steering: Steering | None

    @property
    def port(self) -> int: ...
    @property
    def operator_port(self) -> int: ...


class OperatorPort:
    """The port and its pages."""

    def __init__(self, overview: Overview, reactor: Any, address: str, port: int) -> None:
        """Listen. port: 0 for any that is free. Raises CannotListen."""
        self._overview = overview
        self._reactor = reactor
        self._samples: dict[int, tuple[ChildProcess, list[Sample]]] = {}  # by slot, of the process that told them
        self._files = page.load()
        self._live = LiveFigures(reactor, overview.monitor, overview.sampler, overview.processes, self._summary)
        site = _Site(None, requestFactory=partial(_Request, self), timeout=_IDLE)
        self._viewers = Viewers(reactor, self._live, site, self._is_own)
        try:
            self._listening = reactor.listenTCP(port, self._viewers.front, interface=address)
        except CannotListenError as error:
            cause = error.socketError
            if not isinstance(cause, OSError):
                cause = OSError(str(cause))
            keys = "http_server.internal_address", address, "http_server.internal_port", port
            raise CannotListen(explain(cause, *keys)) from error
        self._hosts = _own_names(self.address)
        overview.monitor.tasks.add(RESOLUTION, self._viewers.sweep)

    def start(self) -> None:
        """Bring the live figures up to date from now on."""
        self._live.start()

    @property
    def address(self) -> str:
        """The address that is bound."""
        return str(self._listening.getHost().host)

    @property
    def port(self) -> int:
        """The port that is bound."""
        return int(self._listening.getHost().port)

    def close(self) -> None:
        """Stop listening, and send the viewers away."""
        self._live.stop()
        self._viewers.close()
        self._listening.stopListening()

    def answer(self, request: _Request) -> None:
        """Answer one request, now or later."""
        if not self._is_own(request.getHeader("host") or ""):
            request.reply(FORBIDDEN, "text/plain", "unknown Host: use localhost, or the address that is bound\n")
        elif request.method not in (b"GET", b"HEAD"):
            request.setHeader("allow", "GET, HEAD")
            request.reply(NOT_ALLOWED, "text/plain", "only GET and HEAD\n")
        elif request.path in self._files:
            kind, content = self._files[request.path]
            for name, value in page.HEADERS.items():
                request.setHeader(name, value)
            request.reply(OK, kind, content)
        elif request.path == b"/health":
            self._health(request)
        elif request.path == b"/snapshot":
            request.reply(OK, _JSON, self._live.json)
        elif request.path == b"/ready":
            ready = self._overview.pool.ready
            request.reply(OK if ready else SERVICE_UNAVAILABLE, _JSON, msgspec.json.encode({"ready": ready}))
        elif request.path == b"/metrics":
            self._metrics(request)
        elif request.path == b"/incidents":
            self._incidents(request)
        elif request.path == b"/dump" and request.getHeader("sec-fetch-site") in _FOREIGN:
            request.reply(FORBIDDEN, "text/plain", "not for a page or a link of another site\n")
        elif request.path == b"/dump":
            self._dump(request)
        else:
            request.reply(
                NOT_FOUND, "text/plain", "here are /, /snapshot, /health, /ready, /metrics, /incidents and /dump\n"
            )

    def _is_own(self, host: str) -> bool:
        name = _host_name(host)
        # Bound to every address, each of them is ours; rebinding needs a name, so a literal is safe.
        return name in self._hosts or (_is_wildcard(self.address) and _is_literal(name))

    # /health

    def _health(self, request: _Request) -> None:
        status = (
            OK if any(slot.state is SlotState.READY for slot in self._overview.pool.workers) else SERVICE_UNAVAILABLE
        )
        request.reply(status, _JSON, msgspec.json.encode(self._summary()))

    def _summary(self) -> dict[str, Any]:
        """The server and each of its processes."""
        pool = self._overview.pool
        serving = any(slot.state is SlotState.READY for slot in pool.workers)
        now = self._reactor.seconds()
        broker = pool.slots.get(BROKER)
        return {
            "status": "ok" if serving else "no worker is ready",
            "stopping": pool.stopping,
            "port": self._overview.port,
            "operator_port": self._overview.operator_port,
            "workers": [self._describe(slot, now) for slot in pool.workers],
            "broker": broker and self._describe(broker, now),
        }

    def _describe(self, slot: Slot, now: float) -> dict[str, object]:
        process = self._overview.processes.get(slot.number)
        vitals = process.vitals if process else None
        running = process.running if process else None
        health = self._overview.monitor.health.get(slot.number)
        return {
            "slot": slot.number,
            "state": slot.state.value,
            "condition": health and health.condition.value,
            "since": round(now - slot.since, 3),
            "pid": process.pid if process else None,
            "beat_age": vitals and round(_age(vitals, now), 3),
            "lag": vitals and round(vitals.lag, 6),
            "connections": vitals and vitals.connections,
            "subscriptions": vitals and vitals.subscriptions,
            "utilization": vitals and round(vitals.utilization, 4),
            "queued_bytes": vitals and vitals.queued_bytes,
            "threads_busy": vitals and vitals.threads_busy,
            "threads_waiting": vitals and vitals.threads_waiting,
            "rss": vitals and vitals.rss,
            "handler": running and running.handler,
            "subject": running and running.subject,
            "restarts": sum(slot.restarts.values()),
            "crash_loop": slot.in_crash_loop,
            **self._describe_queue(slot.number),
        }

    def _describe_queue(self, slot: int) -> dict[str, object]:
        """How new clients come to a worker."""
        steering = self._overview.steering
        if steering is None or slot == BROKER:
            return {}
        depth, limit = steering.accept_queue(slot)
        return {"weight": steering.weights[slot], "accept_queue": depth, "accept_queue_limit": limit}

    # /incidents

    def _incidents(self, request: _Request) -> None:
        """What has blocked the loops: the latest incidents, newest first, and by handler and place, worst first.

        ?at=T: only the incidents that say that they began at T, of which there is one at most in a worker.
        """
        ledger = self._overview.sampler.incidents
        incidents = list(reversed(ledger.recent))
        at = _argument(request, b"at", "")
        if at:
            incidents = [incident for incident in incidents if incident.at == _number(at)]
        body = {"places": worst_places(ledger.blocks), "incidents": incidents}
        request.reply(OK, _JSON, msgspec.json.encode(body))

    # /dump

    def _dump(self, request: _Request) -> None:
        """What one process tells of itself: ?worker=N, or "broker", and what=stacks, tasks or memory."""
        whose, what = _argument(request, b"worker", ""), _argument(request, b"what", "stacks")
        slot = next((number for number in self._overview.pool.slots if _label(number) == whose), None)
        process = None if slot is None else self._overview.processes.get(slot)
        if process is None or what not in REPORTS:
            usage = f"/dump?worker=N&what={'|'.join(REPORTS)}, for a worker that runs, or worker=broker\n"
            request.reply(NOT_FOUND, "text/plain", usage)
            return

        def instead(_: Failure) -> Deferred[str]:
            stack = process.dump(stack_dumps.STACK).addTimeout(REPORT_LIMIT, self._reactor)
            return stack.addCallback("Its loop does not turn; this is where it is.\n{}".format)

        answer = process.report(what).addTimeout(REPORT_LIMIT, self._reactor)
        if what == "stacks":
            answer.addErrback(instead)
        answer.addCallbacks(
            lambda text: request.reply(OK, "text/plain; charset=utf-8", text),
            lambda _: request.reply(SERVICE_UNAVAILABLE, "text/plain", "it does not answer\n"),
        )

    # /metrics

    def _metrics(self, request: _Request) -> None:
        """Ask all processes at once; answer when the last has answered or its time is over."""

        def answer(_: object) -> None:
            text = exposition([*self._own_samples(), *self._processes_samples()])
            request.reply(OK, CONTENT_TYPE_LATEST, text)

        asked = [self._collect(slot, process) for slot, process in self._overview.processes.items()]
        DeferredList(asked).addCallback(answer)

    def _collect(self, slot: int, process: ChildProcess) -> Deferred[None]:
        def keep(samples: list[Sample]) -> None:
            self._samples[slot] = process, samples

        def not_now(failure: Failure) -> None:
            _log.debug("no metrics of slot {slot}: {reason}", slot=slot, reason=failure.getErrorMessage())

        asked = process.collect()
        asked.addTimeout(COLLECT_LIMIT, self._reactor)
        return asked.addCallbacks(keep, not_now)

    def _processes_samples(self) -> Iterator[tuple[Mapping[str, str], Sample]]:
        for number, (process, samples) in self._samples.items():
            if self._overview.processes.get(number) is process:
                label = {"worker": _label(number)}
                for sample in samples:
                    yield label, sample

    def _own_samples(self) -> Iterator[tuple[Mapping[str, str], Sample]]:
        """What the supervisor itself knows."""
        pool, now = self._overview.pool, self._reactor.seconds()
        states = [slot.state for slot in pool.workers]
        own = {"worker": "supervisor"}
        for sample in self._overview.metrics.snapshot():
            yield {**own, **dict(sample.labels)}, sample
        for state in SlotState:
            help = "Worker slots by state."
            yield own, Sample("realtime_workers", "gauge", help, [("state", state.value)], states.count(state))
        for slot in pool.slots.values():
            label = {"worker": _label(slot.number)}
            up = float(slot.state is SlotState.READY)
            yield label, Sample("realtime_worker_up", "gauge", "Whether the process is ready.", [], up)
            for reason, count in slot.restarts.items():
                help = "Deaths that were answered by a new process, by reason."
                yield label, Sample("realtime_worker_restarts", "counter", help, [("reason", reason)], count)
            process = self._overview.processes.get(slot.number)
            vitals = process.vitals if process else None
            if vitals:
                for sample in _vital_samples(vitals, now):
                    yield label, sample
        for (handler, place), blocks in self._overview.sampler.incidents.blocks.items():
            labels = [("handler", handler), ("place", place)]
            help = "Turns of workers' loops that took longer than loop.lagging, by what blocked them."
            yield own, Sample("realtime_loop_blocks", "counter", help, labels, blocks.count)
            help = "Seconds of those turns."
            yield own, Sample("realtime_loop_blocked_seconds", "counter", help, labels, blocks.seconds)
        for health in self._overview.monitor.health.values():
            for condition in Condition:
                help = "1 for the condition that the worker is in."
                labels = [("condition", condition.value)]
                value = float(health.condition is condition)
                yield {"worker": _label(health.slot)}, Sample("realtime_worker_condition", "gauge", help, labels, value)


class _Request(Request):
    """A request to the operators' port, which takes no body."""

    def __init__(self, admin: OperatorPort, channel: Any, queued: object = None) -> None:
        super().__init__(channel)
        self._admin = admin
        self._left = False
        self.notifyFinish().addErrback(self._client_left)

    def _client_left(self, _: Failure) -> None:
        self._left = True

    def gotLength(self, length: int | None) -> None:
        """Called by twisted when the head is complete: a body would be kept in memory without a limit."""
        super().gotLength(0)
        if length != 0:
            self.channel.write(b"HTTP/1.1 413 Content Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
            self.channel.loseConnection()

    def process(self) -> None:
        """Called by twisted when the request is complete."""
        self._admin.answer(self)

    def reply(self, status: int, content_type: str, body: str | bytes) -> None:
        """Send the whole answer. Without effect when the client has left."""
        if self._left:
            return
        content = body.encode() if isinstance(body, str) else body
        self.setResponseCode(status)
        for name, value in {
            "content-type": content_type,
            "content-length": str(len(content)),
            "cache-control": "no-store",
            "x-content-type-options": "nosniff",
            "server": "realtime",
        }.items():
            self.setHeader(name, value)
        if self.method != b"HEAD":
            self.write(content)
        self.finish()


class _Channel(HTTPChannel):
    """Writes no line for a connection that was idle."""

    _log = Logger(observer=LogPublisher())


class _Site(Site):
    """No access log: a scrape every second is no event."""

    protocol = _Channel  # type: ignore[assignment]
    noisy = False
    displayTracebacks = False

    def log(self, request: HTTPRequest) -> None:
        pass


class _Families(Collector):
    """Samples grouped for prometheus_client."""

    def __init__(self, samples: Iterable[tuple[Mapping[str, str], Sample]]) -> None:
        self._families: dict[str, Metric] = {}
        for labels, sample in samples:
            self._add(sample, {**dict(sample.labels), **labels})

    def _add(self, sample: Sample, labels: dict[str, str]) -> None:
        # A process of another version, or one gone wrong, must not spoil the page for the others.
        if not _NAME.fullmatch(sample.name) or not all(map(_LABEL.fullmatch, labels)):
            return
        if sample.kind not in ("counter", "gauge"):
            return
        family = self._families.setdefault(sample.name, Metric(sample.name, sample.help, sample.kind))
        if family.type == sample.kind:
            name = f"{sample.name}_total" if sample.kind == "counter" else sample.name
            family.add_sample(name, labels, sample.value)

    def collect(self) -> Iterable[Metric]:
        return self._families.values()


def exposition(samples: Iterable[tuple[Mapping[str, str], Sample]]) -> bytes:
    """Prometheus text of samples, each with the labels that say where it is from."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Families(samples))
    return generate_latest(registry)


def _argument(request: _Request, name: bytes, default: str) -> str:
    values: list[bytes] = request.args.get(name, [])
    return values[-1].decode("utf-8", "replace") if values else default


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _label(slot: int) -> str:
    return "broker" if slot == BROKER else str(slot)


def _vital_samples(vitals: Vitals, now: float) -> Iterator[Sample]:
    """What a process's page tells of it."""
    gauges = {
        "loop_beat_age_seconds": (_age(vitals, now), "Since the process's loop last turned."),
        "loop_lag_seconds": (vitals.lag, "How late the latest timer of the process's loop fired."),
        "loop_utilization": (vitals.utilization, "Share of the last second that the process's loop did not idle."),
        "queued_bytes": (vitals.queued_bytes, "Bytes that wait for slow sockets."),
        "resident_bytes": (vitals.rss, "The process's resident memory."),
    }
    for name, (value, help) in gauges.items():
        yield Sample(f"realtime_{name}", "gauge", help, [], value)
    yield Sample("realtime_loop_turns", "counter", "Turns of the process's loop.", [], vitals.turns)
    help = "Callbacks that were ready when the loop's turns began."
    yield Sample("realtime_loop_callbacks", "counter", help, [], vitals.callbacks)


def _age(vitals: Vitals, now: float) -> float:
    return max(0.0, now - vitals.beat / 1e9)


def _host_name(host: str) -> str:
    """The name in a Host header, without port and brackets, in lower case; "" for nonsense."""
    found = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^\[\]:@/\s]+)(:[0-9]{1,5})?", host)
    return found[1].strip("[]").lower() if found else ""


def _own_names(address: str) -> frozenset[str]:
    return frozenset({"localhost", "127.0.0.1", "::1", address.lower()})


def _is_wildcard(address: str) -> bool:
    return ipaddress.ip_address(address).is_unspecified


def _is_literal(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
