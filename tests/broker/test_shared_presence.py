"""Presence over all nodes: lists in a real Redis, written by several nodes in this process."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import msgspec
import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred

from realtime.broker import shared_presence
from realtime.broker.shared_presence import Done, Names, SharedPresence
from realtime.config.settings import RedisSettings
from realtime.errors import EngineUnavailable
from realtime.metrics import Metrics
from realtime.process.reactor import turn_end_caller
from realtime.pubsub.history import make_epoch
from realtime.pubsub.presence import PresenceEntry
from realtime.types import ClientInfo
from tests.redis.deployments import RedisProcess
from tests.redis.users import User
from tests.system.brokers import until

TTL = 60.0
ALICE = ClientInfo("alice", "client-a", b'{"name":"Alice"}', b"\x00bytes")
AGAIN = ClientInfo("alice", "client-b")
BOB = ClientInfo("bob", "client-c")
KEYS = tuple(f"{kind}.{{room}}".encode() for kind in ("presence", "clients", "users"))
NAMES = Names(KEYS, b"room", b"+", b"-")  # type: ignore[arg-type]


class Node:
    """One node: its clients in the channel `room`, and its view of the list. log: joins and leaves."""

    def __init__(self, redis: RedisProcess) -> None:
        self.user = User(RedisSettings(address=(redis.address,)))
        self.server: Any = self.user.server
        self.run = make_epoch()
        self.here: dict[str, PresenceEntry] = {}
        self.dead: set[str] = set()
        self.metrics = Metrics()
        self.shared = SharedPresence(
            self.run,
            TTL,
            lambda channel: NAMES,
            lambda channel: self.server,
            lambda channel: list(self.here.values()),
            lambda run: run in self.dead,
            lambda error, channel: error,
            turn_end_caller(reactor),
            self.metrics,
        )
        self._time = 0.0

    def make_unreliable(self, fails: Callable[[], str]) -> None:
        self.server = UnreliableServer(self.user.server, fails)

    @property
    def log(self) -> list[str]:
        infos = [(payload[:1], msgspec.msgpack.decode(payload[1:], type=ClientInfo)) for _, payload in self.messages]
        return [f"{sign.decode()}{info.client}" for sign, info in infos]

    @property
    def messages(self) -> list[tuple[bytes, bytes]]:
        return self.user.messages

    def put(self, *infos: ClientInfo, present: bool = True, announce: bool = True) -> None:
        for info in infos:
            entry = PresenceEntry(info, present, announce, 0.0)
            is_new = info.client not in self.here
            self.here[info.client] = entry
            self.shared.put("room", entry, is_new=is_new, announce=True)

    def remove(self, *infos: ClientInfo) -> None:
        for info in infos:
            self.shared.remove("room", self.here.pop(info.client))

    async def stored(self) -> None:
        await answer(self.shared.when_stored, "room")

    async def add(self, *infos: ClientInfo, **more: bool) -> None:
        self.put(*infos, **more)
        await self.stored()

    async def leave(self, *infos: ClientInfo) -> None:
        self.remove(*infos)
        await self.stored()

    def start_renewal(self) -> None:
        self._time += TTL
        self.shared.renew(self._time)

    async def renew(self) -> None:
        """Renew all lists, and wait until their states are known and repaired."""
        self.start_renewal()
        for _ in range(2):  # a script that Redis does not know yet is sent again behind the first
            await self.user.call("PING")
        await until(lambda: self.shared.is_stored)
        await self.user.call("PING")

    async def present(self) -> list[ClientInfo]:
        infos = await answer(self.shared.present, "room")
        return sorted(infos, key=lambda info: info.client)

    async def count(self) -> tuple[int, int]:
        result: tuple[int, int] = await answer(self.shared.count, "room")
        return result


async def answer(ask: Any, *arguments: Any) -> Any:
    outcome: Deferred[Any] = Deferred()

    def done(result: Any, error: Exception | None) -> None:
        if error is None:
            outcome.callback(result)
        else:
            outcome.errback(error)

    ask(*arguments, done)
    return await outcome


@pytest_twisted.async_yield_fixture
async def nodes(redis_server: RedisProcess) -> AsyncIterator[list[Node]]:
    made = [Node(redis_server) for _ in range(3)]
    for node in made:
        await node.user.ready()
        await node.user.subscribe(b"room")
    yield made
    for node in made:
        await node.user.close()


async def settled(nodes: Iterable[Node]) -> None:
    """Returns when all messages published so far have arrived."""
    for node in nodes:
        await node.user.call("PING")


pytestmark = pytest.mark.timeout(60)


@pytest_twisted.ensureDeferred
async def test_all_nodes_have_one_list_with_joins_and_leaves(redis_server: RedisProcess, nodes: list[Node]) -> None:
    here, there, watching = nodes
    await here.add(ALICE)
    await there.add(AGAIN, BOB)
    for node in nodes:
        assert await node.present() == [ALICE, AGAIN, BOB]
        assert await node.count() == (3, 2)
    renamed = msgspec.structs.replace(BOB, conn_info=b'"Bob"')
    await there.add(renamed)
    assert await here.present() == [ALICE, AGAIN, renamed]
    await here.leave(ALICE)
    assert (await there.present(), await there.count()) == ([AGAIN, renamed], (2, 2))
    await there.leave(AGAIN, renamed)
    assert (await here.present(), await here.count()) == ([], (0, 0))
    await settled(nodes)
    assert watching.log == ["+client-a", "+client-b", "+client-c", "-client-a", "-client-b", "-client-c"]
    assert redis_server.command("DBSIZE") == 0
    assert all(node.shared.is_stored for node in nodes)


@pytest_twisted.ensureDeferred
async def test_hidden_clients_are_announced_and_not_listed_and_quiet_ones_the_other_way_round(
    redis_server: RedisProcess,
    nodes: list[Node],
) -> None:
    here, there, _ = nodes
    await here.add(ALICE, present=False)
    await here.add(BOB, announce=False)
    assert (await there.present(), await there.count()) == ([BOB], (1, 1))
    await here.leave(ALICE, BOB)
    await settled(nodes)
    assert there.log == ["+client-a", "-client-a"]
    assert redis_server.command("DBSIZE") == 0


@pytest_twisted.ensureDeferred
async def test_many_clients_are_stored_and_read_in_steps(nodes: list[Node], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_presence, "PAGE", 100)
    here, there, _ = nodes
    crowd = [ClientInfo(f"user-{number % 50}", f"client-{number:03}") for number in range(700)]
    await here.add(*crowd[:350])
    await there.add(*crowd[350:])
    assert (await there.present(), await there.count()) == (crowd, (700, 50))
    await here.leave(*crowd[:350])
    assert (await there.present(), await there.count()) == (crowd[350:], (350, 50))
    await settled(nodes)
    assert (len(here.log), len(set(here.log))) == (1050, 1050)


@pytest_twisted.ensureDeferred
async def test_changes_while_redis_is_away_are_stored_later(redis_server: RedisProcess, nodes: list[Node]) -> None:
    here, there, _ = nodes
    await here.add(ALICE, BOB)
    redis_server.pause()
    here.remove(ALICE)
    here.put(AGAIN)
    here.user.server._connection.end("cut")  # type: ignore[union-attr]
    with pytest.raises(EngineUnavailable):
        await here.stored()
    redis_server.resume()
    await here.user.ready()
    await here.renew()
    assert (await there.present(), await there.count()) == ([AGAIN, BOB], (2, 2))
    await settled(nodes)
    assert sorted(there.log) == ["+client-a", "+client-b", "+client-c", "-client-a"]


@pytest_twisted.ensureDeferred
async def test_lists_that_redis_has_lost_are_written_again_without_joins(
    redis_server: RedisProcess, nodes: list[Node]
) -> None:
    here, there, _ = nodes
    await here.add(ALICE)
    await there.add(BOB)
    redis_server.command("FLUSHALL")
    await here.add(AGAIN)  # finds out at once
    await until(lambda: here.shared.is_stored)
    assert await here.present() == [ALICE, AGAIN]
    await there.renew()
    assert (await here.present(), await here.count()) == ([ALICE, AGAIN, BOB], (3, 2))
    await settled(nodes)
    assert there.log == ["+client-a", "+client-c", "+client-b"]


@pytest.mark.parametrize("key", KEYS)
@pytest_twisted.ensureDeferred
async def test_a_list_that_redis_has_lost_a_part_of_is_written_again(
    redis_server: RedisProcess, nodes: list[Node], key: bytes
) -> None:
    here, there, _ = nodes
    await here.add(ALICE, AGAIN)
    await there.add(BOB)
    await here.user.call("DEL", key)
    for node in (here, there, here):
        await node.renew()
    assert (await here.present(), await here.count()) == ([ALICE, AGAIN, BOB], (3, 2))
    await here.leave(ALICE, AGAIN)
    await there.leave(BOB)
    assert redis_server.command("DBSIZE") == 0
    await settled(nodes)
    assert len(here.log) == 6


@pytest_twisted.ensureDeferred
async def test_the_list_of_a_node_that_does_not_renew_it_expires(nodes: list[Node]) -> None:
    here, _, _ = nodes
    await here.add(ALICE)
    assert all([0 < await here.user.call("PTTL", key) <= 2000 * TTL for key in KEYS])
    for key in KEYS:
        await here.user.call("PEXPIRE", key, 1000)
    await here.renew()
    assert all([await here.user.call("PTTL", key) > 1000 * TTL for key in KEYS])


# Runs that have ended


@pytest_twisted.ensureDeferred
async def test_clients_of_an_ended_node_leave_once_and_a_paused_node_adds_its_own_again(nodes: list[Node]) -> None:
    here, there, paused = nodes
    crowd = [ClientInfo("crowd", f"client-{number}") for number in range(500)]
    await paused.add(*crowd)
    await here.add(ALICE)
    await there.add(BOB)
    for node in (here, there):
        node.dead.add(paused.run)
        node.shared.renew(TTL)
    await until(lambda: sum(entry.startswith("-") for entry in here.log) >= 500)
    for node in (here, there):
        await node.renew()
        assert (await node.present(), await node.count()) == ([ALICE, BOB], (2, 2))
    assert sorted(entry for entry in here.log if entry[0] == "-") == sorted(f"-{info.client}" for info in crowd)
    # It was only paused.
    here.dead.clear()
    there.dead.clear()
    await paused.renew()
    assert await here.count() == (502, 3)
    await paused.renew()
    await settled(nodes)
    for info in crowd:
        signs = [entry[0] for entry in here.log if entry[1:] == info.client]
        assert signs == ["+", "-", "+"]


@pytest_twisted.ensureDeferred
async def test_a_node_that_returns_in_the_middle_of_its_removal_ends_it(nodes: list[Node]) -> None:
    here, _, paused = nodes
    await here.add(BOB)
    crowd = [ClientInfo("crowd", f"client-{number}") for number in range(2000)]
    await paused.add(*crowd)
    here.dead.add(paused.run)
    here.shared.renew(TTL)
    await until(lambda: any(entry.startswith("-") for entry in paused.log))
    here.dead.clear()
    await paused.add(ALICE)
    for _ in range(2):
        await paused.renew()
        await here.renew()
    assert await here.count() == (2002, 3)
    await settled(nodes)
    for info in (*crowd, ALICE):
        signs = [entry[0] for entry in here.log if entry[1:] == info.client]
        assert signs in (["+"], ["+", "-", "+"])


@pytest_twisted.ensureDeferred
async def test_a_read_removes_clients_of_an_ended_node_where_no_other_node_has_any(nodes: list[Node]) -> None:
    here, _, ended = nodes
    await ended.add(ALICE, BOB)
    here.dead.add(ended.run)
    assert (await here.count(), await here.present()) == ((0, 0), [])
    await settled(nodes)
    assert sorted(here.log[2:]) == ["-client-a", "-client-c"]


@pytest_twisted.ensureDeferred
async def test_the_next_run_of_a_broker_takes_its_clients_over(nodes: list[Node]) -> None:
    earlier, later, watching = nodes
    await earlier.add(ALICE, AGAIN, BOB)
    later.here = {info.client: PresenceEntry(info, True, True, 0.0) for info in (ALICE, BOB)}
    for entry in later.here.values():
        later.shared.put("room", entry, is_new=True, announce=False)
    await later.stored()
    later.dead.add(earlier.run)
    await later.renew()
    assert (await watching.present(), await watching.count()) == ([ALICE, BOB], (2, 2))
    await settled(nodes)
    assert sorted(watching.log) == ["+client-a", "+client-b", "+client-c", "-client-b"]


# Any interleaving


class UnreliableServer:
    """Passes calls on to a server. fails: whether the next call is lost on its way, or its reply on the way back."""

    def __init__(self, server: Any, fails: Callable[[], str]) -> None:
        self._server = server
        self._fails = fails
        self.is_cluster = False

    def run(self, done: Done, *call: Any) -> None:
        fault = self._fails()
        lost = EngineUnavailable("lost on purpose")
        if fault == "call":
            done(None, lost)
        else:
            self._server.run(
                lambda reply, error: done(None, lost) if fault == "reply" else done(reply, error),
                *call,
            )


@pytest.mark.parametrize("loses_data", [False, True])
@pytest.mark.parametrize("seed", range(4))
@pytest_twisted.ensureDeferred
async def test_after_any_faults_the_list_is_that_of_the_living_nodes(
    nodes: list[Node], seed: int, loses_data: bool
) -> None:
    chance = random.Random(seed)
    is_faulty = True

    def fails() -> str:
        return chance.choice(["", "", "", "", "", "call", "reply"]) if is_faulty else ""

    for node in nodes:
        node.make_unreliable(fails)
    for _ in range(150):
        node = chance.choice(nodes)
        others = [other for other in nodes if other is not node]
        info = ClientInfo(f"user-{chance.randrange(3)}", f"{nodes.index(node)}-{chance.randrange(6)}")
        match chance.choice(["put", "put", "remove", "renew", "dead", "alive", "read", "lose", "wait"]):
            case "put" if info.client not in node.here:
                node.put(info)
            case "remove" if info.client in node.here:
                node.remove(node.here[info.client].info)
            case "renew":
                node.start_renewal()
            case "dead":
                for other in others:
                    other.dead.add(node.run)
            case "alive":
                for other in others:
                    other.dead.discard(node.run)
            case "read":
                node.shared.count("room", lambda result, error: None)
            case "lose" if loses_data:
                await node.user.call("DEL", chance.choice(KEYS))
            case "wait":
                await node.user.call("PING")
    is_faulty = False
    for node in nodes:
        await settled([node])  # the last faults have shown by then
        node.dead.clear()
    for _ in range(4):
        for node in nodes:
            await node.renew()
    expected = sorted((entry.info for node in nodes for entry in node.here.values()), key=lambda info: info.client)
    assert (await nodes[0].present(), await nodes[1].count()) == (
        expected,
        (len(expected), len({info.user for info in expected})),
    )
    await settled(nodes)
    if not loses_data:
        present = {info.client for info in expected}
        for client in {entry[1:] for entry in nodes[2].log}:
            signs = "".join(entry[0] for entry in nodes[2].log if entry[1:] == client)
            assert signs == ("+-" * len(signs))[: len(signs)] and (signs[-1] == "+") == (client in present)
