"""The pool's state machine: the effects of each event, and invariants under arbitrary events."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import settings as profile
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from realtime.config.settings import LoopSettings, WorkersSettings
from realtime.supervision.pool import (
    BROKER,
    TICK,
    TRANSITIONS,
    ConnectToBroker,
    DrainProcess,
    DumpProcessStacks,
    Effect,
    HaltService,
    LogLine,
    NotifySystemd,
    Pool,
    PoolEvent,
    SignalProcess,
    SlotState,
    SpawnProcess,
)

WORKERS = WorkersSettings(restart_delay=0.1, restart_delay_max=3.0, restart_reset=60.0, start_timeout=30.0)
STOP = 20.0


class World:
    """A pool, a clock, and punctual ticks. Every process beats, except for those in `silent`."""

    def __init__(self, workers: int = 2, stuck: float = 10.0, stop: float = STOP, broker: bool = True) -> None:
        self.now = 100.0
        self.pool = Pool(workers, WORKERS, LoopSettings(stuck=stuck), stop, broker=broker)
        self.silent: set[int] = set()
        self.effects: list[Effect] = []

    def do(self, effects: list[Effect]) -> list[Effect]:
        self.effects += effects
        return effects

    def up(self) -> World:
        self.do(self.pool.start(self.now))
        for number in self.pool.slots:
            self.do(self.pool.process_ready(number, self.now))
        self.effects.clear()
        return self

    def beats(self) -> dict[int, float]:
        return {number: self.now for number in self.pool.slots if number not in self.silent}

    def tick(self) -> list[Effect]:
        self.now += TICK
        return self.do(self.pool.tick(self.now, self.beats()))

    def wait(self, seconds: float) -> list[Effect]:
        """Let time pass in ticks. Returns their effects."""
        return [effect for _ in range(round(seconds / TICK)) for effect in self.tick()]

    def exit(self, number: int, status: int) -> list[Effect]:
        return self.do(self.pool.process_exited(number, status, self.now))

    def die(self, number: int, status: int = 1) -> float:
        """Let the slot's process die. Returns the seconds until the start of the next one."""
        self.exit(number, status)
        died = self.now
        while SpawnProcess(number) not in self.tick():
            assert self.now - died < 100
        return self.now - died


def of(kind: type, effects: Sequence[Effect]) -> list[Any]:
    return [effect for effect in effects if isinstance(effect, kind)]


# Starting.


def test_start_spawns_the_broker_and_every_worker() -> None:
    world = World(workers=3)
    assert world.pool.start(0.0) == [SpawnProcess(BROKER), SpawnProcess(0), SpawnProcess(1), SpawnProcess(2)]


def test_a_pool_without_broker() -> None:
    world = World(workers=1, broker=False)
    assert world.pool.start(0.0) == [SpawnProcess(0)]
    assert NotifySystemd("ready") in world.pool.process_ready(0, 0.0)
    assert of(ConnectToBroker, world.wait(1)) == []


def test_systemd_is_notified_once_when_the_last_slot_is_ready() -> None:
    world = World()
    world.pool.start(world.now)
    assert of(NotifySystemd, world.pool.process_ready(0, world.now) + world.pool.process_ready(BROKER, world.now)) == []
    assert not world.pool.ready
    assert of(NotifySystemd, world.pool.process_ready(1, world.now)) == [NotifySystemd("ready")]
    assert world.pool.ready
    world.die(0)
    assert not world.pool.ready
    assert of(NotifySystemd, world.pool.process_ready(0, world.now)) == []
    assert world.pool.ready


@pytest.mark.parametrize("order", [(BROKER, 0, 1), (0, BROKER, 1), (0, 1, BROKER)])
def test_each_worker_is_connected_once_as_soon_as_the_broker_is_ready(order: tuple[int, ...]) -> None:
    world = World()
    world.pool.start(world.now)
    effects = [effect for number in order for effect in world.pool.process_ready(number, world.now)]
    assert sorted(effect.slot for effect in of(ConnectToBroker, effects)) == [0, 1]
    assert of(ConnectToBroker, world.wait(1)) == []


