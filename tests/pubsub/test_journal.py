"""The journal of histories: whatever happened, another broker rebuilds the same channels from the records."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator
from contextlib import suppress
from typing import Any

import msgspec
import pytest

from realtime.errors import ClientError
from realtime.pubsub.broker_core import BrokerCore
from realtime.pubsub.broker_state import StatePart
from realtime.pubsub.engine import GetHistory, Publish, RemoveHistory
from realtime.pubsub.history import StreamsState
from realtime.pubsub.journal import (
    BadJournal,
    Change,
    JournaledKeys,
    JournaledStreams,
    JournalReplay,
    Renewed,
    frame,
    records_in,
)
from realtime.types import HistoryOptions, Position, Publication

CHANNELS = [f"channel-{number}" for number in range(4)]
OPTIONS = HistoryOptions(5, 20.0, 50.0)
LONG = HistoryOptions(700, 1000.0)
PEER = "peer"


class Nowhere:
    """Delivers to no peer."""

    def deliver_publication(self, peers: Collection[str], channel: str, publication: Publication, epoch: str) -> None:
        raise AssertionError("nobody subscribes in these tests")

    def __getattr__(self, name: str) -> Any:
        return self.deliver_publication


class Store:
    """A core that writes a journal into a list. clock: of its process. shift: from that clock to Unix times."""

    def __init__(self, clock: float = 1000.0, shift: float = 0.0) -> None:
        self.now, self.shift = clock, shift
        self.written: list[tuple[bytes, float]] = []
        self.streams = JournaledStreams(1000, self._write, 1000)
        self.keys = JournaledKeys(1000, self._write)
        self.core: BrokerCore[str] = BrokerCore(Nowhere(), 1000, streams=self.streams, keys=self.keys)
        self.core.attach(PEER)
        self._write(self.streams.epochs.export())

    def _write(self, record: Change | StatePart) -> None:
        self.written.append((frame(record), self.shift))

    def publish(self, channel: str = "c", data: bytes = b"1", options: HistoryOptions = LONG, **more: Any) -> Position:
        return self.core.carry_out(PEER, self.now, Publish(channel, data, options, **more))

    def history(self, channel: str = "c", options: HistoryOptions = LONG) -> tuple[Position, list[bytes]]:
        page = self.core.carry_out(PEER, self.now, GetHistory(channel, options, limit=-1))
        return page.position, [publication.data for publication in page.publications]

    def snapshot(self) -> Iterator[StatePart]:
        yield from self.streams.snapshot()
        yield from self.keys.snapshot()

    def view(self) -> dict[str, Any]:
        """Everything that a client could learn, by channel."""
        found: dict[str, Any] = {name: self.streams.epochs.of(name) for name in CHANNELS}
        for part in self.streams.export():
            for state in part.streams if isinstance(part, StreamsState) else ():
                kept = state.publications if state.expires > self.now else []
                before = found[state.channel][2] if isinstance(found[state.channel], tuple) else []
                found[state.channel] = state.epoch, state.top, before + kept, state.version, state.version_epoch
        for name in CHANNELS:
            for key in ("a", "b"):
                found[f"{name} {key}"] = self.keys.recall(self.now, name, key)
        return found

    def restarted(self, written: list[tuple[bytes, float]], pause: float = 0.0, *renewals: Renewed) -> Store:
        """A store of another process, with another clock, that goes on from these records after a pause."""
        clock = float(random.Random(len(written)).randrange(5000))
        other = Store(clock, self.now + self.shift + pause - clock)
        replay = JournalReplay()
        for data, shift in written:
            for record in records_in(data):
                replay.apply(record, shift)
        for renewed in renewals:
            replay.apply(renewed, 0.0)
        for part in replay.state(other.now, other.shift):
            other.core.import_part(part, ())
        other.written = [*written, *((frame(renewed), 0.0) for renewed in renewals)]
        return other


def act(store: Store, chance: random.Random) -> None:
    """Let anything happen that changes a history."""
    channel = chance.choice(CHANNELS)
    options = chance.choice((OPTIONS, OPTIONS, HistoryOptions(2, 30.0, 60.0), HistoryOptions()))
    store.now += chance.choice((0.0, 0.125, 3.0, 15.0))
    what = chance.random()
    if what < 0.5:
        store.publish(channel, b"%d" % chance.randrange(99), options)
    elif what < 0.6:
        store.publish(channel, b"versioned", options, version=chance.randrange(1, 9), version_epoch=chance.choice("ab"))
    elif what < 0.7:
        store.publish(channel, b"keyed", options, idempotency_key=chance.choice("ab"))
    elif what < 0.8:
        store.core.carry_out(PEER, store.now, RemoveHistory(channel))
    elif what < 0.9:
        store.history(channel, OPTIONS)
    else:
        while store.core.sweep(store.now, 2):
            pass


@pytest.mark.parametrize("seed", range(20))
def test_records_rebuild_the_state_after_every_change_and_over_restarts(seed: int) -> None:
    chance, store = random.Random(seed), Store()
    for _ in range(3):
        for _ in range(40):
            act(store, chance)
            # Reading prolongs a stream without a record, so a restart may only keep it longer.
            copy = store.restarted(store.written)
            assert copy.view() == store.view()
        store = store.restarted(store.written, pause=chance.choice((0.0, 10.0)))


@pytest.mark.parametrize("seed", range(20))
def test_everything_before_a_snapshot_can_be_dropped_while_changes_go_on(seed: int) -> None:
    chance, store = random.Random(seed), Store()
    for _ in range(60):
        act(store, chance)
    begin, snapshot = len(store.written), store.snapshot()
    for part in snapshot:
        store._write(part)
        if chance.random() < 0.5:
            act(store, chance)
        assert store.restarted(store.written).view() == store.view()
    assert store.restarted(store.written[begin:]).view() == store.view()
    act(store, chance)
    assert store.restarted(store.written[begin:]).view() == store.view()


def test_a_long_stream_changes_while_its_snapshot_is_written() -> None:
    store = Store()
    for number in range(700):
        store.publish(data=b"%d" % number)
    begin, snapshot = len(store.written), store.snapshot()
    for number, part in enumerate(snapshot):
        store._write(part)
        store.publish(data=b"meanwhile %d" % number)
    assert store.restarted(store.written[begin:]).history() == store.history()
    begin, snapshot = len(store.written), store.snapshot()
    for number, part in enumerate(snapshot):
        store._write(part)
        if number == 1:
            store.core.carry_out(PEER, store.now, RemoveHistory("c"))
    assert store.restarted(store.written[begin:]).history() == store.history()
    assert store.history()[1] == []


def test_lost_changes_give_every_channel_an_epoch_that_never_was() -> None:
    store, salt = Store(), Renewed(b"1" * 16)
    store.publish(idempotency_key="key")
    quiet = store.history("quiet")[0]
    after = store.restarted(store.written, 0.0, salt)
    assert after.history()[0].offset == 1
    assert after.history()[1] == [b"1"]
    assert after.history()[0].epoch != store.history()[0].epoch
    assert after.history("quiet")[0].epoch != quiet.epoch
    # The publication of the key has the same place in the new epoch.
    assert after.publish(idempotency_key="key") == after.history()[0]
    # The new epochs are as lasting as the others were.
    assert after.restarted(after.written).history() == after.history()
    assert after.restarted(after.written).history("quiet") == after.history("quiet")


def test_history_and_keys_expire_while_the_server_is_down() -> None:
    store = Store()
    position = store.publish(options=HistoryOptions(5, 60.0), idempotency_key="key")
    soon = store.restarted(store.written, 59.0)
    assert soon.history()[1] == [b"1"]
    assert soon.publish(idempotency_key="key") == position
    late = store.restarted(store.written, 301.0)
    assert late.history() == (position, [])
    assert late.publish(idempotency_key="key").offset == 2


def test_a_publication_that_no_queue_can_take_is_refused() -> None:
    store = Store()
    with pytest.raises(ClientError) as refusal:
        store.publish(data=b"x" * 1001)
    assert refusal.value.code == 106
    assert store.publish(data=b"x" * 1000).offset == 1


@pytest.mark.parametrize("data", [b"\x01", b"\x05\0\0\0abc", b"\x01\0\0\0\xc1", frame(Renewed(b""))[:-1] + b"\xff"])
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(BadJournal):
        list(records_in(data))


def test_bytes_of_any_kind_never_raise_anything_else() -> None:
    chance, good = random.Random(1), b"".join(data for data, _ in Store().written)
    for _ in range(500):
        data = bytearray(good)
        data[chance.randrange(len(data))] = chance.randrange(256)
        with suppress(BadJournal):
            list(records_in(bytes(data)))
    assert msgspec.msgpack.decode(good[4:])
