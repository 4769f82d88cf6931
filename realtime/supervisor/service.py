"""The parent process: carries out what the pool decides, and never touches a client or user code.

It opens the ports, starts a process for each slot with everything it needs as inherited descriptors, introduces the
workers to the broker, reads their vital signs, and serves the operators' port. The decisions (when to start, kill, or
give up) are `realtime.supervision.pool`'s; here are the sockets, processes, timers and signals.

twistd runs it, on any reactor that can spawn processes. Nothing is opened before `privilegedStartService`, since
twistd forks between making the service and starting it.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

from msgspec.structs import replace
from twisted.application.service import Service
from twisted.internet.defer import Deferred, DeferredList
from twisted.internet.error import ReactorNotRunning
from twisted.logger import Logger

from realtime.config import settings as configuration
from realtime.config.settings import Settings
from realtime.metrics import Metrics
from realtime.operators.port import OperatorPort
from realtime.process import log
from realtime.supervision import pool as effects
from realtime.supervision.pool import BROKER, TICK, Effect, Pool, SlotState
from realtime.supervision.vitals import Vitals
from realtime.supervisor.child_process import ChildProcess
from realtime.supervisor.health_monitor import HealthMonitor
from realtime.supervisor.listener import CannotListen, SharedPort
from realtime.supervisor.rescue import Rescue
from realtime.supervisor.stack_sampler import StackSampler
from realtime.supervisor.steering import Steering
from realtime.supervisor.systemd import SystemdNotifier

WORKER_MODULE = "realtime.worker.process"
BROKER_MODULE = "realtime.broker.process"

_EX_OSERR = 71
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL

_log = Logger(observer=log.observer)


def make_service(
    settings: Settings, worker: str = WORKER_MODULE, broker: str = BROKER_MODULE, unwise: Iterable[str] = ()
) -> Supervisor:
    """The service that `twistd realtime` runs. It ends the reactor when everything has ended, and sets twistd's exit
    status: 0 after an orderly stop, 1 when a port can't be opened, 78 when the application can't be started.

    unwise: the keys of the settings that were warned of, for the metrics.
    """
    from twisted.internet import reactor

    log.limit(settings.log.level)
    supervisor = Supervisor(reactor, settings, worker, broker)
    supervisor.leave = lambda status: _leave(reactor, status)
    for key in unwise:
        supervisor.metrics.gauge("realtime_insecure_setting", "Settings that were warned of.", lambda: 1.0, key=key)
    return supervisor


class Supervisor(Service):
    """The parent of all processes, as a service.

    leave: called with the exit status when no process is left. `stopService` alone does without it.
    """

    name = "realtime"

    def __init__(self, reactor: Any, settings: Settings, worker: str, broker: str) -> None:
        """worker, broker: modules to run as children; see `realtime.process.child`."""
        self.leave: Callable[[int], None] = _stay
        # The children are told the number, not left to count the cores for themselves.
        count = settings.workers.count or _cores()
        settings = replace(settings, workers=replace(settings.workers, count=count))
        self.pool = Pool(count, settings.workers, settings.loop, settings.shutdown.timeout)
        self.processes: dict[int, ChildProcess] = {}
        self.monitor = HealthMonitor(reactor, settings.loop, self.pool, self.processes)
        self.metrics = Metrics()
        self.steering: Steering | None = None
        self._rescue: Rescue | None = None
        self.sampler = StackSampler(reactor, self.monitor, settings.loop, settings.app, self.processes)
        self._reactor = reactor
        self._settings = settings
        self._modules = {BROKER: broker}
        self._worker = worker
        self._port: SharedPort | None = None
        self._admin: OperatorPort | None = None
        self._notifier = SystemdNotifier({})
        self._tree = -1
        self._capture = False
        self._todo: deque[Effect] = deque()
        self._carrying = False
        self._halted = False
        self._waiting: list[Deferred[None]] = []

    # As a service.

    def privilegedStartService(self) -> None:
        """Open the ports; twistd gives up root's privileges after this. An endpoint that can't be opened ends twistd
        with status 1 and one line in the log."""
        super().privilegedStartService()
        # Before the first timer: Twisted's own clock is the wall's, whose steps would fire or freeze every timer.
        self._reactor.seconds = time.monotonic
        server = self._settings.http_server
        try:
            # The operators' port first: it is not shared, so it also tells of a second server most clearly.
            self._admin = OperatorPort(self, self._reactor, server.internal_address, server.internal_port)
            self._port = SharedPort(server.address, server.port, server.backlog, len(self.pool.workers))
        except CannotListen as error:
            _log.critical("can't start: {reason}", reason=str(error))
            raise SystemExit(1) from error
        self.steering = Steering(
            self._port, self.monitor.health, self._now, self.metrics, enabled=self._settings.loop.steering
        )
        self._rescue = Rescue(
            self._reactor, self._port, self.monitor.health, self.processes, self._settings.loop, self.metrics
        )
        self.monitor.listeners.append(self.steering.condition_changed)
        self.monitor.after_check += [self.steering.update, self._rescue.check]
        self.monitor.tasks.add(TICK, self._tick)

    def startService(self) -> None:
        """Start all processes."""
        if self._port is None:
            self.privilegedStartService()
        super().startService()
        assert self._port is not None and self._admin is not None
        _log.info(
            "serving clients on http://{client}/, operators on http://{operator}/",
            client=_endpoint(self._port.address, self._port.port),
            operator=_endpoint(self._admin.address, self._admin.port),
        )
        self._notifier = SystemdNotifier(
            os.environ
        )  # not before: it may be meant for this process, and not for its parent
        self._tree = _sealed(configuration.dump(self._settings))
        # As a daemon our output goes nowhere; the log is twistd's, so what the children write goes there too.
        self._capture = _leads_nowhere(1)
        self._reactor.callWhenRunning(self._begin)

    def stopService(self) -> Deferred[None]:
        """Stop all processes; the Deferred fires when none is left."""
        super().stopService()
        stopped: Deferred[None] = Deferred()
        self._waiting.append(stopped)
        if self._halted:
            self._fire_waiting()
        elif not self.pool.stopping:
            self._carry(self.pool.stop(self._now()))
        return stopped

    @property
    def port(self) -> int:
        """The clients' port that is bound."""
        assert self._port is not None
        return self._port.port

    @property
    def operator_port(self) -> int:
        """The operators' port that is bound."""
        assert self._admin is not None
        return self._admin.port

    def _begin(self) -> None:
        self._take_signals()
        self._carry(self.pool.start(self._now()))
        self.monitor.start()
        if self._admin is not None:
            self._admin.start()

    def _now(self) -> float:
        return float(self._reactor.seconds())

    # Signals.

    def _take_signals(self) -> None:
        """Take over from Twisted, whose handlers would have twistd end by the signal instead of with status 0."""
        if self.leave is _stay:
            return
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_stop_signal)
        for number in (signal.SIGHUP, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)
        if signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL:  # else twistd's, which rotates the log
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)

    def _on_stop_signal(self, number: int, frame: object) -> None:
        self._reactor.callFromThread(self._stop_signalled, number)

    def _stop_signalled(self, number: int) -> None:
        how = "stopping at once" if self.pool.stopping else "stopping; once more stops at once"
        _log.info("{signal}: {how}", signal=signal.Signals(number).name, how=how)
        self._carry(self.pool.stop(self._now()))

    # What the processes tell (realtime.supervisor.child_process.Owner).

    def process_ready(self, process: ChildProcess) -> None:
        if self._current(process):
            self._carry(self.pool.process_ready(process.slot, self._now()))

    def start_failed(self, process: ChildProcess, reason: str) -> None:
        if self._current(process):
            self._carry(self.pool.start_failed(process.slot, reason, self._now()))

    def broker_link_lost(self, process: ChildProcess) -> None:
        if self._current(process):
            self._carry(self.pool.broker_link_lost(process.slot, self._now()))

    def control_link_lost(self, process: ChildProcess) -> None:
        if self._current(process):
            self._carry(self.pool.control_link_lost(process.slot, self._now()))

    def process_exited(self, process: ChildProcess, status: int) -> None:
        if self._current(process):
            del self.processes[process.slot]
            self._carry(self.pool.process_exited(process.slot, status, self._now()))

    def _current(self, process: ChildProcess) -> bool:
        return self.processes.get(process.slot) is process

    # Time.

    def _tick(self) -> None:
        if self._halted:
            return
        now = self._now()
        vitals = {slot: process.vitals for slot, process in self.processes.items()}
        self._carry(self.pool.tick(now, {slot: seen.beat / 1e9 for slot, seen in vitals.items() if seen}))
        self._replace_bloated(vitals, now)
        if self._healthy(now):
            self._notifier.feed(now)

    def _replace_bloated(self, vitals: Mapping[int, Vitals | None], now: float) -> None:
        limit = self._settings.loop.max_rss
        for slot in self.pool.workers:
            seen = vitals.get(slot.number)
            if seen is not None and slot.state is SlotState.READY and 0 < limit < seen.rss:
                self._carry(self.pool.memory_exceeded(slot.number, seen.rss, now))

    def _healthy(self, now: float) -> bool:
        """Whether every loop that should turn has turned within the watchdog's interval.

        A blocked worker is for the pool to replace, which it does within `loop.stuck`. The manager restarts us only
        when that remedy fails: it waits for a whole interval more.
        """
        serving = [slot for slot in self.pool.slots.values() if slot.state is SlotState.READY]
        return all(now - slot.heard < self._notifier.watchdog for slot in serving)

    # Effects.

    def _carry(self, wanted: list[Effect]) -> None:
        """Carry out effects in order; those of an event that happens on the way come after."""
        self._todo.extend(wanted)
        if self._carrying:
            return
        self._carrying = True
        try:
            while self._todo:
                effect = self._todo.popleft()
                _CARRY[type(effect)](self, effect)
        finally:
            self._carrying = False

    def _spawn(self, effect: effects.SpawnProcess) -> None:
        assert self._port is not None
        process = ChildProcess(self, effect.slot)
        listen = [] if effect.slot == BROKER else [self._port.sockets[effect.slot].fileno()]
        module = self._modules.get(effect.slot, self._worker)
        self.processes[effect.slot] = process
        try:
            process.start(self._reactor, [sys.executable, "-m", module], self._tree, listen, self._capture)
        except OSError as error:
            del self.processes[effect.slot]
            _log.error("can't start a process: {error}", error=error)
            self._carry(self.pool.process_exited(effect.slot, _EX_OSERR, self._now()))

    def _drain(self, effect: effects.DrainProcess) -> None:
        self.processes[effect.slot].drain(effect.timeout)

    def _signal(self, effect: effects.SignalProcess) -> None:
        self.processes[effect.slot].signal(effect.number)

    def _examine(self, effect: effects.DumpProcessStacks) -> None:
        self.sampler.log_all_stacks(effect.slot)

    def _introduce(self, effect: effects.ConnectToBroker) -> None:
        """Make a stream and give an end to each. Our copies live until both have answered."""
        if effect.slot not in self.processes:
            return  # it could not be spawned a moment ago, which the pool knows by now
        try:
            ends = socket.socketpair()
        except OSError as error:
            _log.error("can't introduce worker {slot} to the broker: {error}", slot=effect.slot, error=error)
            self.broker_link_lost(self.processes[effect.slot])
            return
        both = [self.processes[effect.slot], self.processes[BROKER]]
        handed = [process.introduce(effect.slot, end.fileno()) for process, end in zip(both, ends, strict=True)]

        def answered(results: list[tuple[bool, object]]) -> None:
            for end in ends:
                end.close()
            if not all(taken for taken, _ in results):
                self.broker_link_lost(both[0])

        DeferredList(handed, consumeErrors=True).addCallback(answered)

    def _notify(self, effect: effects.NotifySystemd) -> None:
        if effect.state == "ready":
            _log.info("ready: {count} workers", count=len(self.pool.workers))
            self._notifier.ready()
        else:
            self._notifier.stopping()

    def _report(self, effect: effects.LogLine) -> None:
        (_log.error if effect.is_error else _log.info)("{line}", line=effect.line)
        ready = sum(slot.state is SlotState.READY for slot in self.pool.workers)
        self._notifier.status(f"{ready} of {len(self.pool.workers)} workers ready")

    def _halt(self, effect: effects.HaltService) -> None:
        self._halted = True
        self.monitor.stop()
        if effect.reason:
            _log.critical("{reason}", reason=effect.reason)
        if self._admin is not None:
            self._admin.close()
        if self._rescue is not None:
            self._rescue.close()
        if self._port is not None:
            self._port.close()
        if self._tree >= 0:
            os.close(self._tree)
        self._fire_waiting()
        self.leave(effect.status)

    def _fire_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        for stopped in waiting:
            stopped.callback(None)


