"""Incidents: when a stack is requested, which stacks count, and the lines for the log. The test sets the clock."""

from __future__ import annotations

from msgspec.structs import replace

from realtime.config.settings import LoopSettings
from realtime.repetition import REPEAT_AFTER
from realtime.supervision.incidents import (
    MANY_CALLS,
    MAX_INCIDENTS,
    MAX_PLACES,
    MAX_SAMPLES,
    OTHER,
    SAMPLE_INTERVAL,
    UNKNOWN,
    Incident,
    IncidentLog,
    LoopInvestigation,
    StackRequest,
    describe,
)
from realtime.supervision.stacks import CodeOrigin, Stack, StackFrame
from realtime.supervision.vitals import LatestCalls, ProcessState, RunningHandler, Vitals

WALL = 1_700_000_000.0
RUNNING = RunningHandler("rpc report", "report")
LOOP = "/usr/lib/python3.11/selectors.py"
THREADING = "/usr/lib/python3.11/threading.py"


def stack(file: str = "/app/chat.py", line: int = 7, main: bool = True) -> Stack:
    return Stack(main, (StackFrame(file, line, "report"), StackFrame("/app/main.py", 1, "call")))


class Case:
    """An investigation into a worker whose loop is in a turn, or whose beat is overdue."""

    def __init__(self) -> None:
        self.incidents = IncidentLog()
        self.investigation = LoopInvestigation(3, 4000, LoopSettings(), CodeOrigin(["/app"], ["/usr"]), self.incidents)
        self.now = 100.0
        self.vitals = Vitals(int(99.9e9), 0.0, 0, 0, ProcessState.READY)
        self.began = 0.0
        self.lines: list[str] = []
        self.calls: LatestCalls | None = None

    def turn(self) -> None:
        """A turn begins now."""
        self.began = self.now
        self.vitals = replace(self.vitals, busy_since=int(self.now * 1e9))

    def silence(self) -> None:
        """The loop seems to idle, but stops beating."""
        self.began = self.now
        self.vitals = replace(self.vitals, busy_since=0, beat=int(self.now * 1e9))

    def end_turn(self) -> None:
        since = self.vitals.busy_since
        self.vitals = replace(self.vitals, busy_since=0, block_since=since, block_until=int(self.now * 1e9))

    def update(self, seconds: float = 0.01, running: RunningHandler | None = RUNNING) -> StackRequest | None:
        self.now += seconds
        lasts = self.vitals.busy_since or not self.vitals.block_since
        blocked = self.now - self.began if lasts else 0.0
        request, line = self.investigation.update(self.vitals, blocked, running, self.now, WALL + self.now, self.calls)
        if line:
            self.lines.append(line)
        return request

    def answer(self, *stacks: Stack, running: RunningHandler | None = RUNNING) -> None:
        self.investigation.record_stacks(list(stacks), self.vitals, running)

    def block(self, seconds: float, *stacks: Stack) -> Incident:
        """Run a block of `seconds` that answers a request with `stacks`. Returns its incident."""
        self.turn()
        assert self.update(0.06) is StackRequest.STACK
        self.answer(*stacks)
        self.now = self.began + seconds
        self.end_turn()
        self.update()
        return self.incidents.recent[-1]


def test_a_short_turn_is_no_incident() -> None:
    case = Case()
    case.turn()
    assert case.update(0.049) is None
    case.end_turn()
    assert case.update() is None
    assert not case.incidents.recent
    assert case.lines == []


def test_a_block_is_attributed_measured_counted_and_logged() -> None:
    case = Case()
    incident = case.block(0.3125, stack())
    assert (incident.slot, incident.pid, incident.lasts) == (3, 4000, False)
    assert (incident.place, incident.function) == ("/app/chat.py:7", "report")
    assert (incident.handler, incident.subject) == ("rpc report", "report")
    assert abs(incident.duration - 0.3125) < 1e-6
    assert abs(incident.at - (WALL + 100.0)) < 1e-6
    assert incident.stack == ["/app/chat.py:7 in report", "/app/main.py:1 in call"]
    [blocks] = case.incidents.blocks.values()
    assert (blocks.count, round(blocks.seconds, 4)) == (1, 0.3125)
    assert case.lines == ["worker 3 was blocked for 0.312 s at /app/chat.py:7 in report (rpc report for report)"]


