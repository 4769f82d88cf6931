"""The fan-out: bursts beside other channels, deliveries by filter and delta, and the limits of backlogs."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable

import pytest
from centrifuge.fossil import apply_delta

from realtime.errors import INAPPROPRIATE_PROTOCOL, Disconnect
from realtime.pubsub import fanout
from realtime.pubsub.hub import Hub
from realtime.pubsub.time_slices import TimeSlicer
from realtime.types import Position, Publication
from tests.pubsub.test_hub import CLIENT, EPOCH, Listener, SlowEngine, TextForm, add, at, opened

SLICE = 0.005
COST = 0.00001  # seconds that one delivery takes


class Worker:
    """A hub, and a loop whose clock only deliveries move."""

    def __init__(self) -> None:
        self.now = 0.0
        self.asked: list[Callable[[], None]] = []
        slices = TimeSlicer(lambda: self.now, SLICE, self.asked.append)
        self.hub = Hub(lambda hub: SlowEngine(), lambda order: None, slices)  # type: ignore[arg-type, return-value]
        self.offsets: dict[str, int] = {}

    def member(self, channel: str = "c", **kinds: object) -> Listener:
        """Return an active subscriber whose deliveries take time."""
        member = Listener(**kinds)  # type: ignore[arg-type]
        member.deliver = lambda frame: self._take(member, frame)
        return opened(self.hub, member, self.top(channel) if member.positioned else None, channel)

    def _take(self, member: Listener, frame: bytes) -> None:
        self.now += COST
        Listener.deliver(member, frame)

    def top(self, channel: str) -> Position:
        return at(self.offsets.get(channel, 0))

    def publish(self, channel: str = "c", data: bytes = b"p", **options: object) -> None:
        offset = self.offsets[channel] = self.offsets.get(channel, 0) + 1
        self.hub.on_publication(channel, Publication(data, offset, **options), EPOCH)  # type: ignore[arg-type]

    def turn(self) -> None:
        while self.asked:
            self.asked.pop()()
            break

    def until_idle(self) -> int:
        turns = 0
        while self.asked:
            self.turn()
            turns += 1
        return turns


@pytest.fixture
def worker() -> Worker:
    return Worker()


def offsets(member: Listener) -> list[int]:
    return [offset for offset, _ in member.seen]


# Time


def test_few_subscribers_receive_at_once(worker: Worker) -> None:
    members = [worker.member() for _ in range(100)]
    worker.publish()
    assert [offsets(member) for member in members] == [[1]] * 100
    assert not worker.asked


def test_a_burst_blocks_the_loop_for_one_slice_at_a_time(worker: Worker) -> None:
    members = [worker.member() for _ in range(2000)]
    for _ in range(5):
        began = worker.now
        worker.publish()
    assert worker.now - began == 0
    while worker.asked:
        began = worker.now
        worker.turn()
        assert worker.now - began <= SLICE + fanout.CHUNK * COST
    assert all(offsets(member) == [1, 2, 3, 4, 5] for member in members)


def test_a_backlog_reaches_each_subscriber_in_one_write(worker: Worker) -> None:
    members = [worker.member() for _ in range(2000)]
    for _ in range(20):
        worker.publish()
    worker.until_idle()
    assert all(offsets(member) == list(range(1, 21)) for member in members)
    assert all(len(member.written) == 2 for member in members)  # the first was in progress when the others arrived
    assert worker.hub.fanout.sent.value == 40_000


def test_a_mark_is_reached_between_two_publications(worker: Worker) -> None:
    members = [worker.member() for _ in range(2000)]
    reached: list[list[int]] = []

    def look() -> None:
        (found,) = {tuple(offsets(member)) for member in members}
        reached.append(list(found))

    worker.hub.when_delivered("c", look)
    worker.hub.when_delivered("a channel without subscribers", lambda: reached.append([-1]))
    assert reached == [[], [-1]]
    for _ in range(3):
        worker.publish()
    worker.hub.when_delivered("c", look)
    for _ in range(2):
        worker.publish()
    worker.until_idle()
    assert reached == [[], [-1], [1, 2, 3]]
    assert all(offsets(member) == [1, 2, 3, 4, 5] for member in members)


def test_a_batch_has_a_limit(worker: Worker) -> None:
    members = [worker.member() for _ in range(2000)]
    for _ in range(5):
        worker.publish(data=b"x" * (fanout.BATCH_BYTES // 2))
    worker.until_idle()
    assert all(len(member.written) == 3 and offsets(member) == [1, 2, 3, 4, 5] for member in members)


def test_a_burst_delays_another_channel_by_a_slice(worker: Worker) -> None:
    for _ in range(5000):
        worker.member("burst")
    other = worker.member("other")
    for _ in range(50):
        worker.publish("burst", data=b"x" * fanout.BATCH_BYTES)
    for number in range(1, 20):
        began = worker.now
        worker.publish("other")
        worker.turn()
        assert offsets(other) == list(range(1, number + 1))
        assert worker.now - began <= SLICE + fanout.CHUNK * COST
    assert worker.hub.fanout.queued > 0


def test_many_bursts_delay_another_channel_by_a_chunk_of_each(worker: Worker) -> None:
    for number in range(10):
        for _ in range(1000):
            worker.member(f"burst {number}")
    other, important = worker.member("other"), worker.member("important", priority="high")
    for number in range(10):
        for _ in range(20):
            worker.publish(f"burst {number}")
    began = worker.now
    worker.publish("other")
    worker.publish("important")
    while not important.frames:
        worker.turn()
    assert worker.now - began <= 2 * fanout.CHUNK * COST + SLICE
    while not other.frames:
        worker.turn()
    assert worker.now - began <= 2 * 11 * fanout.CHUNK * COST + SLICE


def test_a_low_channel_gets_its_share_beside_a_flood_of_high_ones(worker: Worker) -> None:
    for _ in range(5000):
        worker.member("flood", priority="high")
    low = worker.member("low", priority="low")
    for _ in range(100):
        worker.publish("flood")
    worker.publish("low")
    for _ in range(3):
        worker.turn()
    assert offsets(low) == [1]


def test_joins_and_leaves_keep_their_order_in_the_backlog(worker: Worker) -> None:
    members = [worker.member(announced=True) for _ in range(1000)]
    worker.hub.on_join("c", CLIENT)
    worker.publish()
    worker.hub.on_leave("c", CLIENT)
    assert len(members[-1].frames) < 3
    worker.until_idle()
    assert all(member.frames == [b"join client-1", b"p 1 abcdefgh", b"leave client-1"] for member in members)


def test_queued_bytes_return_to_zero(worker: Worker) -> None:
    members = [worker.member() for _ in range(2000)]
    for _ in range(10):
        worker.publish(data=b"x" * 100)
    assert 700 <= worker.hub.fanout.queued <= 1000
    worker.until_idle()
    assert worker.hub.fanout.queued == 0
    assert worker.hub.fanout.sent.value == sum(len(member.frames) for member in members) == 20_000


# Subscribers that come and go during a backlog


def test_an_unsubscribed_one_receives_nothing_of_the_backlog(worker: Worker) -> None:
    members = [worker.member() for _ in range(2000)]
    worker.publish()
    worker.publish()
    gone = [member for member in members if not member.frames]
    for member in gone:
        worker.hub.unsubscribe("c", member)
    assert gone
    worker.until_idle()
    assert all(member.frames == [] for member in gone)
    assert all(offsets(member) == [1, 2] for member in members if member not in gone)


def test_a_subscriber_behind_a_backlog_receives_what_its_reply_did_not_count(worker: Worker) -> None:
    for _ in range(2000):
        worker.member()
    for _ in range(3):
        worker.publish()
    early, late = Listener(), Listener()
    add(worker.hub, early)
    worker.publish()
    add(worker.hub, late)
    assert worker.hub.activate("c", early, at(3))
    assert worker.hub.activate("c", late, at(4))
    worker.publish()
    assert (early.frames, late.frames) == ([], [])
    worker.until_idle()
    assert (offsets(early), offsets(late)) == ([4, 5], [5])
    worker.publish()
    worker.until_idle()
    assert (offsets(early), offsets(late)) == ([4, 5, 6], [5, 6])


def test_a_subscriber_that_leaves_before_its_activation_receives_nothing(worker: Worker) -> None:
    for _ in range(2000):
        worker.member()
    worker.publish()
    member = Listener()
    add(worker.hub, member)
    worker.publish()
    assert worker.hub.activate("c", member, at(1))
    worker.hub.unsubscribe("c", member)
    worker.until_idle()
    worker.publish()
    assert member.frames == []


def test_a_leaving_subscriber_does_not_affect_waiting_activations(worker: Worker) -> None:
    members = [worker.member() for _ in range(2000)]
    for _ in range(3):
        worker.publish()
    late = Listener()
    add(worker.hub, late)
    worker.publish()
    assert worker.hub.activate("c", late, at(3))
    worker.hub.unsubscribe("c", members[0])
    worker.until_idle()
    assert offsets(late) == [4]


@pytest.mark.parametrize("others", [1, 500])
def test_events_caused_by_a_delivery_follow_it(worker: Worker, others: int) -> None:
    first = Listener()

    def take(frame: bytes) -> None:
        first.frames.append(frame)
        if len(first.frames) < 3:
            worker.publish()

    first.deliver = take
    opened(worker.hub, first, at(0))
    rest = [worker.member() for _ in range(others)]
    worker.publish("other")
    worker.publish()
    worker.until_idle()
    assert all(offsets(member) == [1, 2, 3] for member in [first, *rest])


def test_a_long_replay_yields_to_other_work(worker: Worker) -> None:
    other = worker.member("other")
    member = Listener()
    member.deliver = lambda frame: worker._take(member, frame)
    add(worker.hub, member)
    for _ in range(3000):
        worker.publish()
    assert worker.hub.activate("c", member, at(0))
    worker.publish("other")
    assert len(member.frames) < 1000
    worker.turn()
    assert other.frames
    worker.publish()
    worker.until_idle()
    assert offsets(member) == list(range(1, 3002))


def test_a_subscriber_that_catches_up_receives_the_joins_queued_before_it(worker: Worker) -> None:
    for _ in range(2000):
        worker.member()
    member = Listener(announced=True)
    add(worker.hub, member)
    assert worker.hub.begin_replay("c", member)
    worker.publish()
    worker.hub.on_join("c", CLIENT)
    worker.hub.end_replay("c", member)
    worker.publish()
    assert worker.hub.activate("c", member, at(1))
    worker.publish()
    assert member.frames == []
    worker.until_idle()
    assert member.frames == [b"join client-1", b"p 2 abcdefgh", b"p 3 abcdefgh"]


def test_a_subscriber_that_leaves_while_it_is_behind_takes_no_delta_base_along(worker: Worker) -> None:
    texts = [b"the quick brown fox jumps over the lazy dog, number %d" % n for n in range(3)]
    member, behind = worker.member(delta=True), Listener(delta=True)
    worker.publish(data=texts[0], delta=True)
    add(worker.hub, behind)
    assert worker.hub.begin_replay("c", behind)
    worker.publish(data=texts[1], delta=True)
    worker.hub.unsubscribe("c", behind)
    worker.publish(data=texts[2], delta=True)
    assert [frame.split(b" ")[0] for frame in member.frames] == [b"whole", b"patch", b"patch"]
    assert behind.frames == []


def test_gaps_are_reported_in_slices_and_before_newer_publications(worker: Worker) -> None:
    members = [worker.member() for _ in range(2000)]
    for member in members:
        member.on_gap = lambda member=member: worker._take(member, b"lost\0")  # type: ignore[method-assign, misc]
    worker.publish()
    worker.offsets["c"] += 1
    began = worker.now
    worker.publish()
    assert worker.now - began <= SLICE
    assert worker.hub.subscribers("c") == 0
    while worker.asked:
        began = worker.now
        worker.turn()
        assert worker.now - began <= SLICE + fanout.CHUNK * COST
    assert all(member.frames[-1] == b"lost" and len(member.frames) <= 2 for member in members)


def test_a_subscriber_that_leaves_first_gets_no_gap(worker: Worker) -> None:
    members = [worker.member() for _ in range(2000)]
    for member in members:
        member.on_gap = lambda member=member: worker._take(member, b"lost\0")  # type: ignore[method-assign, misc]
    worker.hub.on_interruption()
    left = [member for member in members if not member.frames]
    for member in left:
        worker.hub.unsubscribe("c", member)
    assert left
    worker.until_idle()
    assert all(member.frames == [] for member in left)


def test_an_interruption_of_many_channels_precedes_later_publications(worker: Worker) -> None:
    members = [worker.member(f"c{number}") for number in range(1000)]
    for member in members:
        member.on_gap = lambda member=member: worker._take(member, b"lost\0")  # type: ignore[method-assign, misc]
    worker.hub.on_interruption()
    assert any(member.frames for member in members)
    waiting = [number for number, member in enumerate(members) if not member.frames]
    heard, unheard = waiting[0], waiting[1]
    worker.hub.on_publication(f"c{heard}", Publication(b"p", 1), "new")
    newcomer = Listener()
    add(worker.hub, newcomer, f"c{unheard}")
    assert worker.hub.activate(f"c{unheard}", newcomer, at(0, "new"))
    worker.until_idle()
    worker.hub.on_publication(f"c{unheard}", Publication(b"p", 1), "new")
    assert all(member.frames == [b"lost"] for member in members)
    assert (newcomer.seen, newcomer.losses) == ([(1, "new")], 0)
    assert worker.hub.subscriptions == 1


def test_a_channel_without_subscribers_frees_its_backlog(worker: Worker) -> None:
    members = [worker.member() for _ in range(2000)]
    for _ in range(10):
        worker.publish()
    for member in members:
        worker.hub.unsubscribe("c", member)
    assert worker.hub.fanout.queued == 0
    again = worker.member()
    worker.publish()
    worker.until_idle()
    assert offsets(again) == [11]


def test_an_encoder_that_raises_costs_one_publication(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    members = [worker.member() for _ in range(2000)]
    worker.publish()
    worker.publish(data=b"bad")
    worker.publish()

    def publication(self: TextForm, channel: str, publication: Publication, epoch: str) -> bytes:
        if publication.data == b"bad":
            raise ZeroDivisionError
        return b"p %d e\0" % publication.offset

    monkeypatch.setattr(TextForm, "publication", publication)
    with pytest.raises(ZeroDivisionError):
        worker.until_idle()
    worker.until_idle()
    assert all(offsets(member) == [1, 3] for member in members)


def test_an_encoder_that_raises_for_few_subscribers_costs_one_publication(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = [worker.member() for _ in range(2)]

    def publication(self: TextForm, channel: str, publication: Publication, epoch: str) -> bytes:
        if publication.data == b"bad":
            raise ZeroDivisionError
        return b"p %d e\0" % publication.offset

    monkeypatch.setattr(TextForm, "publication", publication)
    for data in (b"good", b"bad", b"good"):
        with contextlib.suppress(ZeroDivisionError):
            worker.publish(data=data)
    assert [offsets(member) for member in members] == [[1, 3]] * 2


# Limits


def test_a_channel_too_far_behind_drops_its_backlog_and_reports_gaps(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fanout, "BACKLOG_LIMIT", 100)
    positioned = [worker.member() for _ in range(1000)]
    relaxed = [worker.member(positioned=False) for _ in range(1000)]
    other = worker.member("other")
    for _ in range(150):
        worker.publish()
    assert worker.hub.fanout.overflows.value == 1
    worker.until_idle()
    assert all(member.losses == 1 for member in positioned)
    assert all(member.losses == 0 and offsets(member)[-1] == 150 for member in relaxed)
    assert all(offsets(member) == list(range(1, len(member.frames) + 1)) for member in positioned)
    worker.publish("other")
    assert (offsets(other), other.losses) == ([1], 0)


def test_joins_and_leaves_are_the_first_to_be_dropped(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fanout, "BACKLOG_LIMIT", 100)
    members = [worker.member() for _ in range(2000)]
    announced = [worker.member(announced=True, positioned=False) for _ in range(10)]
    other = worker.member("other", announced=True)
    for _ in range(10):
        worker.publish()
        for _ in range(50):
            worker.hub.on_join("c", CLIENT)
    worker.until_idle()
    assert worker.hub.fanout.overflows.value == 0
    assert all(offsets(member) == list(range(1, 11)) and member.losses == 0 for member in members)
    # A subscriber that is not sent all joins and leaves has to ask for presence anew.
    assert all(member.losses == 1 for member in announced)
    assert other.losses == 0
    assert 100 < worker.hub.fanout.dropped.value <= 500


def test_an_interruption_reports_a_gap_to_the_subscribers_with_joins_and_leaves(worker: Worker) -> None:
    announced, plain = worker.member(positioned=False, announced=True), worker.member(positioned=False)
    worker.hub.on_interruption()
    worker.until_idle()
    assert (announced.losses, plain.losses) == (1, 0)


def test_the_bytes_of_all_backlogs_are_limited(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fanout, "BACKLOG_BYTES", 100_000)
    large = [worker.member("large") for _ in range(2000)]
    small = [worker.member("small") for _ in range(2000)]
    for _ in range(20):
        worker.publish("large", b"x" * 10_000)
        worker.publish("small", b"x")
        assert worker.hub.fanout.queued <= 100_000
    worker.until_idle()
    assert all(member.losses == 1 for member in large)
    assert all(offsets(member) == list(range(1, 21)) and member.losses == 0 for member in small)


def test_a_waiting_activation_survives_an_overflow(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fanout, "BACKLOG_LIMIT", 10)
    for _ in range(2000):
        worker.member(positioned=False)
    worker.publish()
    late = Listener(positioned=False)
    add(worker.hub, late)
    worker.publish()
    assert worker.hub.activate("c", late, None)
    for _ in range(20):
        worker.publish()
    assert worker.hub.fanout.overflows.value
    worker.until_idle()
    worker.publish()
    worker.until_idle()
    assert (offsets(late)[0], offsets(late)[-1]) == (2, 23)
    assert sorted(set(offsets(late))) == offsets(late)


# Filters


def cheap(tags: object) -> bool:
    return bool(tags) and tags["price"] < "5"  # type: ignore[index]


def test_filtered_subscribers_receive_matching_publications(worker: Worker) -> None:
    every, some = worker.member(), worker.member(filter=cheap)
    for price in "19283":
        worker.publish(tags={"price": price})
    worker.publish()
    assert (offsets(every), offsets(some)) == ([1, 2, 3, 4, 5, 6], [1, 3, 5])
    assert some.losses == 0


def test_slow_filters_block_the_loop_for_one_slice_at_a_time(worker: Worker) -> None:
    def slow(tags: object) -> bool:
        worker.now += 30 * COST
        return True

    members = [worker.member(filter=slow) for _ in range(100)]
    began = worker.now
    worker.publish()
    assert worker.now - began <= 2 * SLICE
    while worker.asked:
        began = worker.now
        worker.turn()
        assert worker.now - began <= 2 * SLICE
    assert [offsets(member) for member in members] == [[1]] * 100


def test_filters_apply_to_held_events(worker: Worker) -> None:
    member = Listener(filter=cheap)
    add(worker.hub, member)
    for price in "192":
        worker.publish(tags={"price": price})
    assert worker.hub.activate("c", member, at(0))
    assert offsets(member) == [1, 3]


def test_filtered_subscribers_receive_joins_and_gaps(worker: Worker) -> None:
    member = worker.member(filter=cheap, announced=True)
    worker.hub.on_join("c", CLIENT)
    worker.publish(tags={"price": "9"})
    worker.offsets["c"] += 1
    worker.publish(tags={"price": "1"})
    assert (member.frames, member.losses) == ([b"join client-1"], 1)


# Deltas


class Reader:
    """A client that decodes the frames of a subscriber with deltas."""

    def __init__(self, member: Listener) -> None:
        self.member = member
        self.texts: list[bytes] = []
        self.kinds: list[str] = []
        self.base: bytes | None = None

    def read(self, base: bytes | None = None) -> list[bytes]:
        """Return the data of the frames since the last call. base: replaces the data of the last frame."""
        self.base = base or self.base
        texts = []
        for frame in self.member.frames[len(self.kinds) :]:
            kind, _, rest = frame.partition(b" ")
            self.kinds.append(kind.decode())
            body = rest.rpartition(b" ")[0]
            if kind == b"patch":
                assert self.base is not None
                self.base = bytes(apply_delta(self.base, body))
            else:
                assert kind == b"whole"
                self.base = body.rpartition(b" ")[0]
            texts.append(self.base)
        return texts


def text(number: int) -> bytes:
    return b"a long text in which only a number changes, which is %d" % number


def test_the_first_publication_is_whole_and_the_others_are_deltas(worker: Worker) -> None:
    member, plain = worker.member(delta=True), worker.member()
    for number in range(3):
        worker.publish(data=text(number), delta=True)
    reader = Reader(member)
    assert reader.read() == [text(0), text(1), text(2)]
    assert reader.kinds == ["whole", "patch", "patch"]
    assert plain.frames == [text(n) + b" %d abcdefgh" % (n + 1) for n in range(3)]


def test_a_delta_is_computed_once_for_all_subscribers(worker: Worker) -> None:
    members = [worker.member(delta=True) for _ in range(3)]
    others = [worker.member() for _ in range(3)]
    worker.publish(data=text(0), delta=True)
    members[0].form.encoded = 0
    worker.publish(data=text(1), delta=True)
    assert members[0].form.encoded == 2
    assert members[0].written[1] is members[2].written[1]
    assert others[0].written[1] is others[2].written[1]


def test_a_publication_without_delta_is_whole_and_a_base(worker: Worker) -> None:
    reader = Reader(worker.member(delta=True))
    worker.publish(data=text(0), delta=True)
    worker.publish(data=text(1))
    worker.publish(data=text(2), delta=True)
    assert reader.read() == [text(0), text(1), text(2)]
    assert reader.kinds == ["whole", "whole", "patch"]


def test_a_delta_that_is_not_shorter_is_not_sent(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Reader(worker.member(delta=True))
    for data in (b"one", b"two", text(1), text(2)):
        worker.publish(data=data, delta=True)
    monkeypatch.setattr(fanout, "PATCH_LIMIT", 10)
    worker.publish(data=text(3), delta=True)
    assert reader.read() == [b"one", b"two", text(1), text(2), text(3)]
    assert reader.kinds == ["whole", "whole", "whole", "patch", "whole"]


def test_a_format_without_deltas_gets_the_data(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TextForm, "delta_publication", lambda *args: None)
    reader = Reader(worker.member(delta=True))
    for number in range(3):
        worker.publish(data=text(number), delta=True)
    assert reader.read() == [text(0), text(1), text(2)]
    assert set(reader.kinds) == {"whole"}


def test_a_new_subscriber_starts_with_a_whole_publication(worker: Worker) -> None:
    old = Reader(worker.member(delta=True))
    worker.publish(data=text(0), delta=True)
    new = Reader(worker.member(delta=True))
    for number in (1, 2):
        worker.publish(data=text(number), delta=True)
    assert (old.read(), new.read()) == ([text(0), text(1), text(2)], [text(1), text(2)])
    assert (old.kinds, new.kinds) == (["whole", "patch", "patch"], ["whole", "patch"])


@pytest.mark.parametrize("followed", [True, False])
def test_the_last_publication_of_the_reply_is_a_base(worker: Worker, followed: bool) -> None:
    """The base is the reply's, whether or not the channel has other subscribers."""
    worker.member(delta=followed)
    worker.publish(data=text(0), delta=True)
    worker.publish(data=text(1), delta=True)
    member = Listener(delta=True)
    add(worker.hub, member)
    assert worker.hub.activate("c", member, at(2), Publication(text(1), 2))
    worker.publish(data=text(2), delta=True)
    reader = Reader(member)
    assert reader.read(base=text(1)) == [text(2)]
    assert reader.kinds == ["patch"]


