"""One soak: a server, its clients and publishers, faults and bad input at once, and the account at the end."""

from __future__ import annotations

import asyncio
import gc
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import IO, Any

import aiohttp
import msgspec
from prometheus_client.parser import text_string_to_metric_families

from tests.conformance.messages import write_message
from tests.soak import world as worlds
from tests.soak.account import BROKEN, LOST, REORDERED, REPEATED, Account, Finding
from tests.soak.bad_input import Attack
from tests.soak.clients import ON, Client, Crowd
from tests.soak.faults import Faults
from tests.soak.publishers import FAILURES, KEY, APIPublisher, Numbers, Speakers, share_out
from tests.soak.schedule import schedule
from tests.soak.sdk import Readers
from tests.soak.served import Service, free_ports

PUBLISHERS = 8
SPEAKERS_SHARE = 0.15  # of the publications
START_LIMIT = 120.0
# Seconds until every client is back and has everything, after the last fault.
SETTLE_LIMIT = 180.0
PROGRESS = 30.0
SHOWN = 8  # findings of each rule


@dataclass(frozen=True, slots=True)
class Options:
    """seconds: of load and faults. publications, bad_inputs: a second."""

    seed: int
    seconds: float
    clients: int
    faults: int
    only: tuple[str, ...]
    publications: float
    bad_inputs: float
    workers: int


