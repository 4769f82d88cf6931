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
from realtime.supervision.pool import TICK, TRANSITIONS, Pool
from realtime.supervision.slots import BROKER, NOT_FORKED, PoolEvent, SlotState

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
            self.ready(number)
        self.effects.clear()
        return self

    def serving(self, number: int) -> int:
        """The generation of the process that serves the slot."""
        return self.pool.slots[number].process.generation

    def successor(self, number: int) -> int:
        successor = self.pool.slots[number].successor
        assert successor is not None
        return successor.generation

    def predecessor(self, number: int) -> int:
        predecessor = self.pool.slots[number].predecessor
        assert predecessor is not None
        return predecessor.generation

    def ready(self, number: int) -> list[Effect]:
        return self.do(self.pool.process_ready(self.serving(number), self.now))

    def fail(self, number: int, reason: str, status: int) -> list[Effect]:
        return self.do(self.pool.start_failed(self.serving(number), reason, status, self.now))

    def broker_link_lost(self, number: int) -> list[Effect]:
        return self.do(self.pool.broker_link_lost(self.serving(number), self.now))

    def control_link_lost(self, number: int) -> list[Effect]:
        return self.do(self.pool.control_link_lost(self.serving(number), self.now))

    def beats(self) -> dict[int, float]:
        slots = self.pool.slots.values()
        return {one.generation: self.now for slot in slots for one in slot.processes if slot.number not in self.silent}

    def tick(self) -> list[Effect]:
        self.now += TICK
        return self.do(self.pool.tick(self.now, self.beats()))

    def wait(self, seconds: float) -> list[Effect]:
        """Let time pass in ticks. Returns their effects."""
        return [effect for _ in range(round(seconds / TICK)) for effect in self.tick()]

    def exit(self, number: int, status: int) -> list[Effect]:
        return self.ended(self.serving(number), status)

    def ended(self, generation: int, status: int) -> list[Effect]:
        return self.do(self.pool.process_exited(generation, status, self.now))

    def die(self, number: int, status: int = 1) -> float:
        """Let the slot's process die. Returns the seconds until the start of the next one."""
        self.exit(number, status)
        died = self.now
        while slots(SpawnProcess, self.tick()) != [number]:
            assert self.now - died < 100
        return self.now - died

    def hand_over(self, number: int) -> list[Effect]:
        """Let the slot's successor become ready, and its predecessor hand over, drain and end."""
        effects = self.do(self.pool.process_ready(self.successor(number), self.now))
        assert slots(MoveConnections, effects) == [number]
        assert slots(DrainProcess, self.do(self.pool.handed_over(self.predecessor(number), self.now))) == [number]
        return self.ended(self.predecessor(number), 0)

    def lines(self) -> list[str]:
        return [report.line for report in of(LogLine, self.effects)]


def of(kind: type, effects: Sequence[Effect]) -> list[Any]:
    return [effect for effect in effects if isinstance(effect, kind)]


def slots(kind: type, effects: Sequence[Effect]) -> list[int]:
    """The slots of the effects of a kind."""
    return [effect.slot for effect in of(kind, effects)]


def signals(effects: Sequence[Effect]) -> list[tuple[int, int]]:
    return [(effect.slot, effect.number) for effect in of(SignalProcess, effects)]


# Starting.


def test_start_spawns_the_broker_and_every_worker() -> None:
    world = World(workers=3)
    effects = world.pool.start(0.0)
    assert slots(SpawnProcess, effects) == [BROKER, 0, 1, 2]
    assert len({effect.generation for effect in of(SpawnProcess, effects)}) == 4


def test_a_pool_without_broker() -> None:
    world = World(workers=1, broker=False)
    assert slots(SpawnProcess, world.pool.start(0.0)) == [0]
    assert NotifySystemd("ready") in world.ready(0)
    assert of(ConnectToBroker, world.wait(1)) == []


def test_systemd_is_notified_once_when_the_last_slot_is_ready() -> None:
    world = World()
    world.pool.start(world.now)
    assert of(NotifySystemd, world.ready(0) + world.ready(BROKER)) == []
    assert not world.pool.ready
    assert of(NotifySystemd, world.ready(1)) == [NotifySystemd("ready")]
    assert world.pool.ready
    world.die(0)
    assert not world.pool.ready
    assert of(NotifySystemd, world.ready(0)) == []
    assert world.pool.ready


@pytest.mark.parametrize("order", [(BROKER, 0, 1), (0, BROKER, 1), (0, 1, BROKER)])
def test_each_worker_is_connected_once_as_soon_as_the_broker_is_ready(order: tuple[int, ...]) -> None:
    world = World()
    world.pool.start(world.now)
    effects = [effect for number in order for effect in world.ready(number)]
    assert sorted(effect.slot for effect in of(ConnectToBroker, effects)) == [0, 1]
    assert of(ConnectToBroker, world.wait(1)) == []