def test_held_publications_are_whole_and_a_base(worker: Worker) -> None:
    worker.member(delta=True)
    member = Listener(delta=True)
    add(worker.hub, member)
    for number in range(3):
        worker.publish(data=text(number), delta=True)
    assert worker.hub.activate("c", member, at(1), Publication(text(0), 1))
    worker.publish(data=text(3), delta=True)
    reader = Reader(member)
    assert reader.read() == [text(1), text(2), text(3)]
    assert reader.kinds == ["whole", "whole", "patch"]


def test_a_reply_that_is_behind_is_no_base(worker: Worker) -> None:
    worker.member(delta=True, positioned=False)
    worker.publish(data=text(0), delta=True)
    worker.hub.on_publication("c", Publication(text(1), 0, delta=True), "")
    member = Listener(delta=True)
    add(worker.hub, member)
    assert worker.hub.activate("c", member, at(1), Publication(text(0), 1))
    worker.publish(data=text(2), delta=True)
    reader = Reader(member)
    assert reader.read(base=text(0)) == [text(2)]
    assert reader.kinds == ["whole"]


def test_a_reply_under_another_epoch_is_no_base(worker: Worker) -> None:
    worker.member(delta=True, positioned=False)
    worker.publish(data=text(0), delta=True)
    worker.hub.on_interruption()
    member = Listener(delta=True)
    add(worker.hub, member)
    assert worker.hub.activate("c", member, at(1, "new"), Publication(text(7)[::-1], 1))
    worker.hub.on_publication("c", Publication(text(1), 2, delta=True), "new")
    assert Reader(member).read(base=text(7)[::-1]) == [text(1)]


