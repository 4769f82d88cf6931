"""Streams compared with a naive model, and the cases that the client protocol describes."""

from __future__ import annotations

import gc
import itertools
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realtime.errors import ClientError
from realtime.pubsub import history
from realtime.pubsub.engine import GetHistory, Publish
from realtime.pubsub.history import ChannelStream, ChannelStreams, Epochs, ExpiryQueue, IdempotencyCache
from realtime.types import ClientInfo, HistoryOptions, Position, Publication

KEEP = HistoryOptions(size=3, ttl=60.0, meta_ttl=3600.0)
SWEEP = 5000


def counted_epochs() -> Callable[[], str]:
    numbers = itertools.count(1)
    return lambda: f"epoch{next(numbers)}"


class CountedEpochs(Epochs):
    """Readable epochs, in the order of the first questions."""

    def __init__(self) -> None:
        self.next = counted_epochs()
        self.current: dict[str, str] = {}

    def of(self, channel: str) -> str:
        if channel not in self.current:
            self.current[channel] = self.next()
        return self.current[channel]

    def retire(self, channel: str) -> None:
        self.current.pop(channel, None)


def streams(limit: int = 1000) -> ChannelStreams:
    return ChannelStreams(limit, CountedEpochs())


def offsets(publications: list[Publication]) -> list[int]:
    return [publication.offset for publication in publications]


def query(since: Position | None, limit: int, reverse: bool) -> GetHistory:
    return GetHistory("c", KEEP, since, limit, reverse)


def filled(count: int, history_options: HistoryOptions = KEEP) -> ChannelStream:
    """Return a stream with `count` publications of time 0."""
    store = streams()
    for number in range(1, count + 1):
        store.append(0.0, Publish("c", b"%d" % number, history_options))
    return store.open(0.0, "c", history_options)


# The model: sections 5.6 and 7.1 of the client protocol, implemented without regard to cost.


@dataclass
class ModelStream:
    epoch: str
    top: int = 0
    kept: list[tuple[int, bytes]] = field(default_factory=list)
    contents_end: float = 0.0
    idle_end: float = 0.0


class Model:
    def __init__(self) -> None:
        self.streams: dict[str, ModelStream] = {}
        self.epoch = counted_epochs()

    def access(self, now: float, channel: str, history_options: HistoryOptions) -> ModelStream:
        stream = self.streams.get(channel)
        if stream is not None and now >= stream.contents_end:
            stream.kept = []
        if stream is None or (stream.top and now >= stream.idle_end and not stream.kept):
            stream = self.streams[channel] = ModelStream(self.epoch())
        stream.idle_end = now + history_options.meta_ttl
        return stream

    def publish(self, now: float, channel: str, data: bytes, history_options: HistoryOptions) -> tuple[int, str]:
        stream = self.access(now, channel, history_options)
        stream.top += 1
        stream.kept = [*stream.kept, (stream.top, data)][-history_options.size :]
        stream.contents_end = now + history_options.ttl
        return stream.top, stream.epoch

    def remove(self, channel: str) -> None:
        if channel in self.streams:
            self.streams[channel].kept = []

    def page(
        self, now: float, channel: str, history_options: HistoryOptions, since: int | None, limit: int, reverse: bool
    ) -> tuple[list[tuple[int, bytes]], int, str]:
        stream = self.access(now, channel, history_options)
        found = list(stream.kept)
        if reverse:
            found.reverse()
            if since is not None:
                before = since - 1
                found = [item for item in found if item[0] <= before] if before in dict(found) else []
        elif since is not None:
            found = [item for item in found if item[0] > since]
        return found if limit < 0 else found[:limit], stream.top, stream.epoch


channels = st.sampled_from(["a", "b"])
retentions = st.sampled_from(
    [HistoryOptions(1, 5.0, 20.0), HistoryOptions(3, 10.0, 15.0), HistoryOptions(4, 30.0, 8.0)]
)
operations = st.lists(
    st.one_of(
        st.tuples(st.just("wait"), st.integers(1, 12)),
        st.tuples(st.just("sweep"), st.integers(1, 5)),
        st.tuples(st.just("publish"), channels, retentions),
        st.tuples(st.just("remove"), channels),
        st.tuples(
            st.just("page"),
            channels,
            retentions,
            st.one_of(st.none(), st.integers(0, 12)),
            st.integers(-1, 5),
            st.booleans(),
        ),
    ),
    max_size=60,
)


