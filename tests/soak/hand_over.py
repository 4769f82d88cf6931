"""Faults at the steps of a hand-over: each of the processes that take part in it is killed at each of its steps.

For every case, the server is told to reload. The worker that gets to the step stops there; then one process is killed,
and the stopped one goes on. After that every client must be connected to exactly one process, which answers it.
"""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import IO, Any

import aiohttp

from tests.soak import world as worlds
from tests.soak.account import BROKEN
from tests.soak.holders import holders
from tests.soak.report import tell_account
from tests.soak.run import Load, Run
from tests.soak.served import Service
from tests.soak.steps import EACH, SOME, SOURCE, STEPS, Steps

VICTIMS = ("old", "new", "broker", "supervisor")
RATE = 40.0  # publications a second
REACH = 20.0  # seconds until a step is reached
ANSWER = 15.0  # seconds for an answer to each client
SILENT = 5.0  # seconds for the server to end the copies of a connection


@dataclass(frozen=True, slots=True)
class Case:
    """victim: which process is killed while a worker stands at the step, for the `times`-th time in its life."""

    step: str
    victim: str
    times: int = 1

    def __str__(self) -> str:
        return f"kill the {self.victim} {self.step}, time {self.times}"


def cases(seed: int, number: int | None = None) -> list[Case]:
    """Return every step with every victim, the victims by turns, in an order by the seed; only the first `number`."""
    random = Random(f"hand-over of {seed}")
    columns = []
    for victim in VICTIMS:
        steps = random.sample(STEPS, len(STEPS))
        columns.append([Case(step, victim, _pick_time(step, random)) for step in steps])
    return [case for row in zip(*columns, strict=True) for case in row][:number]


def _pick_time(step: str, random: Random) -> int:
    """Return how often the step is met before it counts: within a batch, or in its first messages."""
    function = step.partition(" ")[2]
    return random.randint(1, 30 if function in EACH else 4 if function in SOME else 1)


class HandOverFaults(Run):
    """One run. done: the cases carried out, by victim; missed: the cases whose step was not reached."""

    def __init__(
        self,
        seed: int,
        clients: int,
        workers: int,
        cases: Sequence[Case],
        folder: Path,
        tell: Callable[[str], None] = print,
        copy: IO[str] | None = None,
    ) -> None:
        """folder: an empty one, for `Steps`."""
        super().__init__(seed, workers, tell, copy)
        self.done: Counter[str] = Counter()
        self.missed: list[Case] = []
        self._clients = clients
        self._cases = cases
        self._folder = folder
        self._steps = Steps(folder)
        self._latest = ""

    def _settings(self, port: int, operator_port: int) -> dict[str, Any]:
        settings = super()._settings(port, operator_port)
        settings["app"]["options"] = {"steps": str(self._folder)}
        return settings

    def _create_world(self) -> worlds.World:
        return worlds.create(self.account, self._seed, self._clients)

    def _latest_fault(self) -> str:
        return self._latest

    async def _strain(self, load: Load) -> None:
        publishing = self._publish(load, RATE)
        for case in self._cases:
            self._latest = str(case)
            await self._carry_out(case, load.service)
            await self._wait_back(load.crowd)
            await self._check_connections(load)
        await self._stop_publishing(load, publishing)

    async def _carry_out(self, case: Case, service: Service) -> None:
        before = await workers(service)
        self._steps.arm(case.step, case.times)
        reloading = asyncio.create_task(service.reload())
        reached = await self._until(lambda: self._steps.stopped is not None or reloading.done(), REACH)
        stopped = self._steps.stopped
        if not reached or stopped is None:
            self.missed.append(case)
            self._say(f"{case}: the step was not reached")
        else:
            service.census()
            victim = self._find(case, stopped, before, service)
            self._say(f"{case}: process {victim}")
            self.done[case.victim] += 1
            service.excuse(victim, str(case))
            service.excuse_one_worker(str(case))
            service.kill(victim, signal.SIGKILL)
            service.kill(stopped, signal.SIGCONT)
        self._steps.disarm()
        await reloading
        await self._until(lambda: not service.is_restarting, REACH)

    def _find(self, case: Case, stopped: int, before: Mapping[int, int], service: Service) -> int:
        """Return the process to kill. before: the workers by slot, before the reload."""
        if case.victim == "supervisor":
            return service.supervisor
        if case.victim == "broker":
            return service.of("broker")[0]
        if (case.victim == "old") is (case.step.partition(" ")[2] in SOURCE):
            return stopped
        if case.victim == "new":
            return max(pid for pid in service.of("worker") if pid not in before.values())
        return next(pid for pid in service.of("worker") if pid in before.values())

    async def _check_connections(self, load: Load) -> None:
        """Every connection has one holder, which answers."""

        def shared() -> dict[str, list[int]]:
            found = holders(load.service.port, load.service.everyone())
            mine = {client.name: found.get(client.local_port, []) for client in load.crowd.connected()}
            return {name: pids for name, pids in mine.items() if len(pids) != 1}

        await self._until(lambda: not shared(), SILENT)
        for name, pids in shared().items():
            self.account.require(False, "holder", BROKEN, name, "connection", f"is held by the processes {pids}")
        for client in await load.crowd.find_silent(ANSWER):
            self.account.require(False, "holder", BROKEN, client.name, "connection", "has no answer, and no end")

    def _report_all(self, load: Load, totals: Mapping[str, int]) -> None:
        self._tell(f"\ncases: {sum(self.done.values())}, steps not reached: {len(self.missed)}")
        tell_account(self.account, totals, self._tell)
        self._tell(f"\n{'FAILED' if self.failed else 'passed'}, seed {self._seed}")


async def workers(service: Service) -> dict[int, int]:
    """Return the processes of the workers by slot, as the server tells them."""
    with suppress(OSError, aiohttp.ClientError):
        async with (
            aiohttp.ClientSession() as http,
            http.get(f"http://127.0.0.1:{service.operator_port}/health") as answer,
        ):
            said = await answer.json()
            return {worker["slot"]: worker["pid"] for worker in said["workers"] if worker["pid"]}
    return {}
