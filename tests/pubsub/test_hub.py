"""The hub: fan-out, continuity, and the races between subscribing, activating and unsubscribing."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Coroutine, Generator
from functools import partial
from typing import Any
from unittest import mock

import msgspec
import pytest
from centrifuge.fossil import apply_delta
from hypothesis import given
from hypothesis import strategies as st

from realtime.config.settings import EngineSettings
from realtime.errors import EngineUnavailable
from realtime.pubsub import fanout
from realtime.pubsub import hub as hub_module
from realtime.pubsub.engine import GetHistory, Publish, Receiver, RemoveHistory, Subscribe, Unsubscribe
from realtime.pubsub.filters import Filter
from realtime.pubsub.hub import Hub
from realtime.pubsub.time_slices import TimeSlicer
from realtime.types import ClientInfo, HistoryOptions, HistoryPage, Position, Publication
from tests.protocol.sessions import Gate, run
from tests.pubsub.memory_engine import MemoryEngine
from tests.pubsub.sinks import WholeFrames

EPOCH = "abcdefgh"
CLIENT = ClientInfo("42", "client-1")
KEEP = HistoryOptions(1000, 3600.0)


class TextForm:
    """A readable wire format that counts its encodings. Each frame ends with a NUL."""

    def __init__(self, name: str = "") -> None:
        self.name = name
        self.encoded = 0

    def publication(self, channel: str, publication: Publication, epoch: str) -> bytes:
        self.encoded += 1
        return b"%s%s %d %s\0" % (self.name.encode(), publication.data, publication.offset, epoch.encode())

    def full_publication(self, channel: str, publication: Publication, epoch: str) -> bytes:
        return b"whole " + self.publication(channel, publication, epoch)

    def delta_publication(self, channel: str, publication: Publication, delta: bytes, epoch: str) -> bytes | None:
        self.encoded += 1
        return b"patch %s %d\0" % (delta, publication.offset)

    def join(self, channel: str, info: ClientInfo) -> bytes:
        self.encoded += 1
        return b"join %s\0" % info.client.encode()

    def leave(self, channel: str, info: ClientInfo) -> bytes:
        return b"leave %s\0" % info.client.encode()


FORMS = {"text": TextForm(), "other": TextForm("other:")}


class Listener(WholeFrames):
    """A subscriber that logs its frames."""

    client = ""

    def __init__(
        self,
        form: str = "text",
        positioned: bool = True,
        announced: bool = False,
        delta: bool = False,
        filter: Filter | None = None,
        priority: str = "normal",
    ) -> None:
        self.form = FORMS[form]
        self.positioned = positioned
        self.announced = announced
        self.delta = delta
        self.filter = filter
        self.priority = priority
        self.frames: list[bytes] = []
        self.written: list[bytes] = []
        self.losses = self.misfits = 0

    def deliver(self, frames: bytes) -> None:
        self.written.append(frames)
        self.frames += frames.split(b"\0")[:-1]

    def on_gap(self) -> None:
        self.losses += 1

    def on_unencodable(self) -> None:
        self.misfits += 1

    @property
    def seen(self) -> list[tuple[int, str]]:
        """Offset and epoch of the numbered publications."""
        split = [frame.decode().split(" ") for frame in self.frames if frame.count(b" ") == 2]
        return [(int(offset), epoch) for _, offset, epoch in split if offset != "0"]


class Pause:
    def __await__(self) -> Generator[Pause, None, None]:
        yield self


class SlowEngine:
    """An engine whose answers wait until the test resumes them."""

    def __init__(self) -> None:
        self.log: list[str] = []

    async def ask(self, request: Subscribe) -> None:
        self.log.append(f"subscribe {request.channel}")
        await Pause()

    def tell(self, notice: Unsubscribe) -> None:
        self.log.append(f"unsubscribe {notice.channel}")


def begin(coroutine: Coroutine[Any, Any, None]) -> Coroutine[Any, Any, None]:
    """Run to the first wait."""
    coroutine.send(None)
    return coroutine


def finish(coroutine: Coroutine[Any, Any, None]) -> None:
    with pytest.raises(StopIteration):
        coroutine.send(None)


def complete(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Return the result of a coroutine that never waits."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("it waited")


def add(hub: Hub, listener: Listener, channel: str = "c") -> None:
    coroutine = hub.subscribe(channel, listener)
    try:
        coroutine.send(None)
    except StopIteration:
        return
    finish(coroutine)


def opened(hub: Hub, listener: Listener, position: Position | None, channel: str = "c") -> Listener:
    add(hub, listener, channel)
    assert hub.activate(channel, listener, position)
    return listener


def publish(hub: Hub, offset: int, epoch: str = EPOCH, data: bytes = b"p") -> None:
    hub.on_publication("c", Publication(data, offset), epoch if offset else "")


@pytest.fixture
def form() -> TextForm:
    FORMS["text"].encoded = 0
    return FORMS["text"]


@pytest.fixture
def engine() -> SlowEngine:
    return SlowEngine()


@pytest.fixture
def hub(form: TextForm, engine: SlowEngine) -> Hub:
    return Hub(lambda hub: engine, lambda order: None)  # type: ignore[arg-type, return-value]


def at(offset: int, epoch: str = EPOCH) -> Position:
    return Position(offset, epoch)


# Fan-out


def test_one_encoding_serves_all_subscribers_of_a_format(hub: Hub, form: TextForm) -> None:
    members = [opened(hub, Listener(), at(0)) for _ in range(3)]
    other = opened(hub, Listener("other"), at(0))
    publish(hub, 1)
    assert [member.frames for member in members] == [[b"p 1 abcdefgh"]] * 3
    assert other.frames == [b"other:p 1 abcdefgh"]
    assert form.encoded == 1
    assert members[0].written[0] is members[1].written[0]


def test_other_channels_receive_nothing(hub: Hub) -> None:
    other = opened(hub, Listener(), None, "other")
    opened(hub, Listener(), None)
    publish(hub, 0)
    assert other.frames == []


def test_a_publication_of_an_unknown_channel_is_dropped(hub: Hub) -> None:
    publish(hub, 1)
    hub.on_join("c", CLIENT)
    hub.on_leave("c", CLIENT)


def test_subscribers_may_come_and_go_during_a_fan_out(hub: Hub) -> None:
    first, second = Listener(), opened(hub, Listener(), at(0))
    first.deliver = lambda frame: hub.unsubscribe("c", first)
    opened(hub, first, at(0))
    third = opened(hub, Listener(), at(0))
    publish(hub, 1)
    publish(hub, 2)
    assert second.seen == third.seen == [(1, EPOCH), (2, EPOCH)]
    assert hub.subscribers("c") == 2


def test_joins_and_leaves_reach_announced_subscribers(hub: Hub) -> None:
    curious, other = opened(hub, Listener(announced=True), None), opened(hub, Listener(), None)
    hub.on_join("c", CLIENT)
    hub.on_leave("c", CLIENT)
    assert curious.frames == [b"join client-1", b"leave client-1"]
    assert other.frames == []


def test_orders_are_obeyed(form: TextForm) -> None:
    orders: list[bytes] = []
    Hub(lambda hub: SlowEngine(), orders.append).on_order(b"order")  # type: ignore[arg-type, return-value]
    assert orders == [b"order"]


def test_a_hub_is_a_receiver(hub: Hub) -> None:
    receiver: Receiver = hub
    assert receiver is hub


# Continuity


@pytest.mark.parametrize(
    ("offsets", "seen", "losses"),
    [
        ([1, 2, 3], [1, 2, 3], 0),
        ([1, 1, 2, 1, 2, 3], [1, 2, 3], 0),
        ([1, 3], [1], 1),
        ([1, 3, 2, 4], [1], 1),
        ([2], [], 1),
        ([0, 1, 0, 2], [1, 2], 0),
    ],
)
def test_a_positioned_subscriber_sees_no_gap(hub: Hub, offsets: list[int], seen: list[int], losses: int) -> None:
    member = opened(hub, Listener(), at(0))
    for offset in offsets:
        publish(hub, offset)
    assert [offset for offset, _ in member.seen] == seen
    assert member.losses == losses
    assert hub.subscribers("c") == 1 - losses


def test_another_epoch_is_a_gap(hub: Hub) -> None:
    member = opened(hub, Listener(), at(1))
    publish(hub, 2, "anotherone")
    assert (member.seen, member.losses) == ([], 1)


def test_subscribers_without_position_receive_what_follows_a_gap_but_no_repeats(hub: Hub) -> None:
    member = opened(hub, Listener(positioned=False), None)
    for offset, epoch in [(5, EPOCH), (7, EPOCH), (7, EPOCH), (1, "new"), (2, "new")]:
        publish(hub, offset, epoch)
    assert member.seen == [(5, EPOCH), (7, EPOCH), (1, "new"), (2, "new")]
    assert member.losses == 0


def test_publications_without_offset_always_pass(hub: Hub) -> None:
    member = opened(hub, Listener(), at(3))
    publish(hub, 0)
    publish(hub, 0)
    publish(hub, 4)
    assert member.frames == [b"p 0 ", b"p 0 ", b"p 4 abcdefgh"]


def test_a_subscriber_may_subscribe_again_after_a_gap(hub: Hub) -> None:
    witness = opened(hub, Listener(positioned=False), None)
    opened(hub, Listener(), at(1))
    publish(hub, 3)
    again = opened(hub, Listener(), at(3))
    publish(hub, 4)
    assert again.seen == [(4, EPOCH)]
    assert witness.seen == [(3, EPOCH), (4, EPOCH)]


def test_a_subscriber_may_subscribe_again_inside_on_gap(hub: Hub) -> None:
    member = opened(hub, Listener(), at(1))
    newcomer = Listener()

    def lost() -> None:
        assert hub.subscribers("c") == 0
        hub.unsubscribe("c", member)
        opened(hub, newcomer, at(3))

    member.on_gap = lost  # type: ignore[method-assign]
    publish(hub, 3)
    publish(hub, 4)
    assert newcomer.seen == [(4, EPOCH)]
    assert hub.subscriptions == 1


def test_an_interruption_is_a_gap_for_every_positioned_subscriber(hub: Hub) -> None:
    member, relaxed = opened(hub, Listener(), at(1)), opened(hub, Listener(positioned=False), None)
    waiting = Listener()
    add(hub, waiting)
    hub.on_interruption()
    assert (member.losses, relaxed.losses) == (1, 0)
    assert not hub.activate("c", waiting, at(1))
    publish(hub, 9, "new")
    assert relaxed.seen == [(9, "new")]
    assert hub.subscriptions == 1


def test_publications_missed_in_one_channel_are_a_gap_for_its_positioned_subscribers(hub: Hub) -> None:
    member, relaxed = opened(hub, Listener(), at(1)), opened(hub, Listener(positioned=False), None)
    other = opened(hub, Listener(), at(1), "other")
    hub.on_missed("c", True)
    assert (member.losses, relaxed.losses, other.losses) == (1, 0, 0)
    publish(hub, 9)
    assert relaxed.seen == [(9, EPOCH)]


def test_missed_joins_are_a_gap_for_the_subscribers_that_receive_joins(hub: Hub) -> None:
    member, announced = opened(hub, Listener(), at(1)), opened(hub, Listener(announced=True), at(1))
    hub.on_missed("c", False)
    assert (member.losses, announced.losses) == (0, 1)
    publish(hub, 2)
    assert member.seen == [(2, EPOCH)]
    hub.on_missed("c", False)
    hub.on_missed("unknown", True)
    assert member.losses == 0


def test_after_an_interruption_the_new_epoch_counts(hub: Hub) -> None:
    opened(hub, Listener(positioned=False), None)
    publish(hub, 1)
    hub.on_interruption()
    member = opened(hub, Listener(), at(0, "new"))
    publish(hub, 1, "new")
    assert member.seen == [(1, "new")]


def test_an_interruption_does_not_affect_a_waiting_subscribe(hub: Hub) -> None:
    member = Listener()
    call = begin(hub.subscribe("c", member))
    hub.on_interruption()
    finish(call)
    assert hub.activate("c", member, at(5))


# Activating


@pytest.mark.parametrize(
    ("held", "position", "ok", "seen"),
    [
        ([], 3, True, []),
        ([4, 5], 3, True, [4, 5]),
        ([2, 3, 4, 5], 3, True, [4, 5]),
        ([2, 3], 3, True, []),
        ([5, 6], 3, False, []),
        ([3, 4, 6], 3, False, []),
        ([4, 4, 5], 3, True, [4, 5]),
    ],
)
def test_held_events_follow_the_position(hub: Hub, held: list[int], position: int, ok: bool, seen: list[int]) -> None:
    member = Listener()
    add(hub, member)
    for offset in held:
        publish(hub, offset)
    assert member.frames == []
    assert hub.activate("c", member, at(position)) is ok
    assert [offset for offset, _ in member.seen] == seen
    assert hub.subscribers("c") == int(ok)


def test_another_epoch_among_held_events(hub: Hub) -> None:
    member = Listener()
    add(hub, member)
    publish(hub, 4, "anotherone")
    assert not hub.activate("c", member, at(3))


def test_a_position_before_the_latest_publication_is_a_gap(hub: Hub) -> None:
    opened(hub, Listener(), at(5))
    late = Listener()
    add(hub, late)
    assert not hub.activate("c", late, at(4))


def test_a_position_beyond_the_latest_publication_is_a_gap_for_the_others(hub: Hub) -> None:
    old, waiting, new = opened(hub, Listener(), at(3)), Listener(), Listener()
    add(hub, waiting)
    publish(hub, 4)
    add(hub, new)
    assert hub.activate("c", new, at(6))
    publish(hub, 7)
    assert (old.seen, old.losses) == ([(4, EPOCH)], 1)
    assert not hub.activate("c", waiting, at(3))
    assert new.seen == [(7, EPOCH)]


def test_joins_follow_the_publications(hub: Hub) -> None:
    member = Listener(announced=True)
    add(hub, member)
    hub.on_join("c", CLIENT)
    publish(hub, 1)
    hub.on_leave("c", CLIENT)
    assert hub.activate("c", member, at(0))
    assert member.frames == [b"p 1 abcdefgh", b"join client-1", b"leave client-1"]


def test_a_subscriber_that_is_behind_receives_joins_and_leaves_alone(hub: Hub) -> None:
    member = Listener(announced=True)
    add(hub, member)
    publish(hub, 1)
    hub.on_join("c", CLIENT)
    assert hub.begin_replay("c", member)
    publish(hub, 2)
    hub.on_leave("c", CLIENT)
    assert member.frames == [b"join client-1", b"leave client-1"]
    assert (hub.subscribers("c"), hub.subscriptions) == (1, 1)
    hub.end_replay("c", member)
    publish(hub, 3)
    hub.on_join("c", CLIENT)
    assert hub.activate("c", member, at(2))
    publish(hub, 4)
    assert member.frames[2:] == [b"join client-1", b"p 3 abcdefgh", b"p 4 abcdefgh"]
    assert (hub.subscribers("c"), hub.subscriptions) == (1, 1)


def test_a_replay_that_does_not_reach_the_top_ends_in_a_gap(hub: Hub) -> None:
    member = Listener()
    add(hub, member)
    assert hub.begin_replay("c", member)
    publish(hub, 1)
    hub.end_replay("c", member)
    publish(hub, 2)
    assert not hub.activate("c", member, at(0))
    assert (hub.subscribers("c"), hub.subscriptions) == (0, 0)


def test_missing_joins_end_a_replay_that_relies_on_them(hub: Hub, engine: SlowEngine) -> None:
    member, other = Listener(announced=True), Listener(announced=True)
    for subscriber in (member, other):
        add(hub, subscriber)
    assert hub.begin_replay("c", member)
    hub.on_interruption()
    assert member.losses == 1
    assert not hub.begin_replay("c", other)
    assert not hub.activate("c", member, at(0))
    hub.end_replay("c", member)
    assert hub.subscriptions == 0 and engine.log == ["subscribe c", "unsubscribe c"]


def test_the_leave_of_an_earlier_subscription_of_the_client_is_not_delivered(hub: Hub) -> None:
    member, other = Listener(announced=True), Listener(announced=True)
    member.client = CLIENT.client
    for subscriber in (member, other):
        add(hub, subscriber)
    hub.on_leave("c", CLIENT)
    hub.on_join("c", CLIENT)
    for subscriber in (member, other):
        assert hub.activate("c", subscriber, at(0))
    assert member.frames == [b"join client-1"]
    assert other.frames == [b"leave client-1", b"join client-1"]


def test_a_change_of_announced_takes_effect_at_once(hub: Hub) -> None:
    member = opened(hub, Listener(), None)
    hub.on_join("c", CLIENT)
    member.announced = True
    hub.regroup("c")
    hub.regroup("other")
    hub.on_leave("c", CLIENT)
    assert member.frames == [b"leave client-1"]


def test_on_gap_may_unsubscribe_the_new_subscriber(hub: Hub) -> None:
    old, new = opened(hub, Listener(), at(3)), Listener()
    old.on_gap = lambda: hub.unsubscribe("c", new)  # type: ignore[method-assign]
    publish(hub, 4)
    add(hub, new)
    assert not hub.activate("c", new, at(6))
    assert (hub.subscribers("c"), hub.subscriptions) == (0, 0)


def test_a_subscriber_without_position_receives_all_held_events(hub: Hub) -> None:
    member = Listener(positioned=False)
    add(hub, member)
    for offset in (5, 7, 0):
        publish(hub, offset)
    assert hub.activate("c", member, None)
    assert member.frames == [b"p 5 abcdefgh", b"p 7 abcdefgh", b"p 0 "]


def test_held_events_are_limited(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "HELD_LIMIT", 10)
    positioned, relaxed = Listener(), Listener(positioned=False)
    add(hub, positioned)
    publish(hub, 1)
    publish(hub, 2)
    add(hub, relaxed)
    for offset in range(3, 12):
        publish(hub, offset)
    assert not hub.activate("c", positioned, at(0))
    assert hub.activate("c", relaxed, None)
    assert relaxed.seen == [(11, EPOCH)]


def test_a_stream_of_new_subscribers_causes_no_gap(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "HELD_LIMIT", 10)
    newcomers: deque[tuple[int, Listener]] = deque()
    for offset in range(1, 100):
        listener = Listener()
        add(hub, listener)
        newcomers.append((offset - 1, listener))
        publish(hub, offset)
        if len(newcomers) == 4:
            known, eldest = newcomers.popleft()
            assert hub.activate("c", eldest, at(known))
            assert eldest.seen == [(known + n, EPOCH) for n in range(1, 5)]


def test_nothing_is_held_without_pending_subscribers(hub: Hub) -> None:
    opened(hub, Listener(), at(0))
    publish(hub, 1)
    late = Listener()
    add(hub, late)
    assert hub.activate("c", late, None)
    assert late.frames == []


# Subscribing and unsubscribing


def test_the_first_subscribes_and_the_last_unsubscribes(hub: Hub, engine: SlowEngine) -> None:
    first, second = opened(hub, Listener(), None), opened(hub, Listener(), None)
    assert (hub.subscribers("c"), hub.subscriptions) == (2, 2)
    hub.unsubscribe("c", first)
    hub.unsubscribe("c", first)
    assert engine.log == ["subscribe c"]
    hub.unsubscribe("c", second)
    assert engine.log == ["subscribe c", "unsubscribe c"]
    assert (hub.subscribers("c"), hub.subscriptions) == (0, 0)


def test_removing_an_unknown_subscriber_has_no_effect(hub: Hub, engine: SlowEngine) -> None:
    hub.unsubscribe("c", Listener())
    opened(hub, Listener(), None)
    hub.unsubscribe("c", Listener())
    assert (hub.subscriptions, engine.log) == (1, ["subscribe c"])


def test_nothing_arrives_after_removal(hub: Hub) -> None:
    stays, goes = opened(hub, Listener(), at(0)), opened(hub, Listener(), at(0))
    hub.unsubscribe("c", goes)
    publish(hub, 1)
    assert (len(stays.frames), goes.frames) == (1, [])


def test_a_pending_subscriber_keeps_the_channel(hub: Hub, engine: SlowEngine) -> None:
    first, second = opened(hub, Listener(), None), Listener()
    add(hub, second)
    hub.unsubscribe("c", first)
    assert engine.log == ["subscribe c"]
    hub.unsubscribe("c", second)
    assert engine.log == ["subscribe c", "unsubscribe c"]


def test_an_unavailable_engine_adds_no_subscriber(hub: Hub, engine: SlowEngine) -> None:
    member = Listener()
    call = begin(hub.subscribe("c", member))
    with pytest.raises(EngineUnavailable):
        call.throw(EngineUnavailable("away"))
    assert (hub.subscribers("c"), hub.subscriptions) == (0, 0)
    assert engine.log[-1] == "unsubscribe c"
    assert not hub.activate("c", member, None)


def test_two_concurrent_subscribes_have_answers_of_their_own(hub: Hub) -> None:
    first, second = Listener(), Listener()
    one, two = begin(hub.subscribe("c", first)), begin(hub.subscribe("c", second))
    with pytest.raises(EngineUnavailable):
        one.throw(EngineUnavailable("away"))
    finish(two)
    assert not hub.activate("c", first, at(0))
    assert hub.activate("c", second, at(0))
    publish(hub, 1)
    assert (first.frames, second.seen) == ([], [(1, EPOCH)])


def test_removal_during_the_engine_request(hub: Hub, engine: SlowEngine) -> None:
    member = Listener()
    call = begin(hub.subscribe("c", member))
    hub.unsubscribe("c", member)
    assert engine.log == ["subscribe c", "unsubscribe c"]
    finish(call)
    assert not hub.activate("c", member, at(0))
    assert hub.subscriptions == 0


def test_a_new_subscriber_after_a_removal_during_the_engine_request(hub: Hub, engine: SlowEngine) -> None:
    gone, stays = Listener(), Listener()
    first = begin(hub.subscribe("c", gone))
    hub.unsubscribe("c", gone)
    second = begin(hub.subscribe("c", stays))
    with pytest.raises(EngineUnavailable):
        first.throw(EngineUnavailable("away"))
    publish(hub, 1)
    finish(second)
    assert hub.activate("c", stays, at(0))
    assert stays.seen == [(1, EPOCH)]
    assert engine.log == ["subscribe c", "unsubscribe c", "subscribe c"]


def test_a_second_subscriber_does_not_wait(hub: Hub) -> None:
    opened(hub, Listener(), None)
    complete(hub.subscribe("c", Listener()))


# Checking positions


class Store(SlowEngine):
    """An engine that knows the latest position, even if publications were lost."""

    def __init__(self) -> None:
        super().__init__()
        self.top = at(0)
        self.meanwhile: Callable[[], None] = lambda: None

    async def ask(self, request: Subscribe | GetHistory) -> HistoryPage | None:  # type: ignore[override]
        if isinstance(request, Subscribe):
            return await super().ask(request)
        self.log.append(f"history {request.channel}")
        page = HistoryPage([], self.top)
        self.meanwhile()
        return page


def checked(hub: Hub) -> list[str]:
    """Run one round of checks and return the channels that it asked the engine about."""
    engine: Any = hub.engine
    engine.log.clear()
    complete(hub.check_positions(lambda channel: KEEP))
    return [line.removeprefix("history ") for line in engine.log if line.startswith("history")]


@pytest.fixture
def store(hub: Hub) -> Store:
    store = hub.engine = Store()  # type: ignore[assignment]
    return store


def test_a_lost_last_publication_is_found(hub: Hub, store: Store) -> None:
    member, relaxed = opened(hub, Listener(), at(0)), opened(hub, Listener(positioned=False), None)
    publish(hub, 1)
    store.top = at(2)
    assert checked(hub) == []
    assert member.losses == 0
    assert checked(hub) == ["c"]
    assert (member.losses, relaxed.losses) == (1, 0)
    waiting = Listener()
    add(hub, waiting)
    assert checked(hub) == ["c"]
    assert hub.activate("c", waiting, at(2))
    again = opened(hub, Listener(), at(2))
    publish(hub, 3)
    assert (again.seen, again.losses) == ([(3, EPOCH)], 0)


def test_only_quiet_channels_are_checked(hub: Hub, store: Store) -> None:
    member = opened(hub, Listener(), at(0))
    for offset in range(1, 5):
        publish(hub, offset)
        store.top = at(offset)
        assert checked(hub) == []
    assert [checked(hub), checked(hub)] == [["c"], ["c"]]
    assert member.losses == 0


def test_another_epoch_is_found_too(hub: Hub, store: Store) -> None:
    member = opened(hub, Listener(), at(3))
    store.top = at(3, "another")
    checked(hub)
    checked(hub)
    assert member.losses == 1


def test_a_publication_during_the_check_is_no_gap(hub: Hub, store: Store) -> None:
    member = opened(hub, Listener(), at(0))
    checked(hub)
    store.top = at(1)
    store.meanwhile = lambda: publish(hub, 1)
    assert checked(hub) == ["c"]
    assert (member.seen, member.losses) == ([(1, EPOCH)], 0)


def test_a_channel_that_ends_during_the_check(hub: Hub, store: Store) -> None:
    member = opened(hub, Listener(), at(0))
    store.top = at(1)
    checked(hub)
    store.meanwhile = lambda: hub.unsubscribe("c", member)
    assert checked(hub) == ["c"]
    assert member.losses == 0


def test_channels_without_positions_are_not_checked(hub: Hub, store: Store) -> None:
    opened(hub, Listener(positioned=False), None)
    publish(hub, 0)
    assert [checked(hub), checked(hub)] == [[], []]
    opened(hub, Listener(), at(0))
    complete(hub.check_positions(lambda channel: HistoryOptions()))
    assert "history c" not in store.log


# Any sequence of events


KINDS = st.fixed_dictionaries(
    {
        "positioned": st.booleans(),
        "announced": st.booleans(),
        "delta": st.booleans(),
        "filter": st.sampled_from([None, None, lambda tags: int(tags["n"]) % 2 == 0]),
    }
)
MEANWHILE = st.lists(st.sampled_from(["next", "joined", "joined", "turn"]), max_size=4)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("next"), st.integers(0, 3)),  # 0: a repeat, 1: the next one, more: a gap
        st.tuples(st.just("next"), st.just(1)),
        st.tuples(st.just("next"), st.just(1)),
        st.tuples(st.just("again"), st.integers(1, 8)),
        st.tuples(st.just("plain")),
        st.tuples(st.just("joined")),
        st.tuples(st.just("epoch")),
        st.tuples(st.just("interrupted")),
        st.tuples(st.just("missed"), st.booleans()),
        st.tuples(st.just("turn")),
        st.tuples(st.just("add"), KINDS),
        st.tuples(st.just("add"), KINDS),
        st.tuples(st.just("open"), st.integers(0, 5), st.integers(-2, 2)),
        st.tuples(st.just("open"), st.integers(0, 5), st.just(0)),
        st.tuples(st.just("open"), st.integers(0, 5), st.just(0)),
        st.tuples(st.just("replay"), st.integers(0, 5)),
        st.tuples(st.just("caught up"), st.integers(0, 5)),
        st.tuples(st.just("recover"), KINDS, st.tuples(MEANWHILE, MEANWHILE, MEANWHILE)),
        st.tuples(st.just("remove"), st.integers(0, 5)),
        st.tuples(st.just("remove behind"), st.integers(0, 5)),
    ),
    max_size=60,
)


class Story:
    """One hub whose deliveries take time, and a link to it that may lose, repeat, reorder and restart."""

    def __init__(self) -> None:
        self.now = 0
        self.turns: list[Callable[[], None]] = []
        slices = TimeSlicer(lambda: self.now, 3, self.turns.append)
        self.hub = Hub(lambda hub: SlowEngine(), lambda order: None, slices)  # type: ignore[arg-type, return-value]
        self.offset, self.epoch = 0, "e0"
        self.plains = 0
        self.top = Position()  # of the latest publication
        self.joins = 0
        self.joins_before: dict[int, int] = {}
        self.pending: list[Listener] = []
        self.behind: list[Listener] = []
        self.replayed: set[int] = set()
        self.open: list[tuple[Listener, Position | None]] = []
        self.honest: set[int] = set()  # subscribers whose reply had the true position
        self.refused: list[Listener] = []
        self.ended: list[tuple[Listener, int]] = []

    def publish(self, offset: int, epoch: str) -> None:
        data = b"a_text_that_is_long_enough_for_deltas_%d_%s_%d" % (offset, epoch.encode(), self.plains)
        tags = {"n": str(offset)}
        self.hub.on_publication("c", Publication(data, offset, tags=tags, delta=True), epoch if offset else "")
        if offset and (epoch != self.top.epoch or offset > self.top.offset):
            self.top = Position(offset, epoch)

    def next(self, step: int) -> None:
        self.offset = max(1, self.offset + step)
        self.publish(self.offset, self.epoch)

    def again(self, offset: int) -> None:
        self.publish(min(offset, self.offset), self.epoch)

    def plain(self) -> None:
        self.plains += 1
        self.publish(0, "")

    def joined(self) -> None:
        self.joins += 1
        self.hub.on_join("c", CLIENT)

    def start_again(self) -> None:
        self.offset, self.epoch = 0, f"e{int(self.epoch[1:]) + 1}"

    def turn(self) -> None:
        if self.turns:
            began = self.now
            self.turns.pop()()
            assert self.now - began <= 3 + 2, "a turn is a slice and a chunk at most"

    def add(self, kind: dict[str, Any]) -> None:
        member = Listener(**kind)
        member.deliver = lambda frame: self.take(member, frame)
        member.on_gap = lambda: self.lose(member)  # type: ignore[method-assign]
        self.joins_before[id(member)] = self.joins
        add(self.hub, member)
        self.pending.append(member)

    def replay(self, index: int) -> None:
        able = [member for member in self.pending if member.positioned and id(member) not in self.replayed]
        if able:
            member = able[index % len(able)]
            self.pending.remove(member)
            self.replayed.add(id(member))
            if self.hub.begin_replay("c", member):
                self.behind.append(member)
            else:
                assert member.announced
                self.refused.append(member)

    def caught_up(self, index: int) -> None:
        """Hold publications for a member that is behind, from the true top on; a later step opens it."""
        if self.behind:
            member = self.behind.pop(index % len(self.behind))
            self.hub.end_replay("c", member)
            self.pending.append(member)

    def recover(self, kind: dict[str, Any], meanwhile: tuple[list[str], list[str], list[str]]) -> None:
        """Take a member through a whole replay."""
        self.add({**kind, "positioned": True})
        self.go(meanwhile[0])
        member = self.pending[-1]
        self.pending.insert(0, self.pending.pop())
        self.replay(0)
        self.go(meanwhile[1])
        if member in self.behind:
            self.caught_up(self.behind.index(member))
            self.go(meanwhile[2])
            self.open_one(self.pending.index(member), 0)

    def go(self, steps: list[str]) -> None:
        for step in steps:
            {"next": lambda: self.next(1), "joined": self.joined, "turn": self.turn}[step]()

    def take(self, member: Listener, frame: bytes) -> None:
        self.now += 1
        Listener.deliver(member, frame)

    def lose(self, member: Listener) -> None:
        self.now += 1
        member.losses += 1
        self.ended.append((member, len(member.frames)))

    def open_one(self, index: int, skew: int) -> None:
        if not self.pending:
            return
        member = self.pending.pop(index % len(self.pending))
        position = Position(max(0, self.offset + skew), self.epoch) if member.positioned else None
        if self.hub.activate("c", member, position):
            self.open.append((member, position))
            if not skew:
                self.honest.add(id(member))
        elif id(member) in self.replayed:
            self.ended.append((member, len(member.frames)))
        else:
            assert member.positioned or member.announced
            self.refused.append(member)

    def remove(self, index: int) -> None:
        if self.open:
            member, _ = self.open[index % len(self.open)]
            self.hub.unsubscribe("c", member)
            self.ended.append((member, len(member.frames)))

    def remove_behind(self, index: int) -> None:
        if self.behind:
            member = self.behind.pop(index % len(self.behind))
            self.hub.unsubscribe("c", member)
            self.ended.append((member, len(member.frames)))

    def check(self) -> None:
        for member, position in self.open:
            seen = heard(member)
            if position is None:
                assert member.losses <= member.announced
            else:
                assert seen == wanted(member, position, position.offset + 2 * len(seen) + 2)[: len(seen)]
                assert member.losses <= 1
        for member in self.refused:
            assert (member.frames, member.losses) == ([], 0)
        for member in self.behind:
            assert heard(member) == []
        for member, frames in self.ended:
            assert len(member.frames) == frames
        assert self.hub.subscriptions == self.hub.subscribers("c")

    def end(self) -> None:
        """After all deliveries, the remaining subscribers have received everything."""
        while self.turns:
            self.turn()
            self.check()
        gone = {id(member) for member, _ in self.ended}
        alive = [(member, position) for member, position in self.open if id(member) not in gone]
        for member, position in alive:
            if position is not None and position.epoch == self.top.epoch and id(member) in self.honest:
                assert heard(member) == wanted(member, position, self.top.offset)
        waiting = [member for member in [*self.pending, *self.behind] if not member.losses]
        assert self.hub.subscriptions == len(alive) + len(waiting)
        for member in [member for member, _ in alive] + [member for member in self.behind if not member.losses]:
            if member.announced:
                assert (
                    sum(frame.startswith(b"join") for frame in member.frames)
                    == self.joins - self.joins_before[id(member)]
                )
        assert self.hub.fanout.queued == 0


def wanted(member: Listener, position: Position, top: int) -> list[tuple[int, str]]:
    """Return the publications that a subscriber at this position receives up to `top`."""
    numbers = range(position.offset + 1, top + 1)
    return [(n, position.epoch) for n in numbers if member.filter is None or member.filter({"n": str(n)})]


def heard(member: Listener) -> list[tuple[int, str]]:
    """Return the numbered publications that a client decodes from a subscriber's frames."""
    found = []
    data = b""
    for frame in member.frames:
        if frame.startswith(b"join"):
            continue
        if member.delta:
            kind, _, frame = frame.partition(b" ")
            if kind == b"patch":
                assert data, "a delta needs a base"
                data = bytes(apply_delta(data, frame.rpartition(b" ")[0]))
            else:
                data = frame.split(b" ")[0]
        else:
            data = frame.split(b" ")[0]
        offset, epoch, _ = data.decode().split("_")[-3:]
        if offset != "0":
            found.append((int(offset), epoch))
    return found