def test_a_worker_that_is_not_ready_in_time_is_killed_and_replaced() -> None:
    world = World()
    world.pool.start(world.now)
    world.ready(BROKER)
    world.ready(0)
    assert world.wait(29.8) == []
    assert slots(DumpProcessStacks, world.wait(0.3)) == [1], "the line that hangs is logged"
    assert signals(world.wait(0.4)) == [(1, signal.SIGKILL)]
    world.exit(1, -signal.SIGKILL)
    assert world.pool.slots[1].restarts == {"start_timeout": 1}
    assert slots(SpawnProcess, world.wait(0.2)) == [1]


# Dying.


def test_a_dead_worker_is_replaced_and_connected_again() -> None:
    world = World().up()
    assert world.die(0, -signal.SIGSEGV) < 0.3
    assert 0 in slots(ConnectToBroker, world.effects)
    assert world.lines() == ["worker 0 was killed by SIGSEGV; restarting it in 0.1 s"]
    world.ready(0)
    assert world.pool.slots[0].restarts == {"signal": 1}


def test_a_dead_broker_is_replaced_and_all_workers_connected_again() -> None:
    world = World().up()
    world.die(BROKER, -signal.SIGKILL)
    assert slots(ConnectToBroker, world.ready(BROKER)) == [0, 1]


def test_the_delay_doubles_up_to_its_limit() -> None:
    world = World().up()
    delays = [world.die(0) for _ in range(8)]
    assert delays == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.0, 3.0, 3.0], abs=1.01 * TICK)


def test_the_delay_is_reset_after_restart_reset_seconds() -> None:
    world = World().up()
    for _ in range(4):
        world.die(0)
    world.ready(0)
    world.wait(60.1)
    assert world.die(0) < 0.3


def test_the_delay_is_not_reset_before_restart_reset_seconds() -> None:
    world = World().up()
    for _ in range(4):
        world.die(0)
    world.ready(0)
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
                world.fail(number, "no such module", 78)
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


def test_an_end_of_the_zygote_is_no_death_of_the_process_that_it_was_to_fork() -> None:
    world = World().up()
    world.die(0)
    delay = world.die(0, NOT_FORKED)
    for _ in range(5):
        assert world.die(0, NOT_FORKED) == pytest.approx(delay, abs=TICK)
    slot = world.pool.slots[0]
    assert (slot.deaths, slot.in_crash_loop, slot.restarts["zygote"]) == (1, False, 6)
    assert "worker 0 was not started, as the zygote has ended; restarting it in" in of(LogLine, world.effects)[-1].line


def test_recovery_from_a_crash_loop_is_logged() -> None:
    world = World().up()
    for _ in range(5):
        world.die(0)
    assert of(LogLine, world.ready(0)) == []
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
    world.ready(0)
    effects = world.fail(1, "app.module: no module named chat", 78)
    assert effects[0] == NotifySystemd("stopping")
    assert signals(effects) == [(BROKER, signal.SIGKILL), (0, signal.SIGKILL)]
    world.exit(BROKER, -9)
    world.exit(0, -9)
    assert world.exit(1, 78) == [HaltService(78, "worker 1 can't start: app.module: no module named chat")]


def test_a_failure_that_may_pass_halts_with_the_status_of_the_process() -> None:
    world = World(workers=1)
    world.pool.start(world.now)
    world.fail(0, "chat.py:3: on_start failed: no database", 75)
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
    assert world.fail(0, "syntax error", 78) == []
    effects = world.exit(0, 78)
    assert of(HaltService, effects) == []
    assert [report.line for report in of(LogLine, effects)] == [
        "worker 0 can't start: syntax error; restarting it in 0.2 s"
    ]


def test_a_crash_at_the_first_start_is_retried() -> None:
    world = World(workers=1)
    world.pool.start(world.now)
    world.exit(0, 1)
    assert slots(SpawnProcess, world.wait(0.3)) == [0]


def test_a_process_that_failed_to_start_and_does_not_exit_is_killed() -> None:
    world = World().up()
    world.die(0)
    world.fail(0, "syntax error", 78)
    assert signals(world.wait(6)) == [(0, signal.SIGKILL)]


# Stuck.


def test_a_worker_without_a_beat_writes_its_stacks_and_is_killed_and_replaced() -> None:
    world = World(stuck=2.0).up()
    world.silent.add(1)
    assert of(SignalProcess, world.wait(1.9)) == []
    effects = world.wait(0.3)
    assert (slots(DumpProcessStacks, effects), of(SignalProcess, effects)) == ([1], [])
    assert signals(world.wait(0.3)) == [(1, signal.SIGKILL)]
    world.exit(1, -signal.SIGKILL)
    assert world.pool.slots[1].restarts == {"stuck": 1}
    assert "worker 1 did not turn its loop for 2 s and was killed" in of(LogLine, world.effects)[-1].line


