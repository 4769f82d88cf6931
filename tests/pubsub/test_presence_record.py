"""Presence replies of many members, beside joins and leaves: the list that a client keeps is never wrong for good."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

from hypothesis import given, settings
from hypothesis import strategies as st

from realtime.config.settings import ChannelOptions, ChannelSettings
from realtime.protocol import commands
from realtime.pubsub import presence, time_slices
from realtime.pubsub.engine import AddPresence, GetPresence, RemovePresence
from realtime.pubsub.presence_record import PresenceRecords
from realtime.pubsub.time_slices import TimeSlicer
from realtime.types import ClientInfo
from tests.protocol.sessions import BARE, BARE_PROTOBUF, Gate, Peer, Server

CHANNEL = ChannelSettings(
    without_namespace=ChannelOptions(
        presence=True,
        join_leave=True,
        force_push_join_leave=True,
        allow_subscribe_for_client=True,
        allow_subscribe_for_anonymous=True,
        allow_presence_for_subscriber=True,
        allow_presence_for_anonymous=True,
    )
)
ANN = ClientInfo("42", "ann")


class Turn(Gate):
    def callback(self, result: None) -> None:
        self.open()


@contextmanager
def in_short_steps() -> Iterator[None]:
    with (
        mock.patch.object(time_slices, "YIELD_EVERY", 2),
        mock.patch.object(commands, "YIELD_EVERY", 2),
        mock.patch.object(commands, "PRESENCE_PAGE", 3),
        mock.patch.object(presence, "PRESENCE_PAGE", 3),
    ):
        yield


class Room:
    """A channel, and a client that keeps the list of its members as applications do."""

    def __init__(self, form=BARE) -> None:
        self.turns: list[Callable[[], None]] = []
        self.now = 0
        self.server = Server(
            CHANNEL, TimeSlicer(self.tick, 1, self.turns.append, Turn), allow_anonymous_connect_without_token=True
        )
        self.peer: Peer = self.server.peer(form)
        self.peer.connect()
        self.members: set[str] | None = set()
        self.command = 1
        self.loses = False
        deliver = self.server.hub._deliver_join_leave
        self.server.hub._deliver_join_leave = lambda *event: None if self.loses else deliver(*event)  # type: ignore[method-assign]
        self.say("subscribe")
        self.say("presence")
        self.run()

    def tick(self) -> int:
        self.now += 1
        return self.now

    def say(self, name: str) -> None:
        self.command += 1
        for message in self.peer.say({"id": self.command, name: {"channel": "a"}}):
            self.take(message)

    def take(self, message: dict) -> None:
        if "presence" in message:
            self.members = set(message["presence"].get("presence", {}))
        push = message.get("push", {})
        if "join" in push:
            self.members.add(push["join"]["info"]["client"])
        if "leave" in push:
            self.members.discard(push["leave"]["info"]["client"])
        if "unsubscribe" in push:
            assert push["unsubscribe"]["code"] == 2500
            self.say("subscribe")
            self.say("presence")

    def run(self, turns: int = 1_000) -> None:
        while self.turns and turns:
            self.turns.pop(0)()
            for message in self.peer.heard():
                self.take(message)
            turns -= 1

    def join(self, number: int) -> None:
        self.execute(AddPresence("a", ClientInfo("42", f"client {number}"), present=True, announce=True))

    def leave(self, number: int) -> None:
        self.execute(RemovePresence("a", f"client {number}"))

    def execute(self, request) -> None:
        self.server.engine.execute(request)
        for message in self.peer.heard():
            self.take(message)

    def lose(self, number: int) -> None:
        """A join or leave is lost with the stream to the engine."""
        self.loses = True
        self.join(number) if number % 2 else self.leave(number)
        self.loses = False
        self.server.hub.on_interruption()
        for message in self.peer.heard():
            self.take(message)

    @property
    def present(self) -> set[str]:
        return set(self.server.engine.execute(GetPresence("a")))


STEPS = st.one_of(
    st.tuples(st.sampled_from(["join", "leave"]), st.integers(0, 7)),
    st.tuples(st.just("lose"), st.integers(0, 7)),
    st.tuples(st.just("run"), st.integers(1, 4)),
    st.tuples(st.just("say"), st.just("presence")),
)


@settings(deadline=None)
@given(st.lists(STEPS, max_size=40), st.sampled_from([BARE, BARE_PROTOBUF]))
def test_no_interleaving_leaves_a_ghost(steps, form):
    with in_short_steps():
        room = Room(form)
        for number in range(5):
            room.join(number)
        for name, argument in steps:
            getattr(room, name)(argument)
        room.run()
        assert room.members == room.present


def test_a_leave_overtakes_no_reply():
    with in_short_steps():
        room = Room()
        for number in range(10):
            room.join(number)
        room.say("presence")
        room.leave(9)
        room.join(10)
        room.run()
        assert room.members == room.present == {room.peer.session.client, *(f"client {n}" for n in (*range(9), 10))}


def test_records_of_one_channel():
    records = PresenceRecords()
    with records.open("a", is_complete=True) as first, records.open("a", is_complete=False) as second:
        records.add("a", ANN, joined=True)
        records.add("b", ANN, joined=True)
        assert first.changes == second.changes == {"ann": ANN}
        assert (first.is_complete, second.is_complete) == (True, False)
        records.add("a", ANN, joined=False)
        assert first.changes == {"ann": None}
        records.interrupt("b")
        assert first.is_complete
        records.interrupt_all()
        assert not first.is_complete
    assert not records
