"""The records of the pool: slots, their processes, and the states and events of these.

Only `realtime.supervision.pool` changes them.
"""

from __future__ import annotations

import math
import signal as signals
from collections import Counter
from dataclasses import dataclass, field
from enum import Enum

BROKER = -1
EX_CONFIG = 78

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

    @property
    def exists(self) -> bool:
        """Whether there is a process."""
        return self.state not in (SlotState.WAITING, SlotState.GONE)


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


def exit_reason(status: int) -> str:
    """Return the metrics' label for an exit status, one of a closed set."""
    if status < 0:
        return "signal"
    return {0: "exit", EX_CONFIG: "config"}.get(status, "error")


def describe_exit(status: int) -> str:
    """Describe an exit status for the log."""
    if status == 0:
        return "has drained and exited, though the supervisor did not ask for it (SIGTERM from another process?)"
    if status > 0:
        return f"exited with status {status}"
    try:
        return f"was killed by {signals.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"
