"""The pool of processes as a state machine: events in, effects out. It touches no process, socket, signal or clock.

A *slot* is a place for one process: 0 to N-1 for the workers, BROKER for the broker. Each public method of `Pool` is an
event. It returns the effects, which the caller carries out at once and in order. Times are CLOCK_MONOTONIC seconds.
`TRANSITIONS` maps the state of a slot and an event to an action. A pair that is not in the table has no consequence
(the message of a process that is being killed, for example).

    WAITING ──deadline──▶ STARTING ──ready──▶ READY ──stop, lost control link──▶ LEAVING ──deadline──▶ KILLED
       ▲                      │ any              │ no beat, memory ─▶ LEAVING       │                     │
       └──────────────────────┴──── exited ──────┴──────────────────────────────────┴─────────────────────┘
                                (GONE instead of WAITING once the pool stops)

The pool answers a death with a new process, after a delay that doubles with each death in a row. The third death in a
row makes a crash loop: from then on the pool reports all such slots in one log line, once a minute while it lasts.
"""

from __future__ import annotations

import math
import signal as signals
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum

from msgspec import Struct

from realtime.config.settings import LoopSettings, WorkersSettings

BROKER = -1
EX_CONFIG = 78

# Seconds between two ticks. A tick that is _LATE seconds late or more excuses all processes for the time until then.
TICK = 0.1
_LATE = 0.3
# Deaths in a row that make a crash loop, and seconds between two log lines about it.
_CRASH_LOOP_DEATHS = 3
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


class SlotState(Enum):
    """State of a slot. WAITING: for the next start. LEAVING: its process is expected to exit. GONE: empty for good,
    since the pool stops."""

    WAITING = "waiting"
    STARTING = "starting"
    READY = "ready"
    LEAVING = "leaving"
    KILLED = "killed"
    GONE = "gone"


class PoolEvent(Enum):
    """Events of a slot. DEADLINE: its deadline has passed. NO_BEAT: its process's loop has not turned for `loop.stuck`
    seconds. MEMORY_EXCEEDED: its process uses more than `loop.max_rss`. STOP: exit in order. KILL: exit at once."""

    READY = "ready"
    START_FAILED = "start failed"
    BROKER_LINK_LOST = "broker link lost"
    CONTROL_LINK_LOST = "control link lost"
    EXITED = "exited"
    DEADLINE = "deadline"
    NO_BEAT = "no beat"
    MEMORY_EXCEEDED = "memory exceeded"
    STOP = "stop"
    KILL = "kill"


# Effects.


class SpawnProcess(Struct, frozen=True):
    """Start the slot's process. On failure, call `process_exited`."""

    slot: int


class DrainProcess(Struct, frozen=True):
    """Order the slot's process to finish its work within `timeout` seconds and exit."""

    slot: int
    timeout: float


class SignalProcess(Struct, frozen=True):
    """Send the slot's process a signal."""

    slot: int
    number: int


class DumpProcessStacks(Struct, frozen=True):
    """Log the stacks of all threads of the slot's process. Its loop is blocked, and the pool kills it in a moment."""

    slot: int


class ConnectToBroker(Struct, frozen=True):
    """Give the slot's worker and the broker a new stream to each other. On failure, call `broker_link_lost`."""

    slot: int


class NotifySystemd(Struct, frozen=True):
    """Notify the service manager of a state: "ready" or "stopping". Each occurs once at most."""

    state: str


class LogLine(Struct, frozen=True):
    """Write a line to the log."""

    line: str
    is_error: bool = False


class HaltService(Struct, frozen=True):
    """Exit with `status`: no process is left. reason: one line, "" for status 0. The last effect of all."""

    status: int
    reason: str = ""


Effect = (
    SpawnProcess
    | DrainProcess
    | SignalProcess
    | DumpProcessStacks
    | ConnectToBroker
    | NotifySystemd
    | LogLine
    | HaltService
)


