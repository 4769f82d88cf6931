"""Channels in a file: what continues after each end of a broker, and what clients are not promised any more."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from twisted.internet import reactor

from realtime.broker import journal_queue
from realtime.broker.persistence import Persistence
from realtime.config.settings import EngineSettings, MemorySettings
from realtime.errors import RealtimeError
from realtime.metrics import Metrics
from realtime.pubsub.engine import GetHistory, Publish, RemoveHistory, Subscribe
from realtime.types import HistoryOptions, HistoryPage, Position
from tests.broker import workers as fixtures
from tests.broker.workers import KEEP, SETTINGS, Worker
from tests.system.brokers import BrokerProcess, until

brokers, workers = fixtures.brokers, fixtures.workers


def queues() -> set[Path]:
    return set(journal_queue.DIRECTORY.glob(f"{journal_queue.PREFIX}*"))


@pytest.fixture(autouse=True)
def earlier_queues() -> Iterator[set[Path]]:
    before = queues()
    yield before
    for path in queues() - before:
        path.unlink()  # of killed brokers that no other one followed


def settings(path: Path, **memory: Any) -> EngineSettings:
    return replace(SETTINGS, memory=MemorySettings(str(path / "channels.db"), **memory))


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


async def lose_power(broker: BrokerProcess, earlier_queues: set[Path]) -> None:
    """Kill a broker, and lose the memory of the machine."""
    await broker.kill()
    for path in queues() - earlier_queues:
        path.unlink()


async def page(worker: Worker, channel: str = "c") -> HistoryPage:
    return await worker.engine.ask(GetHistory(channel, KEEP, limit=-1))


def data(found: HistoryPage) -> list[bytes]:
    return [publication.data for publication in found.publications]


async def test_a_clean_restart_continues_all_channels(
    brokers: Any, workers: Any, tmp_path: Path, earlier_queues: set[Path]
) -> None:
    wanted = settings(tmp_path)
    broker, worker = await served(brokers, workers, wanted)
    kept = [await worker.publish("c", b"%d" % number) for number in range(5)]
    keyed = await worker.engine.ask(Publish("keyed", b"once", KEEP, idempotency_key="key"))
    await worker.publish("removed")
    await worker.engine.ask(RemoveHistory("removed"))
    quiet = (await page(worker, "quiet")).position
    await end(broker, worker)
    assert queues() == earlier_queues
    broker, worker = await served(brokers, workers, wanted)
    assert (await page(worker)).position == kept[-1]
    assert data(await page(worker)) == [b"0", b"1", b"2", b"3", b"4"]
    assert await worker.engine.ask(Publish("keyed", b"twice", KEEP, idempotency_key="key")) == keyed
    assert data(await page(worker, "removed")) == []
    assert (await page(worker, "quiet")).position == quiet
    assert await worker.publish() == Position(6, kept[-1].epoch)


async def test_a_killed_broker_loses_nothing_that_was_accepted(brokers: Any, workers: Any, tmp_path: Path) -> None:
    wanted = settings(tmp_path)
    position = Position()
    for number in range(3):
        broker, worker = await served(brokers, workers, wanted)
        for _ in range(200):
            position = await worker.publish("c", b"%d" % number)
        await broker.kill()
        worker.engine.close()
    broker, worker = await served(brokers, workers, wanted)
    assert (await page(worker)).position == position == Position(600, position.epoch)
    assert data(await page(worker)) == [b"2"] * 100


async def test_a_loss_of_power_gives_new_epochs_unless_everything_waited_for_the_disk(
    brokers: Any, workers: Any, tmp_path: Path, earlier_queues: set[Path]
) -> None:
    for fsync in ("interval", "never", "always"):
        folder = tmp_path / fsync
        folder.mkdir()
        wanted = settings(folder, fsync=fsync)
        broker, worker = await served(brokers, workers, wanted)
        await worker.engine.ask(Subscribe("c"))
        position = await worker.publish()
        quiet = (await page(worker, "quiet")).position
        assert worker.entries == [("published", "c", b"1", 1)]
        await lose_power(broker, earlier_queues)
        worker.engine.close()
        broker, worker = await served(brokers, workers, wanted)
        kept, after = await page(worker), (await page(worker, "quiet")).position
        assert ((kept.position == position), (after == quiet)) == ((fsync == "always",) * 2), fsync
        assert kept.position.epoch == position.epoch or kept.position.offset in (0, 1)
        worker.engine.close()


async def test_with_fsync_always_every_accepted_publication_is_in_the_file(
    brokers: Any, workers: Any, tmp_path: Path
) -> None:
    """Copies of the file at any time, each in the place of a disk after a loss of power."""
    wanted = settings(tmp_path, fsync="always")
    broker, worker = await served(brokers, workers, wanted)
    copies = []
    for number in range(6):
        position = await worker.publish("c", b"%d" % number)
        copy = tmp_path / f"disk-{number}"
        copy.mkdir()
        for file in tmp_path.glob("channels.db*"):
            shutil.copy(file, copy)
        copies.append((copy, position))
    await end(broker, worker)
    for copy, position in copies:
        # A disk has the same inode after a loss of power.
        with closing(sqlite3.connect(copy / "channels.db", isolation_level=None)) as database:
            database.execute("UPDATE run SET queue = '', inode = ?", (os.stat(copy / "channels.db").st_ino,))
        broker, worker = await served(brokers, workers, settings(copy, fsync="always"))
        assert (await page(worker)).position == position
        await end(broker, worker)


@pytest.mark.parametrize("cut", ["log", "middle", "head", "row", "records"])
async def test_a_damaged_file_is_set_aside_or_cut_and_never_continues_an_epoch(
    brokers: Any,
    workers: Any,
    tmp_path: Path,
    cut: str,
    earlier_queues: set[Path],
    capfd: pytest.CaptureFixture[str],
) -> None:
    wanted, database = settings(tmp_path), tmp_path / "channels.db"
    broker, worker = await served(brokers, workers, wanted)
    for _ in range(300):
        position = await worker.publish("c", b"x" * 100)
    if cut == "log":  # what a loss of power may leave of it
        await lose_power(broker, earlier_queues)
        worker.engine.close()
    else:
        await end(broker, worker)
    _damage(database, cut)
    broker, worker = await served(brokers, workers, wanted)
    assert (await page(worker)).position.epoch != position.epoch
    assert (await worker.publish()).offset >= 1
    lines = [line for line in capfd.readouterr().out.splitlines() if "channels.db" in line]
    assert len(lines) == 1, lines


def _damage(database: Path, cut: str) -> None:
    if cut == "log":
        log = Path(f"{database}-wal")
        os.truncate(log, log.stat().st_size * 2 // 3)
    elif cut == "row":
        with closing(sqlite3.connect(database, isolation_level=None)) as opened:
            opened.execute("DELETE FROM batch WHERE position = (SELECT max(position) FROM batch)")
    elif cut == "records":
        with closing(sqlite3.connect(database, isolation_level=None)) as opened:
            opened.execute("UPDATE batch SET records = zeroblob(length(records))")
    else:
        with database.open("r+b") as file:
            file.seek(0 if cut == "head" else database.stat().st_size // 2)
            file.write(os.urandom(5000))


async def test_an_older_copy_in_place_of_the_file_never_continues_an_epoch(
    brokers: Any, workers: Any, tmp_path: Path
) -> None:
    wanted, database = settings(tmp_path), tmp_path / "channels.db"
    broker, worker = await served(brokers, workers, wanted)
    first = await worker.publish("c", b"first")
    await end(broker, worker)
    shutil.copy(database, tmp_path / "backup")
    broker, worker = await served(brokers, workers, wanted)
    await worker.publish("c", b"second")
    await end(broker, worker)
    os.replace(tmp_path / "backup", database)
    broker, worker = await served(brokers, workers, wanted)
    assert data(await page(worker)) == [b"first"]
    assert (await page(worker)).position.epoch != first.epoch


async def test_a_full_disk_leaves_channels_in_memory_until_there_is_room(
    brokers: Any, workers: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    wanted = settings(tmp_path)
    broker, worker = await served(brokers, workers, wanted)
    position = await worker.publish("c", b"before")
    limit = resource.prlimit(broker.pid, resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
    full = [await worker.publish("c", b"full") for _ in range(10)]
    assert full[-1] == Position(11, position.epoch)
    await until_series(broker, "realtime_broker_storage_suspended", 1)
    assert (await worker.publish("c", b"later")).epoch == position.epoch
    assert not (tmp_path / "channels.db").exists()
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
    resource.prlimit(broker.pid, resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
    assert (await worker.publish("c", b"full")).offset == 2
    await broker.kill()
    worker.engine.close()
    broker, worker = await served(brokers, workers, wanted)
    assert (await page(worker)).position.epoch != position.epoch


async def test_the_file_stays_small_while_publications_come_and_go(brokers: Any, workers: Any, tmp_path: Path) -> None:
    wanted = settings(tmp_path, max_file_size=8 * 1024 * 1024, queue_size=1024 * 1024)
    broker, worker = await served(brokers, workers, wanted)
    for _ in range(100):  # 20 MB, of which half a MB is kept
        waiting = [worker.publish("c", b"x" * 5_000) for _ in range(40)]
        for publication in waiting:
            position = await publication
    series = await broker.series()
    assert series["realtime_broker_storage_failures"] == 0
    assert series["realtime_broker_stored_bytes"] > 20_000_000
    assert (tmp_path / "channels.db").stat().st_size <= 8 * 1024 * 1024
    await broker.kill()
    worker.engine.close()
    broker, worker = await served(brokers, workers, wanted)
    assert (await page(worker)).position == position
    assert len((await page(worker)).publications) == 100


async def test_history_expires_while_no_broker_runs(brokers: Any, workers: Any, tmp_path: Path) -> None:
    wanted = settings(tmp_path)
    broker, worker = await served(brokers, workers, wanted)
    position = await worker.publish("brief", b"1", HistoryOptions(10, 0.01))
    await end(broker, worker)
    broker, worker = await served(brokers, workers, wanted)
    assert data(await page(worker, "brief")) == []
    assert (await page(worker, "brief")).position == position


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
