"""A server, its clients and publishers, and the account at the end; with faults and bad input, a soak."""

from __future__ import annotations

import asyncio
import gc
import tempfile
import time
import traceback
from collections.abc import Callable, Coroutine, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import IO, Any

import aiohttp
import msgspec

from tests.soak import world as worlds
from tests.soak.account import BROKEN, Account, Finding
from tests.soak.bad_input import Attack
from tests.soak.clients import ON, Crowd
from tests.soak.faults import Faults
from tests.soak.members import EVENTUALLY
from tests.soak.publishers import FAILURES, APIPublisher, Numbers, Speakers, share_out
from tests.soak.redis import Redis
from tests.soak.report import Report
from tests.soak.schedule import KINDS, REDIS_KINDS, schedule
from tests.soak.sdk import Readers
from tests.soak.served import Service, free_ports

SPEAKERS_SHARE = 0.15  # of the publications
START_LIMIT = 120.0
# Seconds until every client is back and has everything, after the last fault.
SETTLE_LIMIT = 180.0
PROGRESS = 30.0
SHOWN = 8  # findings of each rule
NODES = 2  # with an engine that several nodes share
ENGINES: dict[str, Callable[[], Redis | None]] = {"memory": lambda: None, "redis": Redis}


@dataclass(frozen=True, slots=True)
class Options:
    """seconds: of load and faults. only: kinds of faults, all if empty. publications, bad_inputs: a second. workers: of
    each node. engine: of `ENGINES`."""

    seed: int
    seconds: float
    clients: int
    faults: int
    only: tuple[str, ...]
    publications: float
    bad_inputs: float
    workers: int
    engine: str = "memory"


@dataclass(frozen=True, slots=True)
class Load:
    """The nodes of a run, and their load. service: the first node."""

    services: list[Service]
    crowd: Crowd
    publishers: list[APIPublisher]
    speakers: Speakers

    @property
    def service(self) -> Service:
        return self.services[0]


