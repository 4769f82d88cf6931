"""A client that moves to another worker receives the bytes that it receives without a move.

A random story runs twice, over two workers on one broker core: in the second run one of the clients moves, in steps
between those of the story. Its frames are compared channel by channel: publications with and without history, whole, as
deltas and behind filters, joins and leaves, replies, pings, and the pushes of the server.
"""

from __future__ import annotations

import itertools
import random
import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from realtime.config.settings import ChannelOptions, ChannelSettings, Namespace
from realtime.protocol import handover
from realtime.protocol.commands import COMMANDS
from realtime.protocol.handover import HandedSession
from realtime.protocol.json_encoding import JSON_ENCODING
from realtime.protocol.orders import RefreshOrder, SubscribeOrder, UnsubscribeOrder
from realtime.protocol.wire_formats import WireFormat
from realtime.pubsub.engine import GetHistory, RemoveHistory
from realtime.pubsub.time_slices import TimeSlicer
from realtime.types import SubscribeOptions
from tests.protocol.sessions import (
    ALL,
    BARE,
    BARE_PROTOBUF,
    BARE_PUSHES,
    NOW,
    Gate,
    Server,
    from_protobuf,
    in_protobuf,
    run,
    token,
)

OPEN = {**ALL, "allowed_delta_types": ("fossil",), "allow_tags_filter": True}
KEPT = {"history_size": 5, "history_ttl": 60.0}
SEEN: dict[str, Any] = {"presence": True, "join_leave": True, "force_push_join_leave": True}
CHANNELS = ("free:1", "kept:1", "room:1", "open:1")
SETTINGS = ChannelSettings(
    without_namespace=ChannelOptions(),
    namespaces=(
        Namespace(name="free", **OPEN),
        Namespace(name="kept", force_recovery=True, **KEPT, **OPEN),
        Namespace(name="room", force_positioning=True, **SEEN, **KEPT, **OPEN),
        Namespace(name="open", **SEEN, **OPEN),
    ),
)
# Common to all publications, so that a delta is shorter than the full data.
PADDING = "as in most publications much of it is always the same "
FEATURES: tuple[dict[str, Any], ...] = (
    {},
    {"delta": "fossil"},
    {"tf": {"key": "odd", "cmp": "eq", "val": "1"}},
    {"delta": "fossil", "tf": {"key": "odd", "cmp": "eq", "val": "1"}},
)
# A payload and a frame end alike, as the fan-out joins frames.
LINES = WireFormat(JSON_ENCODING, lambda payload: payload + b"\n")
CLIENT_ID = re.compile(rb"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}")


class Turn(Gate):
    """The waiter of a slicer."""

    def callback(self, result: None) -> None:
        self.open(result)


class Turns:
    """Turns of a worker's loop, each with time for few deliveries."""

    def __init__(self) -> None:
        self._asked: list[Callable[[], None]] = []
        self._clock = itertools.count()
        self.slicer = TimeSlicer(lambda: float(next(self._clock)), 2.0, self._asked.append, Turn)

    def use_up(self) -> None:
        """Leave no time in this turn: events join backlogs until the next one."""
        self.slicer.start_slice()
        while self.slicer.has_time:
            pass

    def take(self) -> bool:
        """Take one turn, if it was asked for."""
        if not self._asked:
            return False
        self._asked.pop(0)()
        return True


