"""The pool of processes as a state machine: events in, effects out. It touches no process, socket, signal or clock.

A *slot* is a place for a process: 0 to N-1 for the workers, BROKER for the broker. While a worker is replaced, its slot
has two: a *successor* that starts beside the serving process, or, once it has taken over, a *predecessor* that hands
its connections over. A *generation* is the serial number of a process, a *revision* that of the settings it was started
with. Each public method of `Pool` is an event. It returns the effects, which the caller carries out at once and in
order. Times are CLOCK_MONOTONIC seconds. `TRANSITIONS` maps the state of a process and an event to an action. A pair
that is not in the table has no consequence (the message of a process that is being killed, for example).

    WAITING ──deadline──▶ STARTING ──ready──▶ READY ──stop, lost control link──▶ LEAVING ──deadline──▶ KILLED
       ▲                      │ any             │ no beat ─▶ LEAVING               ▲  │                   │
       └──────────────────────┴──── exited ─────┴─────────────────────────────────┼──┴───────────────────┘
                                (GONE instead of WAITING once the pool stops)      │
    replacing a worker:    PREPARING ──ready──▶ READY, and the process before: HANDING_OVER ──handed over──▶ LEAVING
    replacing the broker:  PREPARING ──ready──▶ READY, and the process before: LEAVING

The pool answers a death with a new process, after a delay that doubles with each death in a row. The third death in a
row makes a crash loop: from then on the pool reports all such slots in one log line, once a minute while it lasts. A
process that was never forked, because the zygote has ended, is no death.

It replaces one process at a time, and never ends a serving process before its successor is ready; that of the broker is
ready once it has the state. If a successor does not become ready, the serving process stays.
"""

from __future__ import annotations

import math
import signal as signals
from collections.abc import Callable, Iterable, Mapping

from realtime.config.settings import LoopSettings, WorkersSettings
from realtime.supervision.effects import (
    ConnectToBroker,
    DrainProcess,
    DumpProcessStacks,
    Effect,
    HaltService,
    LogLine,
    MoveConnections,
    NotifySystemd,
    ReloadEnded,
    RemoveSlot,
    ScaleEnded,
    SignalProcess,
    SpawnProcess,
    UseRevision,
)
from realtime.supervision.slots import BROKER, EX_CONFIG, PoolEvent, Slot, SlotProcess, SlotRecord, SlotState

# Seconds between two ticks. A tick that is _LATE seconds late or more excuses all processes for the time until then.
TICK = 0.1
_LATE = 0.3
# Seconds between two log lines about a crash loop.
_CRASH_LOOP_INTERVAL = 60.0
# Seconds for a process to exit after it announced its exit, or after its control link ended.
_EXIT_TIMEOUT = 5.0
# Seconds between asking a blocked process for its stacks, which takes milliseconds, and killing it.
_DUMP_TIME = 0.3
# Seconds without a beat after which a process serves nothing. The broker beats once a second.
_UNRESPONSIVE = 3.0
# Seconds that a worker serves at least before it is replaced for its memory, if its predecessor was replaced for that
# too. They double with each replacement in a row: a limit that no worker can keep must not end the service.
_MEMORY_PAUSE = 2.0
_MEMORY_PAUSE_MAX = 300.0
# Seconds from SIGKILL until a stopping pool gives up on a process (uninterruptible sleep).
_REAP_TIMEOUT = 2.0
# Seconds before a worker is to be replaced for its age or memory again, after its successor has failed.
_RECYCLE_PAUSE = 60.0
# The label of a replacement by a reload.
_RELOAD = "reload"
# States in which a worker has a stream to the broker.
_LINKED = (SlotState.STARTING, SlotState.PREPARING, SlotState.READY, SlotState.HANDING_OVER)


