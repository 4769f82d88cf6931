"""Blocked stretches of the workers' loops: when to sample a stack, which code to blame, how often it blocks. No I/O.

An incident is one turn of a loop that takes longer than `loop.lagging`, or a beat that is overdue by that much while
the loop seems to wait (its process was stopped, or another thread holds the interpreter's lock). While an incident
lasts, the investigation requests a stack at once and then every SAMPLE_INTERVAL seconds, at most MAX_SAMPLES times and
never two at a time.

The supervisor checks each worker every few milliseconds (`update`), sends the request to the worker, and delivers the
stacks that the worker wrote (`record_stacks`). A stack that arrives after the end of the turn may be of another turn,
and does not count.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from enum import Enum

from msgspec import Struct, field

from realtime.config.settings import LoopSettings
from realtime.repetition import Repetition
from realtime.supervision.stacks import CodeOrigin, Stack, StackFrame
from realtime.supervision.vitals import LatestCalls, RunningHandler, Vitals

# Stacks sampled per incident, and seconds between two samples.
MAX_SAMPLES = 3
SAMPLE_INTERVAL = 1.0
# Incidents kept.
MAX_INCIDENTS = 1000
# Pairs of handler and place with counts of their own; all further ones share one count.
MAX_PLACES = 200
# A block still in progress is logged once it has lasted this many seconds.
_LONG_BLOCK = 1.0
# Seconds for a process to write its stack.
_ANSWER_TIMEOUT = 0.5
# Characters kept of the final stacks of a stuck process.
_MAX_STACKS_CHARS = 65_536
# The share of a block that the calls of one handler take, from which on they are to blame for it.
_BLAMED_SHARE = 0.5

TURNED = "turned"
UNKNOWN = "unknown"
MANY_CALLS = "many short calls"
OTHER = "other"


class StackRequest(Enum):
    """A request to a worker. STACK: the stack of the loop's thread. STACKS: the stacks of all threads."""

    STACK = "stack"
    STACKS = "stacks"


class Incident(Struct, kw_only=True):
    """One blocked stretch of a loop.

    at: its beginning, Unix time. duration: seconds; until the latest update while it `lasts`. place: the code to blame
    as "file:line", UNKNOWN, or MANY_CALLS of a handler. handler, subject: the running handler, "" for none. calls: of
    the handler in this turn, if several of them together make the block, else 0. thread: whether a thread that holds
    the interpreter's lock is to blame, instead of the loop itself. ending: TURNED, or a few words on the end of the
    process. relieved: seconds for which the worker's relief thread served its other clients. samples: stacks requested.
    stack: the stack with `place`, innermost call first. stacks: of a process killed as stuck, the stacks of all its
    threads.
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
    calls: int = 0
    thread: bool = False
    ending: str = TURNED
    relieved: float = 0.0
    samples: int = 0
    stack: list[str] = field(default_factory=list)
    stacks: str = ""


class Blocks(Struct):
    """Number and total seconds of one handler's blocks at one place, and the part of these that relief served."""

    count: int = 0
    seconds: float = 0.0
    relieved: float = 0.0


class IncidentLog:
    """The incidents of all workers: the latest MAX_INCIDENTS, the counts by place, and the lines for the log."""

    def __init__(self) -> None:
        self.recent: deque[Incident] = deque(maxlen=MAX_INCIDENTS)
        self.blocks: dict[tuple[str, str], Blocks] = {}  # by handler and place
        self._repetition: Repetition[tuple[str, str]] = Repetition(MAX_PLACES)  # by place, and the handler if unknown

    def count(self, incident: Incident) -> None:
        """Count an incident that has ended."""
        key = incident.handler, incident.place
        if key not in self.blocks and len(self.blocks) >= MAX_PLACES:
            key = OTHER, OTHER
        blocks = self.blocks.setdefault(key, Blocks())
        blocks.count += 1
        blocks.seconds += incident.duration
        blocks.relieved += incident.relieved

    def log_line(self, incident: Incident, now: float) -> str:
        """Return the log line about an incident; "" when its place was logged in the last minute."""
        cause = incident.place, incident.handler if incident.place in (UNKNOWN, MANY_CALLS) else ""
        left_out = self._repetition.admit(cause, now)
        if left_out is None:
            return ""
        return describe(incident) + (f"; {left_out} more times since the last such line" if left_out else "")