@given(STEPS, st.sampled_from([4096, 4]))
def test_no_fault_of_the_link_shows_a_positioned_subscriber_a_gap(steps: list[tuple], backlog: int) -> None:
    with mock.patch.multiple(fanout, CHUNK=2, BACKLOG_LIMIT=backlog):
        story = Story()
        actions = {
            "next": story.next,
            "again": story.again,
            "plain": story.plain,
            "joined": story.joined,
            "epoch": story.start_again,
            "interrupted": story.hub.on_interruption,
            "missed": partial(story.hub.on_missed, "c"),
            "turn": story.turn,
            "add": story.add,
            "open": story.open_one,
            "replay": story.replay,
            "caught up": story.caught_up,
            "recover": story.recover,
            "remove behind": story.remove_behind,
            "remove": story.remove,
        }
        for name, *arguments in steps:
            actions[name](*arguments)
            story.check()
        story.end()


@given(
    st.lists(
        st.sampled_from(["publish", "publish", "add", "ask", "open", "remove", "remove history", "plain"]),
        max_size=60,
    ),
    st.randoms(use_true_random=False),
)
def test_a_reliable_engine_never_causes_a_gap(steps: list[str], random: Any) -> None:
    hub = Hub(lambda hub: MemoryEngine(hub, EngineSettings(), lambda: 0.0), lambda order: None)
    engine = hub.engine
    added: list[Listener] = []
    asked: list[tuple[Listener, Position]] = []
    members: list[tuple[Listener, Position]] = []
    top = Position()
    for step in steps:
        if step == "publish":
            top = engine.execute(Publish("c", b"p", KEEP))
        elif step == "plain":
            engine.execute(Publish("c", b"p", HistoryOptions()))
        elif step == "remove history":
            engine.execute(RemoveHistory("c"))
        elif step == "add":
            added.append(Listener())
            add(hub, added[-1])
        elif step == "ask" and added:
            page = engine.execute(GetHistory("c", KEEP))
            asked.append((added.pop(random.randrange(len(added))), page.position))
        elif step == "open" and asked:
            member, position = asked.pop(random.randrange(len(asked)))
            assert hub.activate("c", member, position)
            members.append((member, position))
        elif step == "remove" and members:
            member, position = members.pop(random.randrange(len(members)))
            hub.unsubscribe("c", member)
    for member, position in members:
        assert member.losses == 0
        assert [offset for offset, _ in member.seen] == list(range(position.offset + 1, top.offset + 1))