def test_a_worker_that_is_not_ready_in_time_is_killed_and_replaced() -> None:
    world = World()
    world.pool.start(world.now)
    world.pool.process_ready(BROKER, world.now)
    world.pool.process_ready(0, world.now)
    assert world.wait(29.8) == []
    assert of(DumpProcessStacks, world.wait(0.3)) == [DumpProcessStacks(1)], "the line that hangs is logged"
    assert of(SignalProcess, world.wait(0.4)) == [SignalProcess(1, signal.SIGKILL)]
    world.exit(1, -signal.SIGKILL)
    assert world.pool.slots[1].restarts == {"start_timeout": 1}
    assert of(SpawnProcess, world.wait(0.2)) == [SpawnProcess(1)]


# Dying.


def test_a_dead_worker_is_replaced_and_connected_again() -> None:
    world = World().up()
    assert world.die(0, -signal.SIGSEGV) < 0.3
    assert ConnectToBroker(0) in world.effects
    world.pool.process_ready(0, world.now)
    assert [report.line for report in of(LogLine, world.effects)] == [
        "worker 0 was killed by SIGSEGV; restarting it in 0.1 s"
    ]
    assert world.pool.slots[0].restarts == {"signal": 1}


def test_a_dead_broker_is_replaced_and_all_workers_connected_again() -> None:
    world = World().up()
    world.die(BROKER, -signal.SIGKILL)
    assert of(ConnectToBroker, world.pool.process_ready(BROKER, world.now)) == [
        ConnectToBroker(0),
        ConnectToBroker(1),
    ]


def test_the_delay_doubles_up_to_its_limit() -> None:
    world = World().up()
    delays = [world.die(0) for _ in range(8)]
    assert delays == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.0, 3.0, 3.0], abs=1.01 * TICK)


def test_the_delay_is_reset_after_restart_reset_seconds() -> None:
    world = World().up()
    for _ in range(4):
        world.die(0)
    world.pool.process_ready(0, world.now)
    world.wait(60.1)
    assert world.die(0) < 0.3


def test_the_delay_is_not_reset_before_restart_reset_seconds() -> None:
    world = World().up()
    for _ in range(4):
        world.die(0)
    world.pool.process_ready(0, world.now)
    world.wait(59)
    assert world.die(0) > 1.5


@pytest.mark.parametrize(
    ("status", "reason"),
    [(0, "exit"), (1, "error"), (70, "error"), (78, "config"), (-9, "signal"), (-11, "signal"), (-64, "signal")],
)
def test_the_reason_of_a_restart_is_one_of_a_closed_set(status: int, reason: str) -> None:
    world = World().up()
    world.exit(1, status)
    assert world.pool.slots[1].restarts == {reason: 1}


# Crash loops.


def test_a_crash_loop_is_logged_in_one_line_once_a_minute() -> None:
    world = World().up()
    logged: list[float] = []
    began = world.now
    while world.now - began < 200:
        for number in (0, 1):
            if world.pool.slots[number].state is SlotState.STARTING:
                world.pool.start_failed(number, "no such module", 78, world.now)
                world.exit(number, 78)
            elif world.pool.slots[number].state is SlotState.READY:
                world.exit(number, 1)
        logged += [world.now for report in of(LogLine, world.tick()) if "crash loop" in report.line]
    assert [b - a for a, b in pairwise(logged)] == pytest.approx([60.0] * (len(logged) - 1), abs=4)
    assert len(logged) == 4
    loops = [report.line for report in of(LogLine, world.effects) if "crash loop" in report.line]
    assert "worker 0 can't start: no such module, 3 times in a row; worker 1 can't start: no such module" in loops[0]
    others = [report.line for report in of(LogLine, world.effects) if "crash loop" not in report.line]
    assert len(others) == 4  # the first two deaths of each


def test_recovery_from_a_crash_loop_is_logged() -> None:
    world = World().up()
    for _ in range(5):
        world.die(0)
    assert of(LogLine, world.pool.process_ready(0, world.now)) == []
    assert [report.line for report in of(LogLine, world.wait(61))] == ["worker 0 has recovered: ready for 60 s"]


# Readiness.


@pytest.mark.parametrize(("silent", "serving"), [({0}, True), ({0, 1}, False), ({BROKER}, False)])
def test_it_serves_while_the_broker_and_a_worker_turn(silent: set[int], serving: bool) -> None:
    world = World(stuck=0.0).up()
    assert world.pool.serving
    world.silent |= silent
    world.wait(2.5)
    assert world.pool.serving, "a short block is no reason to take the server out of service"
    world.wait(1.5)
    assert world.pool.serving is serving
    world.silent.clear()
    world.wait(0.5)
    assert world.pool.serving


# Failing to start.


