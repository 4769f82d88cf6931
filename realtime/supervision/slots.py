"""The records of the pool: slots, their processes, and the states and events of these.

Only `realtime.supervision.pool` changes them.
"""

from __future__ import annotations

import math
import signal as signals
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from enum import Enum

from msgspec import Struct

BROKER = -1
EX_CONFIG = 78
NOT_FORKED = 256
"""In place of the exit status of a process: the zygote has ended, for no fault of its own, before it could fork it."""

# Deaths in a row that make a crash loop.
_CRASH_LOOP_DEATHS = 3


class SlotState(Enum):
    """State of a process of a slot. WAITING: for the next start. PREPARING: it starts beside the serving process.
    HANDING_OVER: it serves its connections until others have taken them. LEAVING: it is expected to exit. GONE: the
    slot is empty for good, since the pool stops or has shrunk."""

    WAITING = "waiting"
    STARTING = "starting"
    PREPARING = "preparing"
    READY = "ready"
    HANDING_OVER = "handing over"
    LEAVING = "leaving"
    KILLED = "killed"
    GONE = "gone"


class PoolEvent(Enum):
    """Events of a process. DEADLINE: its deadline has passed. NO_BEAT: its loop has not turned for `loop.stuck`
    seconds. HANDED_OVER: it has handed over what it can. REMOVE: its slot is to be empty for good. STOP: exit in order.
    KILL: exit at once."""

    READY = "ready"
    START_FAILED = "start failed"
    BROKER_LINK_LOST = "broker link lost"
    CONTROL_LINK_LOST = "control link lost"
    HANDED_OVER = "handed over"
    EXITED = "exited"
    DEADLINE = "deadline"
    NO_BEAT = "no beat"
    REMOVE = "remove"
    STOP = "stop"
    KILL = "kill"


@dataclass(slots=True, eq=False)
class SlotProcess:
    """A process of a slot, or the room for its next one. Only the pool changes it.

    since: when it entered its state. deadline: when DEADLINE occurs, in any state. alive_at: when the process last
    showed that its loop turns; stalls of the supervisor move it forward. connected: whether the worker has a stream to
    the broker, or is about to get one. reason: why the process exits, as a label for the metrics; "" while unknown.
    explanation: the same for the log. failed_with: the exit status that it announced when it could not start.
    purpose: of a successor, the `replacement` of its slot.
    """

    slot: Slot
    generation: int = 0
    revision: int = 0
    state: SlotState = SlotState.WAITING
    since: float = 0.0
    deadline: float = math.inf
    alive_at: float = 0.0
    connected: bool = False
    reason: str = ""
    explanation: str = ""
    failed_with: int = EX_CONFIG
    purpose: str = ""

    @property
    def name(self) -> str:
        """The process's name in the log."""
        role = {self.slot.successor: "the successor of ", self.slot.predecessor: "the predecessor of "}
        return role.get(self, "") + self.slot.name

    def note_failed_start(self, reason: str, status: int) -> None:
        """Note that it can't start, for `reason`, and will exit with `status`."""
        self.reason, self.explanation, self.failed_with = _exit_reason(status), f"can't start: {reason}", status

    def note_exit(self, status: int) -> None:
        """Note an exit, unless a reason is known."""
        self.reason = self.reason or _exit_reason(status)
        self.explanation = self.explanation or _describe_exit(status)

    @property
    def exists(self) -> bool:
        """Whether there is a process."""
        return self.state not in (SlotState.WAITING, SlotState.GONE)


class SlotRecord(Struct, frozen=True):
    """A settled slot, for another supervisor. The fields are those of `Slot` and of its process."""

    number: int
    generation: int
    since: float
    deaths: int
    bloated: int
    recycle_after: float
    restarts: dict[str, int]