def test_a_broker_without_a_beat_is_killed() -> None:
    world = World(stuck=2.0).up()
    world.silent.add(BROKER)
    assert signals(world.wait(3)) == [(BROKER, signal.SIGKILL)]


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
        world.do(world.pool.tick(world.now, {**world.beats(), world.serving(0): world.now + 1000}))
    assert slots(DumpProcessStacks, world.effects) == [0]
    world.wait(0.4)
    assert signals(world.effects) == [(0, signal.SIGKILL)]


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
    assert signals(world.effects) == [(0, signal.SIGKILL)]


def test_a_late_tick_extends_the_deadline_of_a_start() -> None:
    world = World()
    world.pool.start(world.now)
    world.wait(1)
    world.now += 1000.0
    assert of(SignalProcess, world.tick() + world.wait(28)) == []
    assert len(of(SignalProcess, world.wait(2))) == 3


# Memory.


def test_a_worker_that_uses_too_much_memory_is_replaced_by_a_hand_over() -> None:
    world = World().up()
    effects = world.do(world.pool.memory_exceeded(1, 512 << 20, world.now))
    assert slots(SpawnProcess, effects) == [1]
    assert "worker 1 uses 512 MiB of memory (loop.max_rss); replacing it" in world.lines()
    assert world.pool.ready, "the old one serves until the new one is ready"
    world.hand_over(1)
    assert "worker 1 has been replaced" in world.lines()
    assert world.pool.slots[1].restarts == {"bloated": 1}
    assert not any(report.is_error for report in of(LogLine, world.effects))


def test_workers_that_use_too_much_memory_are_replaced_one_at_a_time() -> None:
    world = World().up()
    assert slots(SpawnProcess, world.pool.memory_exceeded(0, 1, world.now)) == [0]
    assert world.pool.memory_exceeded(0, 1, world.now) == []
    assert world.pool.memory_exceeded(1, 1, world.now) == []
    world.pool.process_ready(world.successor(0), world.now)
    assert world.pool.memory_exceeded(1, 1, world.now) == []
    world.ended(world.predecessor(0), 0)
    assert slots(SpawnProcess, world.pool.memory_exceeded(1, 1, world.now)) == [1]


def replace_for_memory(world: World) -> float:
    """Let worker 0 use too much memory all the time. Returns the seconds until it is replaced."""
    began = world.now
    while not of(SpawnProcess, world.do(world.pool.memory_exceeded(0, 1, world.now))):
        world.tick()
        assert world.now - began < 1000
    replaced = world.now
    world.hand_over(0)
    return replaced - began


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


def test_a_replacement_for_memory_that_fails_is_tried_again_after_a_pause() -> None:
    world = World().up()
    world.do(world.pool.memory_exceeded(1, 1, world.now, "workers.max_rss"))
    world.ended(world.successor(1), 1)
    goes_on = "worker 1 goes on as it is: its successor exited with status 1; trying again in 60 s"
    assert world.lines() == ["worker 1 uses 0 MiB of memory (workers.max_rss); replacing it", goes_on]
    world.wait(59)
    assert world.pool.memory_exceeded(1, 1, world.now) == []
    world.wait(2)
    assert slots(SpawnProcess, world.pool.memory_exceeded(1, 1, world.now)) == [1]


# Age.


def test_old_workers_are_replaced_at_different_times_and_none_is_older_than_the_limit() -> None:
    world = World(workers=4)
    world.pool.configure(WorkersSettings(max_age=100.0), LoopSettings(), STOP)
    world.up()
    born = dict.fromkeys(range(4), world.now)
    replaced: list[tuple[int, float]] = []
    while world.now < 600.0:
        for number in slots(SpawnProcess, world.tick()):
            replaced.append((number, world.now))
            assert world.now - born[number] <= 100.2
            born[number] = world.now
            world.hand_over(number)
    assert {number for number, _ in replaced} == {0, 1, 2, 3}
    assert [number for number, _ in replaced[:4]] == [3, 2, 1, 0]
    assert all(later - sooner > 5 for (_, sooner), (_, later) in pairwise(replaced[:4]))
    assert world.pool.slots[0].restarts.keys() == {"age"}
    assert "worker 3 has served for 63 s (workers.max_age); replacing it" in world.lines()


def test_without_a_limit_no_worker_is_too_old() -> None:
    world = World().up()
    assert world.wait(1000) == []


# Replacing by reload.


