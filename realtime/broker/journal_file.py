"""The file of a broker's journal: an SQLite database with the records of `realtime.pubsub.journal`, in batches.

A batch is one row, with its positions in the journal and a checksum. SQLite makes a transaction whole or undone, cuts
what a crash has left half written, and reuses the space of dropped batches. The only row of the table `run` says how
the journal can be continued after the broker that writes it has ended:

    queue, token   the `JournalQueue` with the changes behind the last batch; an empty token after a clean end
    fsync          "always" if no answer has left before its changes were on the disk
    inode          of the file, which tells it from most copies
    position       where its last batch ended at that time, at least
    complete       whether the batches make up the whole state
    ended          the Unix time of the clean end. A file that was changed later is the copy of an older one
"""

from __future__ import annotations

import os
import sqlite3
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from realtime.pubsub.journal import FORMAT, BadJournal

APPLICATION = 0x52544A4C
"""Identifies the file among SQLite databases."""

LOCK_TIMEOUT = 15.0
"""Seconds to wait for another broker to close the file: that of a server whose supervisor was killed needs a while."""

LATE = 10.0
"""Seconds between the recorded end of a run and the last change of its file at most."""

PAGE_SIZE = 4096
DROPPED = 8
"""Batches that one transaction drops, so that it stays short."""

_TABLES = """
CREATE TABLE batch (position INTEGER PRIMARY KEY, start INTEGER, shift REAL, checksum INTEGER, records BLOB) STRICT;
CREATE TABLE run
 (queue TEXT, token BLOB, fsync TEXT, inode INTEGER, position INTEGER, complete INTEGER, ended REAL) STRICT;
"""
_SYNCHRONOUS = {"always": "FULL", "interval": "NORMAL", "never": "OFF"}


class ForeignDatabase(Exception):
    """The file is the SQLite database of another program."""


class Run(Struct, frozen=True, array_like=True):
    """The row of the table `run`, see the module."""

    queue: str = ""
    token: bytes = b""
    fsync: str = ""
    inode: int = 0
    position: int = 0
    complete: bool = True
    ended: float = 0.0


class Batch(Struct, frozen=True):
    """Records between two positions. shift: from their times to Unix times."""

    start: int
    position: int
    shift: float
    records: bytes