def test_a_publication_is_kept_only_while_a_delta_may_start_from_it(worker: Worker) -> None:
    def references() -> int:
        """Return a weak reference to the data of a new publication, after its delivery."""
        data = bytes(bytearray(text(0)))
        worker.publish(data=data, delta=True)
        return sys.getrefcount(data)

    plain = worker.member()
    unused = references()
    first, second = worker.member(delta=True), worker.member(delta=True)
    for member in (first, second, plain):
        member.deliver = lambda frame: None
    assert references() > unused
    worker.hub.unsubscribe("c", first)
    assert references() > unused
    worker.hub.unsubscribe("c", second)
    assert references() == unused
    going = Listener(delta=True)
    add(worker.hub, going)
    worker.publish()
    going.deliver = lambda frame: worker.hub.unsubscribe("c", going)
    assert worker.hub.activate("c", going, at(worker.offsets["c"] - 1))
    assert references() == unused


def test_deltas_with_a_filter_are_always_whole(worker: Worker) -> None:
    member = worker.member(delta=True, filter=cheap)
    for number, price in enumerate("191"):
        worker.publish(data=text(number), delta=True, tags={"price": price})
    reader = Reader(member)
    assert reader.read() == [text(0), text(2)]
    assert set(reader.kinds) == {"whole"}