def test_a_reload_replaces_one_worker_at_a_time_and_then_ends() -> None:
    world = World().up()
    effects = world.do(world.pool.reload(world.now))
    assert [(effect.slot, effect.revision) for effect in of(SpawnProcess, effects)] == [(0, 1)]
    assert slots(ConnectToBroker, effects) == [0], "beside the stream of the serving process"
    assert world.wait(5) == []
    assert slots(SpawnProcess, world.hand_over(0)) == [1]
    assert world.pool.reloading
    assert world.hand_over(1)[-1] == ReloadEnded()
    assert (world.pool.revision, world.pool.reloading, world.pool.ready) == (1, False, True)
    assert of(UseRevision, world.effects) == [UseRevision(1)]
    assert [slot.restarts for slot in world.pool.workers] == [{"reload": 1}] * 2
    assert slots(SpawnProcess, world.effects) == [0, 1], "the broker stays"


def test_the_old_process_serves_until_the_new_one_is_ready() -> None:
    world = World(workers=1).up()
    old = world.serving(0)
    world.do(world.pool.reload(world.now))
    world.wait(10)
    assert (world.serving(0), world.pool.slots[0].state) == (old, SlotState.READY)
    new = world.successor(0)
    effects = world.do(world.pool.process_ready(new, world.now))
    assert (world.serving(0), world.pool.slots[0].state) == (new, SlotState.READY)
    assert [(effect.slot, effect.generation) for effect in of(MoveConnections, effects)] == [(0, old)]


def test_a_process_that_does_not_hand_over_or_end_in_time_is_drained_and_killed() -> None:
    world = World(workers=1).up()
    world.do(world.pool.reload(world.now))
    world.do(world.pool.process_ready(world.successor(0), world.now))
    assert slots(DrainProcess, world.wait(STOP + 0.2)) == [0]
    assert signals(world.wait(STOP + 0.2)) == [(0, signal.SIGKILL)]
    assert of(ReloadEnded, world.ended(world.predecessor(0), -9)) == [ReloadEnded()]


@pytest.mark.parametrize(
    ("status", "said", "expected"),
    [
        (78, "chat.py:3: SyntaxError", "can't start: chat.py:3: SyntaxError"),
        (75, "chat.py:9: no database", "can't start: chat.py:9: no database"),
        (1, "", "exited with status 1"),
        (-9, "", "was killed by SIGKILL"),
    ],
)
def test_a_successor_that_does_not_start_leaves_the_old_process_and_ends_the_reload(
    status: int, said: str, expected: str
) -> None:
    world = World().up()
    old = world.serving(0)
    world.do(world.pool.reload(world.now))
    failed = world.successor(0)
    if said:
        world.do(world.pool.start_failed(failed, said, status, world.now))
    effects = world.ended(failed, status)
    assert effects == [ReloadEnded(f"worker 0 goes on as it is: its successor {expected}")]
    assert (world.serving(0), world.pool.slots[0].state, world.pool.revision) == (old, SlotState.READY, 0)
    assert world.wait(100) == []
    assert world.pool.slots[0].restarts == {}
    world.effects.clear()
    world.do(world.pool.reload(world.now))
    assert [effect.revision for effect in of(SpawnProcess, world.effects)] == [2]


def test_a_successor_that_hangs_is_killed_with_its_stacks_in_the_log() -> None:
    world = World(workers=1).up()
    world.do(world.pool.reload(world.now))
    effects = world.wait(31)
    assert slots(DumpProcessStacks, effects) == [0]
    assert signals(effects) == [(0, signal.SIGKILL)]
    (ended,) = of(ReloadEnded, world.ended(world.successor(0), -9))
    assert "was not ready within 30 s and was killed (workers.start_timeout)" in ended.failure
    assert world.pool.ready


def test_a_failure_after_the_first_replacement_keeps_the_new_settings_in_force() -> None:
    world = World().up()
    world.do(world.pool.reload(world.now))
    world.hand_over(0)
    (ended,) = of(ReloadEnded, world.ended(world.successor(1), 1))
    assert ended.failure.startswith("worker 1 goes on as it is")
    assert (world.pool.revision, [slot.process.revision for slot in world.pool.workers]) == (1, [1, 0])
    world.effects.clear()
    world.die(1)
    assert [effect.revision for effect in of(SpawnProcess, world.effects)] == [1]


def test_a_successor_takes_the_place_of_a_process_that_dies_before_it_is_ready() -> None:
    world = World(workers=1).up()
    world.do(world.pool.reload(world.now))
    successor = world.successor(0)
    assert slots(SpawnProcess, world.exit(0, -11)) == []
    assert (world.serving(0), world.pool.slots[0].state) == (successor, SlotState.STARTING)
    assert of(ReloadEnded, world.ready(0)) == [ReloadEnded()]
    assert world.pool.slots[0].restarts == {"signal": 1}


def test_a_process_that_dies_during_its_hand_over_does_not_fail_the_reload() -> None:
    world = World(workers=1).up()
    world.do(world.pool.reload(world.now))
    world.do(world.pool.process_ready(world.successor(0), world.now))
    assert of(ReloadEnded, world.ended(world.predecessor(0), -11)) == [ReloadEnded()]
    assert "worker 0 has been replaced; the process before was killed by SIGSEGV" in world.lines()


