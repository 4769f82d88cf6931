"""The operators' port: the live page, /snapshot, /health, /ready, /metrics, /incidents, /dump, /reload, /scale and
/upgrade.

The supervisor serves it, so it answers while every worker is blocked. Each process has a time limit to send its metrics
or a report; of a process that exceeds the limit for metrics, /metrics shows the previous ones.

No web page of another origin gets anything from this port: the Host header must be one of the port's own names, which
stops DNS rebinding. /dump and /live, which cost a process time or the port a place, refuse requests of other pages as
such. So do the commands (`realtime.operators.commands`), which are POST requests with a header that a page of another
origin can't send.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import msgspec
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from twisted.internet.defer import Deferred, DeferredList, succeed
from twisted.internet.error import CannotListenError
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.http import FORBIDDEN, NOT_ALLOWED, NOT_FOUND, OK, SERVICE_UNAVAILABLE

from realtime.client_log import ClientLog
from realtime.metrics import Sample
from realtime.operators import page, viewers
from realtime.operators.commands import Commands, Tell
from realtime.operators.exposition import (
    LabelledSample,
    block_samples,
    condition_samples,
    exposition,
    pool_samples,
    process_labels,
    supervisor_samples,
)
from realtime.operators.live import (
    CheckedHealth,
    LiveFigures,
    LiveSource,
    MetricsSource,
    incident_json,
    worst_places,
)
from realtime.operators.site import OperatorRequest, OperatorSite
from realtime.operators.summary import Failures, SummarizedProcess, Summary, SummarySource
from realtime.operators.viewers import Viewers
from realtime.process import log, stack_dumps
from realtime.process.diagnostics import REPORTS
from realtime.supervision.slots import BROKER
from realtime.supervisor.listener import CannotListen, explain

# Seconds for a process to send its metrics.
COLLECT_LIMIT = 0.25
# Seconds for a process to send a report of itself.
REPORT_LIMIT = 2.0
_JSON = "application/json"
_MAX_DIGITS = 6

_log = Logger(observer=log.observer)


class ObservedProcess(MetricsSource, SummarizedProcess, Protocol):
    """A child process."""

    def report(self, what: str) -> Deferred[str]: ...
    def dump(self, number: int) -> Deferred[str]: ...


class Overview(LiveSource, SummarySource, Protocol):
    """The supervisor's state."""

    @property
    def processes(self) -> Mapping[int, ObservedProcess]: ...
    @property
    def children(self) -> Mapping[int, ObservedProcess]: ...
    @property
    def monitor(self) -> CheckedHealth: ...
    def reload(self, tell: Tell) -> Deferred[str]: ...
    def scale(self, count: int, tell: Tell) -> Deferred[str]: ...
    def upgrade(self, tell: Tell) -> Deferred[str]: ...
    def join_upgrade(self, tell: Tell) -> Deferred[str]: ...