def test_deltas_survive_a_dropped_backlog(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fanout, "BACKLOG_LIMIT", 10)
    readers = [Reader(worker.member(delta=True, positioned=False)) for _ in range(2000)]
    for number in range(30):
        worker.publish(data=text(number), delta=True)
    worker.until_idle()
    worker.publish(data=text(30), delta=True)
    worker.until_idle()
    assert worker.hub.fanout.overflows.value
    for reader in readers:
        texts = reader.read()
        assert texts[-1] == text(30)
        assert sorted(texts, key=lambda one: int(one.split()[-1])) == texts
        assert set(reader.kinds[1:]) == {"patch"}


# Data that a format cannot carry


class PlainForm(TextForm):
    def publication(self, channel: str, publication: Publication, epoch: str) -> bytes:
        if publication.binary:
            raise Disconnect(*INAPPROPRIATE_PROTOCOL)
        return super().publication(channel, publication, epoch)


@pytest.mark.parametrize("members", [2, 500])
@pytest.mark.parametrize("delta", [False, True])
def test_binary_data_removes_subscribers_that_cannot_receive_it(worker: Worker, members: int, delta: bool) -> None:
    fit = [worker.member() for _ in range(members)]
    form = PlainForm()
    unfit = [Listener(delta=delta) for _ in range(members)]
    for member in unfit:
        member.form = form
        opened(worker.hub, member, at(0))
    worker.publish()
    worker.publish(binary=True)
    worker.publish()
    worker.until_idle()
    assert all(offsets(member) == [1, 2, 3] for member in fit)
    assert all((len(member.frames), member.misfits) == (1, 1) for member in unfit)
    assert worker.hub.subscribers("c") == members


@pytest.mark.parametrize("members", [100, 500])
def test_removing_many_subscribers_takes_many_turns(worker: Worker, members: int) -> None:
    def part() -> None:
        worker.now += 20 * COST

    form = PlainForm()
    for _ in range(members):
        member = Listener()
        member.form = form
        member.on_unencodable = part  # type: ignore[method-assign]
        opened(worker.hub, member, at(0))
    began = worker.now
    worker.publish(binary=True)
    assert worker.now - began <= SLICE + 2 * 8 * 20 * COST
    while worker.asked:
        began = worker.now
        worker.turn()
        assert worker.now - began <= SLICE + 2 * 8 * 20 * COST
    assert worker.hub.subscribers("c") == 0


def test_binary_data_among_held_events(worker: Worker) -> None:
    member = Listener()
    member.form = PlainForm()
    add(worker.hub, member)
    worker.publish()
    worker.publish(binary=True)
    worker.publish()
    assert worker.hub.activate("c", member, at(0))
    assert (offsets(member), member.misfits) == ([1], 1)
    assert worker.hub.subscribers("c") == 0