def test_a_new_process_that_dies_during_the_hand_over_is_restarted() -> None:
    world = World(workers=1).up()
    world.do(world.pool.reload(world.now))
    world.do(world.pool.process_ready(world.successor(0), world.now))
    world.effects.clear()
    assert world.die(0, -11) < 0.3
    assert [effect.revision for effect in of(SpawnProcess, world.effects)] == [1]
    world.ended(world.predecessor(0), 0)
    assert of(ReloadEnded, world.ready(0)) == [ReloadEnded()]


def test_a_server_that_is_starting_or_stopping_does_not_reload() -> None:
    world = World()
    world.do(world.pool.start(world.now))
    assert world.pool.reload(world.now) == [ReloadEnded("the server is still starting")]
    world = World().up()
    world.pool.stop(world.now)
    assert world.pool.reload(world.now) == [ReloadEnded("the server is stopping")]


def test_a_reload_starts_a_worker_in_a_crash_loop_at_once() -> None:
    world = World().up()
    for _ in range(8):
        world.die(0)
    world.exit(0, 1)
    effects = world.do(world.pool.reload(world.now))
    assert [(effect.slot, effect.revision) for effect in of(SpawnProcess, effects)] == [(0, 1)]
    assert slots(SpawnProcess, world.ready(0)) == [1]


def test_a_reload_whose_first_process_is_a_restart_that_fails_keeps_the_old_settings() -> None:
    world = World().up()
    world.exit(0, 1)
    world.do(world.pool.reload(world.now))
    (ended,) = of(ReloadEnded, world.exit(0, 78))
    assert ended.failure == "worker 0 exited with status 78"
    world.effects.clear()
    world.wait(1)
    assert [effect.revision for effect in of(SpawnProcess, world.effects)] == [0]


def test_a_stop_ends_a_reload_and_all_three_kinds_of_process() -> None:
    world = World().up()
    world.do(world.pool.reload(world.now))
    world.do(world.pool.process_ready(world.successor(0), world.now))
    effects = world.do(world.pool.stop(world.now))
    assert of(ReloadEnded, effects) == [ReloadEnded("the server is stopping")]
    assert [(effect.slot, effect.generation) for effect in of(DrainProcess, effects)] == [
        (0, world.serving(0)),
        (0, world.predecessor(0)),
        (1, world.serving(1)),
    ]
    world.exit(0, 0)
    assert slots(DrainProcess, world.exit(1, 0)) == []
    assert slots(DrainProcess, world.ended(world.predecessor(0), 0)) == [BROKER]
    assert world.exit(BROKER, 0) == [HaltService(0)]


# Replacing the broker.


def test_the_broker_is_replaced_first_by_a_process_that_gets_its_state() -> None:
    world = World().up()
    old = world.serving(BROKER)
    effects = world.do(world.pool.reload(world.now, with_broker=True))
    assert [(one.slot, one.revision, one.predecessor) for one in of(SpawnProcess, effects)] == [(BROKER, 1, old)]
    assert world.wait(5) == []
    new = world.successor(BROKER)
    effects = world.do(world.pool.process_ready(new, world.now))
    assert world.serving(BROKER) == new
    assert [(one.slot, one.generation) for one in of(DrainProcess, effects)] == [(BROKER, old)]
    assert of(ConnectToBroker, effects) == [], "the streams of the workers go on"
    assert of(UseRevision, effects) == [UseRevision(1)]
    effects = world.ended(old, 0)
    assert [(one.slot, one.revision, one.predecessor) for one in of(SpawnProcess, effects)] == [(0, 1, 0)]
    world.hand_over(0)
    assert world.hand_over(1)[-1] == ReloadEnded()


def test_a_broker_whose_successor_fails_goes_on_and_ends_the_reload() -> None:
    world = World().up()
    old = world.serving(BROKER)
    world.do(world.pool.reload(world.now, with_broker=True))
    failed = world.successor(BROKER)
    world.do(world.pool.start_failed(failed, "the state is too large", 75, world.now))
    effects = world.ended(failed, 75)
    failure = "broker goes on as it is: its successor can't start: the state is too large"
    assert effects == [ReloadEnded(failure)]
    assert (world.serving(BROKER), world.pool.ready) == (old, True)
    assert slots(SpawnProcess, world.wait(10)) == []


def test_a_broker_that_dies_before_its_successor_has_its_state_is_restarted() -> None:
    world = World().up()
    world.do(world.pool.reload(world.now, with_broker=True))
    successor = world.successor(BROKER)
    assert slots(SpawnProcess, world.exit(BROKER, -9)) == []
    world.fail(BROKER, "the broker before has ended", 75)
    assert world.serving(BROKER) == successor
    (ended,) = of(ReloadEnded, world.exit(BROKER, 75))
    assert ended.failure == "broker can't start: the broker before has ended"
    effects = world.wait(1)
    assert [(one.slot, one.predecessor) for one in of(SpawnProcess, effects)] == [(BROKER, 0)]
    assert slots(ConnectToBroker, world.ready(BROKER)) == [0, 1]