@dataclass(slots=True)
class Slot:
    """One place for a process. Only its pool changes it.

    since: when it entered its state. deadline: when DEADLINE occurs, in any state. alive_at: when its process last
    showed that its loop turns; stalls of the supervisor move it forward. connected: whether the worker has a stream to
    the broker, or is about to get one. deaths: deaths in a row. reason: why its process exits, as a label for the
    metrics; "" while unknown. explanation: the same for the log. failed_with: the exit status that its process
    announced when it could not start. bloated: replacements for too much memory in a row. restarts: number of restarts
    by reason.
    """

    number: int
    state: SlotState = SlotState.WAITING
    since: float = 0.0
    deadline: float = math.inf
    alive_at: float = 0.0
    connected: bool = False
    deaths: int = 0
    reason: str = ""
    explanation: str = ""
    failed_with: int = EX_CONFIG
    bloated: int = 0
    restarts: Counter[str] = field(default_factory=Counter)

    @property
    def name(self) -> str:
        """The slot's name in the log."""
        return "broker" if self.number == BROKER else f"worker {self.number}"

    @property
    def in_crash_loop(self) -> bool:
        """Whether the process has died too often in a row."""
        return self.deaths >= _CRASH_LOOP_DEATHS

    @property
    def has_process(self) -> bool:
        """Whether the slot has a process."""
        return self.state not in (SlotState.WAITING, SlotState.GONE)