def describe(incident: Incident) -> str:
    """Describe an incident in one line."""
    subject = f"a thread of worker {incident.slot}" if incident.thread else f"worker {incident.slot}"
    verb = "has blocked its loop" if incident.thread else "has been blocked" if incident.lasts else "was blocked"
    parts = [f"{subject} {verb} for {incident.duration:.3f} s"]
    if incident.calls:
        parts.append(f"in {incident.calls} calls of {incident.handler}")
    if incident.place == UNKNOWN:
        parts.append("at an unknown place")
    elif incident.place != MANY_CALLS:
        parts.append(f"at {incident.place} in {incident.function}")
    if incident.handler and not incident.calls:
        purpose = f" for {incident.subject}" if incident.subject else ""
        parts.append(f"({incident.handler}{purpose})")
    if incident.relieved:
        parts.append("while relief serves its other clients" if incident.lasts else "while relief served its clients")
    return " ".join(parts)


class LoopInvestigation:
    """The investigation of one worker process. incident: the block in progress."""

    def __init__(self, slot: int, pid: int, loop: LoopSettings, origin: CodeOrigin, incidents: IncidentLog) -> None:
        self.incident: Incident | None = None
        self._slot = slot
        self._pid = pid
        self._limit = loop.lagging
        self._origin = origin
        self._log = incidents
        self._turn = 0  # identifies the blocked turn: its beginning, or minus the time of the last beat
        self._began = 0.0
        self._requested_at = 0.0  # of the latest stack request
        self._answered = True
        self._updates_until_threads = 0  # updates until the request for all threads; 0: none is planned
        self._places: Counter[str] = Counter()
        self._blames_application = False
        self._calls: dict[str, LatestCalls] = {}  # of the blocked turn, by handler
        self._gaps: dict[str, float] = {}  # the most seconds outside of these calls, or in one of them
        self._is_logged = False
        self._relieved_since = 0.0  # when relief began in this turn; 0 without one

    def update(
        self,
        vitals: Vitals,
        blocked: float,
        running: RunningHandler | None,
        now: float,
        wall: float,
        calls: LatestCalls | None = None,
    ) -> tuple[StackRequest | None, str]:
        """Take in the state of the worker. Returns a request to send to it, and a line for the log, "" for none.

        blocked: seconds for which its loop has not turned, see `Health`. running: its handler. now: seconds of a
        monotonic clock. wall: Unix time. calls: of its latest handler.
        """
        line = ""
        if self.incident is not None:
            self._take_calls(calls)
            self._take_relief(vitals)
        if self.incident is not None and not self._lasts(vitals):
            line = self._end_turn(vitals, now)
        if self.incident is None:
            if not 0 < self._limit <= blocked < math.inf:  # infinite: the page is invalid
                return None, line
            self._open(vitals, blocked, now, wall)
            self._take_calls(calls)
            self._take_relief(vitals)
        self._take_gap(calls, now)
        return self._next_request(running, now), line or self._log_long_block(now)

    def record_stacks(self, stacks: list[Stack], vitals: Vitals, running: RunningHandler | None) -> None:
        """Take the stacks that the worker wrote.

        vitals, running: read from its page afterwards; they show whether the turn still lasts.
        """
        self._answered = True
        if self.incident is None or not self._lasts(vitals):
            return
        main = [stack for stack in stacks if stack.is_main]
        others = [stack for stack in stacks if not stack.is_main]
        if not (self._turn < 0 and main and main[0].is_waiting):
            self._blame(main, running, thread=False)
        elif others:
            self._blame([stack for stack in others if not _is_idle(stack)], running, thread=True)
        else:
            # Either the loop waits for the interpreter's lock, which another thread holds, or the process was stopped
            # and has just resumed. In the second case its loop turns before the next update.
            self._updates_until_threads = 2

    def record_final_stacks(self, text: str) -> None:
        """Keep `text`, the stacks of all threads of the process, which is stuck and about to be killed."""
        if self.incident is not None:
            self.incident.ending, self.incident.stacks = "stuck, killed", text[:_MAX_STACKS_CHARS]

    def close(self, ending: str, now: float) -> str:
        """End the investigation, because the process has ended. ending: why, in a few words. Returns a line for the
        log, "" for none."""
        if self.incident is None:
            return ""
        if self.incident.ending == TURNED:
            self.incident.ending = ending
        self._measure(now - self._began)
        return self._finish(now)

    def _lasts(self, vitals: Vitals) -> bool:
        return vitals.busy_since == self._turn if self._turn > 0 else vitals.beat == -self._turn

    def _open(self, vitals: Vitals, blocked: float, now: float, wall: float) -> None:
        self._turn = vitals.busy_since or -vitals.beat
        self._began = now - blocked
        self._requested_at, self._answered = 0.0, True
        self._updates_until_threads = 0
        self._places.clear()
        self._calls.clear()
        self._gaps.clear()
        self._blames_application = self._is_logged = False
        self._relieved_since = 0.0
        self.incident = Incident(slot=self._slot, pid=self._pid, at=wall - blocked, duration=blocked)
        self._log.recent.append(self.incident)

    def _next_request(self, running: RunningHandler | None, now: float) -> StackRequest | None:
        incident = self.incident
        assert incident is not None
        self._measure(now - self._began)
        if running is not None and not incident.handler and self._turn > 0:
            incident.handler, incident.subject = running.handler, running.subject
        if not self._answered and now - self._requested_at < _ANSWER_TIMEOUT:
            return None
        if self._updates_until_threads:
            self._updates_until_threads -= 1
            if self._updates_until_threads:
                return None
            self._requested_at, self._answered = now, False
            return StackRequest.STACKS
        if incident.samples >= MAX_SAMPLES or (self._requested_at and now - self._requested_at < SAMPLE_INTERVAL):
            return None
        incident.samples += 1
        self._requested_at, self._answered = now, False
        return StackRequest.STACK

    def _blame(self, stacks: list[Stack], running: RunningHandler | None, thread: bool) -> None:
        """Count the first place to blame in `stacks`, and blame the place with most samples, at a tie the earlier."""
        incident = self.incident
        assert incident is not None
        for stack in stacks:
            frame = self._origin.frame_to_blame(stack)
            if frame is None:
                continue
            self._places[frame.place] += 1
            if self._places[frame.place] > self._places[incident.place]:
                incident.place, incident.function, incident.thread = frame.place, frame.function, thread
                self._blames_application = self._origin.is_application_code(frame.file)
                incident.stack = [_describe_frame(frame) for frame in stack.frames]
                if not thread:
                    incident.handler = running.handler if running else ""
                    incident.subject = running.subject if running else ""
            return

    def _log_long_block(self, now: float) -> str:
        incident = self.incident
        if incident is None or self._is_logged or incident.duration < _LONG_BLOCK:
            return ""
        self._is_logged = True
        self._blame_calls(incident)
        return self._log.log_line(incident, now)

    def _end_turn(self, vitals: Vitals, now: float) -> str:
        assert self.incident is not None
        # The exact end, from the page, if it has that. The beginning still leaves out excused time.
        end = vitals.block_until / 1e9 if vitals.block_since == self._turn else now
        self._measure(end - self._began)
        return self._finish(now)

    def _finish(self, now: float) -> str:
        incident, self.incident = self.incident, None
        assert incident is not None
        incident.lasts = False
        self._blame_calls(incident)
        self._log.count(incident)
        return "" if self._is_logged else self._log.log_line(incident, now)

    def _measure(self, duration: float) -> None:
        incident = self.incident
        assert incident is not None
        incident.duration = duration
        if self._relieved_since:
            incident.relieved = min(max(self._began + duration - self._relieved_since, 0.0), duration)

    def _take_relief(self, vitals: Vitals) -> None:
        if not self._relieved_since and 0 < self._turn <= vitals.relief_since and self._lasts(vitals):
            self._relieved_since = vitals.relief_since / 1e9

    def _take_calls(self, calls: LatestCalls | None) -> None:
        if calls is not None and calls.turn == self._turn:
            self._calls[calls.handler] = calls

    def _take_gap(self, calls: LatestCalls | None, now: float) -> None:
        if calls is not None and calls.turn == self._turn:
            gap = now - self._began - calls.seconds
            self._gaps[calls.handler] = max(gap, self._gaps.get(calls.handler, 0.0))

    def _blame_calls(self, incident: Incident) -> None:
        """Blame the calls of one handler, if several of them take most of the block.

        A stack shows one moment. Between two short calls it has a line of the server, which is not to blame.
        """
        share = _BLAMED_SHARE * incident.duration
        for calls in self._calls.values():
            # The latest call may still run. It counts as long as the others.
            seconds = calls.seconds * calls.calls / max(calls.calls - 1, 1)
            is_one_call = self._gaps.get(calls.handler, 0.0) >= share
            if calls.calls > 1 and not incident.thread and seconds >= share and not is_one_call:
                incident.calls, incident.subject = calls.calls, ""
                if not (self._blames_application and incident.handler == calls.handler):
                    incident.place, incident.function = MANY_CALLS, ""
                incident.handler = calls.handler


def _is_idle(stack: Stack) -> bool:
    """Return whether a thread waits for work, and so can't hold the interpreter's lock."""
    return not stack.frames or "/threading.py" in stack.frames[0].file or "/queue.py" in stack.frames[0].file


def _describe_frame(frame: StackFrame) -> str:
    return f"{frame.place} in {frame.function}"