class World:
    """Two workers: the client of interest, `subject`, begins at the first one, and each has another client."""

    def __init__(self, form: WireFormat, *, moves: bool, sliced: bool) -> None:
        random.seed(7)
        self.form = form
        self.moves = moves
        self.turns = [Turns(), Turns()]
        slicers = [each.slicer if sliced else None for each in self.turns]
        self.old = Server(SETTINGS, slicers[0], expired_close_delay=5.0)
        self.new = Server(SETTINGS, slicers[1], self.old, expired_close_delay=5.0)
        if sliced:
            for server, turns in zip((self.old, self.new), self.turns, strict=True):
                server.hub.fanout.slices = turns.slicer
        self.at = 0  # the worker of the subject
        self.step = 0  # of its move
        self.publications = 0
        self.inside: set[tuple[int, str]] = set()  # the channels of the other clients
        self.subject = self.old.peer(form)
        self.others = [server.client(f"user {number}") for number, server in enumerate((self.old, self.new))]
        claims: dict[str, Any] = {"sub": "subject", "exp": int(NOW) + 100, "info": {"name": "S"}}
        if form is BARE_PUSHES:
            claims["channels"] = CHANNELS
            self.subject.session.receive(msgspec.json.encode({"token": token(**claims)}))
            self.subject.raw.clear()
        else:
            self.subject.connect(token=token(**claims))
        self.command_id = 10

    @property
    def servers(self) -> list[Server]:
        """The workers: that of the subject, and the other one."""
        return [self.old, self.new] if not self.at else [self.new, self.old]

    # The steps of a story

    def publish(self, channel: str, tags: int, delta: bool) -> None:
        self.publications += 1
        content = {"number": self.publications, "text": PADDING}
        tag = {"odd": str(self.publications % 2)} if tags else None
        self.old.publish(channel, content, tags=tag, delta=delta)

    def other(self, number: int, channel: str, features: int) -> None:
        """Have another client enter a channel, or leave it."""
        peer = self.others[number]
        self.inside ^= {(number, channel)}
        if (number, channel) not in self.inside:
            command: dict[str, Any] = {"unsubscribe": {"channel": channel}}
        else:
            command = {"subscribe": {"channel": channel, **FEATURES[features]}}
        peer.session.receive(msgspec.json.encode({"id": 3, **command}))
        peer.raw.clear()

    def enter(self, channel: str, features: int) -> None:
        """Have the subject enter a channel, or leave it."""
        if channel in self.subject.session.subscriptions:
            self.command(unsubscribe={"channel": channel})
        else:
            self.command(subscribe={"channel": channel, **FEATURES[features]})

    def ask(self, what: str, channel: str) -> None:
        match what:
            case "publish":
                self.command(publish={"channel": channel, "data": {"by": "subject"}})
            case "history":
                self.command(history={"channel": channel, "limit": 10})
            case "presence_stats":
                self.command(presence_stats={"channel": channel})
            case _:
                self.command(rpc={"method": "ping", "data": {}})

    def command(self, **request: Any) -> None:
        self.command_id += 1
        command = {"id": self.command_id, **request}
        binary = self.form is BARE_PROTOBUF
        if self.form is BARE_PUSHES:
            return
        self.subject.session.receive(in_protobuf(command) if binary else msgspec.json.encode(command))

    def order(self, what: str, channel: str) -> None:
        order: Any
        match what:
            case "subscribe":
                order = SubscribeOrder("subject", channel, SubscribeOptions(expire_at=self.old.wall + 20))
            case "unsubscribe":
                order = UnsubscribeOrder("subject", channel)
            case _:
                order = RefreshOrder("subject", self.old.wall + 50, info=b'{"name":"T"}')
        for server in self.servers:
            server.order(order)

    def forget(self, channel: str) -> None:
        self.old.engine.execute(RemoveHistory(channel))

    def wait(self, seconds: float) -> None:
        peers = (self.subject, *self.others)
        for _ in range(int(seconds)):
            received = [len(peer.raw) for peer in peers]
            for server in (self.old, self.new):
                server.advance(1.0)
            for peer, before in zip(peers, received, strict=True):
                if any(frame.strip() == peer.form.encoding.ping for frame in peer.raw[before:]):
                    peer.session.receive(peer.form.encoding.ping)

    def turn(self, worker: int) -> None:
        self.turns[worker].take()

    def flush(self) -> None:
        """Let both workers deliver their backlogs."""
        while self.turns[0].take() or self.turns[1].take():
            pass

    def busy(self, worker: int) -> None:
        self.turns[worker].use_up()

    # The move

    STEPS = 6

    def move(self) -> None:
        """Make the next step of a move, in the world that has moves."""
        if self.subject.close_code is not None:
            return
        if self.moves:
            getattr(self, f"_step_{self.step}")()
        self.step = (self.step + 1) % self.STEPS

    def _step_0(self) -> None:
        self.settled = False

        def ready() -> None:
            self.settled = True

        handover.suspend(self.subject.session, ready)

    def _step_1(self) -> None:
        self._until(self.at, lambda: self.settled)
        target = self.servers[1]
        channels = handover.channels_of([self.subject.session])
        self._result(1 - self.at, handover.expect(target.services, "batch", channels))

    def _step_2(self) -> None:
        source, target = self.servers
        self.subject.session.services.hub.engine.address = source.engine.address  # type: ignore[attr-defined]
        cut = handover.cut(source.services, "batch", target.engine.address, [self.subject.session])
        assert self._result(self.at, cut) == [self.subject.session]

    def _step_3(self) -> None:
        self.state = msgspec.msgpack.encode(handover.export(self.subject.session))

    def _step_4(self) -> None:
        target = self.servers[1]
        self._result(1 - self.at, handover.arrived(target.services, "batch"))
        handed = msgspec.msgpack.decode(self.state, type=HandedSession)
        self.subject.session = handover.restore(
            target.settings, target.services, COMMANDS, "batch", self.subject, handed
        )
        self.at = 1 - self.at

    def _step_5(self) -> None:
        handover.finish(self.servers[0].services, "batch")

    def _result(self, worker: int, coroutine: Any) -> Any:
        results: list[tuple[Any, BaseException | None]] = []
        run(coroutine, lambda result, error: results.append((result, error)))
        self._until(worker, lambda: bool(results))
        ((result, error),) = results
        assert error is None, error
        return result

    def _until(self, worker: int, condition: Callable[[], bool]) -> None:
        while not condition():
            assert self.turns[worker].take(), "it would never come true"

    def whole(self) -> None:
        """Make all steps of a move, or the rest of them."""
        self.move()
        while self.step:
            self.move()

    # The outcome

    def finish(self) -> dict[str, list[bytes]]:
        """Return the frames of the subject by channel; "" for the others, in one order."""
        while self.step:
            self.move()
        for channel in CHANNELS:
            self.publish(channel, 1, True)
        self.flush()
        self.wait(120.0)  # long enough for pings, and for the ends of subscriptions and of the connection
        self.flush()
        assert not (self.old.mistakes or self.new.mistakes)
        frames: dict[str, list[bytes]] = defaultdict(list)
        for frame in self._frames():
            message = from_protobuf(frame) if self.form is BARE_PROTOBUF else msgspec.json.decode(frame)
            push = message if self.form is BARE_PUSHES else message.get("push", {})
            frames[push.get("channel", "")].append(self._normal(frame))
        frames["closed"] = [str(self.subject.close_code).encode()]
        return frames

    def _frames(self) -> list[bytes]:
        if self.form is BARE_PROTOBUF:
            return self.subject.raw
        return [line for raw in self.subject.raw for line in raw.splitlines()]

    def _normal(self, frame: bytes) -> bytes:
        """Return a frame with the same client ids and epochs in both worlds."""
        for number, peer in enumerate((self.subject, *self.others)):
            frame = frame.replace(peer.session.client.encode(), b"<client %d>" % number)
        for channel in CHANNELS:
            options = self.old.services.rules.options(channel).history_options
            if options.enabled:
                epoch = self.old.engine.execute(GetHistory(channel, options)).position.epoch
                frame = frame.replace(epoch.encode(), b"<epoch of %b>" % channel.encode())
        return frame