def test_a_broker_that_is_dead_at_a_reload_is_not_replaced_again() -> None:
    world = World().up()
    world.exit(BROKER, -9)
    effects = world.do(world.pool.reload(world.now, with_broker=True))
    assert [(one.slot, one.revision, one.predecessor) for one in of(SpawnProcess, effects)] == [(BROKER, 1, 0)]
    assert slots(SpawnProcess, world.ready(BROKER)) == [0]


def test_another_pool_goes_on_with_settled_slots() -> None:
    before = World().up()
    before.die(0)
    before.ready(0)
    records = [slot.record() for slot in before.pool.slots.values()]
    world = World()
    world.now = before.now
    world.pool.resume(records, before.pool.generation, world.now)
    assert world.pool.is_settled and world.pool.serving
    assert [slot.record() for slot in world.pool.slots.values()] == records
    assert world.wait(1) == [], "all of them have streams to the broker"
    effects = world.do(world.pool.reload(world.now, with_broker=True))
    (spawned,) = of(SpawnProcess, effects)
    assert (spawned.slot, spawned.predecessor) == (BROKER, before.serving(BROKER))
    assert spawned.generation == before.pool.generation + 1
    assert world.die(1) < 0.2


def test_a_replacement_for_memory_does_not_delay_a_reload_for_ever() -> None:
    world = World(workers=1).up()
    world.do(world.pool.memory_exceeded(0, 1, world.now))
    world.do(world.pool.reload(world.now))
    effects = world.hand_over(0)
    assert [(effect.slot, effect.revision) for effect in of(SpawnProcess, effects)] == [(0, 1)]
    assert of(ReloadEnded, world.hand_over(0)) == [ReloadEnded()]


# Another number of workers.


def test_more_workers_start_beside_the_others() -> None:
    world = World().up()
    assert slots(SpawnProcess, world.do(world.pool.scale(4, world.now))) == [2, 3]
    assert world.pool.ready, "the server is ready while the new ones start"
    assert of(ScaleEnded, world.ready(2)) == []
    assert of(ScaleEnded, world.ready(3)) == [ScaleEnded()]
    assert [slot.number for slot in world.pool.workers] == [0, 1, 2, 3]


def test_the_last_workers_hand_over_and_end() -> None:
    world = World(workers=3).up()
    assert slots(MoveConnections, world.do(world.pool.scale(1, world.now))) == [1, 2]
    assert world.pool.ready
    for number in (1, 2):
        assert slots(DrainProcess, world.do(world.pool.handed_over(world.serving(number), world.now))) == [number]
    assert world.exit(1, 0) == [], "the kernel numbers the sockets in order: the last one goes first"
    assert world.exit(2, 0) == [RemoveSlot(2), RemoveSlot(1), ScaleEnded()]
    assert [slot.number for slot in world.pool.workers] == [0]
    assert world.wait(100) == []


def test_a_new_worker_that_does_not_start_takes_the_other_new_ones_with_it() -> None:
    world = World(workers=1).up()
    world.do(world.pool.scale(3, world.now))
    world.fail(1, "app.py:3: no database", 75)
    assert signals(world.exit(1, 75)) == [(2, signal.SIGTERM)]
    assert world.pool.ready
    failure = "worker 1 can't start: app.py:3: no database"
    assert world.exit(2, -15) == [RemoveSlot(2), RemoveSlot(1), ScaleEnded(failure)]


def test_a_new_worker_that_is_ready_ends_too_when_another_new_one_fails() -> None:
    world = World(workers=1).up()
    world.do(world.pool.scale(3, world.now))
    world.ready(2)
    assert slots(MoveConnections, world.exit(1, 1)) == [2]
    assert world.exit(2, 0) == [RemoveSlot(2), RemoveSlot(1), ScaleEnded("worker 1 exited with status 1")]


def test_a_worker_without_a_process_is_removed_at_once() -> None:
    world = World().up()
    world.exit(1, 1)
    assert world.do(world.pool.scale(1, world.now)) == [RemoveSlot(1), ScaleEnded()]


def test_a_worker_that_dies_while_it_is_removed_is_not_replaced() -> None:
    world = World().up()
    world.do(world.pool.scale(1, world.now))
    assert world.exit(1, -11) == [RemoveSlot(1), ScaleEnded()]
    assert world.wait(100) == []


def test_a_worker_that_is_being_replaced_can_be_removed() -> None:
    world = World().up()
    world.do(world.pool.memory_exceeded(1, 1, world.now))
    effects = world.do(world.pool.scale(1, world.now))
    assert (slots(MoveConnections, effects), signals(effects)) == ([1], [(1, signal.SIGTERM)])
    world.ended(world.successor(1), -15)
    assert world.exit(1, 0) == [RemoveSlot(1), ScaleEnded()]