class JournalFile:
    """An open file, locked for this process. One thread uses it at a time. Methods raise sqlite3.Error and OSError.

    position: where its last batch ends. begin: where its first one starts. size: of the file, in bytes, without the
    write-ahead log.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        """Open or make the file. max_bytes: of its size. Raises ForeignDatabase, and BadJournal for another format."""
        self.path = path
        self.begin = self.position = 0
        self._database = sqlite3.connect(path, LOCK_TIMEOUT, isolation_level=None, check_same_thread=False)
        try:
            self._prepare(max_bytes)
        except BaseException:
            self._database.close()
            raise

    def _prepare(self, max_bytes: int) -> None:
        do = self._database.execute
        do(f"PRAGMA page_size={PAGE_SIZE}")
        do("PRAGMA locking_mode=EXCLUSIVE")
        is_ours = self._value("PRAGMA application_id") == APPLICATION
        if not is_ours and self._value("SELECT count(*) FROM sqlite_master"):
            raise ForeignDatabase
        do("PRAGMA journal_mode=WAL")
        do(f"PRAGMA journal_size_limit={16 * 1024 * 1024}")
        do("PRAGMA synchronous=FULL")
        self._transaction()
        if not is_ours:
            for statement in _TABLES.strip().split(";"):
                do(statement)
            do(f"PRAGMA application_id={APPLICATION}")
            do(f"PRAGMA user_version={FORMAT}")
        elif (version := self._value("PRAGMA user_version")) != FORMAT:
            raise BadJournal(f"its format is {version}, this server's is {FORMAT}")
        do("COMMIT")
        do(f"PRAGMA max_page_count={max(max_bytes // PAGE_SIZE, 16)}")

    def _value(self, statement: str) -> Any:
        return self._database.execute(statement).fetchone()[0]

    @property
    def size(self) -> int:
        return int(self._value("PRAGMA page_count")) * PAGE_SIZE

    # Reading

    def run(self) -> Run | None:
        """Return how the latest run began or ended, None in a new file."""
        row = self._database.execute("SELECT * FROM run").fetchone()
        return msgspec.convert(row, Run, strict=False) if row is not None else None

    def batches(self) -> Iterator[Batch]:
        """Yield all batches in order. Raises BadJournal if one is damaged or missing."""
        rows = self._database.execute("SELECT start, position, shift, records, checksum FROM batch ORDER BY position")
        for start, position, shift, records, checksum in rows:
            if self.position and start != self.position:
                raise BadJournal(f"the records from {self.position} to {start} are missing")
            if position != start + len(records) or zlib.crc32(records) != checksum:
                raise BadJournal(f"the records from {start} to {position} have another checksum")
            self.begin = self.begin or start
            self.position = position
            yield Batch(start, position, shift, records)

    def was_changed_after(self, run: Run) -> bool:
        """Whether the file is another one than at the clean end of this run, or was written later: a copy."""
        status = os.stat(self.path)
        return status.st_ino != run.inode or status.st_ctime > run.ended + LATE

    @property
    def inode(self) -> int:
        return os.stat(self.path).st_ino

    # Writing

    def start(self, run: Run, batches: list[Batch]) -> None:
        """Begin a run: store its row and its first batches on the disk, all or nothing."""
        self._transaction()
        for batch in batches:
            self._insert(batch)
        self._replace_run(run)
        self._database.execute("COMMIT")
        self._database.execute(f"PRAGMA synchronous={_SYNCHRONOUS[run.fsync]}")

    def add(self, batch: Batch) -> None:
        """Store a batch."""
        self._transaction()
        self._insert(batch)
        self._database.execute("COMMIT")

    def _insert(self, batch: Batch) -> None:
        row = batch.position, batch.start, batch.shift, zlib.crc32(batch.records), batch.records
        self._database.execute("INSERT INTO batch VALUES (?, ?, ?, ?, ?)", row)
        self.begin = self.begin or batch.start
        self.position = batch.position

    def sync(self) -> None:
        """Wait until the disk has all batches."""
        fd = os.open(f"{self.path}-wal", os.O_RDWR | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def drop(self, position: int) -> None:
        """Drop the batches up to a position."""
        drop = f"DELETE FROM batch WHERE position IN (SELECT position FROM batch WHERE position <= ? LIMIT {DROPPED})"
        while self._database.execute(drop, (position,)).rowcount:
            pass
        self.begin = position

    def note(self, run: Run) -> None:
        """Replace the row of the run, on the disk together with all batches."""
        self._database.execute("PRAGMA synchronous=FULL")
        self._transaction()
        self._replace_run(run)
        self._database.execute("COMMIT")
        if run.fsync:
            self._database.execute(f"PRAGMA synchronous={_SYNCHRONOUS[run.fsync]}")

    def _replace_run(self, run: Run) -> None:
        self._database.execute("DELETE FROM run")
        row = run.queue, run.token, run.fsync, run.inode, run.position, int(run.complete), run.ended
        self._database.execute("INSERT INTO run VALUES (?, ?, ?, ?, ?, ?, ?)", row)

    def _transaction(self) -> None:
        if self._database.in_transaction:
            self._database.execute("ROLLBACK")
        self._database.execute("BEGIN IMMEDIATE")

    # The end

    def end(self) -> None:
        """Note a clean end, and close the file."""
        self.note(Run(inode=self.inode, position=self.position, ended=time.time()))
        self.close()

    def close(self) -> None:
        """Close the file as it is. Idempotent."""
        self._database.close()

    def discard(self) -> None:
        """Close and remove the file: it lacks changes."""
        with suppress(sqlite3.Error):
            self._database.close()
        for path in (self.path, Path(f"{self.path}-wal")):
            path.unlink(missing_ok=True)
        _sync_directory(self.path.parent)


def set_aside(path: Path) -> Path:
    """Rename a damaged file, in place of an earlier damaged one; return its new path."""
    aside = Path(f"{path}.damaged")
    for suffix in ("-wal", ""):
        with suppress(FileNotFoundError):
            os.replace(f"{path}{suffix}", f"{aside}{suffix}")
    _sync_directory(path.parent)
    return aside


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