class Soak:
    """One run. failed: whether its account has a finding."""

    def __init__(self, options: Options, tell: Callable[[str], None] = print, copy: IO[str] | None = None) -> None:
        self._options = options
        self._tell = tell
        self._copy = copy
        self._began = time.monotonic()
        self._faults: Faults | None = None
        self._dropped: Counter[tuple[Any, ...]] = Counter()
        self._dropped_before: dict[tuple[Any, ...], float] = {}
        self.account = Account(
            self._now, lambda: self._faults.latest if self._faults else "", worlds.RECOVERY_LIMIT, self._tell_first
        )
        self.totals: Counter[str] = Counter()

    def _now(self) -> float:
        return time.monotonic() - self._began

    @property
    def failed(self) -> bool:
        return bool(self.account.effects)

    async def run(self) -> None:
        """Run the soak; the server has ended afterwards."""
        asyncio.get_running_loop().set_exception_handler(
            lambda loop, context: self._own_fault(context.get("exception")) if "exception" in context else None
        )
        options = self._options
        world = worlds.create(self.account, options.seed, options.clients)
        port, operator_port = free_ports()
        with tempfile.TemporaryDirectory(prefix="soak-") as folder:
            settings = worlds.settings(port, operator_port, options.workers)
            service = Service(self.account, Path(folder, "realtime.toml"), settings, self._copy)
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=30)
            async with aiohttp.ClientSession(connector=connector) as http:
                try:
                    service.start()
                    await self._ready(http, service)
                    await self._load(world, service, http)
                    await service.stop(lambda text: self._report("stop", text))
                finally:
                    service.end()

    def _tell_first(self, finding: Finding, number: int) -> None:
        """Print the first findings of each rule at once: their cause may need a look at the server now."""
        if number <= SHOWN:
            self._tell(f"FINDING {finding}")

    def _report(self, place: str, text: str) -> None:
        self.account.require(False, "end", BROKEN, "server", place, text)

    async def _ready(self, http: aiohttp.ClientSession, service: Service) -> None:
        until = self._now() + START_LIMIT
        while self._now() < until:
            try:
                async with http.get(f"http://127.0.0.1:{service.operator_port}/ready") as answer:
                    if answer.status == 200:
                        return
            except OSError:
                pass
            await asyncio.sleep(0.1)
        raise SystemExit("the server did not start:\n" + "".join(service.output.lines))

    async def _load(self, world: worlds.World, service: Service, http: aiohttp.ClientSession) -> None:
        options, random = self._options, Random(f"load of {self._options.seed}")

        async def emulate(client: Client, commands: bytes) -> None:
            await self._emulate(http, service.port, client, commands)

        crowd = Crowd(world, options.seed, emulate)
        crowd.port = service.port
        numbers = Numbers()
        speakers = Speakers(crowd, numbers)
        publishers = [APIPublisher(world, http, numbers, channels) for channels in share_out(world, PUBLISHERS)]
        attack = Attack(self.account)
        attack.port = service.port
        self._faults = faults = Faults(self.account, service, crowd)
        for publisher in publishers:
            publisher.port = service.port

        background = [
            asyncio.create_task(part) for part in (service.care(), crowd.run(), self._look(http, service, crowd))
        ]
        self._watch(background)
        readers = Readers(world, service.port)
        await readers.start()
        await self._until(lambda: len(crowd.connected()) == len(crowd.clients), START_LIMIT)
        self._tell(f"{self._now():9.3f} s  {len(crowd.connected())} clients are connected")
        gc.collect()
        gc.freeze()
        rate = options.publications / PUBLISHERS * (1 - SPEAKERS_SHARE)
        load = [
            asyncio.create_task(one.run(rate, Random(f"publisher {index} of {options.seed}")))
            for index, one in enumerate(publishers)
        ]
        load.append(asyncio.create_task(speakers.run(options.publications * SPEAKERS_SHARE, random)))
        load.append(asyncio.create_task(self._leave_and_return(crowd, random)))
        load.append(asyncio.create_task(attack.run(options.bad_inputs, options.seed)))
        self._watch(load)
        planned = schedule(options.seed, options.seconds, options.faults, options.only)
        began = self._now()
        await faults.run(planned, began, lambda text: self._tell(f"{self._now():9.3f} s  {text}"))
        await asyncio.sleep(max(0.0, began + options.seconds - self._now()))
        await faults.finish()
        for publisher in publishers:
            publisher.is_ending = True
        await asyncio.wait(load[: len(publishers)], timeout=SETTLE_LIMIT)  # each ends its current publication
        await self._end_tasks(load)
        self._tell(f"{self._now():9.3f} s  the load has ended; waiting for all clients")
        await self._settle(world, crowd, publishers)
        await self._read_histories(world, http, service)
        await self._sample(http, service)
        self._close(service, crowd, publishers, speakers, attack, faults)
        await self._end_tasks(background)
        await readers.close()
        await crowd.close()

    def _watch(self, tasks: list[asyncio.Task[Any]]) -> None:
        """Report an exception in a part of the soak itself."""
        for task in tasks:
            task.add_done_callback(
                lambda ended: ended.cancelled() or not ended.exception() or self._own_fault(ended.exception())
            )

    def _own_fault(self, error: BaseException | None) -> None:
        trace = "".join(traceback.format_exception(error)) if error else ""
        self._report("soak", f"a part of the soak failed: {trace}")

    async def _end_tasks(self, tasks: list[asyncio.Task[Any]]) -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _until(self, condition: Callable[[], bool], limit: float) -> bool:
        until = self._now() + limit
        while not condition():
            if self._now() > until:
                return False
            await asyncio.sleep(0.1)
        return True

    async def _settle(self, world: worlds.World, crowd: Crowd, publishers: list[APIPublisher]) -> None:
        """Wait until all clients are back, publish once more everywhere, and wait for that."""

        def unsettled() -> list[str]:
            return [
                f"{client.name} in {part.channel}"
                for client in crowd.clients
                for part in client.parts.values()
                if not (client.is_connected and part.is_settled)
            ]

        if not await self._until(lambda: not unsettled(), SETTLE_LIMIT):
            absent = unsettled()
            self._report("clients", f"{len(absent)} subscriptions did not come back: {absent[:5]}")
        settled = self._now()
        await asyncio.gather(
            *(one.publish(channel) for one in publishers for channel in one.channels), return_exceptions=True
        )
        self.account.expect_last(settled)
        await self._until(lambda: not any(self.account.unsettled()), SETTLE_LIMIT)
        await asyncio.sleep(1.0)

    async def _leave_and_return(self, crowd: Crowd, random: Random) -> None:
        """Let a client unsubscribe and subscribe again, now and then."""
        while True:
            await asyncio.sleep(random.expovariate(len(crowd.clients) / 1000))
            client = random.choice(crowd.clients)
            for part in client.parts.values():
                if client.is_connected and part.state == ON and not part.channel.startswith("own:"):
                    client.unsubscribe(part)

    async def _emulate(self, http: aiohttp.ClientSession, port: int, client: Client, commands: bytes) -> None:
        if client.encoding.content_type == "application/json":
            body = msgspec.json.encode({"session": client.session, "node": client.node, "data": commands.decode()})
        else:
            body = _protobuf_emulation(client.node, client.session, commands)
        connection = client.connection
        try:
            async with http.post(
                f"http://127.0.0.1:{port}/emulation", data=body, headers={"Content-Type": client.encoding.content_type},
                timeout=aiohttp.ClientTimeout(total=20),
            ) as answer:  # fmt: skip
                failed = answer.status >= 500 or answer.status == 404
        except (OSError, aiohttp.ClientError):
            failed = True
        if failed and connection is not None and client.connection is connection:
            connection.cut()

    # What is looked at while it runs.

    async def _look(self, http: aiohttp.ClientSession, service: Service, crowd: Crowd) -> None:
        told = self._now()
        while True:
            await asyncio.sleep(5.0)
            crowd.compare_rooms()
            await self._sample(http, service)
            if self._now() - told >= PROGRESS:
                told = self._now()
                live = sum(one.live + one.recovered for one in self.account.subscriptions)
                self._tell(
                    f"{told:9.3f} s  {len(crowd.connected())} connected, {live} received, "
                    f"{sum(self.account.effects.values())} findings, {len(self.account.remarks)} gaps"
                )

    async def _sample(self, http: aiohttp.ClientSession, service: Service) -> None:
        """Add up what the server says it dropped, over the lives of its processes."""
        try:
            limit = aiohttp.ClientTimeout(total=5)
            async with http.get(f"http://127.0.0.1:{service.operator_port}/metrics", timeout=limit) as answer:
                text = await answer.text()
        except (OSError, aiohttp.ClientError):
            return
        for family in text_string_to_metric_families(text):
            if family.name == "realtime_messages_dropped":
                for sample in family.samples:
                    key = tuple(sorted(sample.labels.items()))
                    before = self._dropped_before.get(key, 0.0)
                    self._dropped[key] += sample.value - before if sample.value >= before else sample.value
                    self._dropped_before[key] = sample.value

    async def _read_histories(self, world: worlds.World, http: aiohttp.ClientSession, service: Service) -> None:
        """Compare what the histories have at the end with what was seen (N1)."""
        url = f"http://127.0.0.1:{service.port}/api/history"
        for channel in world.channels.values():
            if not channel.size or channel.name.startswith("heavy:"):
                continue
            body = msgspec.json.encode({"channel": channel.name, "limit": -1})
            try:
                async with http.post(url, data=body, headers={"X-API-Key": KEY}) as answer:
                    result = msgspec.json.decode(await answer.read()).get("result", {})
            except FAILURES as error:
                self._report("history", f"no history of {channel.name}: {error!r}")
                continue
            for publication in result.get("publications", ()):
                epoch = channel.epoch(result["epoch"])
                channel.saw("history", epoch, publication["offset"], publication["data"]["n"])

    # The account.

    def _close(
        self, service: Service, crowd: Crowd, publishers: list[APIPublisher], speakers: Speakers, attack: Attack,
        faults: Faults,
    ) -> None:  # fmt: skip
        for text in service.output.tracebacks:
            self._report("log", "an exception in the log:\n" + text)
        dropped = sum(self._dropped.values())
        self.totals = self.account.close(dropped)
        options, tell = self._options, self._tell
        tell(f"\nseed {options.seed}; {options.seconds:g} s, {len(crowd.clients)} clients, {options.workers} workers")
        tell(f"faults carried out: {sum(faults.done.values())}")
        for kind, number in sorted(faults.done.items()):
            tell(f"  {number:5}  {kind}")
        api = sum((one.counts for one in publishers), Counter[str]())
        comparisons = sum(room.comparisons for room in crowd.world.rooms.values())
        dropped_by = {str(dict(key)): round(value) for key, value in self._dropped.items() if value}
        largest = {role: size >> 20 for role, size in service.largest.items()}
        for name, counts in {
            "faults without effect": faults.impossible,
            "ends of processes": service.deaths,
            "publishers by the API": api,
            "publishers by connection": speakers.counts,
            "clients": crowd.counts,
            "bad input": attack.sent,
            "answers to bad input": attack.answers,
            "dropped, as the server says": Counter(dropped_by),
            "largest process, MiB": Counter(largest),
        }.items():
            tell(f"{name}: {sum(counts.values())}")
            for kind, number in counts.most_common(30):
                tell(f"  {number:9}  {kind}")
        tell(f"comparisons of rooms' members: {comparisons}")
        self._tell_account()

    def _tell_account(self) -> None:
        tell, totals, effects = self._tell, self.totals, self.account.effects
        tell("\nTHE ACCOUNT, publications summed over all subscriptions")
        for name in (
            "accepted", "happened", "promised", "delivered", "recovered", "filtered", "superseded", "told lost",
            "still in history", "times told", "plain delivered", "plain dropped and counted",
        ):  # fmt: skip
            tell(f"  {totals[name]:12,}  {name}")
        tell(f"  {totals['silently lost']:12,}  {LOST}")
        for effect in (REPEATED, REORDERED, BROKEN):
            tell(f"  {effects[effect]:12,}  {effect}")
        for rule, number in sorted(self.account.rules.items()):
            tell(f"  {number:12,}  findings of {rule}")
        for remark in self.account.remarks[:10] if self.account.effects else ():
            tell(remark)
        tell(f"\n{'FAILED' if self.failed else 'passed'}, seed {self._options.seed}")


def _protobuf_emulation(node: str, session: str, commands: bytes) -> bytes:
    return write_message("EmulationRequest", {"node": node, "session": session, "data": commands})