# Reads of history


class Reads:
    """Reads of history by subscribers of "c" over an engine that answers when the test says so."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, Gate]] = []
        self.turns: list[Callable[[], None]] = []
        slices = TimeSlicer(lambda: 0.0, 1.0, self.turns.append, Waiting)
        self.hub = Hub(lambda hub: self, lambda order: None, slices)  # type: ignore[arg-type, return-value]
        self.done: list[Any] = []

    async def ask(self, request: Any) -> Any:
        if isinstance(request, Subscribe):
            return None
        self.asked.append((request, gate := Gate()))
        answer = await gate
        if isinstance(answer, Exception):
            raise answer
        return answer

    def tell(self, notice: Unsubscribe) -> None: ...

    def read(self, **changes: Any) -> None:
        query = msgspec.structs.replace(GetHistory("c", KEEP, at(1), 300), **changes)
        run(self.hub.read_history(query), lambda result, error: self.done.append(error or result))

    def answer(self, index: int, answer: Any) -> None:
        self.asked[index][1].open(answer)
        while self.turns:
            self.turns.pop(0)()


class Waiting(Gate):
    def callback(self, result: None) -> None:
        self.open()


def test_subscribers_that_ask_for_the_same_page_at_once_share_one_read() -> None:
    reads, page = Reads(), HistoryPage([], at(3))
    add(reads.hub, Listener())
    for _ in range(3):
        reads.read()
    reads.read(limit=5)
    assert [request.limit for request, _ in reads.asked] == [300, 5]
    reads.answer(0, page)
    assert reads.done == [page] * 3
    reads.read()
    assert len(reads.asked) == 3  # what was read may be old by now


def test_a_failed_read_is_made_again_for_those_that_waited_for_it() -> None:
    reads, page = Reads(), HistoryPage([], at(3))
    add(reads.hub, Listener())
    for _ in range(3):
        reads.read()
    reads.answer(0, failure := EngineUnavailable("gone"))
    assert (reads.done, len(reads.asked)) == ([failure], 2)
    reads.answer(1, page)
    assert reads.done == [failure, page, page]


def test_a_read_is_not_shared_beyond_the_subscription_of_the_channel() -> None:
    """Publications between the end of the channel here and its next subscriber do not arrive."""
    reads, listener = Reads(), Listener()
    add(reads.hub, listener)
    reads.read()
    reads.hub.unsubscribe("c", listener)
    add(reads.hub, listener)
    reads.read()
    assert len(reads.asked) == 2
