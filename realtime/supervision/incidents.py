"""Blocked stretches of the workers' loops: when to take a stack, what it says, how often it happened. Without I/O.

An incident is one turn of one loop that took longer than `loop.lagging`, or a beat that is overdue by that much while
the loop seems to wait (its process was stopped, or another thread holds the interpreter's lock). While it lasts a stack
is asked for at once and then every SAMPLE_INTERVAL, MAX_SAMPLES times at most, never two at a time.

The supervisor looks at each worker every few milliseconds (`look`), carries out what is wanted, and brings what the
worker wrote (`record_stacks`). A stack that comes when the turn is over may be of another turn, and does not count.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from enum import Enum

from msgspec import Struct, field

from realtime.config.settings import LoopSettings
from realtime.supervision.stacks import CodeOrigin, Stack, StackFrame
from realtime.supervision.vitals import RunningHandler, Vitals

MAX_SAMPLES = 3
SAMPLE_INTERVAL = 1.0
MAX_INCIDENTS = 1000
# Places and handlers that are counted apart; further ones are counted together.
MAX_PLACES = 200
# Seconds between two lines about one place.
REPEAT_AFTER = 60.0
# Seconds of a block after which it is told of although it lasts.
_PATIENCE = 1.0
# Seconds for a process to write its stack.
_ANSWER = 0.5

# Characters that are kept of all stacks of a process that was stuck.
_STACKS_CHARS = 65_536

TURNED = "turned"
UNKNOWN = "unknown"
OTHER = "other"


class StackRequest(Enum):
    """What is to be asked of a worker now. STACK: of the loop's thread. STACKS: of all its threads."""

    STACK = "stack"
    STACKS = "stacks"


class Incident(Struct, kw_only=True):
    """One block. at: when it began, Unix time. duration: seconds, to the latest look while it `lasts`.

    place: "file:line" to blame, or UNKNOWN. thread: what is blamed is not the loop itself but a thread that holds the
    interpreter's lock. stack: the one that `place` is from, innermost call first. handler, subject: "" for none.
    ending: TURNED, or in a few words why the process ended. stacks: of all its threads, of a process that was stuck.
    """

    slot: int
    pid: int
    at: float
    duration: float = 0.0
    lasts: bool = True
    place: str = UNKNOWN
    function: str = ""
    handler: str = ""
    subject: str = ""
    thread: bool = False
    ending: str = TURNED
    samples: int = 0
    stack: list[str] = field(default_factory=list)
    stacks: str = ""


class Blocks(Struct):
    """How often one handler blocked at one place, and for how many seconds together."""

    count: int = 0
    seconds: float = 0.0


class IncidentLog:
    """The incidents of all workers: the latest MAX_INCIDENTS, the numbers by place, and the lines for the log."""

    def __init__(self) -> None:
        self.recent: deque[Incident] = deque(maxlen=MAX_INCIDENTS)
        self.blocks: dict[tuple[str, str], Blocks] = {}  # by handler and place
        self._told: dict[str, _LogThrottle] = {}

    def count(self, incident: Incident) -> None:
        """Count an incident that is over."""
        key = incident.handler, incident.place
        if key not in self.blocks and len(self.blocks) >= MAX_PLACES:
            key = OTHER, OTHER
        blocks = self.blocks.setdefault(key, Blocks())
        blocks.count += 1
        blocks.seconds += incident.duration

    def log_line(self, incident: Incident, now: float) -> str:
        """The line that tells of it; "" when its place was told of within REPEAT_AFTER seconds."""
        told = self._told.get(incident.place)
        if told is not None and now - told.at < REPEAT_AFTER:
            told.left_out += 1
            return ""
        if len(self._told) >= MAX_PLACES:
            self._told = {place: one for place, one in self._told.items() if now - one.at < REPEAT_AFTER}
            if len(self._told) >= MAX_PLACES:
                return ""
        self._told[incident.place] = _LogThrottle(now)
        more = f"; {told.left_out} times more since this was told last" if told and told.left_out else ""
        return describe(incident) + more


class _LogThrottle(Struct):
    """When a place was told of, and how often it was not since."""

    at: float
    left_out: int = 0


def describe(incident: Incident) -> str:
    """An incident in one line."""
    whose = f"a thread of worker {incident.slot}" if incident.thread else f"worker {incident.slot}"
    verb = "has blocked its loop" if incident.thread else "has been blocked" if incident.lasts else "was blocked"
    parts = [f"{whose} {verb} for {incident.duration:.3f} s"]
    if incident.place == UNKNOWN:
        parts.append("at a place that is not known")
    else:
        parts.append(f"at {incident.place} in {incident.function}")
    if incident.handler:
        subject = f" for {incident.subject}" if incident.subject else ""
        parts.append(f"({incident.handler}{subject})")
    return " ".join(parts)