class OperatorPort:
    """The port and its pages."""

    def __init__(self, overview: Overview, reactor: Any, address: str, port: int, inherited: int | None = None) -> None:
        """Listen. port: 0 for any free one. inherited: a descriptor that listens already. Raises CannotListen."""
        self._overview = overview
        self._reactor = reactor
        self._client_log = ClientLog(now=reactor.seconds, info=lambda line: _log.info("{line}", line=line))
        self._samples: dict[int, tuple[ObservedProcess, list[Sample]]] = {}  # by slot, the latest of its process
        self._files = page.load()
        failures = Failures()
        self._summary = Summary(overview, failures)
        self._live = LiveFigures(reactor, overview, failures, self._summary.read)
        self._viewers = Viewers(reactor, self._live)
        commands = {b"/reload": self._reload, b"/scale": self._scale, b"/upgrade": self._upgrade}
        self._commands = Commands(reactor, commands)
        self._pages: dict[bytes, Callable[[OperatorRequest], None]] = {
            b"/snapshot": lambda request: request.reply(OK, _JSON, self._live.json),
            b"/health": self._health,
            b"/ready": self._ready,
            b"/metrics": self._metrics,
            b"/incidents": self._incidents,
            b"/dump": self._unless_foreign(self._dump),
            viewers.PATH: self._unless_foreign(self._viewers.open),
        }
        site = OperatorSite(self.answer)
        try:
            if inherited is None:
                self._listening = reactor.listenTCP(port, site, interface=address)
            else:
                self._listening = _adopt(reactor, inherited, site)
        except CannotListenError as error:
            cause = error.socketError
            if not isinstance(cause, OSError):
                cause = OSError(str(cause))
            keys = "http_server.internal_address", address, "http_server.internal_port", port
            raise CannotListen(explain(cause, *keys)) from error
        self._hosts = _own_names(self.address)

    def fileno(self) -> int:
        """The descriptor that listens."""
        return int(self._listening.fileno())

    def start(self) -> None:
        """Keep the live figures up to date from now on."""
        self._live.start()

    @property
    def address(self) -> str:
        """The bound address."""
        return str(self._listening.getHost().host)

    @property
    def port(self) -> int:
        """The bound port."""
        return int(self._listening.getHost().port)

    def close(self) -> None:
        """Stop listening, and end the viewers' streams."""
        self._live.stop()
        self._viewers.close()
        self._listening.stopListening()

    def answer(self, request: OperatorRequest) -> None:
        """Answer one request, now or later."""
        if len(request.hosts) != 1 or not self._is_own(request.hosts[0]):
            self._client_log.refuse("operator_host", host=", ".join(request.hosts))
            request.reply(FORBIDDEN, "text/plain", "unknown Host: use localhost, or the address that is bound\n")
        elif request.path in self._commands.paths:
            self._unless_foreign(self._commands.carry_out)(request)
        elif request.method not in (b"GET", b"HEAD"):
            request.setHeader("allow", "GET, HEAD")
            request.reply(NOT_ALLOWED, "text/plain", "only GET and HEAD\n")
        elif request.path in self._files:
            kind, content = self._files[request.path]
            for name, value in page.HEADERS.items():
                request.setHeader(name, value)
            request.reply(OK, kind, content)
        elif request.path in self._pages:
            self._pages[request.path](request)
        else:
            paths = "/, /live, /snapshot, /health, /ready, /metrics, /incidents, /dump, /reload, /scale and /upgrade"
            request.reply(NOT_FOUND, "text/plain", f"no such page; this port has {paths}\n")

    def _is_own(self, host: str) -> bool:
        """Whether a Host header names this port."""
        name = _host_name(host)
        # Bound to every address, each of them is ours; rebinding needs a name, so a literal is safe.
        return name in self._hosts or (_is_wildcard(self.address) and _is_literal(name))

    def _unless_foreign(self, answer: Callable[[OperatorRequest], None]) -> Callable[[OperatorRequest], None]:
        """Wrap `answer` to refuse requests of other pages."""

        def guarded(request: OperatorRequest) -> None:
            if request.is_foreign():
                self._client_log.refuse("operator_origin", origin=request.getHeader("origin") or "another site")
                request.reply(FORBIDDEN, "text/plain", "refused: the request comes from a page of another origin\n")
            else:
                answer(request)

        return guarded

    # Commands

    def _reload(self, request: OperatorRequest, tell: Tell) -> Deferred[str]:
        return self._overview.reload(tell)

    def _upgrade(self, request: OperatorRequest, tell: Tell) -> Deferred[str]:
        """Upgrade; with ?join=1 only tell of the upgrade under way, or of its outcome."""
        join = _argument(request, b"join", "")
        return self._overview.join_upgrade(tell) if join else self._overview.upgrade(tell)

    def _scale(self, request: OperatorRequest, tell: Tell) -> Deferred[str]:
        """Have another number of workers: ?workers=N."""
        number = _argument(request, b"workers", "")
        if not (number.isascii() and number.isdigit() and len(number) <= _MAX_DIGITS):
            return succeed("no number of workers; use realtime scale N")
        return self._overview.scale(int(number), tell)

    # /health and /ready

    def _health(self, request: OperatorRequest) -> None:
        summary = self._summary.read(self._reactor.seconds())
        is_bad = any(problem.tone == "bad" for problem in summary["problems"])
        request.reply(SERVICE_UNAVAILABLE if is_bad else OK, _JSON, msgspec.json.encode(summary))

    def _ready(self, request: OperatorRequest) -> None:
        ready = self._overview.pool.serving
        request.reply(OK if ready else SERVICE_UNAVAILABLE, _JSON, msgspec.json.encode({"ready": ready}))

    # /incidents

    def _incidents(self, request: OperatorRequest) -> None:
        """Blocks of the loops: the latest incidents, newest first, and all by handler and place, worst first.

        ?at=T: only incidents whose `at` is T; a worker has one at most.
        """
        incident_log = self._overview.sampler.incidents
        incidents = list(reversed(incident_log.recent))
        at = _argument(request, b"at", "")
        if at:
            incidents = [incident for incident in incidents if incident.at == _number(at)]
        body = {
            "places": worst_places(incident_log.blocks),
            "incidents": [incident_json(incident, stacks=True) for incident in incidents],
        }
        request.reply(OK, _JSON, msgspec.json.encode(body))

    # /dump

    def _dump(self, request: OperatorRequest) -> None:
        """A report of one process: ?worker=N, or "broker", and what=stacks, tasks or memory."""
        worker, what = _argument(request, b"worker", ""), _argument(request, b"what", "stacks")
        slot = next((number for number in self._overview.pool.slots if _slot_name(number) == worker), None)
        process = None if slot is None else self._overview.processes.get(slot)
        if process is None or what not in REPORTS:
            usage = f"/dump?worker=N&what={'|'.join(REPORTS)}, for a worker that runs, or worker=broker\n"
            request.reply(NOT_FOUND, "text/plain", usage)
            return

        def dump_stack(_: Failure) -> Deferred[str]:
            stack = process.dump(stack_dumps.STACK).addTimeout(REPORT_LIMIT, self._reactor)
            return stack.addCallback("The loop does not turn; its stack at this moment:\n{}".format)

        answer = process.report(what).addTimeout(REPORT_LIMIT, self._reactor)
        if what == "stacks":
            answer.addErrback(dump_stack)
        name = "the broker" if slot == BROKER else f"worker {slot}"
        hint = "the process may be stopped" if what == "stacks" else "what=stacks shows the line that blocks it"
        unavailable = f"{name} did not answer within {REPORT_LIMIT:g} s; {hint}\n"
        answer.addCallbacks(
            lambda text: request.reply(OK, "text/plain; charset=utf-8", text),
            lambda _: request.reply(SERVICE_UNAVAILABLE, "text/plain", unavailable),
        )

    # /metrics

    def _metrics(self, request: OperatorRequest) -> None:
        """Ask all processes at once; answer when the last one has answered or exceeded COLLECT_LIMIT."""

        def answer(_: object) -> None:
            text = exposition([*self._supervisor_samples(), *self._process_samples()])
            request.reply(OK, CONTENT_TYPE_LATEST, text)

        collections = [self._collect(slot, process) for slot, process in self._overview.processes.items()]
        DeferredList(collections).addCallback(answer)

    def _collect(self, slot: int, process: ObservedProcess) -> Deferred[None]:
        def keep(samples: list[Sample]) -> None:
            self._samples[slot] = process, samples

        def log_failure(failure: Failure) -> None:
            reason = failure.getErrorMessage()
            _log.debug("slot {slot} sent no metrics in time: {reason}", slot=slot, reason=reason)

        collected = process.collect()
        collected.addTimeout(COLLECT_LIMIT, self._reactor)
        return collected.addCallbacks(keep, log_failure)

    def _process_samples(self) -> Iterator[LabelledSample]:
        """The latest samples of each process that still runs."""
        for slot, (process, samples) in self._samples.items():
            if self._overview.processes.get(slot) is process:
                labels = process_labels(slot)
                for sample in samples:
                    yield labels, sample

    def _supervisor_samples(self) -> Iterator[LabelledSample]:
        """All series that the supervisor itself keeps."""
        overview = self._overview
        yield from supervisor_samples(overview.metrics)
        yield from pool_samples(overview.pool, overview.children, self._reactor.seconds())
        yield from block_samples(overview.sampler.incidents.blocks)
        monitor = overview.monitor
        yield from condition_samples([*monitor.health.values(), *([monitor.broker] if monitor.broker else [])])


def _adopt(reactor: Any, descriptor: int, site: OperatorSite) -> Any:
    """Listen at a socket that listens already. Owns the descriptor."""
    with socket.socket(fileno=descriptor) as listening:
        listening.setblocking(False)
        return reactor.adoptStreamPort(listening.fileno(), listening.family, site)


def _argument(request: OperatorRequest, name: bytes, default: str) -> str:
    values: list[bytes] = request.args.get(name, [])
    return values[-1].decode("utf-8", "replace") if values else default


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _slot_name(slot: int) -> str:
    """The process of a slot as /dump names it."""
    return "broker" if slot == BROKER else str(slot)


def _host_name(host: str) -> str:
    """The name in a Host header, in lower case, without port and brackets; "" for a malformed header."""
    match = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^\[\]:@/\s]+)(:[0-9]{1,5})?", host)
    return match[1].strip("[]").lower() if match else ""


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