@given(operations)
def test_any_sequence_of_operations_reads_like_the_model(steps: list[tuple]) -> None:
    store, model, now = streams(), Model(), 100.0
    for number, (name, *arguments) in enumerate(steps):
        if name == "wait":
            now += arguments[0]
        elif name == "sweep":
            store.sweep(now, arguments[0])
        elif name == "remove":
            store.remove(*arguments)
            model.remove(*arguments)
        elif name == "publish":
            channel, history_options = arguments
            data = b"%d" % number
            publication, epoch = store.append(now, Publish(channel, data, history_options))
            assert (publication.offset, epoch) == model.publish(now, channel, data, history_options)
        else:
            channel, history_options, since, limit, reverse = arguments
            position = None if since is None else Position(since, "whatever")
            page = store.open(now, channel, history_options).page(query(position, limit, reverse))
            found = [(publication.offset, publication.data) for publication in page.publications]
            expected = model.page(now, channel, history_options, since, limit, reverse)
            assert (found, page.position.offset, page.position.epoch) == expected


@given(operations)
def test_sweeping_after_everything_expired_leaves_nothing(steps: list[tuple]) -> None:
    store, now = streams(), 0.0
    for name, *arguments in steps:
        if name == "wait":
            now += arguments[0]
        elif name == "publish":
            store.append(now, Publish(arguments[0], b"x", arguments[1]))
        elif name == "page":
            store.open(now, arguments[0], arguments[1])
    for _ in range(5):
        now += 1000.0
        store.sweep(now, SWEEP)
    assert len(store) == 0


# The stream


def test_offsets_count_from_one_and_the_epoch_is_eight_letters() -> None:
    store = ChannelStreams(10)
    publication, epoch = store.append(0.0, Publish("c", b"1", KEEP))
    assert publication == Publication(b"1", 1)
    assert len(epoch) == 8
    assert epoch.isalpha()


def test_a_first_read_creates_the_epoch_of_the_first_publication() -> None:
    store = streams()
    position = store.open(0.0, "c", KEEP).position
    _, epoch = store.append(10.0, Publish("c", b"1", KEEP))
    assert position == Position(0, epoch)


def test_author_and_tags_are_stored() -> None:
    store, author = streams(), ClientInfo("42", "client", b'{"n":1}')
    store.append(0.0, Publish("c", b"1", KEEP, author, {"tag": "value"}))
    (found,) = store.open(0.0, "c", KEEP).page(query(None, -1, False)).publications
    assert (found.info, found.tags) == (author, {"tag": "value"})


@pytest.mark.parametrize(
    ("since", "limit", "expected"),
    [
        (None, 0, []),
        (None, -1, [3, 4, 5]),
        (None, 2, [3, 4]),
        (0, -1, [3, 4, 5]),
        (3, -1, [4, 5]),
        (4, 1, [5]),
        (5, -1, []),
        (9, -1, []),
    ],
)
def test_pages_forward(since: int | None, limit: int, expected: list[int]) -> None:
    position = None if since is None else Position(since, "")
    page = filled(5).page(query(position, limit, False))
    assert offsets(page.publications) == expected
    assert page.position == Position(5, "epoch1")


@pytest.mark.parametrize(
    ("since", "limit", "expected"),
    [(None, -1, [5, 4, 3]), (None, 2, [5, 4]), (5, -1, [4, 3]), (5, 1, [4]), (3, -1, []), (2, -1, []), (9, -1, [])],
)
def test_pages_in_reverse(since: int | None, limit: int, expected: list[int]) -> None:
    position = None if since is None else Position(since, "")
    assert offsets(filled(5).page(query(position, limit, True)).publications) == expected


def test_every_publication_restarts_the_ttl_of_all() -> None:
    store = streams()
    store.append(0.0, Publish("c", b"1", KEEP))
    store.append(59.0, Publish("c", b"2", KEEP))
    assert offsets(store.open(118.0, "c", KEEP).page(query(None, -1, False)).publications) == [1, 2]
    assert offsets(store.open(119.0, "c", KEEP).page(query(None, -1, False)).publications) == []


