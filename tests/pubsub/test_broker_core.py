"""The core of the broker with several peers: recipients of deliveries, and state that belongs to a peer."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Any

import pytest

from realtime.errors import ClientError
from realtime.pubsub.broker_core import BrokerCore
from realtime.pubsub.broker_messages import NOTICES, REQUESTS
from realtime.pubsub.engine import (
    AddClient,
    AddPresence,
    AdmitClient,
    Answer,
    Cut,
    EngineNotice,
    EngineRequest,
    GetPresence,
    GetStats,
    Publish,
    RemoveClient,
    RemoveHistory,
    RemovePresence,
    ReportSubscriptions,
    SendOrder,
    Subscribe,
    TakeLostClients,
)
from realtime.types import ClientInfo, EngineStats, HistoryOptions, Publication

ALICE = ClientInfo("alice", "client-a")
BOB = ClientInfo("bob", "client-b")


class Deliveries:
    """Logs each delivery: its recipients and its content."""

    def __init__(self) -> None:
        self.made: list[tuple[Any, ...]] = []

    def deliver_publication(self, peers: Collection[str], channel: str, publication: Publication, epoch: str) -> None:
        self.made.append((sorted(peers), channel, publication.data))

    def deliver_join(self, peers: Collection[str], channel: str, info: ClientInfo) -> None:
        self.made.append((sorted(peers), "joined", channel, info))

    def deliver_leave(self, peers: Collection[str], channel: str, info: ClientInfo) -> None:
        self.made.append((sorted(peers), "left", channel, info))

    def deliver_order(self, peers: Collection[str], order: bytes) -> None:
        self.made.append((sorted(peers), order))

    def deliver_cut(self, peer: str, request: Cut, clients: list[ClientInfo]) -> None:
        self.made.append(([peer], "cut", request.batch, clients))


class Bench:
    """A core with three peers and room for two channels."""

    def __init__(self) -> None:
        self.deliveries = Deliveries()
        self.core = BrokerCore[str](self.deliveries, max_channels=2)
        self.now = 0.0
        for peer in ("one", "two", "three"):
            self.core.attach(peer, f"at {peer}")

    def ask(self, request: EngineRequest[Answer], peer: str = "one") -> Answer:
        return self.core.carry_out(peer, self.now, request)

    def tell(self, notice: EngineNotice, peer: str = "one") -> None:
        self.core.take_note(peer, self.now, notice)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def present(channel: str, info: ClientInfo, announce: bool = False) -> AddPresence:
    return AddPresence(channel, info, present=True, announce=announce)


def test_every_operation_has_a_method_of_its_types(bench: Bench) -> None:
    assert set(bench.core.operations) == {*REQUESTS, *NOTICES}
    for kind, method in bench.core.operations.items():
        assert [*inspect.signature(method, eval_str=True).parameters.values()][-1].annotation is kind


def test_one_delivery_names_all_its_peers(bench: Bench) -> None:
    bench.ask(Subscribe("c"), "one")
    bench.ask(Subscribe("c"), "three")
    bench.ask(Publish("c", b"1", HistoryOptions()))
    bench.ask(Publish("elsewhere", b"2", HistoryOptions()))
    assert bench.ask(SendOrder(b"order")) == 3
    assert bench.deliveries.made == [(["one", "three"], "c", b"1"), (["one", "three", "two"], b"order")]


def test_an_order_may_be_for_one_peer(bench: Bench) -> None:
    core = bench.core
    core.attach("another two", "at two")
    assert bench.ask(SendOrder(b"order", "at two")) == 1
    core.detach("two", 0.0)
    assert bench.ask(SendOrder(b"again", "at two")) == 1
    core.detach("another two", 0.0)
    assert (bench.ask(SendOrder(b"late", "at two")), bench.ask(SendOrder(b"lost", "nowhere"))) == (0, 0)
    assert bench.deliveries.made == [(["another two"], b"order"), (["another two"], b"again")]


def test_a_detached_peer_makes_room_for_its_users(bench: Bench) -> None:
    assert bench.ask(AdmitClient(ALICE, 1), "one")
    assert not bench.ask(AdmitClient(ClientInfo("alice", "client-c"), 1), "two")
    bench.core.detach("one", 0.0)
    assert bench.ask(AdmitClient(ClientInfo("alice", "client-c"), 1), "two")


def test_the_clients_of_an_unlinked_peer_stay_listed_until_it_returns_or_they_leave(bench: Bench) -> None:
    core = bench.core
    bench.ask(Subscribe("c"), "two")
    for info in (ALICE, BOB):
        bench.tell(AddClient(info), "one")
        bench.ask(present("c", info, announce=True), "one")
    bench.deliveries.made.clear()
    for _ in core.unlink_steps("one", 1.0):
        pass
    assert bench.ask(GetPresence("c")).keys() == {ALICE.client, BOB.client}
    assert bench.ask(AdmitClient(ClientInfo(ALICE.user, "client-c"), 1), "two")  # the connection itself does not count
    core.attach("one again", "at one")
    core.restore("one again", ["c"], [present("c", ALICE, announce=True)], [ALICE], {}, announce=True)
    assert bench.deliveries.made == []
    for _ in range(2):
        for _ in core.leave_steps("one", 2.0):
            pass
    assert bench.deliveries.made == [(["one again", "two"], "left", "c", BOB)]
    assert bench.ask(GetPresence("c")) == {ALICE.client: ALICE}


def test_a_peer_inherits_the_routes_of_an_unlinked_one(bench: Bench) -> None:
    for channel in ("left", "kept"):
        bench.ask(Subscribe(channel), "one")
    bench.ask(Subscribe("kept"), "two")
    for _ in bench.core.unlink_steps("one", bench.now):
        pass
    bench.ask(Publish("kept", b"1", HistoryOptions()), "two")
    assert bench.ask(SendOrder(b"order"), "two") == 3
    bench.core.attach("fresh")
    bench.core.inherit("fresh", "one")
    bench.ask(Publish("kept", b"2", HistoryOptions()), "two")
    assert bench.ask(SendOrder(b"order"), "two") == 3
    bench.core.restore("fresh", ["kept"], [], [], {}, announce=False)
    bench.tell(ReportSubscriptions(1), "fresh")
    for channel in ("left", "kept"):
        bench.ask(Publish(channel, b"3", HistoryOptions()), "two")
    assert bench.deliveries.made == [
        (["one", "two"], "kept", b"1"),
        (["one", "three", "two"], b"order"),
        (["fresh", "two"], "kept", b"2"),
        (["fresh", "three", "two"], b"order"),
        (["fresh", "two"], "kept", b"3"),
    ]
    for _ in bench.core.leave_steps("one", bench.now):
        pass
    assert bench.core.channels == 1


def test_a_detached_peer_takes_its_state_along(bench: Bench) -> None:
    for peer in ("one", "two"):
        bench.ask(Subscribe("c"), peer)
    bench.ask(Subscribe("own"), "one")
    bench.core.restore("one", (), [present("c", ALICE, announce=True)], (), {}, announce=False)
    bench.ask(present("c", BOB), "one")
    bench.tell(AddClient(ALICE), "one")
    bench.tell(AddClient(ClientInfo("alice", "client-c")), "two")
    bench.tell(ReportSubscriptions(5), "one")
    bench.core.detach("one", 0.0)
    bench.core.detach("one", 0.0)
    assert bench.deliveries.made == [(["two"], "left", "c", ALICE)]
    assert bench.ask(GetPresence("c")) == {}
    assert bench.ask(GetStats()) == EngineStats(clients=1, users=1, channels=1, subscriptions=0)
    bench.core.detach("two", 0.0)
    assert (bench.ask(GetStats()), bench.core.channels) == (EngineStats(), 0)


def test_restored_state_may_exceed_the_limit(bench: Bench) -> None:
    for channel in ("a", "b"):
        bench.ask(Subscribe(channel))
        bench.ask(present(channel, ALICE))
    with pytest.raises(ClientError):
        bench.ask(Subscribe("c"))
    with pytest.raises(ClientError):
        bench.ask(present("c", ALICE))
    bench.core.restore("one", ["c"], [present("c", ALICE)], (), {}, announce=True)
    assert (bench.core.channels, bench.ask(GetPresence("c"))) == (3, {"client-a": ALICE})


def test_a_later_info_of_a_client_replaces_the_earlier(bench: Bench) -> None:
    bench.ask(Subscribe("c"))
    bench.ask(present("c", ALICE, announce=True))
    renamed = ClientInfo("alice", "client-a", b'"A."')
    bench.ask(present("c", renamed, announce=True))
    bench.ask(RemovePresence("c", "client-a"))
    assert [delivery[1:] for delivery in bench.deliveries.made] == [
        ("joined", "c", ALICE),
        ("left", "c", renamed),
    ]


def test_a_refused_publication_leaves_no_key_behind(bench: Bench) -> None:
    keep = HistoryOptions(1, 60.0)
    for channel in ("a", "b"):
        bench.ask(Publish(channel, b"1", keep))
    with pytest.raises(ClientError):
        bench.ask(Publish("c", b"1", keep, idempotency_key="key"))
    bench.ask(RemoveHistory("a"))
    bench.now = 10_000_000.0
    bench.core.sweep(bench.now)
    assert bench.core.streams == 0
    assert bench.ask(Publish("c", b"1", keep, idempotency_key="key")).offset == 1


class TestLostClients:
    """The clients of a worker that has died, for the worker in its place."""

    CLIENTS = (ClientInfo("alice", "client-a"), ClientInfo("bob", "client-b"), ClientInfo("", "client-c"))

    def start(self, peer: str, core: BrokerCore[str], *, takes_lost: bool = True, is_returning: bool = False) -> None:
        core.attach(peer, f"0-{peer}", "0")
        core.introduce(peer, takes_lost=takes_lost, is_returning=is_returning)

    def run(self, *, takes_lost: bool = True, max_channels: int = 10) -> BrokerCore[str]:
        """A core whose worker had three clients, of whom one has left, and then died."""
        core = BrokerCore[str](Deliveries(), max_channels)
        self.start("first", core, takes_lost=takes_lost)
        for info in self.CLIENTS:
            core.take_note("first", 0.0, AddClient(info))
        core.take_note("first", 0.0, RemoveClient("client-b"))
        core.detach("first", 0.0)
        return core

    def taken(self, core: BrokerCore[str], peer: str, limit: int = 100) -> list[ClientInfo]:
        return core.carry_out(peer, 0.0, TakeLostClients(limit))

    def test_the_next_worker_gets_each_of_them_once(self) -> None:
        core = self.run()
        self.start("second", core)
        assert self.taken(core, "second", 1) == [self.CLIENTS[0]]
        assert self.taken(core, "second") == [self.CLIENTS[2]]
        assert self.taken(core, "second") == []

    def test_those_that_it_has_not_taken_are_the_next_ones(self) -> None:
        core = self.run()
        self.start("second", core)
        assert self.taken(core, "second", 1) == [self.CLIENTS[0]]
        core.detach("second", 1.0)
        self.start("third", core)
        assert self.taken(core, "third") == [self.CLIENTS[2]]

    def test_a_worker_that_returns_has_them_itself(self) -> None:
        core = self.run()
        core.attach("again", "0-first", "0")
        core.introduce("again", takes_lost=True, is_returning=True)
        assert self.taken(core, "again") == []

    def test_another_workers_clients_are_not_given_out(self) -> None:
        core = self.run()
        core.attach("other", "1-0", "1")
        core.introduce("other", takes_lost=True, is_returning=False)
        assert self.taken(core, "other") == []

    def test_nothing_is_kept_for_an_application_that_does_not_ask(self) -> None:
        core = self.run(takes_lost=False)
        self.start("second", core)
        assert self.taken(core, "second") == []

    def test_their_number_is_limited(self) -> None:
        core = self.run(max_channels=1)
        self.start("second", core)
        assert self.taken(core, "second") == [self.CLIENTS[0]]


class TestCut:
    """Clients that move from one worker to another."""

    def bench(self) -> Bench:
        """Two workers subscribed to a channel, in which Alice is present; she is a client of the first worker."""
        bench = Bench()
        for peer in ("one", "two"):
            bench.ask(Subscribe("c"), peer)
        bench.tell(AddClient(ALICE))
        bench.ask(present("c", ALICE, announce=True))
        bench.deliveries.made.clear()
        return bench

    def cut(self, bench: Bench, worker: str = "at two") -> None:
        bench.ask(Cut("batch", worker, ["client-a"], {"client-a": "secret"}, {"c": ["client-a"]}))

    def test_the_clients_and_their_presence_move_without_a_leave_and_a_join(self) -> None:
        bench = self.bench()
        self.cut(bench)
        assert bench.deliveries.made == [(["two"], "cut", "batch", [ClientInfo("alice", "client-a")])]
        assert bench.ask(GetPresence("c")) == {"client-a": ALICE}
        assert bench.ask(GetStats()).clients == 1
        bench.core.detach("one", 1.0)
        assert bench.ask(GetPresence("c"), "two") == {"client-a": ALICE}
        bench.core.detach("two", 1.0)
        assert bench.ask(GetStats(), "three") == EngineStats()

    def test_the_limit_of_a_user_counts_moved_clients_once(self) -> None:
        bench = self.bench()
        self.cut(bench)
        another = ClientInfo("alice", "client-c")
        assert not bench.ask(AdmitClient(another, 1))
        assert bench.ask(AdmitClient(another, 2))

    def test_only_the_worker_that_has_a_client_removes_it(self) -> None:
        bench = self.bench()
        self.cut(bench)
        bench.deliveries.made.clear()
        bench.ask(RemovePresence("c", "client-a"), "one")
        bench.tell(RemoveClient("client-a"), "one")
        assert (bench.deliveries.made, bench.ask(GetStats()).clients) == ([], 1)
        bench.ask(RemovePresence("c", "client-a"), "two")
        bench.tell(RemoveClient("client-a"), "two")
        assert bench.deliveries.made == [(["one", "two"], "left", "c", ALICE)]
        assert bench.ask(GetStats()).clients == 0

    def test_orders_to_a_session_follow_it(self) -> None:
        bench = self.bench()
        order = SendOrder(b"command", "at one", "secret")
        bench.ask(order, "three")
        self.cut(bench)
        bench.ask(order, "three")
        bench.core.detach("one", 1.0)
        bench.ask(order, "three")
        assert [made[0] for made in bench.deliveries.made if made[1] == b"command"] == [["one"], ["two"], ["two"]]
        bench.tell(RemoveClient("client-a"), "two")
        assert bench.ask(order, "three") == 0

    def test_a_cut_to_an_unknown_worker_moves_nothing(self) -> None:
        bench = self.bench()
        for nobody in ("at four", "at one"):
            with pytest.raises(ClientError):
                self.cut(bench, nobody)
        bench.core.detach("one", 1.0)
        assert bench.ask(GetStats(), "two").clients == 0

    def test_a_worker_that_restores_a_moved_client_has_it_again(self) -> None:
        """It did not get the answer to its request, and goes on with the client."""
        bench = self.bench()
        self.cut(bench)
        bench.deliveries.made.clear()
        bench.core.restore("one", (), [present("c", ALICE, announce=True)], [ALICE], {}, announce=True)
        bench.ask(RemovePresence("c", "client-a"), "two")
        bench.tell(RemoveClient("client-a"), "two")
        assert bench.deliveries.made == []
        assert (bench.ask(GetPresence("c")), bench.ask(GetStats()).clients) == ({"client-a": ALICE}, 1)

    def test_a_moved_client_is_lost_with_its_new_worker(self) -> None:
        core = BrokerCore[str](Deliveries(), 10)
        for peer, slot in (("old", "0"), ("new", "1")):
            core.attach(peer, f"{slot}-0", slot)
            core.introduce(peer, takes_lost=True, is_returning=False)
        core.take_note("old", 0.0, AddClient(ALICE))
        core.carry_out("old", 0.0, Cut("batch", "1-0", ["client-a"], {}, {}))
        core.detach("old", 1.0)
        core.detach("new", 1.0)
        for peer, slot, lost in (("old again", "0", []), ("new again", "1", [ALICE])):
            core.attach(peer, f"{slot}-1", slot)
            core.introduce(peer, takes_lost=True, is_returning=False)
            assert core.carry_out(peer, 2.0, TakeLostClients(10)) == lost

    def test_a_moved_client_stays_listed_for_its_grace(self) -> None:
        """After the end of its connection another one of the user takes its place, without a leave and a join."""
        bench = Bench()
        bench.ask(Subscribe("c"))
        bench.tell(AddClient(ALICE))
        graced = AddPresence("c", ALICE, present=True, announce=True, grace=5.0)
        bench.ask(graced)
        self.cut(bench)
        bench.deliveries.made.clear()
        bench.tell(RemoveClient("client-a"), "two")
        bench.ask(RemovePresence("c", "client-a"), "two")
        assert bench.ask(GetPresence("c")) == {"client-a": ALICE}
        again = ClientInfo("alice", "client-c")
        bench.ask(AddPresence("c", again, present=True, announce=True, grace=5.0), "three")
        assert bench.ask(GetPresence("c")) == {"client-a": ClientInfo("alice", "client-a")}
        assert bench.deliveries.made == []