def test_a_stop_ends_a_change_of_the_number() -> None:
    world = World().up()
    world.do(world.pool.scale(3, world.now))
    assert of(ScaleEnded, world.do(world.pool.stop(world.now))) == [ScaleEnded("the server is stopping")]
    assert world.pool.scale(5, world.now) == [ScaleEnded("the server is stopping")]


# Links.


def test_a_worker_that_lost_its_stream_is_connected_at_the_next_tick() -> None:
    world = World().up()
    assert world.broker_link_lost(1) == []
    assert slots(ConnectToBroker, world.wait(1)) == [1]


def test_workers_are_connected_again_only_to_the_next_broker() -> None:
    world = World().up()
    world.exit(BROKER, -9)
    world.broker_link_lost(0)
    assert of(ConnectToBroker, world.wait(2)) == []
    assert slots(ConnectToBroker, world.ready(BROKER)) == [0, 1]


def test_a_process_whose_control_link_ended_is_killed_after_a_while() -> None:
    world = World().up()
    world.control_link_lost(0)
    assert not world.pool.ready
    assert signals(world.wait(5.2)) == [(0, signal.SIGKILL)]
    world.exit(0, -signal.SIGKILL)
    assert world.pool.slots[0].restarts == {"link": 1}


def test_a_control_link_that_ends_with_its_process_is_not_the_reason_of_the_restart() -> None:
    world = World().up()
    world.control_link_lost(0)
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
    assert signals(effects) == [(0, signal.SIGTERM)]
    assert world.pool.slots[1].state is SlotState.GONE
    assert [drain.slot for drain in of(DrainProcess, world.exit(0, -signal.SIGTERM))] == [BROKER]


def test_stop_before_start_halts() -> None:
    assert HaltService(0) in World().pool.stop(0.0)


# The table.


@pytest.mark.parametrize("state", SlotState)
@pytest.mark.parametrize("event", PoolEvent)
def test_a_pair_that_is_not_in_the_table_has_no_consequence(state: SlotState, event: PoolEvent) -> None:
    world = World().up()
    process = world.pool.slots[0].process
    process.state = state
    world.pool._fire(process, event)
    if (state, event) not in TRANSITIONS:
        assert process.state is state
        assert world.pool._effects == []


def test_every_state_with_a_process_handles_exit_and_kill() -> None:
    for state in set(SlotState) - {SlotState.WAITING, SlotState.GONE}:
        assert (state, PoolEvent.EXITED) in TRANSITIONS
        assert (state, PoolEvent.KILL) in TRANSITIONS or state is SlotState.KILLED


# Invariants.


