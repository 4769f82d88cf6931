"""The file of the journal: whole batches in order, whatever a crash left of it, or it is refused."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from realtime.broker.journal_file import Batch, ForeignDatabase, JournalFile, Run, set_aside
from realtime.pubsub.journal import BadJournal

SIZE = 4 * 1024 * 1024
RUN = Run("queue", b"token", "interval", 7, 1)


def opened(path: Path) -> JournalFile:
    return JournalFile(path, SIZE)


def batches_of(path: Path) -> list[bytes]:
    with closing(opened(path)) as file:
        return [batch.records for batch in file.batches()]


def batches(count: int, size: int = 300) -> list[Batch]:
    return [Batch(1 + number * size, 1 + (number + 1) * size, 0.5, bytes([number]) * size) for number in range(count)]


def test_another_process_finds_the_run_and_its_batches(tmp_path: Path) -> None:
    path, stored = tmp_path / "file", batches(4)
    with closing(opened(path)) as file:
        assert file.run() is None
        file.start(RUN, stored[:1])
        for batch in stored[1:]:
            file.add(batch)
        file.sync()
    with closing(opened(path)) as file:
        assert file.run() == RUN
        assert list(file.batches()) == stored
        assert (file.begin, file.position) == (1, 1201)
        file.drop(601)
    with closing(opened(path)) as file:
        assert list(file.batches()) == stored[2:]


def test_a_crash_at_any_byte_of_the_log_leaves_whole_batches_up_to_some_point(tmp_path: Path) -> None:
    path, chance, stored = tmp_path / "file", random.Random(1), batches(12)
    with closing(opened(path)) as file:
        file.start(RUN, stored[:1])
        copies = []
        for batch in stored[1:]:
            file.add(batch)
            copies.append(tmp_path / f"copy-{batch.position}")
            for suffix in ("", "-wal"):
                shutil.copy(f"{path}{suffix}", f"{copies[-1]}{suffix}")
    expected = [batch.records for batch in stored]
    for number, copy in enumerate(copies, 2):
        log = Path(f"{copy}-wal")
        whole = log.read_bytes()
        log.write_bytes(whole[: chance.randrange(len(whole))] + chance.randbytes(chance.choice((0, 700))))
        found = batches_of(copy)
        assert found == expected[: len(found)]
        log.write_bytes(whole)
        assert batches_of(copy)[: len(found)] == found
        assert len(found) <= number


def test_a_missing_or_changed_batch_is_found(tmp_path: Path) -> None:
    for statement in (
        "DELETE FROM batch WHERE position = 601",
        "UPDATE batch SET records = zeroblob(300) WHERE position = 601",
        "UPDATE batch SET start = 302 WHERE position = 601",
        "PRAGMA user_version = 99",
    ):
        path = tmp_path / "file"
        with closing(opened(path)) as file:
            file.start(RUN, batches(4))
        with closing(sqlite3.connect(path, isolation_level=None)) as database:
            database.execute(statement)
        with pytest.raises(BadJournal):
            batches_of(path)
        assert set_aside(path) == tmp_path / "file.damaged"
        assert batches_of(path) == []


def test_a_foreign_database_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE other (x)")
    before = path.read_bytes()
    with pytest.raises(ForeignDatabase):
        opened(path)
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("SELECT name FROM sqlite_master").fetchall() == [("other",)]
    assert path.read_bytes() == before


def test_a_clean_end_tells_a_copy_from_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    with closing(opened(path)) as file:
        file.start(RUN, batches(2))
        file.end()
    with closing(opened(path)) as file:
        run = file.run()
        assert run is not None
        assert (run.queue, run.token, run.position) == ("", b"", 601)
        assert not file.was_changed_after(run)
        earlier = Run(inode=run.inode, ended=run.ended - 60)
        assert file.was_changed_after(earlier)
    shutil.copy(path, tmp_path / "copy")
    os.replace(tmp_path / "copy", path)
    with closing(opened(path)) as file:
        assert file.was_changed_after(run)


def test_the_size_has_a_limit_and_dropped_batches_make_room(tmp_path: Path) -> None:
    with closing(opened(tmp_path / "file")) as file:
        file.start(RUN, [])
        position = 1
        with pytest.raises(sqlite3.OperationalError, match="full"):
            for _ in range(100):
                file.add(Batch(position, position + 100_000, 0.0, bytes(100_000)))
                position += 100_000
        assert file.size <= SIZE
        file.drop(position)
        file.add(Batch(position, position + 100_000, 0.0, bytes(100_000)))
        file.discard()
    assert list(tmp_path.iterdir()) == []
