"""The pool of processes as a table: events in, effects out. No process, socket, signal or clock is touched here.

A *slot* is a place for one process: 0 to N-1 for the workers, BROKER for the broker. Each method of `Pool` is one
event. It returns the effects that the caller carries out at once, in order; times are CLOCK_MONOTONIC seconds. What an
event means to a slot stands in `TRANSITIONS`, by the state that the slot is in; a pair that is not in the table is of no
consequence there (the message of a process that is being killed, say).

    WAITING ──due──▶ STARTING ──ready──▶ READY ──told to drain, hung up──▶ LEAVING ──deadline──▶ KILLED
       ▲                 │ any                │ stuck, bloated ─▶ LEAVING      │                     │
       └─────────────────┴───── exited ───────┴────────────────────────────────┴─────────────────────┘
                           (GONE, and not WAITING, once the pool stops)

A death is answered by a new process after a delay that doubles with each death in a row. The third in a row is a crash
loop: from then on the pool tells of all such slots in one line, and once a minute while it lasts.
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

# Seconds between two ticks, and how late one may be before the time until then is held against nobody.
TICK = 0.1
_LATE = 0.3
# Deaths in a row that make a crash loop, and seconds between two lines about it.
_LOOP = 3
_LOOP_INTERVAL = 60.0
# Seconds for a process to end that said it would, or whose control link has ended.
_FAREWELL = 5.0
# Seconds for a process that does not turn its loop to write its stacks, which takes milliseconds, before it is killed.
_EXAMINATION = 0.3
# Seconds after which a stopping pool gives up on a process that even SIGKILL did not end (uninterruptible sleep).
_REAP = 2.0


class SlotState(Enum):
    """Where a slot is. LEAVING: its process is expected to end. GONE: for good, the pool stops."""

    WAITING = "waiting"
    STARTING = "starting"
    READY = "ready"
    LEAVING = "leaving"
    KILLED = "killed"
    GONE = "gone"


class PoolEvent(Enum):
    """What can happen to a slot. DEADLINE: its deadline has passed. NO_BEAT: no beat for too long. MEMORY_EXCEEDED: it uses more
    memory than it may."""

    READY = "ready"
    START_FAILED = "start failed"
    BROKER_LINK_LOST = "broker_link_lost"
    CONTROL_LINK_LOST = "hung up"
    EXITED = "exited"
    DEADLINE = "due"
    NO_BEAT = "silent"
    MEMORY_EXCEEDED = "bloated"
    STOP = "stop"
    KILL = "kill"


# Effects.


class SpawnProcess(Struct, frozen=True):
    """Start the slot's process. If that fails, answer with `process_exited`."""

    slot: int


class DrainProcess(Struct, frozen=True):
    """Tell the slot's process to finish within `timeout` seconds and exit."""

    slot: int
    timeout: float


class SignalProcess(Struct, frozen=True):
    """Send the slot's process a signal."""

    slot: int
    number: int


class DumpProcessStacks(Struct, frozen=True):
    """Have the slot's process, which does not turn its loop, write all its stacks; it is killed in a moment."""

    slot: int


class ConnectToBroker(Struct, frozen=True):
    """Give the slot's worker and the broker a fresh stream to each other. If that fails, answer with `broker_link_lost`."""

    slot: int


class NotifySystemd(Struct, frozen=True):
    """Tell the service manager: "ready" or "stopping". Each once at most."""

    state: str


class LogLine(Struct, frozen=True):
    """A line for the log."""

    line: str
    is_error: bool = False