def test_a_failure_at_the_first_start_halts_with_the_reason() -> None:
    world = World()
    world.do(world.pool.start(world.now))
    world.do(world.pool.process_ready(0, world.now))
    effects = world.pool.start_failed(1, "app.module: no module named chat", 78, world.now)
    assert effects == [
        NotifySystemd("stopping"),
        SignalProcess(BROKER, signal.SIGKILL),
        SignalProcess(0, signal.SIGKILL),
    ]
    world.exit(BROKER, -9)
    world.exit(0, -9)
    assert world.exit(1, 78) == [HaltService(78, "worker 1 can't start: app.module: no module named chat")]


def test_a_failure_that_may_pass_halts_with_the_status_of_the_process() -> None:
    world = World(workers=1)
    world.pool.start(world.now)
    world.pool.start_failed(0, "chat.py:3: on_start failed: no database", 75, world.now)
    world.exit(BROKER, -9)
    assert world.exit(0, 75) == [HaltService(75, "worker 0 can't start: chat.py:3: on_start failed: no database")]


def test_an_orderly_exit_that_was_not_asked_for_is_no_error() -> None:
    world = World().up()
    world.die(0, 0)
    (report,) = of(LogLine, world.effects)
    assert report.line.startswith("worker 0 has drained and exited") and "SIGTERM" in report.line
    assert not report.is_error
    world.effects.clear()
    world.die(1, 1)
    assert [report.is_error for report in of(LogLine, world.effects)] == [True]


def test_exit_status_78_halts_without_a_reason_before() -> None:
    world = World(workers=1)
    world.pool.start(world.now)
    world.exit(0, 78)
    assert world.exit(BROKER, -9) == [HaltService(78, "worker 0 exited with status 78")]


def test_a_failed_start_after_the_first_is_retried_after_a_delay() -> None:
    world = World().up()
    world.die(0)
    assert world.pool.start_failed(0, "syntax error", 78, world.now) == []
    effects = world.exit(0, 78)
    assert of(HaltService, effects) == []
    assert [report.line for report in of(LogLine, effects)] == [
        "worker 0 can't start: syntax error; restarting it in 0.2 s"
    ]


def test_a_crash_at_the_first_start_is_retried() -> None:
    world = World(workers=1)
    world.pool.start(world.now)
    world.exit(0, 1)
    assert of(SpawnProcess, world.wait(0.3)) == [SpawnProcess(0)]


def test_a_process_that_failed_to_start_and_does_not_exit_is_killed() -> None:
    world = World().up()
    world.die(0)
    world.pool.start_failed(0, "syntax error", 78, world.now)
    assert of(SignalProcess, world.wait(6)) == [SignalProcess(0, signal.SIGKILL)]


# Stuck.


def test_a_worker_without_a_beat_writes_its_stacks_and_is_killed_and_replaced() -> None:
    world = World(stuck=2.0).up()
    world.silent.add(1)
    assert of(SignalProcess, world.wait(1.9)) == []
    effects = world.wait(0.3)
    assert (of(DumpProcessStacks, effects), of(SignalProcess, effects)) == ([DumpProcessStacks(1)], [])
    assert of(SignalProcess, world.wait(0.3)) == [SignalProcess(1, signal.SIGKILL)]
    world.exit(1, -signal.SIGKILL)
    assert world.pool.slots[1].restarts == {"stuck": 1}
    assert "worker 1 did not turn its loop for 2 s and was killed" in of(LogLine, world.effects)[-1].line


def test_a_broker_without_a_beat_is_killed() -> None:
    world = World(stuck=2.0).up()
    world.silent.add(BROKER)
    assert of(SignalProcess, world.wait(3)) == [SignalProcess(BROKER, signal.SIGKILL)]


def test_with_zero_a_process_without_a_beat_is_not_killed() -> None:
    world = World(stuck=0.0).up()
    world.silent |= {0, 1, BROKER}
    assert of(SignalProcess, world.wait(100)) == []


def test_a_worker_that_beats_again_in_time_is_not_killed() -> None:
    world = World(stuck=2.0).up()
    for _ in range(5):
        world.silent.add(0)
        world.wait(1.8)
        world.silent.clear()
        world.wait(0.2)
    assert of(SignalProcess, world.effects) == []


def test_beats_from_the_future_do_not_count() -> None:
    world = World(stuck=2.0).up()
    for _ in range(30):
        world.now += TICK
        world.do(world.pool.tick(world.now, {0: world.now + 1000, 1: world.now, BROKER: world.now}))
    assert of(DumpProcessStacks, world.effects) == [DumpProcessStacks(0)]
    world.wait(0.4)
    assert of(SignalProcess, world.effects) == [SignalProcess(0, signal.SIGKILL)]