def test_reading_prolongs_the_numbering_and_not_the_publications() -> None:
    store = streams()
    store.append(0.0, Publish("c", b"1", KEEP))
    assert store.open(3000.0, "c", KEEP).position == Position(1, "epoch1")
    assert store.open(6599.0, "c", KEEP).position == Position(1, "epoch1")


def test_the_numbering_expires_without_access() -> None:
    store = streams()
    store.append(0.0, Publish("c", b"1", KEEP))
    assert store.open(3600.0, "c", KEEP).position == Position(0, "epoch2")


def test_publications_survive_a_shorter_meta_ttl() -> None:
    store, history_options = streams(), HistoryOptions(3, ttl=60.0, meta_ttl=10.0)
    store.append(0.0, Publish("c", b"1", history_options))
    store.sweep(50.0, SWEEP)
    assert store.open(50.0, "c", history_options).position == Position(1, "epoch1")


def test_removal_keeps_the_numbering() -> None:
    store = streams()
    store.append(0.0, Publish("c", b"1", KEEP))
    store.remove("c")
    assert store.open(1.0, "c", KEEP).page(query(None, -1, False)).publications == []
    publication, epoch = store.append(2.0, Publish("c", b"2", KEEP))
    assert (publication.offset, epoch) == (2, "epoch1")


def test_removing_an_unknown_history_creates_no_stream() -> None:
    store = streams()
    store.remove("c")
    assert len(store) == 0


def test_a_page_ends_early_when_it_gets_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "PAGE_BYTES", 1000)
    store, info = streams(), ClientInfo("u", "c", b"i" * 200)
    for _ in range(3):
        store.append(0.0, Publish("c", b"x" * 200, KEEP, info))
    stream = store.open(0.0, "c", KEEP)
    assert offsets(stream.page(query(None, -1, False)).publications) == [1]
    assert offsets(stream.page(query(None, -1, True)).publications) == [3]
    assert offsets(stream.page(query(Position(1, ""), -1, False)).publications) == [2]


def test_a_page_always_holds_one_publication(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "PAGE_BYTES", 10)
    assert offsets(filled(2).page(query(None, -1, False)).publications) == [1]


def test_a_long_stream_keeps_exactly_its_size() -> None:
    stream = filled(1000, HistoryOptions(100, 60.0))
    assert len(stream) == 100
    assert offsets(stream.page(query(None, -1, False)).publications) == list(range(901, 1001))


# The store


def publish(store: ChannelStreams, channel: str, now: float = 0.0) -> str:
    return store.append(now, Publish(channel, b"1", KEEP))[1]


def test_channels_are_limited() -> None:
    store = streams(limit=2)
    publish(store, "a")
    publish(store, "b")
    with pytest.raises(ClientError) as refusal:
        publish(store, "c")
    assert refusal.value.code == 106
    store.append(1.0, Publish("a", b"goes on", KEEP))


def test_channels_that_were_only_asked_about_take_no_room() -> None:
    store = ChannelStreams(1)
    epochs = [store.open(0.0, f"c{number}", KEEP).epoch for number in range(100)]
    assert len(set(epochs)) == 100
    assert len(store) == 0
    assert [store.open(10**7, f"c{number}", KEEP).position for number in range(100)] == [Position(0, e) for e in epochs]
    assert publish(store, "c7", 10**7) == epochs[7]


def test_an_epoch_never_returns_once_its_stream_is_forgotten() -> None:
    store = ChannelStreams(1000)
    seen: set[str] = set()
    for turn in range(20):
        now = turn * 10_000.0
        epoch = store.open(now, "a", KEEP).epoch
        assert publish(store, "a", now) == epoch
        assert epoch not in seen
        seen.add(epoch)
        if turn % 2:
            store.sweep(now + 5_000.0, SWEEP)


def test_epochs_of_two_stores_differ() -> None:
    assert Epochs().of("a") != Epochs().of("a")


def test_an_expired_stream_makes_room() -> None:
    store = streams(limit=1)
    publish(store, "a")
    store.sweep(3700.0, SWEEP)
    publish(store, "b", 3700.0)
    assert len(store) == 1