class Pool:
    """Keeps one process running in each slot. Its public methods are the events, to be called in the order of time.

    stopping: whether the pool is shutting down.
    """

    def __init__(
        self, workers: int, settings: WorkersSettings, loop: LoopSettings, stop_timeout: float, *, broker: bool = True
    ) -> None:
        """workers: number of worker slots, at least 1. stop_timeout: seconds from `stop` to SIGKILL. broker: False for
        a pool without a broker."""
        order = [BROKER, *range(workers)] if broker else list(range(workers))
        self.slots = {number: Slot(number) for number in order}
        self.stopping = False
        self._settings = settings
        self._stuck = loop.stuck
        self._stop_timeout = stop_timeout
        self._stop_deadline = math.inf
        self._was_ready = False  # all slots have been ready together: from then on, a failed start does not halt
        self._halted = False
        self._status = 0
        self._reason = ""
        self._ticked = 0.0
        self._crash_loop_logged = -math.inf
        self._now = 0.0
        self._effects: list[Effect] = []

    @property
    def workers(self) -> list[Slot]:
        """The slots of the workers, in order."""
        return [slot for slot in self.slots.values() if slot.number != BROKER]

    @property
    def ready(self) -> bool:
        """Whether every slot is ready and the pool is not stopping."""
        return not self.stopping and all(slot.state is SlotState.READY for slot in self.slots.values())

    @property
    def serving(self) -> bool:
        """Whether the pool is ready, and the loops of the broker and of at least one worker turn."""
        turning = {number for number, slot in self.slots.items() if self.is_up(slot)}
        return self.ready and (BROKER in turning or BROKER not in self.slots) and bool(turning - {BROKER})

    def is_up(self, slot: Slot) -> bool:
        """Whether the slot's process is ready, and its loop has turned in the last seconds."""
        return slot.state is SlotState.READY and self._now - slot.alive_at < _UNRESPONSIVE

    # Events.

    def start(self, now: float) -> list[Effect]:
        """Start all processes. The first event, and once only."""
        self._now = self._ticked = now
        for slot in self.slots.values():
            slot.deadline = now
            self._fire(slot, PoolEvent.DEADLINE)
        return self._take_effects()

    def process_ready(self, number: int, now: float) -> list[Effect]:
        """The slot's process reports that it is ready."""
        return self._event(number, PoolEvent.READY, now)

    def start_failed(self, number: int, reason: str, status: int, now: float) -> list[Effect]:
        """The slot's process reports that it can't start, for `reason` (one line). It will exit with `status`."""
        slot = self.slots[number]
        if slot.state is SlotState.STARTING:
            slot.reason, slot.explanation = _exit_reason(status), f"can't start: {reason}"
            slot.failed_with = status
        return self._event(number, PoolEvent.START_FAILED, now)

    def broker_link_lost(self, number: int, now: float) -> list[Effect]:
        """The slot's worker has lost its stream to the broker. A tick at which both run replaces it."""
        return self._event(number, PoolEvent.BROKER_LINK_LOST, now)

    def control_link_lost(self, number: int, now: float) -> list[Effect]:
        """The control link to the slot's process ended. The process is exiting, or broken and must exit."""
        return self._event(number, PoolEvent.CONTROL_LINK_LOST, now)

    def memory_exceeded(self, number: int, size: int, now: float) -> list[Effect]:
        """The slot's worker uses `size` bytes of memory, more than it may: drain and replace it.

        Only one worker at a time: without effect unless all slots are ready. Without effect too on a worker that has
        just replaced another one for this reason: the intervals between such replacements grow.
        """
        slot = self.slots[number]
        pause = min(_MEMORY_PAUSE * 2.0 ** min(slot.bloated - 1, 30), _MEMORY_PAUSE_MAX) if slot.bloated else 0.0
        ready_for = now - slot.since
        if not self.ready or ready_for < pause:
            return []
        # Past twice the pause its memory was below the limit at the end of the pause, so it has grown slowly.
        slot.bloated = 1 if ready_for >= max(2 * pause, self._settings.restart_reset) else slot.bloated + 1
        slot.reason = "bloated"
        slot.explanation = f"used {size / 2**20:.0f} MiB of memory (loop.max_rss) and was drained"
        return self._event(number, PoolEvent.MEMORY_EXCEEDED, now)

    def process_exited(self, number: int, status: int, now: float) -> list[Effect]:
        """The slot's process has exited. status: its exit status, or minus the signal that killed it."""
        slot = self.slots[number]
        slot.reason, slot.explanation = slot.reason or _exit_reason(status), slot.explanation or _describe_exit(status)
        self._now = now
        if status == EX_CONFIG and slot.state is SlotState.STARTING:
            self._give_up(slot, EX_CONFIG)
        return self._event(number, PoolEvent.EXITED, now)

    def tick(self, now: float, beats: Mapping[int, float]) -> list[Effect]:
        """Time has passed, every TICK seconds. beats: by slot, when its process's loop last turned, where known."""
        self._now = now
        stall = now - self._ticked - TICK
        self._ticked = now
        if stall > _LATE:
            self._excuse(stall)
        for slot in self.slots.values():
            self._note_beat(slot, beats.get(slot.number, 0.0))
            if now >= slot.deadline:
                self._fire(slot, PoolEvent.DEADLINE)
            elif 0 < self._stuck < now - slot.alive_at:
                self._fire(slot, PoolEvent.NO_BEAT)
            self._forgive_deaths(slot)
            self._connect_to_broker(slot)
        if now >= self._stop_deadline:
            self._fire_all(self.slots.values(), PoolEvent.KILL)
        self._log_crash_loops()
        return self._take_effects()

    def stop(self, now: float) -> list[Effect]:
        """Stop all processes: drain the workers, then the broker, then halt. A second call kills all by SIGKILL."""
        self._now = now
        if self.stopping:
            self._stop_deadline = min(self._stop_deadline, now)
            self._fire_all(self.slots.values(), PoolEvent.KILL)
            return self._take_effects()
        self._begin_stop(self._stop_timeout)
        self._fire_all(self.workers, PoolEvent.STOP)
        return self._take_effects()

    # The actions of TRANSITIONS.

    def _spawn(self, slot: Slot) -> None:
        slot.reason = slot.explanation = ""
        slot.connected = False
        self._enter(slot, SlotState.STARTING, self._now + self._settings.start_timeout)
        self._effects.append(SpawnProcess(slot.number))
        self._connect_to_broker(slot)

    def _become_ready(self, slot: Slot) -> None:
        self._enter(slot, SlotState.READY)
        if not slot.in_crash_loop:
            self._log(f"{slot.name} is ready")
        if slot.number == BROKER:
            for worker in self.workers:
                worker.connected = False
                self._connect_to_broker(worker)
        if self.ready and not self._was_ready:
            self._was_ready = True
            self._effects.append(NotifySystemd("ready"))

    def _await_failed_exit(self, slot: Slot) -> None:
        self._enter(slot, SlotState.LEAVING, self._now + _EXIT_TIMEOUT)
        self._give_up(slot, slot.failed_with)

    def _disconnect(self, slot: Slot) -> None:
        slot.connected = False

    def _await_exit(self, slot: Slot) -> None:
        self._enter(slot, SlotState.LEAVING, self._now + _EXIT_TIMEOUT)

    def _drain(self, slot: Slot) -> None:
        self._enter(slot, SlotState.LEAVING, self._leave_deadline(slot))
        # Less time than until SIGKILL, so that the process can exit by itself.
        self._effects.append(DrainProcess(slot.number, 0.9 * (slot.deadline - self._now)))

    def _terminate(self, slot: Slot) -> None:
        # A starting process may not read its control link yet, and has no clients to drain.
        self._enter(slot, SlotState.LEAVING, self._leave_deadline(slot))
        self._effects.append(SignalProcess(slot.number, signals.SIGTERM))

    def _shorten_deadline(self, slot: Slot) -> None:
        slot.deadline = min(slot.deadline, self._leave_deadline(slot))

    def _kill(self, slot: Slot) -> None:
        self._enter(slot, SlotState.KILLED)
        self._effects.append(SignalProcess(slot.number, signals.SIGKILL))

    def _kill_late_start(self, slot: Slot) -> None:
        timeout = self._settings.start_timeout
        slot.reason = slot.reason or "start_timeout"
        slot.explanation = (
            slot.explanation or f"was not ready within {timeout:g} s and was killed (workers.start_timeout)"
        )
        # The stacks name the line of the application that hangs.
        self._enter(slot, SlotState.LEAVING, self._now + _DUMP_TIME)
        self._effects.append(DumpProcessStacks(slot.number))

    def _kill_overdue(self, slot: Slot) -> None:
        slot.reason = slot.reason or "link"
        slot.explanation = (
            slot.explanation or f"closed its control link, did not exit within {_EXIT_TIMEOUT:g} s and was killed"
        )
        if self.stopping:
            self._log(f"{slot.name} did not finish in time and was killed (shutdown.timeout)", is_error=True)
        self._kill(slot)

    def _dump_stacks(self, slot: Slot) -> None:
        slot.reason = "stuck"
        slot.explanation = f"did not turn its loop for {self._stuck:g} s and was killed (loop.stuck)"
        self._enter(slot, SlotState.LEAVING, self._now + _DUMP_TIME)
        self._effects.append(DumpProcessStacks(slot.number))

    def _drain_and_replace(self, slot: Slot) -> None:
        self._enter(slot, SlotState.LEAVING, self._now + self._stop_timeout)
        self._effects.append(DrainProcess(slot.number, 0.9 * self._stop_timeout))

    def _schedule_restart(self, slot: Slot) -> None:
        if self.stopping:
            self._retire(slot)
            return
        slot.restarts[slot.reason] += 1
        delay = self._settings.restart_delay
        if slot.reason != "bloated":  # the replacement of a worker that was drained need not wait
            slot.deaths += 1
            delay = min(delay * 2.0 ** min(slot.deaths - 1, 30), self._settings.restart_delay_max)
        if not slot.in_crash_loop:
            # A process that was asked to end by SIGTERM, and has ended in order, is no error.
            self._log(f"{slot.name} {slot.explanation}; restarting it in {delay:g} s", is_error=slot.reason != "exit")
        self._enter(slot, SlotState.WAITING, self._now + delay)

    def _retire(self, slot: Slot) -> None:
        self._enter(slot, SlotState.GONE)

    # Shared by events and actions.

    def _event(self, number: int, event: PoolEvent, now: float) -> list[Effect]:
        self._now = now
        self._fire(self.slots[number], event)
        return self._take_effects()

    def _fire(self, slot: Slot, event: PoolEvent) -> None:
        action = TRANSITIONS.get((slot.state, event))
        if action is not None:
            action(self, slot)

    def _fire_all(self, slots: Iterable[Slot], event: PoolEvent) -> None:
        for slot in slots:
            self._fire(slot, event)

    def _enter(self, slot: Slot, state: SlotState, deadline: float = math.inf) -> None:
        slot.state, slot.since, slot.alive_at, slot.deadline = state, self._now, self._now, deadline

    def _log(self, line: str, is_error: bool = False) -> None:
        self._effects.append(LogLine(line, is_error))

    def _leave_deadline(self, slot: Slot) -> float:
        # The broker serves until the last worker has exited, so the last tenth of the time is reserved for the broker.
        share = 1.0 if slot.number == BROKER else 0.9
        return self._stop_deadline - (1.0 - share) * self._stop_timeout

    def _begin_stop(self, timeout: float) -> None:
        self.stopping = True
        self._stop_deadline = self._now + timeout
        self._effects.append(NotifySystemd("stopping"))
        self._fire_all([slot for slot in self.slots.values() if slot.state is SlotState.WAITING], PoolEvent.STOP)

    def _give_up(self, slot: Slot, status: int) -> None:
        """Stop the pool with `status`, because its first start failed for a reason that the process has reported.

        The service manager restarts the server unless the status is EX_CONFIG. Without effect once all slots have been
        ready.
        """
        if self.stopping or self._was_ready:
            return
        self._status, self._reason = status, f"{slot.name} {slot.explanation}"
        self._begin_stop(_EXIT_TIMEOUT)
        self._fire_all([other for other in self.slots.values() if other is not slot], PoolEvent.KILL)

    def _take_effects(self) -> list[Effect]:
        """Return the effects of an event, including those of the next step of a stop."""
        if self.stopping and not self._halted:
            broker = self.slots.get(BROKER)
            if broker and all(worker.state is SlotState.GONE for worker in self.workers):
                self._fire(broker, PoolEvent.STOP)
            self._halt_if_empty()
        effects, self._effects = self._effects, []
        return effects

    def _halt_if_empty(self) -> None:
        """Halt once every process has exited, or has survived SIGKILL for _REAP_TIMEOUT seconds."""
        remaining = [slot for slot in self.slots.values() if slot.state is not SlotState.GONE]
        if any(slot.state is not SlotState.KILLED or self._now - slot.since < _REAP_TIMEOUT for slot in remaining):
            return
        self._halted = True
        for slot in remaining:
            remedy = "uninterruptible sleep; check disks and network mounts"
            self._log(f"{slot.name} survived SIGKILL and is left behind ({remedy})", is_error=True)
            self._retire(slot)
        self._effects.append(HaltService(self._status, self._reason))

    # Steps of a tick.

    def _excuse(self, stall: float) -> None:
        """Excuse all processes for `stall` seconds in which the supervisor was stopped, starved or asleep."""
        for slot in self.slots.values():
            slot.alive_at += stall
            if slot.state is SlotState.STARTING:
                slot.deadline += stall

    def _note_beat(self, slot: Slot, beat: float) -> None:
        if slot.alive_at < beat <= self._now:
            slot.alive_at = beat

    def _forgive_deaths(self, slot: Slot) -> None:
        ready_for = self._now - slot.since
        if slot.state is SlotState.READY and slot.deaths and ready_for >= self._settings.restart_reset:
            if slot.in_crash_loop:
                self._log(f"{slot.name} has recovered: ready for {ready_for:.0f} s")
            slot.deaths = 0

    def _connect_to_broker(self, slot: Slot) -> None:
        """Connect a worker that has no stream to the broker, as soon as the broker is ready."""
        broker = self.slots.get(BROKER)
        if broker is None or broker.state is not SlotState.READY or slot is broker:
            return
        # Starting workers too: a worker is ready only after it has reached the broker.
        if slot.state in (SlotState.STARTING, SlotState.READY) and not slot.connected:
            slot.connected = True
            self._effects.append(ConnectToBroker(slot.number))

    def _log_crash_loops(self) -> None:
        """Log all slots in a crash loop in one line, once every _CRASH_LOOP_INTERVAL seconds."""
        looping = [slot for slot in self.slots.values() if slot.in_crash_loop and slot.state is SlotState.WAITING]
        if self.stopping or not looping or self._now - self._crash_loop_logged < _CRASH_LOOP_INTERVAL:
            return
        self._crash_loop_logged = self._now
        slots = "; ".join(f"{slot.name} {slot.explanation}, {slot.deaths} times in a row" for slot in looping)
        pause = min(slot.deadline for slot in looping) - self._now
        advice = f"up to {self._settings.restart_delay_max:g} s apart (workers.restart_delay_max); see its errors above"
        self._log(f"crash loop: {slots}; next attempt in {pause:.1f} s, {advice}", is_error=True)