@pytest.mark.parametrize("pause", [0.5, 15.0, 36_000.0])
def test_a_late_tick_excuses_all_processes(pause: float) -> None:
    world = World(stuck=0.5).up()
    world.wait(1)
    world.silent |= {0, 1, BROKER}  # all processes were paused, and none has beaten yet
    world.now += pause
    assert of(SignalProcess, world.do(world.pool.tick(world.now, world.beats()))) == []
    world.wait(0.3)
    world.silent.clear()
    world.wait(2)
    assert of(SignalProcess, world.effects) == []


def test_a_process_that_stays_silent_after_a_pause_is_killed() -> None:
    world = World(stuck=2.0).up()
    world.silent.add(0)
    for _ in range(8):  # repeated late ticks do not excuse it for ever
        world.now += 1.0
        world.do(world.pool.tick(world.now, world.beats()))
        world.wait(0.4)
    assert of(SignalProcess, world.effects) == [SignalProcess(0, signal.SIGKILL)]


def test_a_late_tick_extends_the_deadline_of_a_start() -> None:
    world = World()
    world.pool.start(world.now)
    world.wait(1)
    world.now += 1000.0
    assert of(SignalProcess, world.tick() + world.wait(28)) == []
    assert len(of(SignalProcess, world.wait(2))) == 3


# Memory.


def test_a_worker_that_uses_too_much_memory_drains_and_is_replaced() -> None:
    world = World().up()
    assert world.pool.memory_exceeded(1, 512 << 20, world.now) == [DrainProcess(1, pytest.approx(0.9 * STOP))]
    assert not world.pool.ready
    world.wait(1)
    world.exit(1, 0)
    assert (
        "worker 1 used 512 MiB of memory (loop.max_rss) and was drained; restarting it in 0.1 s"
        in of(LogLine, world.effects)[-1].line
    )
    assert SpawnProcess(1) in world.wait(0.3)
    assert world.pool.slots[1].restarts == {"bloated": 1}


def test_workers_that_use_too_much_memory_are_replaced_one_at_a_time() -> None:
    world = World().up()
    assert of(DrainProcess, world.pool.memory_exceeded(0, 1, world.now)) != []
    assert world.pool.memory_exceeded(0, 1, world.now) == []
    assert world.pool.memory_exceeded(1, 1, world.now) == []
    world.die(0, 0)
    assert world.pool.memory_exceeded(1, 1, world.now) == []
    world.pool.process_ready(0, world.now)
    assert of(DrainProcess, world.pool.memory_exceeded(1, 1, world.now)) != []


def replace_for_memory(world: World) -> float:
    """Let worker 0 use too much memory all the time. Returns the seconds until it is drained; replaces it then."""
    began = world.now
    while not of(DrainProcess, world.do(world.pool.memory_exceeded(0, 1, world.now))):
        world.tick()
        assert world.now - began < 1000
    drained = world.now
    assert world.die(0, 0) < 1  # the slot does not stay empty
    world.do(world.pool.process_ready(0, world.now))
    return drained - began


def test_a_memory_limit_that_no_worker_keeps_replaces_workers_at_growing_intervals() -> None:
    world = World().up()
    intervals = [replace_for_memory(world) for _ in range(12)]
    assert [round(interval) for interval in intervals[:5]] == [0, 2, 4, 8, 16]
    assert intervals[-1] == pytest.approx(300, abs=1)
    assert not of(LogLine, [effect for effect in world.effects if "crash loop" in getattr(effect, "line", "")])


def test_a_worker_whose_memory_grows_slowly_is_replaced_when_it_reaches_the_limit() -> None:
    world = World().up()
    for _ in range(5):
        replace_for_memory(world)
    world.wait(2 * 32 + 1)
    assert replace_for_memory(world) == 0.0
    assert replace_for_memory(world) == pytest.approx(2, abs=0.2)


def test_a_worker_that_uses_too_much_memory_and_does_not_exit_is_killed() -> None:
    world = World().up()
    world.pool.memory_exceeded(1, 1, world.now)
    assert of(SignalProcess, world.wait(STOP + 0.2)) == [SignalProcess(1, signal.SIGKILL)]
    world.exit(1, -signal.SIGKILL)
    assert world.pool.slots[1].restarts == {"bloated": 1}


# Links.