_CARRY: dict[type[Any], Callable[[Supervisor, Any], None]] = {
    effects.SpawnProcess: Supervisor._spawn,
    effects.DrainProcess: Supervisor._drain,
    effects.SignalProcess: Supervisor._signal,
    effects.DumpProcessStacks: Supervisor._examine,
    effects.ConnectToBroker: Supervisor._introduce,
    effects.NotifySystemd: Supervisor._notify,
    effects.LogLine: Supervisor._report,
    effects.HaltService: Supervisor._halt,
}


def _cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))


def _leads_nowhere(fd: int) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(os.devnull))
    except OSError:
        return True


def _sealed(data: bytes) -> int:
    """A memfd that holds `data` and can't be changed any more."""
    fd = os.memfd_create("realtime-settings", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with open(fd, "wb", closefd=False) as file:
        file.write(data)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    return fd


def _endpoint(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _stay(status: int) -> None:
    return None


def _leave(reactor: Any, status: int) -> None:
    """End the reactor, and then this process with `status`.

    twistd has no way to give an exit status, and reports a SystemExit from the reactor as a crash. So the status is
    set by what runs last: by then twistd has closed its log and removed its pid file.
    """
    if status:
        atexit.register(_exit, status)
    with suppress(ReactorNotRunning):  # it is stopping already, and waits for us
        reactor.stop()


def _exit(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