class LoopInvestigation:
    """What is going on in one worker's process now. One for each process."""

    def __init__(self, slot: int, pid: int, loop: LoopSettings, origin: CodeOrigin, incidents: IncidentLog) -> None:
        self.incident: Incident | None = None
        self._slot = slot
        self._pid = pid
        self._limit = loop.lagging
        self._origin = origin
        self._incidents = incidents
        self._turn = 0  # what tells it from the next one: its beginning, or minus the beat that is overdue
        self._began = 0.0
        self._asked = 0.0
        self._answered = True
        self._looks_to_threads = 0  # until the other threads are asked for; 0: they are not
        self._places: Counter[str] = Counter()
        self._told = False

    def look(
        self, vitals: Vitals, blocked: float, running: RunningHandler | None, now: float, wall: float
    ) -> tuple[StackRequest | None, str]:
        """Take note of how the worker does. Returns what to ask of it, and a line for the log, "" for none.

        blocked: seconds that it does not turn already, see `Health`. running: its handler. wall: Unix time.
        """
        line = ""
        if self.incident is not None and not self._lasts(vitals):
            line = self._end_turn(vitals, now)
        if self.incident is None:
            if not 0 < self._limit <= blocked < math.inf:  # infinite: its page is nonsense
                return None, line
            self._open(vitals, blocked, now, wall)
        return self._want(running, now), line or self._tell(now)

    def record_stacks(self, stacks: list[Stack], vitals: Vitals, running: RunningHandler | None) -> None:
        """It wrote these stacks.

        vitals, running: as its page says after that; they show whether the turn still lasts.
        """
        self._answered = True
        if self.incident is None or not self._lasts(vitals):
            return
        main = [stack for stack in stacks if stack.is_main]
        others = [stack for stack in stacks if not stack.is_main]
        if not (self._turn < 0 and main and main[0].is_waiting):
            self._note(main, running, thread=False)
        elif others:
            self._note([stack for stack in others if not _is_idle(stack)], running, thread=True)
        else:
            # The loop waits for the interpreter's lock, which another thread holds; or the process was stopped, and
            # goes on this moment: then it has turned its loop after the next look.
            self._looks_to_threads = 2

    def record_final_stacks(self, text: str) -> None:
        """It is stuck and is about to be killed; text: the stacks of all its threads."""
        if self.incident is not None:
            self.incident.ending, self.incident.stacks = "stuck, killed", text[:_STACKS_CHARS]

    def close(self, ending: str, now: float) -> str:
        """The process is no more. ending: in a word, why. Returns a line for the log, "" for none."""
        if self.incident is None:
            return ""
        if self.incident.ending == TURNED:
            self.incident.ending = ending
        self.incident.duration = now - self._began
        return self._finish(now)

    def _lasts(self, vitals: Vitals) -> bool:
        return vitals.busy_since == self._turn if self._turn > 0 else vitals.beat == -self._turn

    def _open(self, vitals: Vitals, blocked: float, now: float, wall: float) -> None:
        self._turn = vitals.busy_since or -vitals.beat
        self._began = now - blocked
        self._asked, self._answered = 0.0, True
        self._looks_to_threads = 0
        self._places.clear()
        self._told = False
        self.incident = Incident(slot=self._slot, pid=self._pid, at=wall - blocked, duration=blocked)
        self._incidents.recent.append(self.incident)

    def _want(self, running: RunningHandler | None, now: float) -> StackRequest | None:
        incident = self.incident
        assert incident is not None
        incident.duration = now - self._began
        if running is not None and not incident.handler and self._turn > 0:
            incident.handler, incident.subject = running.handler, running.subject
        if not self._answered and now - self._asked < _ANSWER:
            return None
        if self._looks_to_threads:
            self._looks_to_threads -= 1
            if self._looks_to_threads:
                return None
            self._asked, self._answered = now, False
            return StackRequest.STACKS
        if incident.samples >= MAX_SAMPLES or (self._asked and now - self._asked < SAMPLE_INTERVAL):
            return None
        incident.samples += 1
        self._asked, self._answered = now, False
        return StackRequest.STACK

    def _note(self, stacks: list[Stack], running: RunningHandler | None, thread: bool) -> None:
        """Blame the place that was seen most often; the first one while there is no such."""
        incident = self.incident
        assert incident is not None
        for stack in stacks:
            frame = self._origin.frame_to_blame(stack)
            if frame is None:
                continue
            self._places[frame.place] += 1
            if self._places[frame.place] > self._places[incident.place]:
                incident.place, incident.function, incident.thread = frame.place, frame.function, thread
                incident.stack = [_describe_frame(one) for one in stack.frames]
                if not thread:
                    incident.handler = running.handler if running else ""
                    incident.subject = running.subject if running else ""
            return

    def _tell(self, now: float) -> str:
        incident = self.incident
        if incident is None or self._told or incident.duration < _PATIENCE:
            return ""
        self._told = True
        return self._incidents.log_line(incident, now)

    def _end_turn(self, vitals: Vitals, now: float) -> str:
        assert self.incident is not None
        self.incident.duration = now - self._began
        if vitals.block_since == self._turn:
            # Exactly, but without what the assess has excused.
            self.incident.duration = vitals.block_until / 1e9 - self._began
        return self._finish(now)

    def _finish(self, now: float) -> str:
        incident, self.incident = self.incident, None
        assert incident is not None
        incident.lasts = False
        self._incidents.count(incident)
        return "" if self._told else self._incidents.log_line(incident, now)


def _is_idle(stack: Stack) -> bool:
    """Whether a thread waits for work, and so can't be the one that holds the lock."""
    return not stack.frames or "/threading.py" in stack.frames[0].file or "/queue.py" in stack.frames[0].file


def _describe_frame(frame: StackFrame) -> str:
    return f"{frame.place} in {frame.function}"
