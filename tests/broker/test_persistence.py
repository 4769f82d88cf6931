"""Channels in a file: what continues after each end of a broker, and what clients are not promised any more."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sqlite3
from collections.abc import Collection, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from twisted.internet import reactor
from twisted.logger import LogEvent, LogLevel, formatEvent, globalLogPublisher

from realtime.broker import journal_queue
from realtime.broker.persistence import Persistence
from realtime.config.settings import EngineSettings, MemorySettings
from realtime.errors import RealtimeError
from realtime.metrics import Metrics
from realtime.process.fd_stream import stream_pair
from realtime.pubsub.broker_core import BrokerCore
from realtime.pubsub.engine import GetHistory, Publish, RemoveHistory
from realtime.types import HistoryOptions, HistoryPage, Position
from tests.broker import test_handover
from tests.broker import workers as fixtures
from tests.broker.workers import KEEP, SETTINGS, Worker
from tests.system.brokers import BrokerProcess, until

brokers, workers, successors = fixtures.brokers, fixtures.workers, test_handover.successors


def queues() -> set[Path]:
    return set(journal_queue.DIRECTORY.glob(f"{journal_queue.PREFIX}*"))


@pytest.fixture
def caplog_of_twisted() -> Iterator[list[str]]:
    """The warnings and errors that the code logs."""
    lines: list[str] = []

    def observe(event: LogEvent) -> None:
        if event["log_level"] in (LogLevel.warn, LogLevel.error, LogLevel.critical):
            lines.append(formatEvent(event))

    globalLogPublisher.addObserver(observe)
    yield lines
    globalLogPublisher.removeObserver(observe)


@pytest.fixture(autouse=True)
def earlier_queues() -> Iterator[set[Path]]:
    before = queues()
    yield before
    for path in queues() - before:
        path.unlink()  # of killed brokers that no other one followed


def settings(path: Path, **memory: Any) -> EngineSettings:
    return replace(SETTINGS, memory=MemorySettings(str(path / "channels.db"), **memory))


class Store:
    """The channels of a broker in this process. Each is closed or lost before the next one of its file is opened."""

    def __init__(self, wanted: EngineSettings) -> None:
        self.series = Metrics()
        self._now = reactor.seconds
        broker: Any = self
        self.persistence = Persistence(wanted.memory, 1000, self.series, reactor, broker)
        streams, keys = self.persistence.streams, self.persistence.keys
        self._core: BrokerCore[str] = BrokerCore(broker, 1000, streams=streams, keys=keys)
        self._core.attach("worker")

    @classmethod
    async def open(cls, wanted: EngineSettings) -> Store:
        store = cls(wanted)
        await store.persistence.load(lambda part: store._core.import_part(part, ()))
        return store

    def deliver_order(self, peers: Collection[str], order: bytes) -> None:
        raise AssertionError("there are no peers in these tests")

    def hold_back(self, is_held: bool) -> None:
        """A test does not publish while it is to wait."""

    def ask(self, request: Any) -> Any:
        return self._core.carry_out("worker", self._now(), request)

    def publish(self, channel: str = "c", data: bytes = b"1", options: HistoryOptions = KEEP) -> Position:
        return self.ask(Publish(channel, data, options))

    def page(self, channel: str = "c") -> HistoryPage:
        return self.ask(GetHistory(channel, KEEP, limit=-1))

    async def stored(self) -> None:
        """Returns when the file has all changes."""
        await until(lambda: not self.persistence._queue.used)

    async def lose(self, *, power: bool = True) -> None:
        """End without a word, as by SIGKILL; with the memory of the machine, or without."""
        self.persistence._is_open = False
        await self.persistence._run(self.persistence._file.close)
        if power:
            self.persistence._queue.remove()


async def served(brokers: Any, workers: Any, wanted: EngineSettings) -> tuple[BrokerProcess, Worker]:
    """A broker on this file, and a worker."""
    broker, worker = await brokers(wanted), workers(0, wanted)
    await broker.link(0, worker.engine)
    return broker, worker


async def end(broker: BrokerProcess, worker: Worker) -> None:
    """Let a broker end cleanly."""
    worker.engine.close()
    broker.signal(signal.SIGTERM)
    await broker.gone()


async def page(worker: Worker, channel: str = "c") -> HistoryPage:
    return await worker.engine.ask(GetHistory(channel, KEEP, limit=-1))


def data(found: HistoryPage) -> list[bytes]:
    return [publication.data for publication in found.publications]


async def test_a_clean_end_continues_all_channels(tmp_path: Path, earlier_queues: set[Path]) -> None:
    wanted = settings(tmp_path)
    store = await Store.open(wanted)
    kept = [store.publish("c", b"%d" % number) for number in range(5)]
    keyed = store.ask(Publish("keyed", b"once", KEEP, idempotency_key="key"))
    store.publish("removed")
    store.ask(RemoveHistory("removed"))
    brief = store.publish("brief", b"1", HistoryOptions(10, 0.001))
    quiet = store.page("quiet").position
    await store.persistence.close()
    assert queues() == earlier_queues
    store = await Store.open(wanted)
    assert (store.page().position, data(store.page())) == (kept[-1], [b"0", b"1", b"2", b"3", b"4"])
    assert store.ask(Publish("keyed", b"twice", KEEP, idempotency_key="key")) == keyed
    assert data(store.page("removed")) == data(store.page("brief")) == []
    assert store.page("brief").position == brief
    assert store.page("quiet").position == quiet
    assert store.publish() == Position(6, kept[-1].epoch)
    await store.persistence.close()


async def test_a_killed_broker_loses_nothing_that_was_accepted(brokers: Any, workers: Any, tmp_path: Path) -> None:
    wanted = settings(tmp_path)
    position = Position()
    for number in range(2):
        broker, worker = await served(brokers, workers, wanted)
        for _ in range(200):
            position = await worker.publish("c", b"%d" % number)
        await broker.kill()
        worker.engine.close()
    broker, worker = await served(brokers, workers, wanted)
    assert (await page(worker)).position == position == Position(400, position.epoch)
    assert data(await page(worker)) == [b"1"] * 100


@pytest.mark.parametrize("fsync", ["interval", "never", "always"])
async def test_a_loss_of_power_gives_new_epochs_unless_everything_waited_for_the_disk(
    tmp_path: Path, fsync: str
) -> None:
    wanted = settings(tmp_path, fsync=fsync)
    store = await Store.open(wanted)
    position, quiet = store.publish(), store.page("quiet").position
    assert store.persistence.is_behind  # so the answer waits, with fsync "always"
    await store.stored()
    await store.lose()
    store = await Store.open(wanted)
    assert data(store.page()) == [b"1"]
    assert (store.page().position == position) == (fsync == "always")
    assert (store.page("quiet").position == quiet) == (fsync == "always")
    await store.persistence.close()


async def test_with_fsync_always_every_accepted_publication_is_in_the_file(tmp_path: Path) -> None:
    """Copies of the file at any time, each in the place of a disk after a loss of power."""
    store = await Store.open(settings(tmp_path, fsync="always"))
    copies = []
    for number in range(6):
        position = store.publish("c", b"%d" % number)
        await until(lambda: not store.persistence.is_behind)
        copy = tmp_path / f"disk-{number}"
        copy.mkdir()
        for file in tmp_path.glob("channels.db*"):
            shutil.copy(file, copy)
        copies.append((copy, position))
    await store.persistence.close()
    for copy, position in copies:
        # A disk has the same inode after a loss of power.
        with closing(sqlite3.connect(copy / "channels.db", isolation_level=None)) as database:
            database.execute("UPDATE run SET queue = '', inode = ?", (os.stat(copy / "channels.db").st_ino,))
        store = await Store.open(settings(copy, fsync="always"))
        assert store.page().position == position
        await store.persistence.close()


@pytest.mark.parametrize("cut", ["log", "middle", "head", "row", "records"])
async def test_a_damaged_file_is_set_aside_or_cut_and_never_continues_an_epoch(
    tmp_path: Path, cut: str, caplog_of_twisted: list[str]
) -> None:
    wanted, database = settings(tmp_path), tmp_path / "channels.db"
    store = await Store.open(wanted)
    for _ in range(3):
        for _ in range(100):
            position = store.publish("c", b"x" * 100)
        await store.stored()
    if cut == "log":  # what a loss of power may leave of it
        log = Path(f"{database}-wal")
        left = log.read_bytes()[: log.stat().st_size * 2 // 3]
        whole = database.read_bytes()
        await store.lose()
        log.write_bytes(left)
        database.write_bytes(whole)
    else:
        await store.persistence.close()
        _damage(database, cut)
    store = await Store.open(wanted)
    assert store.page().position.epoch != position.epoch
    assert store.publish().offset >= 1
    assert len(caplog_of_twisted) == 1, caplog_of_twisted
    await store.persistence.close()


def _damage(database: Path, cut: str) -> None:
    if cut == "row":
        with closing(sqlite3.connect(database, isolation_level=None)) as opened:
            opened.execute("DELETE FROM batch WHERE position = (SELECT max(position) FROM batch)")
    elif cut == "records":
        with closing(sqlite3.connect(database, isolation_level=None)) as opened:
            opened.execute("UPDATE batch SET records = zeroblob(length(records))")
    else:
        with database.open("r+b") as file:
            file.seek(0 if cut == "head" else database.stat().st_size // 2)
            file.write(os.urandom(5000))


async def test_an_older_copy_in_place_of_the_file_never_continues_an_epoch(tmp_path: Path) -> None:
    wanted, database = settings(tmp_path), tmp_path / "channels.db"
    store = await Store.open(wanted)
    first = store.publish("c", b"first")
    await store.persistence.close()
    shutil.copy(database, tmp_path / "backup")
    store = await Store.open(wanted)
    store.publish("c", b"second")
    await store.persistence.close()
    os.replace(tmp_path / "backup", database)
    store = await Store.open(wanted)
    assert data(store.page()) == [b"first"]
    assert store.page().position.epoch != first.epoch
    await store.persistence.close()


async def test_a_full_disk_leaves_channels_in_memory_until_there_is_room(
    brokers: Any, workers: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    wanted = settings(tmp_path)
    broker, worker = await served(brokers, workers, wanted)
    position = await worker.publish("c", b"before")
    limit = resource.prlimit(broker.pid, resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))
    full = [await worker.publish("c", b"full") for _ in range(10)]
    assert full[-1] == Position(11, position.epoch)
    await until_series(broker, "realtime_broker_storage_suspended", 1)
    assert (await worker.publish("c", b"later")).epoch == position.epoch
    resource.prlimit(broker.pid, resource.RLIMIT_FSIZE, limit)
    await until_series(broker, "realtime_broker_storage_suspended", 0)
    last = await worker.publish("c", b"again")
    await broker.kill()
    worker.engine.close()
    broker, worker = await served(brokers, workers, wanted)
    assert (await page(worker)).position == last
    assert data(await page(worker))[:2] == [b"before", b"full"]
    assert "channels can't be stored in" in capfd.readouterr().out


async def test_a_broker_killed_without_room_for_its_changes_starts_new_epochs(
    brokers: Any, workers: Any, tmp_path: Path
) -> None:
    wanted = settings(tmp_path, fsync="always")
    broker, worker = await served(brokers, workers, wanted)
    position = await worker.publish("c", b"before")
    resource.prlimit(broker.pid, resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))
    assert (await worker.publish("c", b"full")).offset == 2
    await broker.kill()
    worker.engine.close()
    broker, worker = await served(brokers, workers, wanted)
    assert (await page(worker)).position.epoch != position.epoch


async def test_the_file_stays_small_while_publications_come_and_go(
    tmp_path: Path, caplog_of_twisted: list[str]
) -> None:
    wanted = settings(tmp_path, max_file_size=8 * 1024 * 1024, queue_size=1024 * 1024)
    store = await Store.open(wanted)

    def is_writing_a_snapshot() -> bool:  # the publications of this test could fill the file meanwhile
        return bool(store.persistence._snapshot or store.persistence._snapshot_end)

    for _ in range(50):  # 20 MB, of which half a MB is kept
        for _ in range(80):
            position = store.publish("c", b"x" * 5_000)
        await until(lambda: store.persistence._queue.used < 250_000 and not is_writing_a_snapshot())
    series = {sample.name: sample.value for sample in store.series.snapshot()}
    assert series["realtime_broker_storage_failures"] == 0, caplog_of_twisted
    assert series["realtime_broker_stored_bytes"] > 15_000_000
    assert (tmp_path / "channels.db").stat().st_size <= 8 * 1024 * 1024
    await store.lose(power=False)
    store = await Store.open(wanted)
    assert store.page().position == position
    assert len(store.page().publications) == 100
    await store.persistence.close()


async def test_a_process_that_takes_the_place_of_the_broker_stores_its_channels(
    brokers: Any, successors: Any, workers: Any, tmp_path: Path, earlier_queues: set[Path]
) -> None:
    wanted = settings(tmp_path, fsync="always")
    broker, worker = await served(brokers, workers, wanted)
    position = await worker.publish("c", b"before")
    following, _ = await successors(broker, wanted)
    await broker.gone()
    assert await worker.publish("c", b"after") == Position(2, position.epoch)
    await until_series(following, "realtime_broker_storage_suspended", 0)
    last = await worker.publish("c", b"last")
    await following.kill()
    worker.engine.close()
    broker, worker = await served(brokers, workers, wanted)
    assert ((await page(worker)).position, data(await page(worker))) == (last, [b"before", b"after", b"last"])
    await end(broker, worker)
    assert queues() == earlier_queues


async def test_a_broker_whose_successor_dies_goes_on_with_its_file(
    brokers: Any, successors: Any, workers: Any, tmp_path: Path
) -> None:
    wanted = settings(tmp_path, fsync="always")
    broker, worker = await served(brokers, workers, wanted)
    position = await worker.publish("c", b"before")
    ours, theirs = stream_pair()
    with ours:
        handed = broker.hand_over(ours.fileno())
        theirs.close()
        assert (await handed)["moved"] == 0
    assert await worker.publish("c", b"after") == Position(2, position.epoch)
    await broker.kill()
    worker.engine.close()
    broker, worker = await served(brokers, workers, wanted)
    assert ((await page(worker)).position.offset, data(await page(worker))) == (2, [b"before", b"after"])


async def until_series(broker: BrokerProcess, name: str, value: float) -> None:
    while (await broker.series())[name] != value:
        await until(lambda: True)


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("folder", "correct the path, or give the server's user the right to write there"),
        ("foreign", "is the database of another program; name another file"),
    ],
)
async def test_a_place_for_no_file_is_one_line(tmp_path: Path, kind: str, line: str) -> None:
    database = tmp_path / "channels.db"
    if kind == "folder":
        database.mkdir()
    else:
        with closing(sqlite3.connect(database, isolation_level=None)) as opened:
            opened.execute("CREATE TABLE other (x)")
    broker: Any = None  # which loading does not need
    persistence = Persistence(settings(tmp_path).memory, 10, Metrics(), reactor, broker)
    with pytest.raises(RealtimeError) as refusal:
        await persistence.load(print)
    assert str(refusal.value).startswith(f"engine.memory.path = '{database}'")
    assert str(refusal.value).endswith(line)
