"""Sessions that move to another worker: what the client, the other clients and the application notice of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import pytest

from realtime.errors import ClientError
from realtime.protocol import handover
from realtime.protocol.commands import COMMANDS
from realtime.protocol.handover import HandedSession
from realtime.protocol.session import Session
from realtime.pubsub.engine import GetPresence, GetStats
from tests.protocol.sessions import BARE, BARE_PROTOBUF, BARE_PUSHES, Gate, Peer, Server, run, token


def result_of(coroutine: Any) -> Any:
    """Return the result of a coroutine that does not wait."""
    results: list[Any] = []

    def done(result: Any, error: BaseException | None) -> None:
        results.append((result, error))

    run(coroutine, done)
    ((result, error),) = results
    if error is not None:
        raise error
    return result


class Move:
    """One batch on its way from one worker to another, step by step."""

    batches = 0

    def __init__(self, source: Server, target: Server, peers: Sequence[Peer]) -> None:
        Move.batches += 1
        self.batch = f"batch {Move.batches}"
        self.source = source
        self.target = target
        self.peers = list(peers)
        self.ready: list[Peer] = []
        self.handed: list[tuple[Peer, bytes]] = []

    def suspend(self) -> None:
        for peer in self.peers:
            handover.suspend(peer.session, lambda peer=peer: self.ready.append(peer))  # type: ignore[misc]

    def prepare(self) -> None:
        channels = handover.channels_of([peer.session for peer in self.ready])
        result_of(handover.expect(self.target.services, self.batch, channels))

    def cut(self) -> None:
        sessions = [peer.session for peer in self.ready]
        address = self.target.engine.address
        self.sessions: list[Session] = result_of(handover.cut(self.source.services, self.batch, address, sessions))

    def export(self) -> None:
        for peer in self.ready:
            if peer.session in self.sessions:
                self.handed.append((peer, msgspec.msgpack.encode(handover.export(peer.session))))

    def restore(self) -> None:
        services = self.target.services
        result_of(handover.arrived(services, self.batch))
        for peer, state in self.handed:
            handed = msgspec.msgpack.decode(state, type=HandedSession)
            peer.session = handover.restore(self.target.settings, services, COMMANDS, self.batch, peer, handed)
            self.target.peers.add(peer)

    def finish(self) -> None:
        assert handover.finish(self.target.services, self.batch) == []

    STEPS: tuple[Callable[[Move], None], ...] = (suspend, prepare, cut, export, restore, finish)

    def run(self) -> None:
        """Make all steps."""
        for step in self.STEPS:
            step(self)


def enter(peer: Peer, *channels: str, **request: Any) -> None:
    """Subscribe to these channels."""
    for channel in channels:
        reply, *_ = peer.say({"id": 2, "subscribe": {"channel": channel, **request}})
        assert "subscribe" in reply


def hand_over(source: Server, target: Server, *peers: Peer) -> None:
    Move(source, target, peers).run()


@pytest.fixture
def old() -> Server:
    return Server()


@pytest.fixture
def new(old: Server) -> Server:
    return Server(beside=old)


def test_a_client_goes_on_where_it_was(old: Server, new: Server) -> None:
    peer = old.client("alice")
    enter(peer, "room:1", recoverable=True)
    enter(peer, "free")
    peer.heard()
    old.publish("room:1", 1)
    hand_over(old, new, peer)
    new.publish("room:1", 2)
    new.publish("free", 3)
    assert peer.publications() == [1, 2, 3]
    (reply,) = peer.say({"id": 7, "rpc": {"method": "ping", "data": 1}})
    assert reply["id"] == 7
    peer.say({"id": 8, "unsubscribe": {"channel": "room:1"}}, {"id": 9, "unsubscribe": {"channel": "free"}})
    peer.session.closed()
    assert old.clean() and new.clean()


@pytest.mark.parametrize("step", range(len(Move.STEPS) + 1))
def test_events_at_any_step_arrive_once_and_in_order(old: Server, new: Server, step: int) -> None:
    peer, other = old.client("alice"), new.client("bob")
    enter(peer, "room:1", recoverable=True)
    enter(peer, "free")
    peer.heard()
    move = Move(old, new, [peer])
    for number in range(len(Move.STEPS) + 1):
        if number == step:
            old.publish("room:1", number)
            new.publish("free", number)
            enter(other, "room:1")
        if number < len(Move.STEPS):
            Move.STEPS[number](move)
    pushes = [message["push"] for message in peer.heard()]
    kinds = [(push["channel"], *(push.keys() - {"channel"})) for push in pushes]
    assert [kind for kind in kinds if kind[0] == "room:1"] == [("room:1", "pub"), ("room:1", "join")]
    assert [kind for kind in kinds if kind[0] == "free"] == [("free", "pub")]


def test_presence_does_not_flicker(old: Server, new: Server) -> None:
    ended: list[Any] = []

    async def disconnected(*args: Any) -> None:
        ended.append(args)

    old.app.disconnected = new.app.disconnected = disconnected
    peer, witness = old.client("alice"), new.client("bob")
    enter(witness, "room:1")
    enter(peer, "room:1")
    witness.heard()
    before = old.engine.execute(GetPresence("room:1"))
    hand_over(old, new, peer)
    assert old.engine.execute(GetPresence("room:1")) == before
    assert old.engine.execute(GetStats()).clients == 2
    assert (witness.heard(), ended) == ([], [])
    peer.session.closed()
    (leave,) = witness.heard()
    assert leave["push"]["leave"]["info"]["user"] == "alice"
    assert len(ended) == 1


def test_the_client_object_of_the_old_worker_does_nothing_any_more(old: Server, new: Server) -> None:
    peer = old.client("alice")
    before = peer.session.handle
    assert before is not None
    hand_over(old, new, peer)
    before.send({"lost": 1})
    before.disconnect()
    assert (peer.heard(), peer.close_code, before.channels, before.user) == ([], None, [], "alice")
    after = peer.session.handle
    assert after is not None
    after.send({"a": 1})
    assert peer.heard() == [{"push": {"message": {"data": {"a": 1}}}}]


def test_a_command_under_way_is_answered_first(old: Server, new: Server) -> None:
    gate = Gate()

    async def slow(client: Any, data: Any) -> Any:
        await gate
        return "slow"

    async def quick(client: Any, data: Any) -> Any:
        return "quick"

    old.app.procedures["slow"] = slow
    new.app.procedures["quick"] = quick
    peer = old.client("alice")
    peer.say({"id": 2, "rpc": {"method": "slow"}}, {"id": 3, "rpc": {"method": "quick"}})
    move = Move(old, new, [peer])
    move.suspend()
    peer.say({"id": 4, "rpc": {"method": "quick"}})
    assert move.ready == []
    gate.open()
    assert [reply["id"] for reply in peer.heard()] == [2]
    for step in Move.STEPS[1:]:
        step(move)
    assert [(reply["id"], reply["rpc"]["data"]) for reply in peer.heard()] == [(3, "quick"), (4, "quick")]


@pytest.mark.parametrize("form", [BARE, BARE_PROTOBUF], ids=["json", "protobuf"])
def test_waiting_commands_travel(old: Server, new: Server, form: Any) -> None:
    """Every kind of command, and a message that is cut off behind them."""
    peer, twin = old.peer(form), new.peer(form)
    for client in (peer, twin):
        client.connect(token=token(sub="alice"))
    tree = {
        "op": "and",
        "nodes": [{"key": "a", "cmp": "eq", "val": "1"}, {"key": "b", "cmp": "in", "vals": ["2", "3"]}],
    }
    commands = [
        {"id": 3, "subscribe": {"channel": "kept:1", "recover": True, "offset": 2**40, "epoch": "e", "flag": -1}},
        {"id": 4, "subscribe": {"channel": "kept:2", "tf": tree, "delta": "fossil"}},
        {"id": 5, "publish": {"channel": "kept:3", "data": {"a": [1, "ü"]}}},
        {"id": 6, "history": {"channel": "kept:3", "limit": -1, "since": {"offset": 0, "epoch": ""}}},
        {"id": 7, "presence": {"channel": "room:1"}},
        {"id": 8, "presence_stats": {"channel": "room:1"}},
        {"id": 9, "rpc": {"method": "ping", "data": {"b": 1.50}}},
        {"id": 10, "unsubscribe": {"channel": "kept:1"}},
        {"id": 11, "sub_refresh": {"channel": "kept:1", "token": "x"}},
        {"id": 12},
    ]
    move = Move(old, new, [peer])
    move.suspend()
    assert peer.say(*commands) == []
    for step in Move.STEPS[1:]:
        step(move)
    replies = peer.heard()
    assert [reply["id"] for reply in replies] == [3, 4, 5, 6, 7, 8, 9, 10, 11]
    assert peer.close_code is not None and peer.close_code[0] == 3501
    assert [(reply["id"], reply.get("error")) for reply in replies] == [
        (reply["id"], reply.get("error")) for reply in twin.say(*commands)
    ]


def test_a_unidirectional_client_moves(old: Server, new: Server) -> None:
    peer = old.peer(BARE_PUSHES)
    peer.session.receive(msgspec.json.encode({"token": token(sub="alice", channels=["kept:1"])}))
    peer.heard()
    hand_over(old, new, peer)
    new.publish("kept:1", 1)
    (push,) = peer.heard()
    assert push["pub"]["data"] == 1


def test_a_client_that_has_not_connected_yet_moves(old: Server, new: Server) -> None:
    peer = old.peer()
    move = Move(old, new, [peer])
    move.suspend()
    peer.say({"id": 1, "connect": {"token": token(sub="alice")}})
    for step in Move.STEPS[1:]:
        step(move)
    (reply,) = peer.heard()
    assert reply["connect"]["client"]
    assert (len(old.sessions), len(new.sessions)) == (0, 1)


def test_a_refused_cut_leaves_everything_in_place(old: Server, new: Server) -> None:
    peer = old.client("alice")
    enter(peer, "room:1")
    peer.heard()
    move = Move(old, new, [peer])
    move.suspend()
    move.prepare()
    peer.say({"id": 5, "rpc": {"method": "ping"}})
    new.engine.address = "9-9"
    with pytest.raises(ClientError):
        move.cut()
    move.finish()
    handover.resume(peer.session)
    assert [reply["id"] for reply in peer.heard()] == [5]
    old.publish("room:1", 1)
    assert peer.publications() == [1]
    peer.session.closed()
    assert old.clean() and new.clean()


def test_a_subscription_of_the_server_is_finished_first(old: Server, new: Server) -> None:
    peer = old.client("alice")
    gates = old.delay_engine()
    move = Move(old, new, [peer])
    assert peer.session.handle is not None
    peer.session.handle.subscribe("room:1")
    move.suspend()
    assert move.ready == []
    while gates:
        gates.pop(0).open()
    assert move.ready == [peer]
    old.engine.overrides.clear()
    for step in Move.STEPS[1:]:
        step(move)
    assert peer.session.channels() == ["room:1"]
