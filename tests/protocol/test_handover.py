"""Sessions that move to another worker: what the client, the other clients and the application notice of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import pytest

from realtime.config.settings import ChannelOptions, ChannelSettings
from realtime.errors import TOO_MANY_ERRORS, ClientError
from realtime.protocol import handover
from realtime.protocol.client_state import StateError
from realtime.protocol.commands import COMMANDS
from realtime.protocol.handover import HandedSession
from realtime.protocol.orders import (
    DisconnectOrder,
    Order,
    RefreshOrder,
    SubscribeOrder,
    SupersedeOrder,
    UnsubscribeOrder,
)
from realtime.protocol.session import Session
from realtime.pubsub.engine import GetPresence, GetStats
from realtime.types import SubscribeOptions
from tests.protocol.sessions import ALL, BARE, BARE_PROTOBUF, BARE_PUSHES, NOW, Gate, Peer, Server, run, token


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
    return Server(ping_interval=0.0)


@pytest.fixture
def new(old: Server) -> Server:
    return Server(beside=old, ping_interval=0.0)


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


def test_presence_that_the_new_configuration_switches_on_has_the_clients_that_move() -> None:
    old = Server(ChannelSettings(without_namespace=ChannelOptions(allow_subscribe_for_client=True)))
    new = Server(ChannelSettings(without_namespace=ChannelOptions(presence=True)), beside=old)
    peer = old.client("alice")
    enter(peer, "free")
    hand_over(old, new, peer)
    assert [info.user for info in new.engine.execute(GetPresence("free")).values()] == ["alice"]
    assert peer.session.is_settled
    peer.session.closed()
    assert new.engine.execute(GetPresence("free")) == {}


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


def test_the_state_of_the_application_moves_along(old: Server, new: Server) -> None:
    peer, other = old.client("alice"), old.client("bob")
    assert peer.session.handle is not None
    peer.session.handle.state["seen"] = {1, 2}
    hand_over(old, new, peer, other)
    assert peer.session.handle.state == {"seen": {1, 2}}
    assert other.session.handle is not None and other.session.handle.state == {}


def test_a_state_that_can_not_move_is_found_before_the_cut(old: Server, new: Server) -> None:
    peer = old.client("alice")
    handover.check_state(peer.session)
    assert peer.session.handle is not None
    peer.session.handle.state["function"] = len
    handover.check_state(peer.session)
    peer.session.handle.state["function"] = lambda: None
    with pytest.raises(StateError):
        handover.check_state(peer.session)


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


# Orders and actions of the server


def orders_everywhere(order: Order, *servers: Server) -> None:
    for server in servers:
        server.order(order)


@pytest.mark.parametrize("step", range(len(Move.STEPS) + 1))
def test_an_order_at_any_step_is_carried_out_once(old: Server, new: Server, step: int) -> None:
    """Both workers receive an order to all connections of a user, at the same place in their deliveries."""
    peer = old.client("alice")
    enter(peer, "free")
    move = Move(old, new, [peer])
    for number in range(len(Move.STEPS) + 1):
        if number == step:
            orders_everywhere(SubscribeOrder("alice", "kept:1"), old, new)
            orders_everywhere(UnsubscribeOrder("alice", "free"), old, new)
            orders_everywhere(RefreshOrder("alice", NOW + 60), old, new)
        if number < len(Move.STEPS):
            Move.STEPS[number](move)
    pushes = [message["push"] for message in peer.heard()]
    assert [next(iter(push.keys() - {"channel"})) for push in pushes] == ["subscribe", "unsubscribe", "refresh"]
    assert peer.session.channels() == ["kept:1"]
    new.advance(100)
    assert peer.close_code is not None and peer.close_code[0] == 3005


@pytest.mark.parametrize("step", range(len(Move.STEPS) + 1))
def test_a_disconnect_at_any_step_reaches_the_client(old: Server, new: Server, step: int) -> None:
    peer, witness = old.client("alice"), new.client("bob")
    enter(witness, "room:1")
    enter(peer, "room:1")
    witness.heard()
    move = Move(old, new, [peer])
    for number in range(len(Move.STEPS) + 1):
        if number == step:
            orders_everywhere(DisconnectOrder("alice", code=4001, reason="gone"), old, new)
        if number < len(Move.STEPS):
            Move.STEPS[number](move)
    assert peer.close_code == (4001, "gone")
    assert [next(iter(message["push"].keys() - {"channel"})) for message in witness.heard()] == ["leave"]
    assert old.engine.execute(GetStats()).clients == 1
    assert (len(old.sessions), len(new.sessions)) == (0, 1)


def test_actions_of_the_application_wait_for_the_new_worker(old: Server, new: Server) -> None:
    peer = old.client("alice")
    enter(peer, "free")
    move = Move(old, new, [peer])
    move.suspend()
    move.prepare()
    handle = peer.session.handle
    assert handle is not None
    handle.send(1)
    handle.subscribe("kept:1")
    handle.unsubscribe("free")
    for step in Move.STEPS[2:]:
        step(move)
    pushes = [message["push"] for message in peer.heard()]
    assert [next(iter(push.keys() - {"channel"})) for push in pushes] == ["message", "subscribe", "unsubscribe"]
    assert peer.session.channels() == ["kept:1"]


def test_actions_of_the_application_are_made_up_for_after_a_refusal(old: Server, new: Server) -> None:
    peer = old.client("alice")
    enter(peer, "free")
    move = Move(old, new, [peer])
    move.suspend()
    move.prepare()
    assert peer.session.handle is not None
    peer.session.handle.subscribe("kept:1")
    peer.session.handle.unsubscribe("free")
    move.finish()
    handover.resume(peer.session)
    assert peer.session.channels() == ["kept:1"]


def test_a_newer_connection_of_a_user_ends_one_that_is_on_its_way(old: Server, new: Server) -> None:
    peer = old.client("alice")
    move = Move(old, new, [peer])
    for step in Move.STEPS[:4]:
        step(move)
    new.order(SupersedeOrder("alice", "a newer client"))
    move.restore()
    assert peer.close_code is not None and peer.close_code[0] == 3504


# Gaps, limits, and other configurations


def test_a_client_with_a_gap_subscribes_again(old: Server, new: Server) -> None:
    """The stream of the new worker is interrupted after the cut."""
    peer = old.client("alice")
    enter(peer, "room:1", "free")
    peer.heard()
    move = Move(old, new, [peer])
    for step in Move.STEPS[:4]:
        step(move)
    new.hub.on_interruption()
    move.restore()
    move.finish()
    (push,) = peer.heard()
    assert push["push"]["channel"] == "room:1" and push["push"]["unsubscribe"]["code"] == 2500
    assert peer.session.channels() == ["free"]


def test_a_gap_before_the_cut_is_reported_after_it(old: Server, new: Server) -> None:
    peer = old.client("alice")
    enter(peer, "room:1")
    peer.heard()
    move = Move(old, new, [peer])
    move.suspend()
    move.prepare()
    old.hub.on_interruption()
    assert peer.heard() == []
    for step in Move.STEPS[2:]:
        step(move)
    (push,) = peer.heard()
    assert push["push"]["unsubscribe"]["code"] == 2500


def test_a_channel_without_a_namespace_at_the_new_worker_ends(old: Server) -> None:
    new = Server(ChannelSettings(without_namespace=ChannelOptions(**ALL)), beside=old)
    peer, witness = old.client("alice"), old.client("bob")
    for client in (peer, witness):
        enter(client, "free", "room:1")
    witness.heard()
    peer.heard()
    hand_over(old, new, peer)
    (push,) = peer.heard()
    assert push["push"] == {"channel": "room:1", "unsubscribe": {"code": 2000, "reason": "server unsubscribe"}}
    assert peer.session.channels() == ["free"]
    assert [next(iter(message["push"].keys() - {"channel"})) for message in witness.heard()] == ["leave"]


def test_a_client_that_has_expired_meanwhile_is_disconnected(old: Server, new: Server) -> None:
    peer = old.peer()
    peer.connect(token=token(sub="alice", exp=int(NOW) + 10))
    move = Move(old, new, [peer])
    for step in Move.STEPS[:4]:
        step(move)
    move.restore()
    new.advance(60)
    assert peer.close_code is not None and peer.close_code[0] == 3005


def test_errors_before_the_move_count_after_it(old: Server, new: Server) -> None:
    for server in (old, new):
        server.change(error_limit=3)
    peer = old.client("alice")
    failing = {"id": 9, "rpc": {"method": "unknown"}}
    peer.say(failing, failing)
    hand_over(old, new, peer)
    peer.say(failing)
    assert peer.close_code is None
    peer.say(failing)
    assert peer.close_code is not None
    assert peer.close_code[0] == TOO_MANY_ERRORS[0]


def test_commands_before_the_move_count_towards_the_rate_after_it(old: Server, new: Server) -> None:
    for server in (old, new):
        server.change(commands_per_second=1.0)
    peer = old.client("alice")
    ping = {"id": 9, "rpc": {"method": "ping"}}
    peer.say(ping)
    hand_over(old, new, peer)
    (reply,) = peer.say(ping)
    assert reply["error"]["code"] == 111


def test_a_session_that_can_not_be_restored_leaves_nothing_behind(old: Server, new: Server) -> None:
    peer = old.client("alice")
    enter(peer, "room:1")
    move = Move(old, new, [peer])
    for step in Move.STEPS[:4]:
        step(move)
    handed = msgspec.msgpack.decode(move.handed[0][1], type=HandedSession)
    move.handed[0] = peer, msgspec.msgpack.encode(msgspec.structs.replace(handed, replays=["room:1"], orders=[b"?"]))
    with pytest.raises(msgspec.MsgspecError):
        move.restore()
    move.finish()
    assert new.clean() and old.clean()
    assert old.engine.execute(GetPresence("room:1")) == {}


def test_a_client_gets_the_pings_that_it_was_promised(old: Server, new: Server) -> None:
    old.change(ping_interval=10.0, pong_timeout=5.0)
    peer = old.client("alice")
    hand_over(old, new, peer)
    for _ in range(5):
        new.ping(peer)
        peer.say({})
    assert peer.close_code is None and new.now < 60


def test_a_suspended_client_drains_like_any_other(old: Server, new: Server) -> None:
    """Its command takes longer than the hand-over may."""
    gate = Gate()

    async def slow(client: Any, data: Any) -> Any:
        await gate
        return "slow"

    old.app.procedures["slow"] = slow
    peer = old.client("alice")
    peer.say({"id": 2, "rpc": {"method": "slow"}}, {"id": 3, "rpc": {"method": "ping"}})
    move = Move(old, new, [peer])
    move.suspend()
    peer.session.drain()
    gate.open()
    first, second = peer.heard()
    assert (first["rpc"]["data"], second["error"]["code"]) == ("slow", 100)
    assert (peer.close_code, move.ready) == ((3001, "shutdown"), [])


def test_a_publication_that_is_lost_behind_the_cut_is_a_gap(old: Server, new: Server) -> None:
    peer = old.client("alice")
    enter(peer, "room:1", "free")
    old.publish("room:1", 1)
    peer.heard()
    move = Move(old, new, [peer])
    for step in Move.STEPS[:4]:
        step(move)
    deliver, new.hub.on_publication = new.hub.on_publication, lambda *lost: None  # type: ignore[method-assign]
    old.publish("room:1", 2)
    new.hub.on_publication = deliver  # type: ignore[method-assign]
    old.publish("room:1", 3)
    move.restore()
    move.finish()
    (push,) = peer.heard()
    assert push["push"]["unsubscribe"]["code"] == 2500
    assert peer.session.channels() == ["free"]


def test_the_options_of_a_single_subscription_move_along(old: Server, new: Server) -> None:
    peer = old.client("alice")
    orders_everywhere(SubscribeOrder("alice", "free", SubscribeOptions(override={"presence": True})), old)
    hand_over(old, new, peer)
    orders_everywhere(RefreshOrder("alice", info=b'{"name":"A"}'), new)
    (info,) = old.engine.execute(GetPresence("free")).values()
    assert info.conn_info == b'{"name":"A"}'


def test_a_filter_moves_along_whatever_the_new_limits() -> None:
    channel = ChannelSettings(without_namespace=ChannelOptions(**ALL, allow_tags_filter=True))
    old = Server(channel)
    new = Server(channel, beside=old, max_filter_nodes=1)
    peer = old.client("alice")
    enter(peer, "free", tf={"op": "not", "nodes": [{"key": "a", "cmp": "ex"}]})
    hand_over(old, new, peer)
    new.publish("free", 1, tags={"a": "1"})
    new.publish("free", 2)
    assert peer.publications() == [2]