class Run:
    """A server under load, from its start to the account. failed: whether the account has a finding."""

    publishers = 8  # programs that call the HTTP API

    def __init__(
        self,
        seed: int,
        workers: int,
        tell: Callable[[str], None] = print,
        copy: IO[str] | None = None,
        redis: Redis | None = None,
    ) -> None:
        """tell: takes the lines of progress and of the account. copy: gets the server's log. redis: the engine of two
        nodes; None for one node with the embedded engine."""
        self._seed = seed
        self._workers = workers
        self._tell = tell
        self._copy = copy
        self._redis = redis
        self._nodes = 1 if redis is None else NODES
        self._began = time.monotonic()
        self.account = Account(
            self._now, self._latest_fault, worlds.RECOVERY_LIMIT, self._tell_first, keeps_data=redis is not None
        )

    def _settings(self, port: int, operator_port: int) -> dict[str, Any]:
        """Return the server's configuration."""
        return worlds.settings(port, operator_port, self._workers)

    def _create_world(self) -> worlds.World:
        raise NotImplementedError

    async def _prepare(self, service: Service) -> None:
        """Called when the server is ready, before any client connects."""

    async def _strain(self, load: Load) -> None:
        """Put load on the server until it is enough."""
        raise NotImplementedError

    def _report_all(self, load: Load, totals: Mapping[str, int]) -> None:
        """Tell the result. totals: of `Account.close`."""
        raise NotImplementedError

    def _now(self) -> float:
        return time.monotonic() - self._began

    def _latest_fault(self) -> str:
        return ""

    @property
    def failed(self) -> bool:
        return bool(self.account.effects)

    async def run(self) -> None:
        """Run all of it; the server has ended afterwards, also if this is cancelled."""
        asyncio.get_running_loop().set_exception_handler(
            lambda loop, context: self._report_own_fault(context.get("exception"))
        )
        with tempfile.TemporaryDirectory(prefix="soak-") as folder, ExitStack() as ends:
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=30)
            async with aiohttp.ClientSession(connector=connector) as http:
                if self._redis is not None:
                    ends.callback(self._redis.end)
                    await self._redis.start(Path(folder), self._nodes)
                services = [self._create_service(Path(folder), node) for node in range(self._nodes)]
                for service in services:
                    ends.callback(service.end)
                    service.start()
                    await self._wait_ready(http, service)
                caring = [self._start(service.care()) for service in services]
                await self._prepare(services[0])
                await self._load(services, http)
                for task in caring:
                    task.cancel()

    def _create_service(self, folder: Path, node: int) -> Service:
        config = folder / f"node {node}.toml"
        settings = self._settings(*free_ports())
        if self._redis is None:
            return Service(self.account, config, settings, self._copy)
        settings["engine"] = self._redis.settings(node)
        return Service(self.account, config, settings, self._copy, f"node {node}")

    async def _wait_ready(self, http: aiohttp.ClientSession, service: Service) -> None:
        until = self._now() + START_LIMIT
        while self._now() < until:
            with suppress(OSError):
                async with http.get(f"http://127.0.0.1:{service.operator_port}/ready") as answer:
                    if answer.status == 200:
                        return
            await asyncio.sleep(0.1)
        raise SystemExit("the server did not start:\n" + "".join(service.output.lines))

    async def _load(self, services: list[Service], http: aiohttp.ClientSession) -> None:
        world = self._create_world()
        ports = [service.port for service in services]
        crowd = Crowd(world, self._seed, http, ports)
        readers = Readers(world, ports)
        numbers = Numbers()
        publishers = [
            APIPublisher(world, http, ports[index % len(ports)], numbers, channels)
            for index, channels in enumerate(share_out(world, self.publishers))
        ]
        load = Load(services, crowd, publishers, Speakers(crowd, numbers))

        background = [self._start(part) for part in (crowd.run(), self._look(services, crowd))]
        await readers.start()
        await self._until(lambda: len(crowd.connected()) == len(crowd.clients), START_LIMIT)
        self._say(f"{len(crowd.connected())} clients are connected")
        gc.collect()
        gc.freeze()  # so that no collection walks all clients
        await self._strain(load)
        self._say("the load has ended; waiting for all clients")
        await self._settle(crowd, publishers)
        await self._read_histories(world, http, load.service)
        totals = await self._close(services)
        for task in background:
            task.cancel()
        await readers.close()
        await crowd.close()
        for service in services:
            await service.stop(self._report)
        self._report_all(load, totals)

    def _publish(self, load: Load, rate: float) -> list[asyncio.Task[None]]:
        """Start to publish `rate` times a second."""
        each = rate * (1 - SPEAKERS_SHARE) / len(load.publishers)
        publishing = [
            self._start(one.run(each, Random(f"publisher {index} of {self._seed}")))
            for index, one in enumerate(load.publishers)
        ]
        speaking = load.speakers.run(rate * SPEAKERS_SHARE, Random(f"speakers of {self._seed}"))
        return [*publishing, self._start(speaking)]

    async def _stop_publishing(self, load: Load, publishing: list[asyncio.Task[None]]) -> None:
        *programs, speaking = publishing
        speaking.cancel()
        for publisher in load.publishers:
            publisher.is_ending = True
        await asyncio.wait(programs, timeout=SETTLE_LIMIT)  # each ends its current publication
        for task in programs:
            task.cancel()

    async def _wait_back(self, crowd: Crowd) -> None:
        """Wait until all clients are connected and in their channels."""

        def absent() -> list[str]:
            return [
                f"{client.name} in {part.channel}"
                for client in crowd.clients
                for part in client.parts.values()
                if not (client.is_connected and part.is_settled)
            ]

        if not await self._until(lambda: not absent(), SETTLE_LIMIT):
            self._report("clients", f"{len(absent())} subscriptions did not come back: {absent()[:5]}")

    async def _settle(self, crowd: Crowd, publishers: list[APIPublisher]) -> None:
        """Wait until all clients are back, publish once more everywhere, and wait for that."""

        await self._wait_back(crowd)
        settled = self._now()
        await asyncio.gather(
            *(one.publish(channel) for one in publishers for channel in one.channels), return_exceptions=True
        )
        self.account.expect_last(settled)
        await self._until(lambda: not any(self.account.unsettled()), SETTLE_LIMIT)
        await self._until(crowd.compare_rooms, EVENTUALLY)
        await asyncio.sleep(1.0)  # for repeats

    async def _read_histories(self, world: worlds.World, http: aiohttp.ClientSession, service: Service) -> None:
        """Compare the histories at the end with what was seen (N1)."""
        url = f"http://127.0.0.1:{service.port}/api/history"
        for channel in world.channels.values():
            if not channel.size:
                continue
            body = msgspec.json.encode({"channel": channel.name, "limit": -1})
            try:
                async with http.post(url, data=body, headers={"X-API-Key": worlds.KEY}) as answer:
                    result = msgspec.json.decode(await answer.read()).get("result", {})
            except FAILURES as error:
                self._report("history", f"no history of {channel.name}: {error!r}")
                continue
            for publication in result.get("publications", ()):
                epoch = channel.epoch(result["epoch"])
                channel.saw("history", epoch, publication["offset"], publication["data"]["n"])

    async def _look(self, services: list[Service], crowd: Crowd) -> None:
        """Compare rooms, read the servers' counters, and tell the progress."""
        told = self._now()
        while True:
            await asyncio.sleep(5.0)
            crowd.compare_rooms()
            for service in services:
                await service.sample()
            if self._now() - told >= PROGRESS:
                told = self._now()
                received = sum(one.live + one.recovered for one in self.account.subscriptions)
                found = sum(self.account.effects.values())
                self._say(f"{len(crowd.connected())} connected, {received} received, {found} findings")

    async def _close(self, services: list[Service]) -> dict[str, int]:
        dropped = 0
        for service in services:
            await service.sample()
            dropped += sum(service.dropped.values())
            for text in service.output.tracebacks:
                self._report("log", "an exception in the log:\n" + text)
        return self.account.close(dropped)

    # Small parts.

    def _start(self, part: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a part of the soak beside the others; an exception in it is a finding."""
        task = asyncio.create_task(part)
        task.add_done_callback(lambda ended: self._report_own_fault(None if ended.cancelled() else ended.exception()))
        return task

    def _report_own_fault(self, error: BaseException | None) -> None:
        if error is not None:
            self._report("soak", "a part of the soak failed: " + "".join(traceback.format_exception(error)))

    def _report(self, place: str, text: str) -> None:
        self.account.require(False, "end", BROKEN, "server", place, text)

    def _tell_first(self, finding: Finding, number: int) -> None:
        """Print the first findings of each rule at once: their cause may need a look at the server now."""
        if number <= SHOWN:
            self._tell(f"FINDING {finding}")

    def _say(self, text: str) -> None:
        self._tell(f"{self._now():9.3f} s  {text}")

    async def _until(self, condition: Callable[[], bool], limit: float) -> bool:
        until = self._now() + limit
        while not condition():
            if self._now() > until:
                return False
            await asyncio.sleep(0.1)
        return True


class Soak(Run):
    """Load, faults and bad input at once."""

    def __init__(self, options: Options, tell: Callable[[str], None] = print, copy: IO[str] | None = None) -> None:
        super().__init__(options.seed, options.workers, tell, copy, ENGINES[options.engine]())
        self._options = options
        self._faults: Faults | None = None
        self._attack: Attack | None = None

    def _create_world(self) -> worlds.World:
        return worlds.create(self.account, self._seed, self._options.clients)

    def _latest_fault(self) -> str:
        return self._faults.latest if self._faults else ""

    async def _strain(self, load: Load) -> None:
        """Put load, bad input and faults on the server."""
        options, began = self._options, self._now()
        self._attack = attack = Attack(self.account, load.service.port)
        self._faults = faults = Faults(self.account, load.services, load.crowd, self._redis)
        publishing = self._publish(load, options.publications)
        others = [
            self._start(self._leave_and_return(load.crowd, Random(f"leavers of {options.seed}"))),
            self._start(attack.run(options.bad_inputs, options.seed)),
        ]
        kinds = KINDS if self._redis is None else KINDS | REDIS_KINDS
        planned = schedule(options.seed, options.seconds, options.faults, options.only, kinds)
        await faults.run(planned, began, self._say)
        await asyncio.sleep(max(0.0, began + options.seconds - self._now()))
        await faults.finish()
        await self._stop_publishing(load, publishing)
        for task in others:
            task.cancel()

    async def _leave_and_return(self, crowd: Crowd, random: Random) -> None:
        """Let a client unsubscribe and subscribe again, now and then."""
        while True:
            await asyncio.sleep(random.expovariate(len(crowd.clients) / 1000))
            client = random.choice(crowd.clients)
            for part in client.parts.values():
                if client.is_connected and part.state == ON and not part.channel.startswith("own:"):
                    client.unsubscribe(part)

    def _report_all(self, load: Load, totals: Mapping[str, int]) -> None:
        assert self._faults and self._attack
        report = Report(
            self.account, totals, load.crowd, load.services, self._faults, load.publishers, load.speakers, self._attack
        )
        report.tell(self._tell)
        self._tell(f"\n{'FAILED' if self.failed else 'passed'}, seed {self._seed}")