def _exit_reason(status: int) -> str:
    """Return the metrics' label for an exit status, one of a closed set."""
    if status < 0:
        return "signal"
    return {0: "exit", EX_CONFIG: "config"}.get(status, "error")


def _describe_exit(status: int) -> str:
    if status == 0:
        return "has drained and exited, though the supervisor did not ask for it (SIGTERM from another process?)"
    if status > 0:
        return f"exited with status {status}"
    try:
        return f"was killed by {signals.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"


TRANSITIONS: dict[tuple[SlotState, PoolEvent], Callable[[Pool, Slot], None]] = {
    (SlotState.WAITING, PoolEvent.DEADLINE): Pool._spawn,
    (SlotState.WAITING, PoolEvent.STOP): Pool._retire,
    (SlotState.WAITING, PoolEvent.KILL): Pool._retire,
    (SlotState.STARTING, PoolEvent.READY): Pool._become_ready,
    (SlotState.STARTING, PoolEvent.START_FAILED): Pool._await_failed_exit,
    (SlotState.STARTING, PoolEvent.CONTROL_LINK_LOST): Pool._await_exit,
    (SlotState.STARTING, PoolEvent.DEADLINE): Pool._kill_late_start,
    (SlotState.STARTING, PoolEvent.STOP): Pool._terminate,
    (SlotState.STARTING, PoolEvent.KILL): Pool._kill,
    (SlotState.STARTING, PoolEvent.BROKER_LINK_LOST): Pool._disconnect,
    (SlotState.STARTING, PoolEvent.EXITED): Pool._schedule_restart,
    (SlotState.READY, PoolEvent.BROKER_LINK_LOST): Pool._disconnect,
    (SlotState.READY, PoolEvent.CONTROL_LINK_LOST): Pool._await_exit,
    (SlotState.READY, PoolEvent.NO_BEAT): Pool._dump_stacks,
    (SlotState.READY, PoolEvent.MEMORY_EXCEEDED): Pool._drain_and_replace,
    (SlotState.READY, PoolEvent.STOP): Pool._drain,
    (SlotState.READY, PoolEvent.KILL): Pool._kill,
    (SlotState.READY, PoolEvent.EXITED): Pool._schedule_restart,
    (SlotState.LEAVING, PoolEvent.DEADLINE): Pool._kill_overdue,
    (SlotState.LEAVING, PoolEvent.STOP): Pool._shorten_deadline,
    (SlotState.LEAVING, PoolEvent.KILL): Pool._kill,
    (SlotState.LEAVING, PoolEvent.EXITED): Pool._schedule_restart,
    (SlotState.KILLED, PoolEvent.EXITED): Pool._schedule_restart,
}