def test_the_time_that_relief_served_is_kept_and_logged() -> None:
    case = Case()
    case.vitals = replace(case.vitals, relief_since=int(99e9))  # in an earlier turn
    assert case.block(0.25, stack()).relieved == 0
    case.turn()
    case.update(0.06)
    case.answer(stack())
    case.vitals = replace(case.vitals, relief_since=int((case.began + 0.03) * 1e9))
    case.update()
    case.vitals = replace(case.vitals, relief_since=int((case.began + 0.3) * 1e9))  # after a pause
    case.now = case.began + 2.03
    case.update(0)
    line = describe(case.incidents.recent[-1])
    assert line.endswith("in report (rpc report for report) while relief serves its other clients")
    case.end_turn()
    case.update()
    assert round(case.incidents.recent[-1].relieved, 3) == 2.0
    [blocks] = case.incidents.blocks.values()
    assert round(blocks.relieved, 3) == 2.0


def test_a_stack_is_requested_each_second_and_never_twice_at_a_time() -> None:
    case = Case()
    case.turn()
    requests = 0
    for _ in range(800):
        if case.update() is StackRequest.STACK:
            requests += 1
            assert case.update() is None
            case.answer(stack())
    assert requests == MAX_SAMPLES
    assert MAX_SAMPLES * SAMPLE_INTERVAL < 8


def test_the_place_with_most_samples_is_blamed() -> None:
    case = Case()
    case.turn()
    for line in (7, 9, 9):
        while case.update() is None:
            pass
        case.answer(stack(line=line))
    assert case.incidents.recent[-1].place == "/app/chat.py:9"


def test_a_stack_that_arrives_after_the_turn_does_not_count() -> None:
    case = Case()
    case.turn()
    case.update(0.06)
    case.now += 0.02
    case.end_turn()
    case.answer(stack(line=1))
    case.update()
    assert case.incidents.recent[-1].place == UNKNOWN
    assert "worker 3 was blocked for 0.080 s at an unknown place (rpc report" in case.lines[0]


def test_the_next_turn_is_another_incident() -> None:
    case = Case()
    case.block(0.2, stack(line=1))
    case.now += 5
    case.block(0.2, stack(line=2))
    assert [incident.place for incident in case.incidents.recent] == ["/app/chat.py:1", "/app/chat.py:2"]


def test_a_thread_that_holds_the_interpreters_lock_is_blamed() -> None:
    case = Case()
    case.silence()
    assert case.update(0.06, None) is StackRequest.STACK
    case.answer(stack(LOOP), running=None)
    assert [case.update(0.01, None), case.update(0.01, None)] == [None, StackRequest.STACKS]
    idle = stack(THREADING, main=False)
    case.answer(idle, stack("/app/chat.py", 30, main=False), stack(LOOP), running=None)
    case.vitals = replace(case.vitals, beat=int(case.now * 1e9), block_since=1)
    case.update(0.01, None)
    incident = case.incidents.recent[-1]
    assert (incident.place, incident.thread, incident.handler) == ("/app/chat.py:30", True, "")
    assert case.lines[0].startswith("a thread of worker 3 has blocked its loop for 0.0")


def test_threads_of_a_process_that_has_just_resumed_are_not_sampled() -> None:
    case = Case()
    case.silence()
    case.update(1.0, None)
    case.answer(stack(LOOP), running=None)
    case.update(0.01, None)
    case.vitals = replace(case.vitals, beat=int(case.now * 1e9), block_since=1)
    assert [case.update(0.01, None) for _ in range(5)] == [None] * 5
    assert case.incidents.recent[-1].place == UNKNOWN


def test_a_process_that_does_not_answer_has_an_incident_without_a_place() -> None:
    case = Case()
    case.silence()
    requests = [case.update(0.1, None) for _ in range(50)]
    assert requests.count(StackRequest.STACK) == MAX_SAMPLES
    case.vitals = replace(case.vitals, beat=int(case.now * 1e9), block_since=1)
    case.update(0.01, None)
    assert case.incidents.recent[-1].place == UNKNOWN
    assert 4.9 < case.incidents.recent[-1].duration < 5.1


def test_a_long_block_is_logged_once_and_while_it_lasts() -> None:
    case = Case()
    case.turn()
    case.update(0.06)
    case.answer(stack())
    for _ in range(30):
        case.update(0.1)
    assert len(case.lines) == 1
    assert "worker 3 has been blocked for 1." in case.lines[0]
    case.end_turn()
    case.update()
    assert len(case.lines) == 1


def test_a_place_is_logged_once_a_minute_with_the_number_of_suppressed_lines() -> None:
    case = Case()
    for _ in range(5):
        case.block(0.2, stack())
        case.now += 1
    assert len(case.lines) == 1
    case.block(0.2, stack(line=8))
    assert len(case.lines) == 2
    case.now += REPEAT_AFTER
    case.block(0.2, stack())
    assert case.lines[2].endswith("; 4 more times since the last such line")