channels = st.sampled_from(CHANNELS)
features = st.integers(0, len(FEATURES) - 1)
# Steps that may come at any time, and those that would come at another time in the middle of a move.
anytime = st.one_of(
    st.tuples(st.just("publish"), channels, st.integers(0, 1), st.booleans()),
    st.tuples(st.just("other"), st.integers(0, 1), channels, features),
    st.tuples(st.just("forget"), channels),
    st.tuples(st.sampled_from(("turn", "busy", "busy")), st.integers(0, 1)),
)
settled = st.one_of(
    st.tuples(st.just("enter"), channels, features),
    st.tuples(st.just("ask"), st.sampled_from(("publish", "history", "presence_stats", "rpc")), channels),
    st.tuples(st.just("order"), st.sampled_from(("subscribe", "unsubscribe", "refresh")), channels),
    st.tuples(st.just("wait"), st.sampled_from((1.0, 12.0, 30.0))),
)
story = st.lists(
    st.one_of(anytime, anytime, settled, st.just(("move",)), st.just(("whole",))), min_size=10, max_size=60
)


def live(form: WireFormat, steps: list[tuple[Any, ...]], *, moves: bool, sliced: bool) -> dict[str, list[bytes]]:
    world = World(form, moves=moves, sliced=sliced)
    in_the_middle = {"enter", "ask", "order", "wait"}
    for name, *arguments in [("enter", channel, number) for number, channel in enumerate(CHANNELS)] + steps:
        if name in in_the_middle:
            if world.step:
                continue
            world.flush()  # the end of a subscription drops what is queued for it, which a move has delivered
        if world.subject.close_code is None:
            getattr(world, name)(*arguments)
    return world.finish()


def check(form: WireFormat, steps: list[tuple[Any, ...]], *, sliced: bool = False) -> None:
    assert live(form, steps, moves=True, sliced=sliced) == live(form, steps, moves=False, sliced=sliced)


@settings(max_examples=40, deadline=None)
@given(story)
def test_a_moved_client_receives_the_same_json(steps: list[tuple[Any, ...]]) -> None:
    check(BARE, steps)


@settings(max_examples=40, deadline=None)
@given(story)
def test_a_moved_client_receives_the_same_protobuf(steps: list[tuple[Any, ...]]) -> None:
    check(BARE_PROTOBUF, steps)


@settings(max_examples=40, deadline=None)
@given(story)
def test_a_moved_client_receives_the_same_from_a_backlog(steps: list[tuple[Any, ...]]) -> None:
    """The workers have little time in each turn of their loops."""
    check(LINES, steps, sliced=True)


@settings(max_examples=30, deadline=None)
@given(story)
def test_a_moved_unidirectional_client_receives_the_same(steps: list[tuple[Any, ...]]) -> None:
    check(BARE_PUSHES, steps)