class Invariants(RuleBasedStateMachine):
    """Arbitrary events, against a model of the processes that the effects start and end."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.alive: dict[int, int] = {}  # generation -> slot
        self.killed: set[int] = set()
        self.leaving: set[int] = set()  # generations that hand over, drain or are killed
        self.reloads = self.scales = 0
        self.halts = 0
        self.stopped_at = float("inf")  # time of the first stop

    def carry(self, effects: list[Effect]) -> None:
        for effect in effects:
            assert not self.halts or isinstance(effect, ReloadEnded | ScaleEnded), "an effect after HaltService"
            if isinstance(effect, SpawnProcess):
                assert effect.generation not in self.alive
                assert self.now < self.stopped_at, "a process was started after stop"
                self.alive[effect.generation] = effect.slot
            elif isinstance(effect, SignalProcess | DrainProcess | MoveConnections | DumpProcessStacks):
                assert self.alive[effect.generation] == effect.slot, "an effect on a process that does not exist"
                self.leaving.add(effect.generation)
                if isinstance(effect, SignalProcess) and effect.number == signal.SIGKILL:
                    self.killed.add(effect.generation)
            elif isinstance(effect, ConnectToBroker):
                assert self.alive[effect.generation] == effect.slot
                assert BROKER in self.alive.values()
            elif isinstance(effect, ReloadEnded):
                self.reloads -= 1
            elif isinstance(effect, ScaleEnded):
                self.scales -= 1
            elif isinstance(effect, HaltService):
                self.halts += 1

    @initialize(workers=st.integers(1, 3), stuck=st.sampled_from([0.0, 1.0]), stop=st.sampled_from([0.0, 2.0]))
    def start(self, workers: int, stuck: float, stop: float) -> None:
        self.stop_timeout = stop
        self.pool = Pool(
            workers, WorkersSettings(start_timeout=2.0, restart_reset=3.0), LoopSettings(stuck=stuck), stop
        )
        self.carry(self.pool.start(self.now))

    def beat(self, seconds: float, beating: bool) -> None:
        self.now += seconds
        self.carry(self.pool.tick(self.now, dict.fromkeys(self.alive, self.now) if beating else {}))

    @rule(seconds=st.sampled_from([TICK, TICK, TICK, 0.5, 30.0]), beating=st.booleans())
    def tick(self, seconds: float, beating: bool) -> None:
        self.beat(seconds, beating)

    def draw(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.alive)))

    def exit(self, generation: int, status: int) -> None:
        del self.alive[generation]
        self.killed.discard(generation)
        self.carry(self.pool.process_exited(generation, status, self.now))

    @precondition(lambda self: self.alive)
    @rule(data=st.data(), status=st.sampled_from([0, 1, 78, -9, -15]))
    def exited(self, data: st.DataObject, status: int) -> None:
        self.exit(self.draw(data), status)

    @precondition(lambda self: self.alive)
    @rule(
        data=st.data(),
        name=st.sampled_from(
            ["process_ready", "process_ready", "handed_over", "broker_link_lost", "control_link_lost"]
        ),
    )
    def event(self, data: st.DataObject, name: str) -> None:
        self.carry(getattr(self.pool, name)(self.draw(data), self.now))

    @rule()
    def all_ready(self) -> None:
        for generation in sorted(self.alive):
            self.carry(self.pool.process_ready(generation, self.now))

    @rule(data=st.data())
    def memory_exceeded(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from([slot.number for slot in self.pool.workers]))
        self.carry(self.pool.memory_exceeded(number, 1, self.now))

    @precondition(lambda self: not self.pool.reloading and not self.pool.scaling)
    @rule(count=st.integers(1, 4))
    def scale(self, count: int) -> None:
        self.scales += 1
        self.carry(self.pool.scale(count, self.now))

    @precondition(lambda self: not self.pool.reloading and not self.pool.scaling)
    @rule(with_broker=st.booleans())
    def reload(self, with_broker: bool) -> None:
        self.reloads += 1
        self.carry(self.pool.reload(self.now, with_broker=with_broker))

    @precondition(lambda self: self.alive)
    @rule(data=st.data(), status=st.sampled_from([75, 78]))
    def failed(self, data: st.DataObject, status: int) -> None:
        self.carry(self.pool.start_failed(self.draw(data), "because", status, self.now))

    @precondition(lambda self: self.now > 2)
    @rule()
    def stop(self) -> None:
        self.stopped_at = min(self.stopped_at, self.now)
        self.carry(self.pool.stop(self.now))

    @invariant()
    def the_pool_knows_where_processes_are(self) -> None:
        if hasattr(self, "pool") and not self.halts:
            known = {one.generation: slot.number for slot in self.pool.slots.values() for one in slot.processes}
            assert known == self.alive
            if self.pool.stopping:
                self.stopped_at = min(self.stopped_at, self.now)
            assert self.reloads == int(self.pool.reloading), "a reload ends once"
            assert self.scales == int(self.pool.scaling), "a change of the number ends once"
            numbers = [slot.number for slot in self.pool.workers]
            assert numbers == list(range(len(numbers)))
            assert not numbers[0:1] or not self.pool.slots[0].is_removed

    @invariant()
    def no_slot_has_two_processes_that_accept(self) -> None:
        if hasattr(self, "pool") and not self.halts:
            for slot in self.pool.slots.values():
                assert sum(one.state is SlotState.READY for one in slot.processes) <= 1
                if slot.predecessor is not None:
                    assert slot.predecessor.state in (SlotState.HANDING_OVER, SlotState.LEAVING, SlotState.KILLED)

    def settle(self) -> None:
        """Let every process do as it should for a while: no slot stays without a process, and a reload ends."""
        for _ in range(1000):
            self.beat(TICK, True)
            for generation in sorted(self.alive):
                if generation in self.leaving:
                    self.carry(self.pool.handed_over(generation, self.now))
                    self.exit(generation, -9 if generation in self.killed else 0)
                else:
                    self.carry(self.pool.process_ready(generation, self.now))
            if self.pool.ready and not (self.reloads or self.scales):
                break
        assert self.pool.ready
        assert (self.reloads, self.scales) == (0, 0)

    def teardown(self) -> None:
        """Every stop ends in one HaltService within the deadline, if killed processes exit."""
        if not hasattr(self, "pool"):
            return
        if not self.pool.stopping:
            self.settle()
        self.stop()
        deadline = self.now + max(self.stop_timeout, 5.0) + 5.0
        while not self.halts:
            assert self.now < deadline
            for generation in sorted(self.killed):
                self.exit(generation, -9)
            if not self.halts:
                self.beat(TICK, True)
        assert self.halts == 1
        assert set(self.alive) <= self.killed


TestInvariants = Invariants.TestCase
TestInvariants.settings = profile(max_examples=150, stateful_step_count=40, deadline=None)
