"""The parent process: carries out the effects of the pool, and never touches a client or user code.

It opens the ports, starts a process for each slot with its inherited descriptors, connects the workers to the broker,
reads their vital signs, and serves the operators. `realtime.supervision.pool` decides when to start, kill, or give up;
this module has the sockets, processes, timers and signals.

twistd runs it, on any reactor that can spawn processes. It opens nothing before `privilegedStartService`, because
twistd forks between making the service and starting it.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any, Protocol

from twisted.application.service import Service
from twisted.internet.defer import Deferred, DeferredList, succeed
from twisted.logger import Logger
from twisted.python.failure import Failure

from realtime._version import __version__
from realtime.config.reload import replaces_broker
from realtime.config.settings import Settings
from realtime.config.sources import Sources
from realtime.metrics import Metrics
from realtime.process import log
from realtime.supervision import effects
from realtime.supervision.balance import MAX_SLOTS
from realtime.supervision.effects import Effect
from realtime.supervision.pool import TICK, Pool
from realtime.supervision.slots import BROKER, SlotState
from realtime.supervisor import orphans
from realtime.supervisor.changes import Changes
from realtime.supervisor.child_process import ChildProcess
from realtime.supervisor.handover import ALL, HandOverCounters, hand_over, hand_state_over
from realtime.supervisor.health_monitor import HealthMonitor
from realtime.supervisor.inheritance import HELD_SIGNALS, Inheritance
from realtime.supervisor.listener import CannotListen, SharedPort
from realtime.supervisor.memory_limits import MemoryLimits
from realtime.supervisor.rebalancer import INTERVAL as REBALANCING_INTERVAL
from realtime.supervisor.rebalancer import Rebalancer
from realtime.supervisor.rescue import Rescue
from realtime.supervisor.revisions import Revisions, with_counts, with_workers
from realtime.supervisor.slot_sockets import LINGER, SlotSockets
from realtime.supervisor.stack_sampler import StackSampler
from realtime.supervisor.steering import Steering
from realtime.supervisor.substitutes import Substitutes
from realtime.supervisor.systemd import SystemdNotifier
from realtime.supervisor.trial import Trial
from realtime.supervisor.upgrade import CannotUpgrade, Estate, Launch, Upgrade
from realtime.supervisor.zygote import EarlyZygote, Zygote

WORKER_MODULE = "realtime.worker.process"
BROKER_MODULES = {"memory": "realtime.broker.process", "redis": "realtime.broker.redis_process"}

_EX_OSERR = 71

_log = Logger(observer=log.observer)


class OperatorEndpoint(Protocol):
    """The listening port for operators."""

    @property
    def address(self) -> str: ...
    @property
    def port(self) -> int: ...
    def fileno(self) -> int: ...
    def start(self) -> None:
        """Begin to update its figures: the processes are starting."""

    def close(self) -> None:
        """Stop listening and close its connections."""


OpenOperatorEndpoint = Callable[["Supervisor", Any, str, int, int | None], OperatorEndpoint]
"""Listens for operators: called with the supervisor, the reactor, an address, a port, and a descriptor that listens
already, if there is one. Raises CannotListen."""


class Supervisor(Service):
    """The parent of all processes, as a service.

    pool, processes, children, monitor, sampler, metrics, steering, zygote: its parts, for the operators' port.
    processes: those that serve their slots, by slot. children: all processes, by generation. steering: None before the
    clients' port is open. zygote: None before the start.
    """

    name = "realtime"

    def __init__(
        self,
        reactor: Any,
        settings: Settings,
        open_operator_endpoint: OpenOperatorEndpoint,
        *,
        worker: str = WORKER_MODULE,
        broker: str | None = None,
        leave: Callable[[int], None] | None = None,
        handle_signals: bool = False,
        capture_output: bool = False,
        sources: Sources | None = None,
        early_zygote: EarlyZygote | None = None,
        launch: Launch | None = None,
        inherited: Inheritance | None = None,
    ) -> None:
        """worker, broker: modules to run as children, see `realtime.process.child`; None for the broker of the engine.
        leave: called with the exit status after the last process has exited; `stopService` works without it.
        handle_signals: whether to take SIGTERM and SIGINT over from Twisted. capture_output: whether to copy the
        children's output to the log in any case. sources: where `settings` come from, and those of a reload; None for a
        server that can't reload. early_zygote: the first one, if it was forked from this process. launch: how to
        execute another version, see `upgrade`. inherited: what another version has left, whose place this one takes."""
        settings = wanted = with_counts(settings)
        if inherited is not None:  # its workers go on; the number that is configured comes with the upgrade's end
            settings = with_workers(settings, inherited.workers)
        self.pool = Pool(settings.workers.count, settings.workers, settings.loop, settings.shutdown.timeout)
        self.processes: dict[int, ChildProcess] = {}
        self.children: dict[int, ChildProcess] = {}
        self.monitor = HealthMonitor(reactor, settings.loop, self.pool, self.processes)
        self.metrics = Metrics()
        self._handovers = HandOverCounters(self.metrics)
        self.steering: Steering | None = None
        self.sockets: SlotSockets | None = None
        self._configured_count = settings.workers.count if inherited is None else inherited.configured_count
        self._knows_count = True
        self._launch, self._inherited, self._wanted = launch, inherited, wanted
        self.zygote: Zygote | None = None
        self._early_zygote = early_zygote
        self.sampler = StackSampler(reactor, self.monitor, settings.loop, settings.app, self.processes)
        self._reactor = reactor
        self._revisions = Revisions(settings)
        self._open_operator_endpoint = open_operator_endpoint
        self._worker, self._modules = worker, {BROKER: broker or BROKER_MODULES[settings.engine.type]}
        self._leave, self._handle_signals = leave, handle_signals
        self._port: SharedPort | None = None
        self._operators: OperatorEndpoint | None = None
        self._rescue: Rescue | None = None
        self._substitutes: Substitutes | None = None
        self._rebalancer: Rebalancer | None = None
        self._notifier = SystemdNotifier({})
        self._trial = Trial(reactor, sources)
        self._changes = Changes(self._trial, self._reload, lambda: self._settings)
        self._capture_output = capture_output
        self._pending: deque[Effect] = deque()
        self._is_carrying_out = False
        self._halted = False
        self._memory = MemoryLimits(self.pool, settings)
        self._stop_waiters: list[Deferred[None]] = []
        self._stop_counting_errors: Callable[[], None] | None = None

    @property
    def _settings(self) -> Settings:
        """The settings in force."""
        return self._revisions.settings

    # The service.

    def privilegedStartService(self) -> None:
        """Open the ports; twistd drops root's privileges afterwards.

        A port that can't be opened ends twistd with status 1 and one line in the log.
        """
        super().privilegedStartService()
        # Before the first timer: Twisted's own clock is wall time, whose steps would fire or freeze every timer.
        self._reactor.seconds = time.monotonic
        server = self._settings.http_server
        try:
            # The operators' port first: it is not shared, so it gives the clearest error when a second server starts.
            operators, port = (self._inherited.operators, self._inherited.port) if self._inherited else (None, None)
            self._operators = self._open_operator_endpoint(
                self, self._reactor, server.internal_address, server.internal_port, operators
            )
            self._port = SharedPort(server.address, server.port, server.backlog, len(self.pool.workers), port)
        except CannotListen as error:
            _log.critical("can't start: {reason}", reason=str(error))
            raise SystemExit(1) from error
        self.steering = Steering(
            self._port, self.monitor.health, self._now, self.metrics, enabled=self._settings.loop.steering
        )
        self.sockets = SlotSockets(self._port, self.steering, self.monitor.health, self._now)
        self.monitor.tasks.add(TICK, self.sockets.close_due)
        self._rebalancer = Rebalancer(
            self.monitor.health,
            self.processes,
            self._settings.loop,
            self.metrics,
            self._now,
            lambda: self.pool.is_settled and not self.pool.scaling,
        )
        self.monitor.tasks.add(REBALANCING_INTERVAL, self._rebalancer.check)
        self._rescue = Rescue(
            self._reactor, self._port, self.monitor.health, self.processes, self._settings.loop, self.metrics
        )
        substitutes = self._substitutes = Substitutes(self._settings.loop, self.monitor.health, self.processes)
        self.monitor.listeners += [self.steering.condition_changed, substitutes.condition_changed]
        self.monitor.after_check += [self.steering.update, substitutes.update, self._rescue.check]
        self.monitor.tasks.add(TICK, self._tick)
        self.monitor.tasks.add(orphans.INTERVAL, self._reap_orphans)

    def startService(self) -> None:
        """Start all processes."""
        if self._port is None:
            self.privilegedStartService()
        super().startService()
        assert self._port is not None and self._operators is not None
        _log.info(
            "serving clients on http://{client}/, operators on http://{operator}/",
            client=_endpoint(self._port.address, self._port.port),
            operator=_endpoint(self._operators.address, self._operators.port),
        )
        # Only now, after the fork: WATCHDOG_PID tells whether the variables are for this process or for its parent.
        self._notifier = SystemdNotifier(os.environ)
        self._changes.notifier = self._notifier
        self._revisions.publish()
        # A daemon's own output goes nowhere. The log is twistd's, so the children's output must go there too.
        self._capture_output = self._capture_output or _is_discarded(1)
        modules = [self._worker, *self._modules.values()]
        formats = self._inherited.formats if self._inherited else ""
        self.zygote = Zygote(
            self._reactor, modules, early=self._early_zygote, capture=self._capture_output, formats=formats
        )
        self._stop_counting_errors = log.count_internal_errors(self.metrics)
        self._reactor.callWhenRunning(self._start_processes)

    def stopService(self) -> Deferred[None]:
        """Stop all processes. The Deferred fires after the last one has exited."""
        super().stopService()
        stopped: Deferred[None] = Deferred()
        self._stop_waiters.append(stopped)
        if self._halted:
            self._fire_stop_waiters()
        elif not self.pool.stopping:
            self._carry_out(self.pool.stop(self._now()))
        return stopped

    @property
    def port(self) -> int:
        """The bound port for clients."""
        assert self._port is not None
        return self._port.port

    @property
    def operator_port(self) -> int:
        """The bound port for operators."""
        assert self._operators is not None
        return self._operators.port

    def _start_processes(self) -> None:
        assert self._operators is not None
        if self._handle_signals:
            self._take_over_signals()
        if self._inherited is None:
            self._carry_out(self.pool.start(self._now()))
        else:
            self._resume(self._inherited)
        self.monitor.start()
        self._operators.start()

    def _resume(self, inherited: Inheritance) -> None:
        """Go on with the processes of another version of this program, and replace them."""
        _log.info(
            "version {version} has taken the place of version {before}", version=__version__, before=inherited.version
        )
        self.pool.resume([one.record for one in inherited.processes], inherited.generation, self._now())
        for one in inherited.processes:
            process = ChildProcess(self, one.record.number, one.record.generation)
            self.children[process.generation] = process
            process.resume(self._reactor, one)
        self._note_serving()
        self._notifier.stretch_watchdog()
        self._changes.continue_upgrade(lambda: self._replace_workers(self._wanted, with_broker=True))

    def _now(self) -> float:
        return float(self._reactor.seconds())

    # Signals.

    def _take_over_signals(self) -> None:
        """Replace Twisted's handlers, which would make twistd end by the signal instead of with status 0."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_stop_signal)
        signal.signal(signal.SIGHUP, self._on_reload_signal)
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        # Another handler than the default is twistd's, which rotates the log.
        if signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL:
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_SIGNALS)

    def _on_stop_signal(self, number: int, frame: object) -> None:
        self._reactor.callFromThread(self._stop_by_signal, number)

    def _on_reload_signal(self, number: int, frame: object) -> None:
        self._reactor.callFromThread(self._reload_by_signal)

    def _reload_by_signal(self) -> None:
        _log.info("SIGHUP: reloading")
        self.reload()

    def _stop_by_signal(self, number: int) -> None:
        name, timeout = signal.Signals(number).name, self._settings.shutdown.timeout
        if self.pool.stopping:
            _log.info("{signal}: killing all processes at once", signal=name)
        else:
            advice = "{signal}: stopping within {timeout:g} s (shutdown.timeout); a second {signal} kills at once"
            _log.info(advice, signal=name, timeout=timeout)
        self._carry_out(self.pool.stop(self._now()))

    # Reports of the processes (realtime.supervisor.child_process.ChildProcessOwner).

    def process_ready(self, process: ChildProcess) -> None:
        self._memory.check_footprint(process)
        self._carry_out(self.pool.process_ready(process.generation, self._now()))

    def start_failed(self, process: ChildProcess, reason: str, status: int) -> None:
        self._carry_out(self.pool.start_failed(process.generation, reason, status, self._now()))

    def broker_link_lost(self, process: ChildProcess) -> None:
        self._carry_out(self.pool.broker_link_lost(process.generation, self._now()))

    def control_link_lost(self, process: ChildProcess) -> None:
        self._carry_out(self.pool.control_link_lost(process.generation, self._now()))

    def process_exited(self, process: ChildProcess, status: int) -> None:
        if self.children.pop(process.generation, None) is not None:
            self._carry_out(self.pool.process_exited(process.generation, status, self._now()))

    # Changes.

    def reload(self, tell: Callable[[str], None] = lambda line: None) -> Deferred[str]:
        """Replace all workers, with the configuration and the application as they are now. Clients keep their places.

        A reload at a time: all requests that come meanwhile share the next one. tell: called with each line of its
        progress. The Deferred fires with the reason why the reload failed, in one line; "" after success.
        """
        return self._changes.request(tell)

    def _reload(self, settings: Settings) -> None:
        """Begin to replace the workers by others with these settings, and with the modules of now."""
        assert self.zygote is not None
        try:
            renewed = self.zygote.renew()
        except OSError as error:
            self._changes.ended(f"can't start a process: {error}; check `ulimit -u` and free memory")
            return
        renewed.addCallbacks(
            lambda _: self._replace_workers(settings),
            lambda failure: self._changes.ended(f"the modules can't be imported: {failure.getErrorMessage()}"),
        )

    def _replace_workers(self, settings: Settings, *, with_broker: bool = False) -> None:
        if self.pool.stopping:
            return
        settings = with_counts(settings)
        if settings.workers.count == self._configured_count:  # so the number that `scale` has set stays
            settings = with_workers(settings, len(self.pool.workers))
        else:
            self._configured_count = settings.workers.count
        if (
            with_broker := with_broker or replaces_broker(self._settings, settings)
        ) and settings.engine.type == "redis":
            with_broker = False
            self._write_log(
                effects.LogLine("a broker with Redis can't be replaced: it goes on as it is until a restart")
            )
        self._replace_all(settings, with_broker=with_broker)

    def _replace_all(self, settings: Settings, *, with_broker: bool = False) -> None:
        try:
            self._revisions.add(self.pool.target + 1, settings)
        except OSError as error:
            self._changes.ended(f"no descriptor is left for the settings: {error}; check `ulimit -n`")
        else:
            self._carry_out(self.pool.reload(self._now(), with_broker=with_broker))

    def _use_revision(self, effect: effects.UseRevision) -> None:
        self._revisions.use(effect.revision)
        settings = self._settings
        log.limit(settings.log.level)
        if (broker := self.processes.get(BROKER)) is not None:
            broker.limit_log(settings.log.level)
        self.pool.configure(settings.workers, settings.loop, settings.shutdown.timeout)
        self._memory.configure(settings)
        self.monitor.configure(settings.loop)
        self.sampler.configure(settings.loop, settings.app)
        assert self._rescue and self._substitutes and self._rebalancer
        for part in (self._rescue, self._substitutes, self._rebalancer):
            part.configure(settings.loop)

    def _end_reload(self, effect: effects.ReloadEnded) -> None:
        self._revisions.drop_others()
        if effect.failure:
            self._changes.ended(effect.failure)
        else:
            self._scale(self._settings.workers.count, is_known=True)

    def upgrade(self, tell: Callable[[str], None] = lambda line: None) -> Deferred[str]:
        """Have the installed version of this package and of Python take the place of the running one.

        Clients keep their places. tell, result: as for `reload`, but after success another program goes on, where
        `join_upgrade` has the result.
        """
        return self._changes.upgrade(tell, self._upgrade)

    def join_upgrade(self, tell: Callable[[str], None]) -> Deferred[str]:
        """Follow the upgrade that is under way. tell, result: as for `reload`."""
        return self._changes.join_upgrade(tell)

    def _upgrade(self) -> None:
        assert self._port and self._operators and self._rescue and self.zygote
        estate = Estate(
            self.pool, self.children, self._port, self._operators, self._rescue, self.zygote, self._settings
        )
        upgrade = Upgrade(self._reactor, estate, self._launch, self._configured_count, self._trial, self._notifier)
        running = Deferred.fromCoroutine(upgrade.run(self._changes.tell))
        running.addErrback(self._end_upgrade)

    def _end_upgrade(self, failure: Failure) -> None:
        self._notifier.stretch_watchdog()
        if not failure.check(CannotUpgrade):
            _log.failure("upgrading raised; the server goes on as it is", failure)
        self._changes.ended(failure.getErrorMessage())

    def scale(self, count: int, tell: Callable[[str], None] = lambda line: None) -> Deferred[str]:
        """Have `count` workers from now on, until a restart or another number in the configuration.

        Clients of removed workers move to the others. tell, result: as for `reload`.
        """
        if not 1 <= count <= MAX_SLOTS:
            return succeed(f"{count} is no number of workers; choose one from 1 to {MAX_SLOTS}")
        return self._changes.scale(tell, lambda: self._scale(count, is_known=False))

    def _scale(self, count: int, is_known: bool) -> None:
        """Begin to have `count` workers. is_known: whether the present workers were started with this number."""
        self._knows_count = is_known
        assert self.sockets is not None
        present = len(self.pool.workers)
        if count == present:
            self._changes.ended("")
            return
        try:
            self.sockets.open(count)
            self._revisions.use_workers(count)
        except OSError as error:
            self._changes.ended(f"can't open a socket: {error}; check `ulimit -n`")
            return
        if count > present:
            self._carry_out(self.pool.scale(count, self._now()))
        else:
            # The workers that are to end accept the connections on their way to them; new ones avoid them.
            self.sockets.avoid(count)
            last = present - 1
            removed = f"worker {count} gets" if count == last else f"workers {count} to {last} get"
            self._write_log(effects.LogLine(f"{removed} no new connections, and will be removed in {LINGER:g} s"))
            self._reactor.callLater(LINGER, lambda: self._carry_out(self.pool.scale(count, self._now())))

    def _end_scale(self, effect: effects.ScaleEnded) -> None:
        assert self.sockets is not None
        count = len(self.pool.workers)
        client = self._settings.client
        if effect.failure and not self.pool.stopping:
            with suppress(OSError):
                self._revisions.use_workers(count)
            self.sockets.avoid(count)
            self.sockets.close_from(count)
        elif not (effect.failure or self._knows_count) and (client.connection_limit or client.connection_rate_limit):
            self._replace_all(self._settings)  # each worker has a share of these limits
            return
        self._changes.ended(effect.failure)

    def _remove_slot(self, effect: effects.RemoveSlot) -> None:
        assert self.sockets is not None
        self.processes.pop(effect.slot, None)
        self.sockets.close_from(effect.slot)

    # Time.

    def _tick(self) -> None:
        if self._halted:
            return
        now = self._now()
        vitals = {generation: process.vitals for generation, process in self.children.items()}
        beats = {generation: reading.beat / 1e9 for generation, reading in vitals.items() if reading}
        self._carry_out(self.pool.tick(now, beats))
        for slot, size, key in self._memory.excesses(vitals):
            self._carry_out(self.pool.memory_exceeded(slot, size, now, key))
        if self._is_healthy(now):
            self._notifier.feed_watchdog(now)

    def _is_healthy(self, now: float) -> bool:
        """Return whether every loop that should turn has turned within the watchdog's interval.

        The pool replaces a blocked worker within `loop.stuck`. The service manager restarts the whole service only if
        that fails: it waits for one more interval.
        """
        serving = [slot for slot in self.pool.slots.values() if slot.state is SlotState.READY]
        return all(now - slot.process.alive_at < self._notifier.watchdog for slot in serving)

    def _reap_orphans(self) -> None:
        if self.zygote is not None and not self.zygote.is_forking:  # else a child may have no known pid yet
            own = self.zygote.pids
            orphans.reap(lambda: [*own, *self._trial.pids, *(process.pid for process in self.children.values())])

    # Effects.

    def _carry_out(self, new: list[Effect]) -> None:
        """Carry out effects in order. Effects of an event during one of them are queued behind the others."""
        self._pending.extend(new)
        if self._is_carrying_out:
            return
        self._is_carrying_out = True
        try:
            while self._pending:
                effect = self._pending.popleft()
                _ACTIONS[type(effect)](self, effect)
        finally:
            self._is_carrying_out = False
            self._note_serving()

    def _note_serving(self) -> None:
        """Bring `processes` up to date."""
        for number, slot in self.pool.slots.items():
            process = self.children.get(slot.process.generation)
            if process is not None:
                self.processes[number] = process
            else:
                self.processes.pop(number, None)

    def _spawn(self, effect: effects.SpawnProcess) -> None:
        assert self._port is not None
        process = ChildProcess(self, effect.slot, effect.generation)
        listening = [] if effect.slot == BROKER else [self._port.sockets[effect.slot].fileno()]
        module = self._modules.get(effect.slot, self._worker)
        settings = self._revisions.fd(effect.revision)
        self.children[effect.generation] = process
        assert self.zygote is not None
        try:
            with ExitStack() as sent:
                stream = None
                if (before := self.children.get(effect.predecessor)) is not None:
                    stream = hand_state_over(before, self._settings.workers.start_timeout, sent, self._write_log)
                process.start(self._reactor, self.zygote, module, settings, listening, self._capture_output, stream)
        except OSError as error:
            del self.children[effect.generation]
            _log.error(
                "can't spawn the process of {name}: {error}; check `ulimit -u` and free memory",
                name=self.pool.slots[effect.slot].name,
                error=error,
            )
            self._carry_out(self.pool.process_exited(effect.generation, _EX_OSERR, self._now()))

    def _hand_over(self, effect: effects.MoveConnections) -> None:
        moves = self._move(self.children[effect.generation], effect)
        Deferred.fromCoroutine(moves).addErrback(self._log_failed_move).addBoth(
            lambda _: self._carry_out(self.pool.handed_over(effect.generation, self._now()))
        )

    async def _move(self, source: ChildProcess, effect: effects.MoveConnections) -> None:
        """Move the connections of a process to the one that serves its slot now, or to all other slots."""
        began, moved, failed = self._now(), 0, 0
        reason = "no other worker is ready"
        targets = self._targets(effect)
        while targets and not source.has_exited:
            target = targets.pop()
            count = ALL
            if targets:  # this one gets its share of the rest
                count = (source.vitals.connections if source.vitals else 0) // (len(targets) + 1)
            if count:
                result = await hand_over(source, target, count, max(effect.timeout - (self._now() - began), 0.0))
                self._handovers.count(result)
                moved, failed, reason = moved + result.moved, failed + result.closed + result.left, result.reason
        line = f"worker {effect.slot} has handed over {moved} connections within {self._now() - began:.1f} s"
        line += f"; {failed} could not move, and their clients reconnect" if failed else ""
        self._write_log(effects.LogLine(line + (f" ({reason})" if reason else "")))

    def _targets(self, effect: effects.MoveConnections) -> list[ChildProcess]:
        slot = self.pool.slots[effect.slot]
        slots = [slot] if slot.process.generation != effect.generation else self.pool.workers
        serving = [one.process.generation for one in slots if one.state is SlotState.READY and not one.is_removed]
        return [self.children[generation] for generation in serving]

    def _log_failed_move(self, failure: Failure) -> None:
        _log.failure("moving connections raised; their clients reconnect", failure)

    def _drain(self, effect: effects.DrainProcess) -> None:
        self.children[effect.generation].drain(effect.timeout)

    def _signal(self, effect: effects.SignalProcess) -> None:
        self.children[effect.generation].signal(effect.number)

    def _dump_stacks(self, effect: effects.DumpProcessStacks) -> None:
        self.sampler.log_all_stacks(self.children[effect.generation])

    def _connect_to_broker(self, effect: effects.ConnectToBroker) -> None:
        """Create a stream and send one end to each process. Our copies stay open until both have answered."""
        broker = self.children.get(self.pool.slots[BROKER].process.generation)
        worker = self.children.get(effect.generation)
        if worker is None or broker is None:
            return  # spawning it has just failed, which the pool already knows
        try:
            ends = socket.socketpair()
        except OSError as error:
            _log.error(
                "can't connect worker {slot} to the broker: {error}; retrying, check `ulimit -n`",
                slot=effect.slot,
                error=error,
            )
            self.broker_link_lost(worker)
            return
        pairs = zip((worker, broker), ends, strict=True)
        sent = [process.send_link(effect.slot, end.fileno()) for process, end in pairs]

        def answered(results: list[tuple[bool, object]]) -> None:
            for end in ends:
                end.close()
            if not all(succeeded for succeeded, _ in results):
                self.broker_link_lost(worker)

        DeferredList(sent, consumeErrors=True).addCallback(answered)

    def _notify(self, effect: effects.NotifySystemd) -> None:
        if effect.state == "ready":
            _log.info("ready: {count} workers", count=len(self.pool.workers))
            self._notifier.ready()
        else:
            self._notifier.stopping()
            self._changes.stop()
            if self._rescue is not None:
                self._rescue.stopping = True

    def _write_log(self, effect: effects.LogLine) -> None:
        (_log.error if effect.is_error else _log.info)("{line}", line=effect.line)
        self._changes.tell(effect.line)
        ready = sum(slot.state is SlotState.READY for slot in self.pool.workers)
        self._notifier.status(f"{ready} of {len(self.pool.workers)} workers ready")

    def _halt(self, effect: effects.HaltService) -> None:
        self._halted = True
        self.monitor.stop()
        if self._stop_counting_errors is not None:
            self._stop_counting_errors()
        if effect.reason:
            _log.critical("{reason}", reason=effect.reason)
        if self._operators is not None:
            self._operators.close()
        if self._rescue is not None:
            self._rescue.close()
        if self._port is not None:
            self._port.close()
        if self.zygote is not None:
            self.zygote.close()
        self._revisions.close()
        self._fire_stop_waiters()
        if self._leave is not None:
            self._leave(effect.status)

    def _fire_stop_waiters(self) -> None:
        waiters, self._stop_waiters = self._stop_waiters, []
        for stopped in waiters:
            stopped.callback(None)


_ACTIONS: dict[type[Effect], Callable[[Supervisor, Any], None]] = {
    effects.SpawnProcess: Supervisor._spawn,
    effects.MoveConnections: Supervisor._hand_over,
    effects.DrainProcess: Supervisor._drain,
    effects.SignalProcess: Supervisor._signal,
    effects.DumpProcessStacks: Supervisor._dump_stacks,
    effects.ConnectToBroker: Supervisor._connect_to_broker,
    effects.UseRevision: Supervisor._use_revision,
    effects.ReloadEnded: Supervisor._end_reload,
    effects.ScaleEnded: Supervisor._end_scale,
    effects.RemoveSlot: Supervisor._remove_slot,
    effects.NotifySystemd: Supervisor._notify,
    effects.LogLine: Supervisor._write_log,
    effects.HaltService: Supervisor._halt,
}


def _is_discarded(fd: int) -> bool:
    """Return whether output to `fd` is discarded: it is /dev/null, or closed."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(os.devnull))
    except OSError:
        return True


def _endpoint(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