class Pool:
    """Keeps one process running in each slot. Its public methods are the events, to be called in the order of time.

    stopping: whether the pool is shutting down. revision: of the settings in force. reloading: whether a reload is
    under way. target: the revision of the latest reload. scaling: whether workers are being added or removed.
    generation: the latest one.
    """

    def __init__(
        self, workers: int, settings: WorkersSettings, loop: LoopSettings, stop_timeout: float, *, broker: bool = True
    ) -> None:
        """workers: number of worker slots, at least 1. stop_timeout: seconds from `stop` to SIGKILL. broker: False for
        a pool without a broker."""
        self.slots = {number: Slot(number) for number in ([BROKER] * broker + [*range(workers)])}
        self.stopping = False
        self.revision = 0
        self.reloading = False
        self.scaling = False
        self.configure(settings, loop, stop_timeout)
        self.target = 0
        self._count_before = 0  # the number of workers before the latest change of it
        self._scale_failure = ""
        self.generation = 0
        self._processes: dict[int, SlotProcess] = {}  # those that exist, by generation
        self._stop_deadline = math.inf
        self._was_ready = False  # all slots have been ready together: from then on, a failed start does not halt
        self._halted = False
        self._status = 0
        self._reason = ""
        self._ticked = 0.0
        self._crash_loop_logged = -math.inf
        self._now = 0.0
        self._effects: list[Effect] = []

    def configure(self, settings: WorkersSettings, loop: LoopSettings, stop_timeout: float) -> None:
        """Use other settings from now on."""
        self._settings = settings
        self._stuck = loop.stuck
        self._stop_timeout = stop_timeout

    @property
    def workers(self) -> list[Slot]:
        """The slots of the workers, in order."""
        return [slot for slot in self.slots.values() if slot.number != BROKER]

    @property
    def ready(self) -> bool:
        """Whether every slot is ready, but for those being added or removed, and the pool is not stopping."""
        lasting = [slot for slot in self.slots.values() if not (slot.is_new or slot.is_removed)]
        return not self.stopping and all(slot.state is SlotState.READY for slot in lasting)

    @property
    def serving(self) -> bool:
        """Whether the pool is ready, and the loops of the broker and of at least one worker turn."""
        turning = {number for number, slot in self.slots.items() if self.is_up(slot)}
        return self.ready and (BROKER in turning or BROKER not in self.slots) and bool(turning - {BROKER})

    def is_up(self, slot: Slot) -> bool:
        """Whether the slot's process is ready, and its loop has turned in the last seconds."""
        return slot.state is SlotState.READY and self._now - slot.process.alive_at < _UNRESPONSIVE

    # Events.

    def start(self, now: float) -> list[Effect]:
        """Start all processes. The first event, and once only."""
        self._now = self._ticked = now
        for slot in self.slots.values():
            slot.process.deadline = now
            self._fire(slot.process, PoolEvent.DEADLINE)
        return self._take_effects()

    def resume(self, records: Iterable[SlotRecord], generation: int, now: float) -> None:
        """Go on with processes that serve, in place of `start`. generation: the latest one."""
        self._now = self._ticked = now
        self.generation, self._was_ready = generation, True
        self.slots = {record.number: Slot.resume(record, now) for record in records}
        self._processes = {slot.process.generation: slot.process for slot in self.slots.values()}

    def process_ready(self, generation: int, now: float) -> list[Effect]:
        """The process reports that it is ready."""
        return self._event(generation, PoolEvent.READY, now)

    def start_failed(self, generation: int, reason: str, status: int, now: float) -> list[Effect]:
        """The process reports that it can't start, for `reason` (one line). It will exit with `status`."""
        process = self._processes.get(generation)
        if process is not None and process.state in (SlotState.STARTING, SlotState.PREPARING):
            process.note_failed_start(reason, status)
        return self._event(generation, PoolEvent.START_FAILED, now)

    def broker_link_lost(self, generation: int, now: float) -> list[Effect]:
        """The worker has lost its stream to the broker. A tick at which both run replaces it."""
        return self._event(generation, PoolEvent.BROKER_LINK_LOST, now)

    def control_link_lost(self, generation: int, now: float) -> list[Effect]:
        """The control link to the process ended. The process is exiting, or broken and must exit."""
        return self._event(generation, PoolEvent.CONTROL_LINK_LOST, now)

    def handed_over(self, generation: int, now: float) -> list[Effect]:
        """The process has handed over what it can. It drains what is left, and ends."""
        return self._event(generation, PoolEvent.HANDED_OVER, now)

    def process_exited(self, generation: int, status: int, now: float) -> list[Effect]:
        """The process has exited. status: its exit status, or minus the signal that killed it."""
        process = self._processes[generation]
        process.note_exit(status)
        self._now = now
        if status == EX_CONFIG and process.state is SlotState.STARTING:
            self._give_up(process, EX_CONFIG)
        return self._event(generation, PoolEvent.EXITED, now)

    def memory_exceeded(self, number: int, size: int, now: float, key: str = "loop.max_rss") -> list[Effect]:
        """The slot's worker uses `size` bytes of memory, more than the setting `key` allows: replace it.

        Only one worker at a time: without effect unless all slots are ready. Without effect too on a worker that has
        just replaced another one for this reason: the intervals between such replacements grow.
        """
        slot = self.slots[number]
        pause = min(_MEMORY_PAUSE * 2.0 ** min(slot.bloated - 1, 30), _MEMORY_PAUSE_MAX) if slot.bloated else 0.0
        ready_for = now - slot.since
        if not self.is_settled or ready_for < pause or now < slot.recycle_after:
            return []
        # Past twice the pause its memory was below the limit at the end of the pause, so it has grown slowly.
        slot.bloated = 1 if ready_for >= max(2 * pause, self._settings.restart_reset) else slot.bloated + 1
        self._now = now
        self._log(f"{slot.name} uses {size / 2**20:.0f} MiB of memory ({key}); replacing it")
        slot.replacement = "bloated"
        return self._take_effects()

    def reload(self, now: float, *, with_broker: bool = False) -> list[Effect]:
        """Replace every worker by one with the settings of the next revision. Ends with ReloadEnded.

        with_broker: replace the broker too, and first. `reloading` must be False.
        """
        self._now = now
        if self.stopping or not self._was_ready:
            return [ReloadEnded("the server is stopping" if self.stopping else "the server is still starting")]
        self.target += 1
        self.reloading = True
        for slot in self.slots.values():
            if slot.number != BROKER or with_broker:
                slot.replacement = _RELOAD
        return self._take_effects()

    def scale(self, count: int, now: float) -> list[Effect]:
        """Add workers, or remove those with the highest numbers, so that there are `count`. Ends with ScaleEnded.

        If a new worker does not become ready, all new ones are removed again. `reloading` and `scaling` must be False.
        """
        self._now = now
        if self.stopping or not self._was_ready:
            return [ScaleEnded("the server is stopping" if self.stopping else "the server is still starting")]
        self.scaling, self._count_before, self._scale_failure = True, len(self.workers), ""
        for number in range(len(self.workers), count):
            slot = self.slots[number] = Slot(number, is_new=True)
            self._fire(slot.process, PoolEvent.DEADLINE)
        self._remove(slot for slot in self.workers if slot.number >= count)
        return self._take_effects()

    def tick(self, now: float, beats: Mapping[int, float]) -> list[Effect]:
        """Time has passed, every TICK seconds. beats: by generation, when a process's loop last turned, where known."""
        self._now = now
        stall = now - self._ticked - TICK
        self._ticked = now
        if stall > _LATE:
            self._excuse(stall)
        for slot in list(self.slots.values()):
            for process in slot.places:
                self._note_beat(process, beats.get(process.generation, 0.0))
                if now >= process.deadline:
                    self._fire(process, PoolEvent.DEADLINE)
                elif 0 < self._stuck < now - process.alive_at:
                    self._fire(process, PoolEvent.NO_BEAT)
                self._connect_to_broker(process)
            self._forgive_deaths(slot)
        self._replace_old()
        if now >= self._stop_deadline:
            self._fire_all(PoolEvent.KILL)
        self._log_crash_loops()
        return self._take_effects()

    def stop(self, now: float) -> list[Effect]:
        """Stop all processes: drain the workers, then the broker, then halt. A second call kills all by SIGKILL."""
        self._now = now
        if self.stopping:
            self._stop_deadline = min(self._stop_deadline, now)
            self._fire_all(PoolEvent.KILL)
            return self._take_effects()
        self._begin_stop(self._stop_timeout)
        for slot in self.workers:
            for process in slot.processes:
                self._fire(process, PoolEvent.STOP)
        return self._take_effects()

    # The actions of TRANSITIONS.

    def _spawn(self, process: SlotProcess) -> None:
        slot = process.slot
        revision = self.revision
        if slot.replacement:  # the reload begins with the slot's next process
            revision, slot.replacement = self._wanted_revision(slot), ""
        self._begin(process, SlotState.STARTING, revision)

    def _begin(self, process: SlotProcess, state: SlotState, revision: int, predecessor: int = 0) -> None:
        """Spawn a process into `state`. predecessor: see `SpawnProcess`."""
        self.generation += 1
        process.generation, process.revision = self.generation, revision
        process.reason = process.explanation = ""
        process.connected = False
        self._processes[process.generation] = process
        self._enter(process, state, self._now + self._settings.start_timeout)
        self._effects.append(SpawnProcess(process.slot.number, process.generation, revision, predecessor))
        self._connect_to_broker(process)

    def _become_ready(self, process: SlotProcess) -> None:
        slot = process.slot
        slot.is_new = False
        self._enter(process, SlotState.READY)
        self._use_revision(process)
        if not slot.in_crash_loop:
            self._log(f"{slot.name} is ready")
        if slot.number == BROKER:
            for worker in self.workers:
                for linked in worker.processes:
                    linked.connected = False
                    self._connect_to_broker(linked)
        if self.ready and not self._was_ready:
            self._was_ready = True
            self._effects.append(NotifySystemd("ready"))

    def _take_over(self, process: SlotProcess) -> None:
        slot, predecessor = process.slot, process.slot.process
        slot.process, slot.successor = process, None
        self._enter(process, SlotState.READY)
        self._use_revision(process)
        slot.restarts[process.purpose] += 1
        if predecessor.exists:
            slot.predecessor = predecessor
            if predecessor.state is SlotState.READY:
                if slot.number == BROKER:
                    self._drain_rest(predecessor)
                else:
                    self._hand_over(predecessor)

    def _hand_over(self, process: SlotProcess) -> None:
        self._enter(process, SlotState.HANDING_OVER, self._now + self._stop_timeout)
        self._effects.append(MoveConnections(process.slot.number, process.generation, 0.9 * self._stop_timeout))

    def _await_failed_exit(self, process: SlotProcess) -> None:
        self._enter(process, SlotState.LEAVING, self._now + _EXIT_TIMEOUT)
        self._give_up(process, process.failed_with)

    def _disconnect(self, process: SlotProcess) -> None:
        process.connected = False

    def _await_exit(self, process: SlotProcess) -> None:
        self._enter(process, SlotState.LEAVING, self._now + _EXIT_TIMEOUT)

    def _drain(self, process: SlotProcess) -> None:
        self._enter(process, SlotState.LEAVING, self._leave_deadline(process))
        # Less time than until SIGKILL, so that the process can exit by itself.
        self._effects.append(
            DrainProcess(process.slot.number, process.generation, 0.9 * (process.deadline - self._now))
        )

    def _terminate(self, process: SlotProcess) -> None:
        # A starting process may not read its control link yet, and has no clients to drain.
        self._enter(process, SlotState.LEAVING, self._leave_deadline(process))
        self._signal(process, signals.SIGTERM)

    def _shorten_deadline(self, process: SlotProcess) -> None:
        process.deadline = min(process.deadline, self._leave_deadline(process))

    def _kill(self, process: SlotProcess) -> None:
        self._enter(process, SlotState.KILLED)
        self._signal(process, signals.SIGKILL)

    def _kill_late_start(self, process: SlotProcess) -> None:
        timeout = self._settings.start_timeout
        self._explain(
            process, "start_timeout", f"was not ready within {timeout:g} s and was killed (workers.start_timeout)"
        )
        # The stacks name the line of the application that hangs.
        self._dump_and_kill(process)

    def _kill_overdue(self, process: SlotProcess) -> None:
        self._explain(
            process, "link", f"closed its control link, did not exit within {_EXIT_TIMEOUT:g} s and was killed"
        )
        if self.stopping:
            self._log(f"{process.name} did not finish in time and was killed (shutdown.timeout)", is_error=True)
        self._kill(process)

    def _kill_stuck(self, process: SlotProcess) -> None:
        process.reason = "stuck"
        process.explanation = f"did not turn its loop for {self._stuck:g} s and was killed (loop.stuck)"
        self._dump_and_kill(process)

    def _drain_rest(self, process: SlotProcess) -> None:
        """Drain a process whose connections have been handed over."""
        self._enter(process, SlotState.LEAVING, self._now + self._stop_timeout)
        self._effects.append(DrainProcess(process.slot.number, process.generation, 0.9 * self._stop_timeout))

    def _exited(self, process: SlotProcess) -> None:
        del self._processes[process.generation]
        slot = process.slot
        if process is slot.predecessor:
            slot.predecessor = None
            self._log_end(process)
        elif process is slot.successor:
            slot.successor = None
            self._keep_old(process)
        elif self.stopping or slot.is_removed:
            self._retire(process)
        elif slot.is_new:
            self._retire(process)
            self._scale_failure = f"{slot.name} {process.explanation}"
            self._remove(slot for slot in self.workers if slot.number >= self._count_before)
        elif slot.successor is not None and slot.successor.state is SlotState.PREPARING:
            self._inherit(process, slot.successor)
        else:
            self._schedule_restart(process)

    def _retire(self, process: SlotProcess) -> None:
        self._enter(process, SlotState.GONE)

    # Steps of the actions.

    def _schedule_restart(self, process: SlotProcess) -> None:
        slot = process.slot
        slot.count_death(process)
        doublings = min(max(slot.deaths - 1, 0), 30)
        delay = min(self._settings.restart_delay * 2.0**doublings, self._settings.restart_delay_max)
        if process.revision > self.revision:
            self._end_reload(f"{slot.name} {process.explanation}")
        if not slot.in_crash_loop:
            # A process that was asked to end by SIGTERM, and has ended in order, is no error.
            is_error = process.reason != "exit"
            self._log(f"{slot.name} {process.explanation}; restarting it in {delay:g} s", is_error)
        self._enter(process, SlotState.WAITING, self._now + delay)

    def _inherit(self, dead: SlotProcess, successor: SlotProcess) -> None:
        """Let a successor take the place of a process that died before it was ready."""
        slot = dead.slot
        slot.count_death(dead)
        self._log(f"{slot.name} {dead.explanation}; its successor starts already", is_error=dead.reason != "exit")
        slot.process, slot.successor = successor, None
        successor.state = SlotState.STARTING

    def _log_end(self, predecessor: SlotProcess) -> None:
        name = predecessor.slot.name
        if predecessor.reason == "exit":
            self._log(f"{name} has been replaced")
        elif not self.stopping:
            self._log(f"{name} has been replaced; the process before {predecessor.explanation}", is_error=True)

    def _keep_old(self, successor: SlotProcess) -> None:
        """Go on with the serving process, because its successor has failed."""
        if self.stopping or successor.slot.is_removed:
            return
        failure = f"{successor.slot.name} goes on as it is: its successor {successor.explanation}"
        if self.reloading and successor.revision == self.target:
            self._end_reload(failure)
        else:
            successor.slot.recycle_after = self._now + _RECYCLE_PAUSE
            self._log(f"{failure}; trying again in {_RECYCLE_PAUSE:g} s", is_error=True)

    def _explain(self, process: SlotProcess, reason: str, explanation: str) -> None:
        """Note why a process ends, unless a reason is known."""
        process.reason = process.reason or reason
        process.explanation = process.explanation or explanation

    def _dump_and_kill(self, process: SlotProcess) -> None:
        self._enter(process, SlotState.LEAVING, self._now + _DUMP_TIME)
        self._effects.append(DumpProcessStacks(process.slot.number, process.generation))

    # Replacing processes.

    @property
    def is_settled(self) -> bool:
        """Whether every slot is ready, and no worker is being replaced."""
        return self.ready and all(slot.is_settled and not slot.replacement for slot in self.slots.values())

    def _wanted_revision(self, slot: Slot) -> int:
        return self.target if slot.replacement == _RELOAD else self.revision

    def _replace_next(self) -> None:
        """Begin to replace the next process, if none is being replaced. A slot without a process starts one at once."""
        slots = [slot for slot in self.slots.values() if not slot.is_removed]
        if any(slot.successor or slot.predecessor for slot in slots):
            return
        for slot in slots:
            if slot.replacement == _RELOAD and slot.state is SlotState.WAITING:
                self._fire(slot.process, PoolEvent.DEADLINE)
        unready = any(slot.state is SlotState.STARTING for slot in slots)
        ready = [slot for slot in slots if slot.replacement and slot.state is SlotState.READY]
        if ready and not unready:
            slot = ready[0]
            slot.successor = SlotProcess(slot, purpose=slot.replacement)
            revision, slot.replacement = self._wanted_revision(slot), ""
            predecessor = slot.process.generation if slot.number == BROKER else 0
            self._begin(slot.successor, SlotState.PREPARING, revision, predecessor)

    def _remove(self, slots: Iterable[Slot]) -> None:
        for slot in list(slots):
            slot.is_removed, slot.replacement = True, ""
            for process in slot.places:
                self._fire(process, PoolEvent.REMOVE)

    def _forget_removed(self) -> None:
        """Remove the slots that are empty, the last one first: the kernel numbers their sockets in order."""
        for slot in reversed(self.workers):
            if not slot.is_removed or slot.processes:
                return
            del self.slots[slot.number]
            self._effects.append(RemoveSlot(slot.number))

    def _end_scale(self, failure: str) -> None:
        if self.scaling:
            self.scaling = False
            self._effects.append(ScaleEnded(failure))

    def _replace_old(self) -> None:
        """Replace a worker that has reached its age: `workers.max_age` for the first slot, down to half of it for the
        last one, so that workers that were started together are not replaced together."""
        limit, workers = self._settings.max_age, self.workers
        if not limit or not self.is_settled:
            return
        for slot in workers:
            age = self._now - slot.since
            if age >= limit * (1 - slot.number / (2 * len(workers))) and self._now >= slot.recycle_after:
                self._log(f"{slot.name} has served for {age:.0f} s (workers.max_age); replacing it")
                slot.replacement = "age"
                return

    def _use_revision(self, process: SlotProcess) -> None:
        if process.revision > self.revision:
            self.revision = process.revision
            self._effects.append(UseRevision(self.revision))

    def _end_reload(self, failure: str = "") -> None:
        """End the reload. Workers that have not been replaced yet go on as they are."""
        if not self.reloading:
            return
        self.reloading = False
        for slot in self.slots.values():
            if slot.replacement == _RELOAD:
                slot.replacement = ""
        for process in list(self._processes.values()):
            if process.revision > self.revision:  # no worker serves with these settings, and none will
                process.explanation = process.explanation or "ended with the reload"
                self._fire(process, PoolEvent.KILL)
        self._effects.append(ReloadEnded(failure))

    # Shared by events and actions.

    def _event(self, generation: int, event: PoolEvent, now: float) -> list[Effect]:
        self._now = now
        process = self._processes.get(generation)
        if process is not None:
            self._fire(process, event)
        return self._take_effects()

    def _fire(self, process: SlotProcess, event: PoolEvent) -> None:
        action = TRANSITIONS.get((process.state, event))
        if action is not None:
            action(self, process)

    def _fire_all(self, event: PoolEvent) -> None:
        for slot in self.slots.values():
            for process in slot.places:
                self._fire(process, event)

    def _enter(self, process: SlotProcess, state: SlotState, deadline: float = math.inf) -> None:
        process.state, process.since, process.alive_at, process.deadline = state, self._now, self._now, deadline

    def _signal(self, process: SlotProcess, number: int) -> None:
        self._effects.append(SignalProcess(process.slot.number, process.generation, number))

    def _log(self, line: str, is_error: bool = False) -> None:
        self._effects.append(LogLine(line, is_error))

    def _leave_deadline(self, process: SlotProcess) -> float:
        # The broker serves until the last worker has exited, so the last tenth of the time is reserved for the broker.
        share = 1.0 if process.slot.number == BROKER else 0.9
        return min(self._stop_deadline - (1.0 - share) * self._stop_timeout, self._now + self._stop_timeout)

    def _begin_stop(self, timeout: float) -> None:
        self.stopping = True
        self._stop_deadline = self._now + timeout
        self._effects.append(NotifySystemd("stopping"))
        self._end_reload("the server is stopping")
        self._end_scale("the server is stopping")
        for slot in self.slots.values():
            if slot.state is SlotState.WAITING:
                self._fire(slot.process, PoolEvent.STOP)

    def _give_up(self, process: SlotProcess, status: int) -> None:
        """Stop the pool with `status`, because its first start failed for a reason that the process has reported.

        The service manager restarts the server unless the status is EX_CONFIG. Without effect once all slots have been
        ready.
        """
        if self.stopping or self._was_ready:
            return
        self._status, self._reason = status, f"{process.slot.name} {process.explanation}"
        self._begin_stop(_EXIT_TIMEOUT)
        for slot in self.slots.values():
            if slot is not process.slot:
                self._fire(slot.process, PoolEvent.KILL)

    def _take_effects(self) -> list[Effect]:
        """Return the effects of an event, including those of the next step of a reload or of a stop."""
        if not self.stopping:
            self._forget_removed()
            self._replace_next()
            if self.scaling and not any(slot.is_new or slot.is_removed for slot in self.workers):
                self._end_scale(self._scale_failure)
            if self.reloading and self._has_reloaded:
                self._end_reload()
        elif not self._halted:
            broker = self.slots.get(BROKER)
            if broker and not any(worker.processes for worker in self.workers):
                self._fire(broker.process, PoolEvent.STOP)
            self._halt_if_empty()
        effects, self._effects = self._effects, []
        return effects

    @property
    def _has_reloaded(self) -> bool:
        is_replacing = any(slot.replacement or slot.successor or slot.predecessor for slot in self.slots.values())
        return not is_replacing and all(
            slot.state is SlotState.READY and slot.process.revision == self.target for slot in self.workers
        )

    def _halt_if_empty(self) -> None:
        """Halt once every process has exited, or has survived SIGKILL for _REAP_TIMEOUT seconds."""
        remaining = list(self._processes.values())
        if any(one.state is not SlotState.KILLED or self._now - one.since < _REAP_TIMEOUT for one in remaining):
            return
        self._halted = True
        for process in remaining:
            remedy = "uninterruptible sleep; check disks and network mounts"
            self._log(f"{process.name} survived SIGKILL and is left behind ({remedy})", is_error=True)
            self._retire(process)
        self._effects.append(HaltService(self._status, self._reason))

    # Steps of a tick.

    def _excuse(self, stall: float) -> None:
        """Excuse all processes for `stall` seconds in which the supervisor was stopped, starved or asleep."""
        for process in self._processes.values():
            process.alive_at += stall
            if process.state in (SlotState.STARTING, SlotState.PREPARING):
                process.deadline += stall

    def _note_beat(self, process: SlotProcess, beat: float) -> None:
        if process.alive_at < beat <= self._now:
            process.alive_at = beat

    def _forgive_deaths(self, slot: Slot) -> None:
        ready_for = self._now - slot.since
        if slot.state is SlotState.READY and slot.deaths and ready_for >= self._settings.restart_reset:
            if slot.in_crash_loop:
                self._log(f"{slot.name} has recovered: ready for {ready_for:.0f} s")
            slot.deaths = 0

    def _connect_to_broker(self, process: SlotProcess) -> None:
        """Connect a worker that has no stream to the broker, as soon as the broker is ready."""
        broker = self.slots.get(BROKER)
        if broker is None or broker.state is not SlotState.READY or process.slot is broker:
            return
        # Starting workers too: a worker is ready only after it has reached the broker.
        if process.state in _LINKED and not process.connected:
            process.connected = True
            self._effects.append(ConnectToBroker(process.slot.number, process.generation))

    def _log_crash_loops(self) -> None:
        """Log all slots in a crash loop in one line, once every _CRASH_LOOP_INTERVAL seconds."""
        looping = [slot for slot in self.slots.values() if slot.in_crash_loop and slot.state is SlotState.WAITING]
        if self.stopping or not looping or self._now - self._crash_loop_logged < _CRASH_LOOP_INTERVAL:
            return
        self._crash_loop_logged = self._now
        self._log(Slot.describe_crash_loop(looping, self._now, self._settings.restart_delay_max), is_error=True)