SERVER = Stack(True, (StackFrame("/srv/realtime/protocol/session.py", 3, "start"),))


def many_calls(case: Case, calls: int, seconds: float, *stacks: Stack, handler: str = "rpc cpu") -> Incident:
    """Run a block of 0.3 s with these calls, of which all but the last took `seconds`."""
    case.turn()
    case.calls = LatestCalls(handler, case.vitals.busy_since, calls, seconds)
    case.update(0.06, running=None)
    case.answer(*stacks, running=None)
    case.now = case.began + 0.3
    case.end_turn()
    case.update(running=None)
    return case.incidents.recent[-1]


def test_many_short_calls_are_blamed_and_not_the_servers_line_between_them() -> None:
    case = Case()
    incident = many_calls(case, 14, 0.27, SERVER)
    assert case.lines == ["worker 3 was blocked for 0.300 s in 14 calls of rpc cpu"]
    assert (incident.handler, incident.calls, incident.place) == ("rpc cpu", 14, MANY_CALLS)
    assert ("rpc cpu", MANY_CALLS) in case.incidents.blocks


def test_many_calls_with_a_stack_of_the_application_have_its_line_too() -> None:
    case = Case()
    case.turn()
    case.calls = LatestCalls(RUNNING.handler, case.vitals.busy_since, 14, 0.27)
    case.update(0.06)
    case.answer(stack())
    case.now = case.began + 0.3
    case.end_turn()
    case.update()
    assert case.lines == ["worker 3 was blocked for 0.300 s in 14 calls of rpc report at /app/chat.py:7 in report"]


def test_calls_that_took_little_of_the_block_are_not_blamed() -> None:
    case = Case()
    incident = many_calls(case, 14, 0.05, SERVER)
    assert incident.calls == 0
    assert "session.py:3" in case.lines[0]


def test_one_long_call_among_short_ones_is_no_matter_of_many() -> None:
    case = Case()
    case.turn()
    since = case.vitals.busy_since
    case.calls = LatestCalls(RUNNING.handler, since, 2, 0.001)
    for _ in range(25):
        case.update(0.01)
    case.answer(stack())
    case.calls = LatestCalls(RUNNING.handler, since, 20, 0.29)
    case.now = case.began + 0.3
    case.end_turn()
    case.update()
    assert case.lines == ["worker 3 was blocked for 0.300 s at /app/chat.py:7 in report (rpc report for report)"]


def test_the_calls_of_another_turn_are_not_blamed() -> None:
    case = Case()
    case.turn()
    case.calls = LatestCalls("rpc cpu", case.vitals.busy_since - 1, 14, 0.27)
    case.update(0.06, running=None)
    case.now = case.began + 0.3
    case.end_turn()
    case.update(running=None)
    assert "rpc cpu" not in case.lines[0]


def test_a_process_that_ends_closes_its_incident() -> None:
    case = Case()
    assert case.investigation.close("the process ended", case.now) == ""
    case.turn()
    case.update(0.06)
    case.answer(stack())
    assert "/app/chat.py:7" in case.investigation.close("the process ended", case.now + 10)
    incident = case.incidents.recent[-1]
    assert (incident.lasts, incident.ending) == (False, "the process ended")
    assert 10 < incident.duration < 10.1


def test_the_incident_of_a_stuck_process_keeps_all_its_stacks() -> None:
    case = Case()
    case.turn()
    case.update(0.06)
    case.answer(stack())
    case.investigation.record_final_stacks("Thread 0x1 …" * 100_000)
    case.investigation.close("the process ended", case.now + 10)
    incident = case.incidents.recent[-1]
    assert (incident.ending, len(incident.stacks)) == ("stuck, killed", 65_536)


def test_kept_incidents_and_counted_places_are_bounded() -> None:
    incidents = IncidentLog()
    lines = 0
    for number in range(2 * MAX_INCIDENTS):
        incident = Incident(slot=0, pid=1, at=0.0, duration=1.0, lasts=False, place=f"/app/{number}.py:1")
        incidents.recent.append(incident)
        incidents.count(incident)
        lines += bool(incidents.log_line(incident, 0.001 * number))
    assert len(incidents.recent) == MAX_INCIDENTS
    assert len(incidents.blocks) == MAX_PLACES + 1
    assert incidents.blocks[OTHER, OTHER].count == 2 * MAX_INCIDENTS - MAX_PLACES
    assert lines == MAX_PLACES
