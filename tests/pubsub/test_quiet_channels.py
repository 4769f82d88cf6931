"""Position checks of quiet channels: a loss is found without a later publication."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

from realtime.errors import LIMIT_EXCEEDED, ClientError
from realtime.pubsub.engine import EngineNotice, GetHistory, Subscribe
from realtime.pubsub.hub import Hub
from realtime.types import HistoryOptions, HistoryPage, Position, Publication
from tests.pubsub.sinks import WholeFrames

KEEP = HistoryOptions(100, 60.0)


class Engine:
    """An engine whose positions the test sets. asked: channels whose position was queried. full: those without room."""

    def __init__(self) -> None:
        self.positions: dict[str, Position] = {}
        self.asked: list[str] = []
        self.full: set[str] = set()

    async def ask(self, request: Subscribe | GetHistory) -> HistoryPage | None:
        if isinstance(request, Subscribe):
            return None
        if request.channel in self.full:
            raise ClientError(*LIMIT_EXCEEDED)
        self.asked.append(request.channel)
        return HistoryPage([], self.positions[request.channel])

    def tell(self, notice: EngineNotice) -> None: ...


class Form:
    def publication(self, channel: str, publication: Publication, epoch: str) -> bytes:
        return b"%d" % publication.offset


class Listener(WholeFrames):
    form = Form()
    announced = delta = False
    filter = None
    client = ""
    priority = "normal"

    def __init__(self, positioned: bool = True) -> None:
        self.positioned = positioned
        self.heard: list[bytes] = []
        self.deliver = self.heard.append
        self.losses = 0

    def on_gap(self) -> None:
        self.losses += 1

    def on_unencodable(self) -> None: ...


def run(coroutine: Coroutine[Any, Any, Any]) -> None:
    try:
        coroutine.send(None)
    except StopIteration:
        return
    raise AssertionError("it waited")


class World:
    def __init__(self) -> None:
        self.engine = Engine()
        self.hub = Hub(lambda hub: self.engine, lambda order: None)  # type: ignore[arg-type, return-value]
        self.history_options = KEEP

    def listener(self, channel: str, positioned: bool = True) -> Listener:
        listener = Listener(positioned)
        run(self.hub.subscribe(channel, listener))  # type: ignore[arg-type]
        self.engine.positions.setdefault(channel, Position(0, "e"))
        position = self.engine.positions[channel] if positioned else None
        assert self.hub.activate(channel, listener, position)  # type: ignore[arg-type]
        return listener

    def publish(self, channel: str, *, lost: bool = False) -> None:
        last = self.engine.positions[channel]
        self.engine.positions[channel] = Position(last.offset + 1, last.epoch)
        if not lost:
            self.hub.on_publication(channel, Publication(b"1", last.offset + 1), last.epoch)

    def check(self) -> list[str]:
        """Run one round of checks; return the channels that it asked about."""
        self.engine.asked.clear()
        run(self.hub.check_positions(lambda channel: self.history_options))
        return self.engine.asked


def test_a_lost_publication_is_found_without_a_later_one() -> None:
    world = World()
    positioned, other = world.listener("a"), world.listener("a", positioned=False)
    world.publish("a")
    world.publish("a", lost=True)
    world.check()
    assert world.check() == ["a"]
    assert (positioned.losses, other.losses) == (1, 0)
    assert positioned.heard == [b"1"]


def test_a_new_epoch_is_found_without_a_publication() -> None:
    world = World()
    positioned = world.listener("a")
    world.engine.positions["a"] = Position(0, "another")
    world.check()
    world.check()
    assert positioned.losses == 1


def test_only_channels_without_publications_are_checked() -> None:
    world = World()
    listeners = [world.listener("busy"), world.listener("quiet")]
    world.check()
    for _ in range(5):
        world.publish("busy")
        assert world.check() == ["quiet"]
    assert [listener.losses for listener in listeners] == [0, 0]


def test_channels_without_history_are_not_checked() -> None:
    world = World()
    world.listener("a", positioned=False)
    world.history_options = HistoryOptions()
    assert [world.check() for _ in range(3)] == [[], [], []]


def test_a_gap_is_reported_once() -> None:
    world = World()
    positioned = world.listener("a")
    world.publish("a", lost=True)
    for _ in range(5):
        world.check()
    assert positioned.losses == 1


def test_a_channel_without_room_at_the_engine_does_not_stop_the_check() -> None:
    world = World()
    full, other = world.listener("full"), world.listener("other")
    world.engine.full.add("full")
    world.publish("other", lost=True)
    world.check()
    world.check()
    assert (full.losses, other.losses) == (0, 1)