def test_an_expired_stream_restarts_within_the_limit() -> None:
    store = streams(limit=1)
    publish(store, "a")
    assert publish(store, "a", 4000.0) == "epoch2"


def test_the_sweep_frees_payloads_without_an_access() -> None:
    store = streams()
    store.append(0.0, Publish("c", b"1", KEEP))
    stream = store.open(0.0, "c", KEEP)
    store.sweep(59.0, SWEEP)
    assert len(stream) == 1
    store.sweep(62.0, SWEEP)
    assert len(stream) == 0
    assert len(store) == 1


def test_the_sweep_returns_to_a_refilled_channel() -> None:
    store = streams()
    for now in (0.0, 100.0, 200.0):
        store.append(now, Publish("c", b"1", KEEP))
        store.sweep(now + 62.0, SWEEP)
        assert len(store.open(now + 59.0, "c", KEEP)) == 0


def test_a_sweep_is_bounded() -> None:
    store = streams()
    for number in range(10):
        publish(store, str(number))
    assert store.sweep(3700.0, 4)
    assert len(store) == 6
    assert store.sweep(3700.0, 4)
    assert not store.sweep(3700.0, 4)
    assert len(store) == 0


def test_the_garbage_collector_tracks_one_object_per_channel() -> None:
    """A full collection blocks the loop for a time proportional to the tracked objects."""
    store = streams(limit=10_000)
    gc.collect()
    before = len(gc.get_objects())
    for number in range(5000):
        store.append(0.0, Publish(str(number), b"1", KEEP, ClientInfo("user", "client"), {"tag": "value"}))
    gc.collect()
    assert len(gc.get_objects()) - before < 5000 * 1.1


def test_an_idle_channel_takes_little_memory() -> None:
    store = streams(limit=100_000)
    names = [f"channel:{number}" for number in range(10_000)]
    tracemalloc.start()
    for name in names:
        store.append(0.0, Publish(name, b"", HistoryOptions(1, 1.0)))
    store.sweep(3.0, 10_000)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size / len(names) < 600


# The expiry queue


@given(st.lists(st.floats(0, 1000)), st.lists(st.floats(0, 100)), st.integers(1, 5))
def test_the_expiry_queue_returns_everything_once_and_nothing_early(
    times: list[float], waits: list[float], limit: int
) -> None:
    queue: ExpiryQueue[float] = ExpiryQueue(7.0)
    for when in times:
        queue.add(when, when)
    now, given_out = 0.0, []
    for wait in waits:
        now += wait
        due = queue.take(now, limit)
        assert len(due) <= limit
        assert all(when <= now for when in due)
        given_out += due
    given_out += queue.take(2000.0, len(times) + 1)
    assert sorted(given_out) == sorted(times)


# Idempotency keys


def test_a_key_is_known_for_300_seconds_on_its_channel() -> None:
    receipts = IdempotencyCache(10)
    receipts.store(0.0, "c", "key", Position(1, "e"))
    assert receipts.recall(299.0, "c", "key") == Position(1, "e")
    assert receipts.recall(299.0, "other", "key") is None
    assert receipts.recall(300.0, "c", "key") is None


def test_an_expired_key_may_be_stored_again() -> None:
    receipts = IdempotencyCache(10)
    receipts.store(0.0, "c", "first", Position(1, "e"))
    receipts.store(1.0, "c", "key", Position(2, "e"))
    receipts.store(300.5, "c", "first", Position(3, "e"))
    assert not receipts.sweep(301.5, SWEEP)
    assert receipts.recall(600.0, "c", "first") == Position(3, "e")
    assert len(receipts) == 1


def test_keys_are_limited_and_none_expires_early() -> None:
    receipts = IdempotencyCache(2)
    receipts.store(0.0, "c", "a", Position(1, "e"))
    receipts.store(10.0, "c", "b", Position(2, "e"))
    with pytest.raises(ClientError) as refusal:
        receipts.recall(20.0, "c", "c")
    assert refusal.value.code == 106
    assert receipts.recall(20.0, "c", "a") == Position(1, "e")
    assert receipts.recall(305.0, "c", "c") is None
