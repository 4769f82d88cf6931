"""The end of one program and the begin of the next in the same process. A whole upgrade is in
tests/system/test_upgrade.py."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import Any

import pytest
from twisted.internet import reactor
from twisted.internet.defer import Deferred, fail, succeed

from realtime.process import control
from realtime.supervision.slots import BROKER
from realtime.supervisor.inheritance import HELD_SIGNALS, Inheritance, InheritedPort
from realtime.supervisor.systemd import SystemdNotifier
from realtime.supervisor.trial import ProgramResult
from realtime.supervisor.upgrade import CannotUpgrade, Estate, Launch, Upgrade, execute
from realtime.supervisor.zygote import ZygoteUnusable
from tests.supervisor import test_service
from tests.supervisor.test_service import Running
from tests.system.serving import CHECKOUT

forks = test_service.forks

LAUNCH = Launch(["/nowhere/twistd", "realtime"], "/run/realtime.pid")


class Trials:
    """Trials whose results the test sets, and a zygote's check."""

    formats = "formats"
    pids: tuple[int, ...] = ()

    def __init__(self) -> None:
        self.application = self.program = ProgramResult()
        self.zygote: Deferred[None] = succeed(None)

    def run_application(self, timeout: float) -> Deferred[ProgramResult]:
        return succeed(self.application)

    def run_program(self, command: list[str], inheritance: int, timeout: float) -> Deferred[ProgramResult]:
        return succeed(self.program)

    def check(self) -> Deferred[None]:
        return self.zygote


class Scene:
    """An upgrade of a supervisor that has two workers, which do not run."""

    def __init__(self) -> None:
        self.running = Running(reactor)
        self.trials: Any = Trials()
        supervisor: Any = self.running.supervisor
        self.estate = Estate(
            supervisor.pool,
            supervisor.children,
            supervisor._port,
            supervisor._operators,
            supervisor._rescue,
            self.trials,
            supervisor._settings,
        )
        self.told: list[str] = []

    async def refused(self, launch: Launch | None = LAUNCH) -> str:
        """Upgrade, and return the reason why the server goes on."""
        with pytest.raises(CannotUpgrade) as caught:
            await Upgrade(reactor, self.estate, launch, 2, self.trials, SystemdNotifier({})).run(self.told.append)
        return str(caught.value)


async def test_each_reason_not_to_upgrade_is_one_line() -> None:
    scene = Scene()
    assert await scene.refused(None) == "this server was not started by `twistd realtime`; restart it"
    assert (await scene.refused()).startswith("not all processes are ready, or some are being replaced")
    await scene.running.ready()
    scene.trials.application = ProgramResult(problems=["realtime.toml:3: bad", "worse"])
    assert await scene.refused() == "realtime.toml:3: bad; worse"
    scene.trials.application = ProgramResult()
    scene.trials.zygote = fail(ZygoteUnusable("other messages"))
    assert await scene.refused() == "other messages"
    scene.trials.zygote = succeed(None)
    scene.trials.program = ProgramResult(problems=["the start of the installed version ended its process"])
    assert await scene.refused() == "the start of the installed version ended its process"
    scene.trials.program = ProgramResult(warnings=["http_server.port = 1: needs a restart"], version="7.0")
    assert await scene.refused() == "/nowhere/twistd can't be executed: No such file or directory"
    assert scene.told[-2].startswith("http_server.port = 1")
    assert scene.told[-1].startswith("version 7.0 takes the place of version ")
    scene.running.end()


async def test_a_message_under_way_delays_the_end_of_the_program() -> None:
    scene = Scene()
    await scene.running.ready()
    child = scene.running.supervisor.processes[0]
    assert scene.estate.is_quiet
    asked = child.report("tasks")  # which this process never answers
    assert not scene.estate.is_quiet
    asked.addErrback(lambda failure: None)
    scene.running.end()


async def test_the_next_program_gets_all_processes_and_sockets() -> None:
    scene = Scene()
    await scene.running.ready()
    await scene.running.process(0).peer.callRemote(control.LinkLost)
    left = scene.estate.inheritance(2, "/run/realtime.pid", b"settings")
    assert [one.record.number for one in left.processes] == [BROKER, 0, 1]
    assert [one.pid for one in left.processes] == [scene.running.process(slot).pid for slot in (BROKER, 0, 1)]
    assert left.processes[0].sent_descriptors == 2, "an end of a stream for each worker"
    assert (left.generation, left.workers, left.formats, left.configured_count) == (3, 2, "formats", 2)
    assert len(left.port.sockets) == 2
    assert left.fixed["http_server.port"] == 0
    scene.running.end()


def test_a_program_that_can_not_be_executed_leaves_no_trace() -> None:
    with open(os.devnull) as file:
        left = Inheritance("1", "", [], 0, InheritedPort([], -1, False), file.fileno(), 1, {}, "")
        before, mask = sorted(os.listdir("/proc/self/fd")), signal.pthread_sigmask(signal.SIG_BLOCK, [])
        with pytest.raises(CannotUpgrade, match="/nowhere can't be executed"):
            execute(Launch(["/nowhere"]), left)
        assert not os.get_inheritable(file.fileno())
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask
        assert sorted(os.listdir("/proc/self/fd")) == before


EXECUTING = """
import os, signal, sys
from realtime.supervisor.inheritance import HELD_SIGNALS, Inheritance, InheritedPort
from realtime.supervisor.upgrade import Launch, execute

kept, _ = os.pipe()
os.environ["PID"] = str(os.getpid())
left = Inheritance("1", "", [], 0, InheritedPort([], -1, False), kept, 1, {}, "")
execute(Launch([sys.executable, "-c", sys.argv[1]]), left)
"""
EXECUTED = """
import json, os, signal, sys
from realtime.supervisor import inheritance

fd = int(sys.argv[1].partition("=")[2])
left = inheritance.take(fd)
held = signal.pthread_sigmask(signal.SIG_BLOCK, [])
print(json.dumps([os.getpid() == int(os.environ["PID"]), os.fstat(left.operators).st_mode, sorted(held)]))
"""


def test_the_program_is_executed_in_the_same_process_and_signals_wait_for_it() -> None:
    command = [sys.executable, "-c", EXECUTING, EXECUTED]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    is_same, mode, held = json.loads(done.stdout)
    assert is_same and mode, "the descriptor is open there"
    assert held == sorted(HELD_SIGNALS)