class HaltService(Struct, frozen=True):
    """Nothing is left to do: exit with `status`. reason: one line, "" for status 0. The last effect of all."""

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
    """One place for a process. Read by anybody, changed by its pool alone.

    deadline: when DEADLINE comes, in any state. heard: when its process last gave a sign of life, moved on by the
    supervisor's own stalls. deaths: in a row. cause, reason: why its process is ending, as far as we know.
    """

    number: int
    state: SlotState = SlotState.WAITING
    since: float = 0.0
    deadline: float = math.inf
    heard: float = 0.0
    linked: bool = False
    deaths: int = 0
    cause: str = ""
    reason: str = ""
    restarts: Counter[str] = field(default_factory=Counter)

    @property
    def name(self) -> str:
        """As the log and the metrics call it."""
        return "broker" if self.number == BROKER else f"worker {self.number}"

    @property
    def in_crash_loop(self) -> bool:
        """Whether it is in a crash loop."""
        return self.deaths >= _LOOP

    @property
    def has_process(self) -> bool:
        """Whether a process is there."""
        return self.state not in (SlotState.WAITING, SlotState.GONE)


class Pool:
    """Wanted processes against running ones. Its methods are the events; they must come in the order of time."""

    def __init__(
        self, workers: int, settings: WorkersSettings, loop: LoopSettings, stop_timeout: float, *, broker: bool = True
    ) -> None:
        """workers: how many, at least 1. stop_timeout: seconds from `stop` to SIGKILL."""
        order = [BROKER, *range(workers)] if broker else list(range(workers))
        self.slots = {number: Slot(number) for number in order}
        self.stopping = False
        self._settings = settings
        self._stuck = loop.stuck
        self._stop_timeout = stop_timeout
        self._stop_deadline = math.inf
        self._settled = False  # all were ready at once: from now on a failed start stops nobody else
        self._halted = False
        self._status = 0
        self._reason = ""
        self._ticked = 0.0
        self._loop_told = -math.inf
        self._now = 0.0
        self._effects: list[Effect] = []

    @property
    def workers(self) -> list[Slot]:
        """The slots of the workers, in order."""
        return [slot for slot in self.slots.values() if slot.number != BROKER]

    @property
    def ready(self) -> bool:
        """Whether every slot is ready, and is to stay so."""
        return not self.stopping and all(slot.state is SlotState.READY for slot in self.slots.values())

    # Events.

    def start(self, now: float) -> list[Effect]:
        """Start everything. Once, and first."""
        self._now = self._ticked = now
        for slot in self.slots.values():
            slot.deadline = now
            self._fire(slot, PoolEvent.DEADLINE)
        return self._conclude()

    def process_ready(self, number: int, now: float) -> list[Effect]:
        """The slot's process says that it is ready."""
        return self._event(number, PoolEvent.READY, now)

    def start_failed(self, number: int, reason: str, now: float) -> list[Effect]:
        """The slot's process says that it can't start, and why; it will exit with status 78."""
        slot = self.slots[number]
        if slot.state is SlotState.STARTING:
            slot.reason = f"can't start: {reason}"
        return self._event(number, PoolEvent.START_FAILED, now)

    def broker_link_lost(self, number: int, now: float) -> list[Effect]:
        """The slot's worker has no stream to the broker. They are introduced again at the next tick, or when both are
        there."""
        return self._event(number, PoolEvent.BROKER_LINK_LOST, now)

    def control_link_lost(self, number: int, now: float) -> list[Effect]:
        """The control link to the slot's process ended: it is ending, or out of order, and is not to stay."""
        return self._event(number, PoolEvent.CONTROL_LINK_LOST, now)

    def memory_exceeded(self, number: int, size: int, now: float) -> list[Effect]:
        """The slot's worker uses `size` bytes of memory, which is too much: it drains and is replaced.

        One at a time: without effect while any other process is missing.
        """
        slot = self.slots[number]
        if not self.ready:
            return []
        slot.cause, slot.reason = "bloated", f"used {size / 2**20:.0f} MiB of memory and has left"
        return self._event(number, PoolEvent.MEMORY_EXCEEDED, now)

    def process_exited(self, number: int, status: int, now: float) -> list[Effect]:
        """The slot's process is no more. status: its exit status, or minus the signal that ended it."""
        slot = self.slots[number]
        slot.cause, slot.reason = slot.cause or _cause(status), slot.reason or _describe(status)
        self._now = now
        if status == EX_CONFIG and slot.state is SlotState.STARTING:
            self._give_up(slot)
        return self._event(number, PoolEvent.EXITED, now)

    def tick(self, now: float, beats: Mapping[int, float]) -> list[Effect]:
        """Time has passed. Every TICK seconds. beats: by slot, when its process's loop last turned, where known."""
        self._now = now
        stall = now - self._ticked - TICK
        self._ticked = now
        if stall > _LATE:
            self._excuse(stall)
        for slot in self.slots.values():
            self._hear(slot, beats.get(slot.number, 0.0))
            if now >= slot.deadline:
                self._fire(slot, PoolEvent.DEADLINE)
            elif 0 < self._stuck < now - slot.heard:
                self._fire(slot, PoolEvent.NO_BEAT)
            self._judge_health(slot)
            self._introduce(slot)
        if now >= self._stop_deadline:
            self._each(self.slots.values(), PoolEvent.KILL)
        self._report_loops()
        return self._conclude()

    def stop(self, now: float) -> list[Effect]:
        """End everything: the workers drain, then the broker ends, then Halt. A second time: quickly, by SIGKILL."""
        self._now = now
        if self.stopping:
            self._stop_deadline = min(self._stop_deadline, now)
            self._each(self.slots.values(), PoolEvent.KILL)
            return self._conclude()
        self._begin_stop(self._stop_timeout)
        self._each(self.workers, PoolEvent.STOP)
        return self._conclude()

    # The table's actions.

    def _spawn(self, slot: Slot) -> None:
        slot.cause = slot.reason = ""
        slot.linked = False
        self._enter(slot, SlotState.STARTING, self._now + self._settings.start_timeout)
        self._effects.append(SpawnProcess(slot.number))
        self._introduce(slot)

    def _serve(self, slot: Slot) -> None:
        self._enter(slot, SlotState.READY)
        if not slot.in_crash_loop:
            self._report(f"{slot.name} is ready")
        if slot.number == BROKER:
            for worker in self.workers:
                worker.linked = False
                self._introduce(worker)
        if self.ready and not self._settled:
            self._settled = True
            self._effects.append(NotifySystemd("ready"))

    def _fail(self, slot: Slot) -> None:
        slot.cause = "config"
        self._enter(slot, SlotState.LEAVING, self._now + _FAREWELL)
        self._give_up(slot)

    def _unlink(self, slot: Slot) -> None:
        slot.linked = False

    def _dismiss(self, slot: Slot) -> None:
        self._enter(slot, SlotState.LEAVING, self._now + _FAREWELL)

    def _tell(self, slot: Slot) -> None:
        self._enter(slot, SlotState.LEAVING, self._leave_deadline(slot))
        # A little less than it has until SIGKILL, so that it can end by itself.
        self._effects.append(DrainProcess(slot.number, 0.9 * (slot.deadline - self._now)))

    def _terminate(self, slot: Slot) -> None:
        # Not yet up: it may not read its link, and has no clients to tell.
        self._enter(slot, SlotState.LEAVING, self._leave_deadline(slot))
        self._effects.append(SignalProcess(slot.number, signals.SIGTERM))

    def _hasten(self, slot: Slot) -> None:
        slot.deadline = min(slot.deadline, self._leave_deadline(slot))

    def _kill(self, slot: Slot) -> None:
        self._enter(slot, SlotState.KILLED)
        self._effects.append(SignalProcess(slot.number, signals.SIGKILL))

    def _kill_late(self, slot: Slot) -> None:
        slot.cause = slot.cause or "start_timeout"
        slot.reason = slot.reason or f"was not ready within {self._settings.start_timeout:g} s and was killed"
        self._kill(slot)

    def _kill_overdue(self, slot: Slot) -> None:
        slot.cause = slot.cause or "link"
        slot.reason = slot.reason or "did not end in time and was killed"
        if self.stopping:
            self._report(f"{slot.name} did not finish in time: killed", is_error=True)
        self._kill(slot)

    def _examine(self, slot: Slot) -> None:
        slot.cause, slot.reason = "stuck", f"did not turn its loop for {self._stuck:g} s and was killed"
        self._enter(slot, SlotState.LEAVING, self._now + _EXAMINATION)
        self._effects.append(DumpProcessStacks(slot.number))

    def _replace(self, slot: Slot) -> None:
        self._enter(slot, SlotState.LEAVING, self._now + self._stop_timeout)
        self._effects.append(DrainProcess(slot.number, 0.9 * self._stop_timeout))

    def _bury(self, slot: Slot) -> None:
        if self.stopping:
            self._vanish(slot)
            return
        slot.deaths += 1
        slot.restarts[slot.cause] += 1
        delay = min(self._settings.restart_delay * 2.0 ** min(slot.deaths - 1, 30), self._settings.restart_delay_max)
        if not slot.in_crash_loop:
            self._report(f"{slot.name} {slot.reason}; starting it again in {delay:g} s", is_error=True)
        self._enter(slot, SlotState.WAITING, self._now + delay)

    def _vanish(self, slot: Slot) -> None:
        self._enter(slot, SlotState.GONE)

    # What they share.

    def _event(self, number: int, event: PoolEvent, now: float) -> list[Effect]:
        self._now = now
        self._fire(self.slots[number], event)
        return self._conclude()

    def _fire(self, slot: Slot, event: PoolEvent) -> None:
        action = TRANSITIONS.get((slot.state, event))
        if action is not None:
            action(self, slot)

    def _each(self, slots: Iterable[Slot], event: PoolEvent) -> None:
        for slot in slots:
            self._fire(slot, event)

    def _enter(self, slot: Slot, state: SlotState, deadline: float = math.inf) -> None:
        slot.state, slot.since, slot.heard, slot.deadline = state, self._now, self._now, deadline

    def _report(self, line: str, is_error: bool = False) -> None:
        self._effects.append(LogLine(line, is_error))

    def _leave_deadline(self, slot: Slot) -> float:
        # The broker serves until the last worker has gone: the workers leave it the last tenth.
        share = 1.0 if slot.number == BROKER else 0.9
        return self._stop_deadline - (1.0 - share) * self._stop_timeout

    def _begin_stop(self, timeout: float) -> None:
        self.stopping = True
        self._stop_deadline = self._now + timeout
        self._effects.append(NotifySystemd("stopping"))
        self._each([slot for slot in self.slots.values() if slot.state is SlotState.WAITING], PoolEvent.STOP)

    def _give_up(self, slot: Slot) -> None:
        """The pool's first start failed, on account of what no restart mends: stop, unless it had come up before."""
        if self.stopping or self._settled:
            return
        self._status, self._reason = EX_CONFIG, f"{slot.name} {slot.reason}"
        self._begin_stop(_FAREWELL)
        self._each([other for other in self.slots.values() if other is not slot], PoolEvent.KILL)

    def _conclude(self) -> list[Effect]:
        """The effects of the event, with those of a stop that has come to its next step."""
        if self.stopping and not self._halted:
            broker = self.slots.get(BROKER)
            if broker and all(worker.state is SlotState.GONE for worker in self.workers):
                self._fire(broker, PoolEvent.STOP)
            self._halt_if_over()
        effects, self._effects = self._effects, []
        return effects

    def _halt_if_over(self) -> None:
        left = [slot for slot in self.slots.values() if slot.state is not SlotState.GONE]
        if any(slot.state is not SlotState.KILLED or self._now - slot.since < _REAP for slot in left):
            return
        self._halted = True
        for slot in left:
            self._report(f"{slot.name} can't be ended: left behind", is_error=True)
            self._vanish(slot)
        self._effects.append(HaltService(self._status, self._reason))

    # What a tick looks at.

    def _excuse(self, stall: float) -> None:
        """We were late ourselves: stopped, starved, or asleep with the machine. Nobody is judged for that time."""
        for slot in self.slots.values():
            slot.heard += stall
            if slot.state is SlotState.STARTING:
                slot.deadline += stall

    def _hear(self, slot: Slot, beat: float) -> None:
        if slot.heard < beat <= self._now:
            slot.heard = beat

    def _judge_health(self, slot: Slot) -> None:
        if slot.state is SlotState.READY and slot.deaths and self._now - slot.since >= self._settings.restart_reset:
            if slot.in_crash_loop:
                self._report(f"{slot.name} is well again")
            slot.deaths = 0

    def _introduce(self, slot: Slot) -> None:
        # A worker that still starts too: it is ready only once it has reached the broker.
        broker = self.slots.get(BROKER)
        there = slot.state in (SlotState.STARTING, SlotState.READY)
        if broker is not None and broker.state is SlotState.READY and slot is not broker and there and not slot.linked:
            slot.linked = True
            self._effects.append(ConnectToBroker(slot.number))

    def _report_loops(self) -> None:
        in_crash_loop = [slot for slot in self.slots.values() if slot.in_crash_loop and slot.state is SlotState.WAITING]
        if self.stopping or not in_crash_loop or self._now - self._loop_told < _LOOP_INTERVAL:
            return
        self._loop_told = self._now
        each = "; ".join(f"{slot.name} {slot.reason}, {slot.deaths} times in a row" for slot in in_crash_loop)
        pause = min(slot.deadline for slot in in_crash_loop) - self._now
        self._report(f"crash loop: {each}; trying again in {pause:.1f} s, then ever more rarely", is_error=True)