def test_a_worker_that_lost_its_stream_is_connected_at_the_next_tick() -> None:
    world = World().up()
    assert world.pool.broker_link_lost(1, world.now) == []
    assert of(ConnectToBroker, world.wait(1)) == [ConnectToBroker(1)]


def test_workers_are_connected_again_only_to_the_next_broker() -> None:
    world = World().up()
    world.exit(BROKER, -9)
    world.pool.broker_link_lost(0, world.now)
    assert of(ConnectToBroker, world.wait(2)) == []
    assert of(ConnectToBroker, world.pool.process_ready(BROKER, world.now)) == [
        ConnectToBroker(0),
        ConnectToBroker(1),
    ]


def test_a_process_whose_control_link_ended_is_killed_after_a_while() -> None:
    world = World().up()
    world.pool.control_link_lost(0, world.now)
    assert not world.pool.ready
    assert of(SignalProcess, world.wait(5.2)) == [SignalProcess(0, signal.SIGKILL)]
    world.exit(0, -signal.SIGKILL)
    assert world.pool.slots[0].restarts == {"link": 1}


def test_a_control_link_that_ends_with_its_process_is_not_the_reason_of_the_restart() -> None:
    world = World().up()
    world.pool.control_link_lost(0, world.now)
    world.exit(0, -signal.SIGKILL)
    assert world.pool.slots[0].restarts == {"signal": 1}


# Stopping.


def test_stop_drains_the_workers_then_the_broker_then_halts() -> None:
    world = World().up()
    effects = world.do(world.pool.stop(world.now))
    assert effects[0] == NotifySystemd("stopping")
    drains = of(DrainProcess, effects)
    assert [drain.slot for drain in drains] == [0, 1]
    assert all(0 < drain.timeout < STOP for drain in drains)
    assert world.exit(0, 0) == []
    effects = world.exit(1, 0)
    assert [drain.slot for drain in of(DrainProcess, effects)] == [BROKER]
    assert world.exit(BROKER, 0) == [HaltService(0)]
    assert world.wait(100) == []


def test_a_process_that_does_not_finish_is_killed_before_the_deadline() -> None:
    world = World().up()
    began = world.now
    world.pool.stop(world.now)
    world.exit(0, 0)
    while not of(SignalProcess, world.tick()):
        pass
    assert world.now - began < STOP
    world.exit(1, -signal.SIGKILL)
    assert world.exit(BROKER, 0) == [HaltService(0)]


def test_a_process_that_survives_sigkill_is_left_behind() -> None:
    world = World(workers=1).up()
    world.pool.stop(world.now)
    halts = of(HaltService, world.wait(STOP + 3))
    assert halts == [HaltService(0)]
    assert sorted(signal.slot for signal in of(SignalProcess, world.effects)) == [BROKER, 0]


def test_a_second_stop_kills_all_at_once() -> None:
    world = World().up()
    world.pool.stop(world.now)
    effects = world.pool.stop(world.now)
    assert sorted(effect.slot for effect in of(SignalProcess, effects)) == [BROKER, 0, 1]
    assert {effect.number for effect in of(SignalProcess, effects)} == {signal.SIGKILL}


def test_stop_terminates_starting_processes_and_retires_waiting_slots() -> None:
    world = World().up()
    world.die(0)
    world.exit(1, 1)
    effects = world.pool.stop(world.now)
    assert of(SignalProcess, effects) == [SignalProcess(0, signal.SIGTERM)]
    assert world.pool.slots[1].state is SlotState.GONE
    assert [drain.slot for drain in of(DrainProcess, world.exit(0, -signal.SIGTERM))] == [BROKER]


def test_stop_before_start_halts() -> None:
    assert HaltService(0) in World().pool.stop(0.0)


# The table.


@pytest.mark.parametrize("state", SlotState)
@pytest.mark.parametrize("event", PoolEvent)
def test_a_pair_that_is_not_in_the_table_has_no_consequence(state: SlotState, event: PoolEvent) -> None:
    world = World().up()
    slot = world.pool.slots[0]
    slot.state = state
    world.pool._fire(slot, event)
    if (state, event) not in TRANSITIONS:
        assert slot.state is state
        assert world.pool._effects == []


def test_every_state_with_a_process_handles_exit_and_kill() -> None:
    for state in (SlotState.STARTING, SlotState.READY, SlotState.LEAVING, SlotState.KILLED):
        assert (state, PoolEvent.EXITED) in TRANSITIONS
        assert (state, PoolEvent.KILL) in TRANSITIONS or state is SlotState.KILLED


