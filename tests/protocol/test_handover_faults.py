"""No publication is lost silently while clients move: the stories of `test_delivery_property` with hand-overs in them.

A hand-over advances by one step at a time, between any two messages of the links. Links break, the engine and workers
are replaced, and clients leave in the middle of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from realtime.errors import ClientError, EngineUnavailable
from realtime.protocol import handover
from realtime.protocol.commands import COMMANDS
from realtime.protocol.handover import HandedSession
from realtime.protocol.session import Session
from realtime.protocol.session_state import SessionState
from tests.protocol.sessions import run
from tests.protocol.test_delivery_property import (
    FREQUENT,
    LONG,
    OCCASIONAL,
    OPTIONS,
    RARE,
    SDK,
    SMALL_REPLY,
    Link,
    World,
    play,
)


class Unread:
    """Takes the place of a session that has been exported: the messages of its client wait in the socket."""

    def __init__(self, session: Session) -> None:
        self.client = session.client
        self.messages: list[bytes] = []

    def receive(self, message: bytes) -> None:
        self.messages.append(message)

    def closed(self) -> None: ...


class HandOver:
    """The hand-over of one client to the other worker. `advance` makes the next step, if it can be made."""

    serial = 0

    def __init__(self, world: MovingWorld, client: SDK) -> None:
        HandOver.serial += 1
        self.batch = f"batch {HandOver.serial}"
        self.world = world
        self.client = client
        assert client.session is not None
        self.session = client.session
        self.links: list[Link] = [world.links[client.link], world.links[1 - client.link]]
        self.source, self.target = world.workers[client.link], world.workers[1 - client.link]
        self.is_ready = self.has_ended = False
        self.outcome: tuple[Any, BaseException | None] | None = None
        self.unread: Unread | None = None
        self.next: Callable[[], bool] = self.prepare
        handover.suspend(self.session, self.ready)

    def ready(self) -> None:
        self.is_ready = True

    def wait(self, coroutine: Any) -> None:
        self.outcome = None
        run(coroutine, lambda result, error: setattr(self, "outcome", (result, error)))

    def advance(self) -> bool:
        """Make the next step. Returns False if it has to wait."""
        if self.has_ended:
            return False
        if self.links[0] not in self.world.links or self.links[1] not in self.world.links:
            self.abandon()
            return True
        return self.next()

    def abandon(self) -> None:
        """One of the workers has ended."""
        if self.links[1] in self.world.links:
            handover.finish(self.target, self.batch)
        elif self.client.session in (self.session, self.unread):
            if self.next in (self.export, self.restore):
                self.client.vanish()  # the source closes what it has cut
            else:
                handover.resume(self.session)
        self.has_ended = True

    def prepare(self) -> bool:
        if self.session.state is SessionState.CLOSED:
            self.has_ended = True
            return True
        if not self.is_ready:
            return False
        self.is_ready = False
        self.wait(handover.expect(self.target, self.batch, handover.channels_of([self.session])))
        self.next = self.cut
        return True

    def cut(self) -> bool:
        if self.outcome is None:
            return False
        if self.failed():
            return True
        self.wait(handover.cut(self.source, self.batch, self.links[1].address, [self.session]))
        self.next = self.export
        return True

    def failed(self) -> bool:
        """Go on at the source after a failure before the cut. Returns whether there was one."""
        assert self.outcome is not None
        error = self.outcome[1]
        if error is None:
            return False
        assert isinstance(error, EngineUnavailable | ClientError), error
        handover.finish(self.target, self.batch)
        handover.resume(self.session)
        self.has_ended = True
        return True

    def export(self) -> bool:
        if self.outcome is None:
            return False
        if self.failed():
            return True
        assert self.outcome is not None
        if self.outcome[0] and self.session.state is not SessionState.CLOSED:
            self.state = msgspec.msgpack.encode(handover.export(self.session))
            self.unread = Unread(self.session)
            self.client.session = self.unread  # type: ignore[assignment]
            self.wait(handover.arrived(self.target, self.batch))
            self.next = self.restore
        else:  # it has ended, or it was not ready any more
            handover.finish(self.target, self.batch)
            self.next = self.prepare
        return True

    def restore(self) -> bool:
        if self.outcome is None:
            return False
        assert self.outcome[1] is None
        if self.client.session is self.unread:  # type: ignore[comparison-overlap]  # its connection has not ended
            handed = msgspec.msgpack.decode(self.state, type=HandedSession)
            self.client.link = 1 - self.client.link
            self.client.session = handover.restore(
                self.world.settings, self.target, COMMANDS, self.batch, self.client, handed
            )
            for message in self.unread.messages:
                self.client.session.receive(message)
        handover.finish(self.target, self.batch)
        self.has_ended = True
        return True


class MovingWorld(World):
    """A world whose clients move."""

    moves: list[HandOver]

    def act(self, step: tuple[str, int]) -> None:
        name, number = step
        if name == "move":
            self.move(self.clients[number])
        else:
            super().act(step)

    def move(self, client: SDK) -> None:
        """Begin the hand-over of a client, or advance it."""
        current = [move for move in self.under_way() if move.client is client]
        if current:
            current[0].advance()
        elif client.session is not None:
            self.moves.append(HandOver(self, client))

    def under_way(self) -> list[HandOver]:
        self.moves = [move for move in getattr(self, "moves", []) if not move.has_ended]
        return self.moves

    def settle(self) -> None:
        moving = True
        while moving:
            super().settle()
            moving = sum(move.advance() for move in self.under_way()) > 0


FAULTS = st.tuples(
    st.sampled_from(3 * FREQUENT + 2 * OCCASIONAL + RARE + 8 * ["move"]),
    st.integers(0, 3),
)
SLOW = st.tuples(
    st.sampled_from(3 * [*FREQUENT, "stall", "drain"] + 2 * ["reconnect", "trim"] + OCCASIONAL[:-1] + 8 * ["move"]),
    st.integers(0, 3),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(FAULTS, min_size=20, max_size=100))
def test_a_moved_client_misses_nothing_silently(steps: list[tuple[str, int]]) -> None:
    play(steps, OPTIONS, make=MovingWorld)


@settings(max_examples=150, deadline=None)
@given(st.lists(SLOW, min_size=20, max_size=100))
def test_a_client_moves_while_it_receives_what_it_has_missed(steps: list[tuple[str, int]]) -> None:
    play(steps, LONG, SMALL_REPLY, make=MovingWorld)