def _cause(status: int) -> str:
    """A label for the metrics: one of a closed set."""
    if status < 0:
        return "signal"
    return {0: "exit", EX_CONFIG: "config"}.get(status, "error")


def _describe(status: int) -> str:
    if status >= 0:
        return f"exited with status {status}"
    try:
        return f"was ended by {signals.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"


TRANSITIONS: dict[tuple[SlotState, PoolEvent], Callable[[Pool, Slot], None]] = {
    (SlotState.WAITING, PoolEvent.DEADLINE): Pool._spawn,
    (SlotState.WAITING, PoolEvent.STOP): Pool._vanish,
    (SlotState.WAITING, PoolEvent.KILL): Pool._vanish,
    (SlotState.STARTING, PoolEvent.READY): Pool._serve,
    (SlotState.STARTING, PoolEvent.START_FAILED): Pool._fail,
    (SlotState.STARTING, PoolEvent.CONTROL_LINK_LOST): Pool._dismiss,
    (SlotState.STARTING, PoolEvent.DEADLINE): Pool._kill_late,
    (SlotState.STARTING, PoolEvent.STOP): Pool._terminate,
    (SlotState.STARTING, PoolEvent.KILL): Pool._kill,
    (SlotState.STARTING, PoolEvent.BROKER_LINK_LOST): Pool._unlink,
    (SlotState.STARTING, PoolEvent.EXITED): Pool._bury,
    (SlotState.READY, PoolEvent.BROKER_LINK_LOST): Pool._unlink,
    (SlotState.READY, PoolEvent.CONTROL_LINK_LOST): Pool._dismiss,
    (SlotState.READY, PoolEvent.NO_BEAT): Pool._examine,
    (SlotState.READY, PoolEvent.MEMORY_EXCEEDED): Pool._replace,
    (SlotState.READY, PoolEvent.STOP): Pool._tell,
    (SlotState.READY, PoolEvent.KILL): Pool._kill,
    (SlotState.READY, PoolEvent.EXITED): Pool._bury,
    (SlotState.LEAVING, PoolEvent.DEADLINE): Pool._kill_overdue,
    (SlotState.LEAVING, PoolEvent.STOP): Pool._hasten,
    (SlotState.LEAVING, PoolEvent.KILL): Pool._kill,
    (SlotState.LEAVING, PoolEvent.EXITED): Pool._bury,
    (SlotState.KILLED, PoolEvent.EXITED): Pool._bury,
}