# Invariants.


class Invariants(RuleBasedStateMachine):
    """Arbitrary events, against a model of the processes that the effects start and end."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.alive: set[int] = set()
        self.killed: set[int] = set()
        self.halts = 0
        self.stopped_at = float("inf")  # time of the first stop

    def carry(self, effects: list[Effect]) -> None:
        for effect in effects:
            assert not self.halts, "an effect after HaltService"
            if isinstance(effect, SpawnProcess):
                assert effect.slot not in self.alive, "two processes in one slot"
                assert self.now < self.stopped_at, "a process was started after stop"
                self.alive.add(effect.slot)
            elif isinstance(effect, SignalProcess | DrainProcess):
                assert effect.slot in self.alive, "an effect on a process that does not exist"
                if isinstance(effect, SignalProcess) and effect.number == signal.SIGKILL:
                    self.killed.add(effect.slot)
            elif isinstance(effect, ConnectToBroker):
                assert {effect.slot, BROKER} <= self.alive
            elif isinstance(effect, HaltService):
                self.halts += 1

    @initialize(workers=st.integers(1, 3), stuck=st.sampled_from([0.0, 1.0]), stop=st.sampled_from([0.0, 2.0]))
    def start(self, workers: int, stuck: float, stop: float) -> None:
        self.stop_timeout = stop
        self.pool = Pool(
            workers, WorkersSettings(start_timeout=2.0, restart_reset=3.0), LoopSettings(stuck=stuck), stop
        )
        self.carry(self.pool.start(self.now))

    @rule(seconds=st.sampled_from([TICK, TICK, TICK, 0.5, 30.0]), beating=st.booleans())
    def tick(self, seconds: float, beating: bool) -> None:
        self.now += seconds
        self.carry(self.pool.tick(self.now, dict.fromkeys(self.alive, self.now) if beating else {}))

    @rule(data=st.data(), status=st.sampled_from([0, 1, 78, -9, -15]))
    def exited(self, data: st.DataObject, status: int) -> None:
        if self.alive:
            number = data.draw(st.sampled_from(sorted(self.alive)))
            self.alive.remove(number)
            self.killed.discard(number)
            self.carry(self.pool.process_exited(number, status, self.now))

    @rule(
        data=st.data(),
        name=st.sampled_from(["process_ready", "process_ready", "broker_link_lost", "control_link_lost"]),
    )
    def event(self, data: st.DataObject, name: str) -> None:
        if self.alive:
            number = data.draw(st.sampled_from(sorted(self.alive)))
            self.carry(getattr(self.pool, name)(number, self.now))

    @rule(data=st.data())
    def memory_exceeded(self, data: st.DataObject) -> None:
        if self.alive:
            self.carry(self.pool.memory_exceeded(data.draw(st.sampled_from(sorted(self.alive))), 1, self.now))

    @rule(data=st.data())
    def failed(self, data: st.DataObject) -> None:
        if self.alive:
            self.carry(
                self.pool.start_failed(
                    data.draw(st.sampled_from(sorted(self.alive))),
                    "because",
                    data.draw(st.sampled_from([75, 78])),
                    self.now,
                )
            )

    @precondition(lambda self: self.now > 2)
    @rule()
    def stop(self) -> None:
        self.stopped_at = min(self.stopped_at, self.now)
        self.carry(self.pool.stop(self.now))

    @invariant()
    def the_pool_knows_where_processes_are(self) -> None:
        if hasattr(self, "pool") and not self.halts:
            assert {slot.number for slot in self.pool.slots.values() if slot.has_process} == self.alive
            if self.pool.stopping:
                self.stopped_at = min(self.stopped_at, self.now)

    def teardown(self) -> None:
        """Every stop ends in one HaltService within the deadline, if killed processes exit."""
        if not hasattr(self, "pool"):
            return
        self.stop()
        deadline = self.now + max(self.stop_timeout, 5.0) + 5.0
        while not self.halts:
            assert self.now < deadline
            for number in sorted(self.killed):
                self.alive.remove(number)
                self.carry(self.pool.process_exited(number, -9, self.now))
            self.killed.clear()
            if not self.halts:
                self.tick(TICK, True)
        assert self.halts == 1
        assert self.alive <= self.killed


TestInvariants = Invariants.TestCase
TestInvariants.settings = profile(max_examples=150, stateful_step_count=40, deadline=None)