@dataclass(slots=True, eq=False)
class Slot:
    """One place for a process. Only its pool changes it.

    process: the one that serves, or the room for it. successor, predecessor: of a process that is being replaced.
    replacement: why the process is to be replaced, as a
    label for the metrics; "" for no reason. is_new: whether it was added to a running pool and has not been ready
    yet. is_removed: whether the slot is to be empty for good. deaths: deaths in a
    row. bloated: replacements for too much memory in a row. recycle_after: time before which it is not replaced
    for its age or memory again, since the latest attempt has failed. restarts: number of replaced processes by reason.
    """

    number: int
    process: SlotProcess = field(init=False)
    successor: SlotProcess | None = None
    predecessor: SlotProcess | None = None
    replacement: str = ""
    is_new: bool = False
    is_removed: bool = False
    deaths: int = 0
    bloated: int = 0
    recycle_after: float = 0.0
    restarts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.process = SlotProcess(self)

    def record(self) -> SlotRecord:
        """Return the state of a settled slot."""
        return SlotRecord(
            self.number,
            self.process.generation,
            self.since,
            self.deaths,
            self.bloated,
            self.recycle_after,
            dict(self.restarts),
        )

    @classmethod
    def resume(cls, record: SlotRecord, now: float) -> Slot:
        """Make a slot whose process serves already."""
        slot = cls(record.number, deaths=record.deaths, bloated=record.bloated, recycle_after=record.recycle_after)
        slot.restarts.update(record.restarts)
        process = slot.process
        process.generation, process.state = record.generation, SlotState.READY
        process.since, process.alive_at, process.connected = record.since, now, True
        return slot

    def count_death(self, process: SlotProcess) -> None:
        """Count the death of a process that was not asked to end."""
        self.restarts[process.reason] += 1
        self.deaths += process.reason != _exit_reason(NOT_FORKED)

    @staticmethod
    def describe_crash_loop(slots: Collection[Slot], now: float, restart_delay_max: float) -> str:
        """Describe slots in a crash loop, which wait for their next start, in one line of the log."""
        each = "; ".join(f"{slot.name} {slot.process.explanation}, {slot.deaths} times in a row" for slot in slots)
        pause = min(slot.process.deadline for slot in slots) - now
        advice = f"up to {restart_delay_max:g} s apart (workers.restart_delay_max); see its errors above"
        return f"crash loop: {each}; next attempt in {pause:.1f} s, {advice}"

    @property
    def name(self) -> str:
        """The slot's name in the log."""
        return "broker" if self.number == BROKER else f"worker {self.number}"

    @property
    def state(self) -> SlotState:
        """The state of its process."""
        return self.process.state

    @property
    def since(self) -> float:
        """When its process entered its state."""
        return self.process.since

    @property
    def processes(self) -> list[SlotProcess]:
        """All its processes."""
        return [process for process in self.places if process.exists]

    @property
    def places(self) -> list[SlotProcess]:
        """All its processes, and the room for the next one."""
        return [place for place in (self.process, self.successor, self.predecessor) if place is not None]

    @property
    def is_settled(self) -> bool:
        """Whether its process serves alone."""
        return self.state is SlotState.READY and self.successor is None and self.predecessor is None

    @property
    def in_crash_loop(self) -> bool:
        """Whether the process has died too often in a row."""
        return self.deaths >= _CRASH_LOOP_DEATHS


def _exit_reason(status: int) -> str:
    """Return the metrics' label for an exit status, one of a closed set."""
    if status < 0:
        return "signal"
    return {0: "exit", EX_CONFIG: "config", NOT_FORKED: "zygote"}.get(status, "error")


def _describe_exit(status: int) -> str:
    """Describe an exit status for the log."""
    if status == 0:
        return "has drained and exited, though the supervisor did not ask for it (SIGTERM from another process?)"
    if status == NOT_FORKED:
        return "was not started, as the zygote has ended"
    if status > 0:
        return f"exited with status {status}"
    try:
        return f"was killed by {signals.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"