TRANSITIONS: dict[tuple[SlotState, PoolEvent], Callable[[Pool, SlotProcess], None]] = {
    (SlotState.WAITING, PoolEvent.DEADLINE): Pool._spawn,
    (SlotState.WAITING, PoolEvent.REMOVE): Pool._retire,
    (SlotState.WAITING, PoolEvent.STOP): Pool._retire,
    (SlotState.WAITING, PoolEvent.KILL): Pool._retire,
    (SlotState.STARTING, PoolEvent.READY): Pool._become_ready,
    (SlotState.STARTING, PoolEvent.START_FAILED): Pool._await_failed_exit,
    (SlotState.STARTING, PoolEvent.CONTROL_LINK_LOST): Pool._await_exit,
    (SlotState.STARTING, PoolEvent.DEADLINE): Pool._kill_late_start,
    (SlotState.STARTING, PoolEvent.REMOVE): Pool._terminate,
    (SlotState.STARTING, PoolEvent.STOP): Pool._terminate,
    (SlotState.STARTING, PoolEvent.KILL): Pool._kill,
    (SlotState.STARTING, PoolEvent.BROKER_LINK_LOST): Pool._disconnect,
    (SlotState.STARTING, PoolEvent.EXITED): Pool._exited,
    (SlotState.PREPARING, PoolEvent.READY): Pool._take_over,
    (SlotState.PREPARING, PoolEvent.START_FAILED): Pool._await_exit,
    (SlotState.PREPARING, PoolEvent.CONTROL_LINK_LOST): Pool._await_exit,
    (SlotState.PREPARING, PoolEvent.DEADLINE): Pool._kill_late_start,
    (SlotState.PREPARING, PoolEvent.REMOVE): Pool._terminate,
    (SlotState.PREPARING, PoolEvent.STOP): Pool._terminate,
    (SlotState.PREPARING, PoolEvent.KILL): Pool._kill,
    (SlotState.PREPARING, PoolEvent.BROKER_LINK_LOST): Pool._disconnect,
    (SlotState.PREPARING, PoolEvent.EXITED): Pool._exited,
    (SlotState.READY, PoolEvent.BROKER_LINK_LOST): Pool._disconnect,
    (SlotState.READY, PoolEvent.CONTROL_LINK_LOST): Pool._await_exit,
    (SlotState.READY, PoolEvent.NO_BEAT): Pool._kill_stuck,
    (SlotState.READY, PoolEvent.REMOVE): Pool._hand_over,
    (SlotState.READY, PoolEvent.STOP): Pool._drain,
    (SlotState.READY, PoolEvent.KILL): Pool._kill,
    (SlotState.READY, PoolEvent.EXITED): Pool._exited,
    (SlotState.HANDING_OVER, PoolEvent.HANDED_OVER): Pool._drain_rest,
    (SlotState.HANDING_OVER, PoolEvent.DEADLINE): Pool._drain_rest,
    (SlotState.HANDING_OVER, PoolEvent.BROKER_LINK_LOST): Pool._disconnect,
    (SlotState.HANDING_OVER, PoolEvent.CONTROL_LINK_LOST): Pool._await_exit,
    (SlotState.HANDING_OVER, PoolEvent.NO_BEAT): Pool._kill_stuck,
    (SlotState.HANDING_OVER, PoolEvent.STOP): Pool._drain,
    (SlotState.HANDING_OVER, PoolEvent.KILL): Pool._kill,
    (SlotState.HANDING_OVER, PoolEvent.EXITED): Pool._exited,
    (SlotState.LEAVING, PoolEvent.DEADLINE): Pool._kill_overdue,
    (SlotState.LEAVING, PoolEvent.STOP): Pool._shorten_deadline,
    (SlotState.LEAVING, PoolEvent.KILL): Pool._kill,
    (SlotState.LEAVING, PoolEvent.EXITED): Pool._exited,
    (SlotState.KILLED, PoolEvent.EXITED): Pool._exited,
}
