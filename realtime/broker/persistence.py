"""Keeps the broker's channels in a file, so that a restart continues them: `engine.memory.path`.

    loop      each change is a record in the queue (`realtime.broker.journal_queue`): memory that outlives the process
    thread    writes the queued records to the file (`realtime.broker.journal_file`), in batches

The loop never waits for the disk. If the thread is far behind, the broker reads no requests for a moment
(`BACK_PRESSURE`); then, or when writing fails, persistence is *suspended*: the file is removed, as it lacks changes,
and the broker continues in memory. Later a fresh file gets the whole state, and persistence continues.

From time to time the loop writes the whole state as records, in slices, and the thread drops the batches before.

What the next broker continues (`_Loader`):

    the latest run ended cleanly           everything, under the same epochs
    its process was killed                 the same: the queue has the rest
    the machine went down                  with fsync "always" the same, as no answer or delivery has left before its
                                           changes were on the disk; else the stored publications, under new epochs
    a copy was put in place of the file    the stored publications, under new epochs
"""

from __future__ import annotations

import queue
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from msgspec import Struct
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall
from twisted.internet.task import deferLater
from twisted.logger import Logger

from realtime.broker.journal_file import LOCK_TIMEOUT, Batch, ForeignDatabase, JournalFile, Run, set_aside
from realtime.broker.journal_queue import JournalQueue
from realtime.config.settings import MemorySettings
from realtime.errors import RealtimeError
from realtime.metrics import Metrics
from realtime.pubsub.broker_state import StatePart
from realtime.pubsub.history import EpochsState
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

COMMIT_INTERVAL = 0.05
"""Seconds in which the changes of one batch collect, unless answers wait for it."""

BACK_PRESSURE = 2.0
"""Seconds for which requests wait while the queue is more than half full, before persistence is suspended."""

FREEZE_TIMEOUT = 0.5
"""Seconds for which the loop waits for the disk before a process takes its place, where answers wait for it anyway."""

SNAPSHOT_SLICE = 0.002
SNAPSHOT_PAUSE = 0.01
"""Seconds of work on a snapshot in one turn of the loop, and between two such turns."""

SNAPSHOT_MIN = 16 * 1024 * 1024
"""Bytes that a journal grows by before a snapshot, at least: a snapshot then drops more than it writes."""

RETRY_MIN, RETRY_MAX = 1.0, 600.0
"""Seconds from a suspension to the next attempt; each failure doubles them."""

IMPORTED = 500
"""Channels that one turn of the loop reads back."""

_log = Logger()


class Persistable(Protocol):
    """The broker, as far as persistence needs it."""

    def hold_back(self, is_held: bool) -> None:
        """Stop or continue reading requests."""


class _Loaded(Struct):
    """An opened file, and what it has. parts: see `JournalReplay.state`. failure: why it can't be written to, or ""."""

    file: JournalFile
    queue: JournalQueue
    parts: Iterator[Any]
    note: str
    failure: str = ""


class _Loader:
    """Opens the file in the thread, and decides what continues. See the module."""

    def __init__(self, settings: MemorySettings) -> None:
        self._settings = settings
        self._path = Path(settings.path)
        self._notes: list[str] = []

    def load(self) -> _Loaded:
        """Raises RealtimeError with a line for the operator if there can be no file in this place."""
        path = self._path
        deadline = time.monotonic() + LOCK_TIMEOUT
        try:
            while True:
                try:
                    return self._load()
                except sqlite3.OperationalError as error:
                    if "locked" not in str(error) or time.monotonic() >= deadline:
                        raise
                    time.sleep(0.1)
                except (BadJournal, sqlite3.DatabaseError) as error:
                    aside = set_aside(path)
                    self._notes.append(f"{path} is damaged ({error}): it is {aside} now, and all channels start anew")
        except ForeignDatabase:
            raise RealtimeError(
                f"engine.memory.path = {str(path)!r} is the database of another program; name another file"
            ) from None
        except (sqlite3.Error, OSError) as error:
            if "locked" in str(error):
                problem = "another server has the file; each server needs its own"
            else:
                problem = f"{error}; correct the path, or give the server's user the right to write there"
            raise RealtimeError(f"engine.memory.path = {str(path)!r}: {problem}") from None

    def _load(self) -> _Loaded:
        file = JournalFile(self._path, self._settings.max_file_size)
        try:
            return self._read(file)
        except BaseException:
            file.close()
            raise

    def _read(self, file: JournalFile) -> _Loaded:
        shift = wall_shift()
        replay, run = JournalReplay(), file.run()
        for batch in file.batches():
            for record in records_in(batch.records):
                replay.apply(record, batch.shift)
        if run is not None and (file.position < run.position or (replay.is_empty and run.complete)):
            raise BadJournal("its last or first records are missing")
        left, added = self._left_queue(file, run), []
        position = max(file.position, 1)  # 0 means that there is no batch
        if left is not None and left.tail > position:
            rest = left.read(position, left.tail)
            for record in records_in(rest):
                replay.apply(record, left.shift)
            added.append(Batch(position, left.tail, left.shift, rest))
            position = left.tail
        elif run is None or replay.is_empty:
            first = EpochsState(secrets.token_bytes(16), {})
            added.append(_batch(position, shift, first))
            replay.apply(first, shift)
            position = added[-1].position
        if run is not None and left is None and not self._is_whole(file, run):
            renewed = Renewed(secrets.token_bytes(16))
            added.append(_batch(position, shift, renewed))
            replay.apply(renewed, shift)
            position = added[-1].position
            self._notes.append(
                f"{file.path}: its server ended without storing its latest changes; channels continue under new epochs,"
                " and clients are informed"
            )
        return self._begin(file, replay, left, added, position)

    def _begin(
        self, file: JournalFile, replay: JournalReplay, left: JournalQueue | None, added: list[Batch], position: int
    ) -> _Loaded:
        shift, settings = wall_shift(), self._settings
        fresh = JournalQueue.create(settings.queue_size, secrets.token_bytes(16), position, shift)
        if not fresh.path:
            self._notes.append("/dev/shm has no room for the queue: a killed broker loses its latest changes")
        failure = ""
        try:
            file.start(Run(fresh.path, fresh.token, settings.fsync, file.inode, position), added)
        except sqlite3.Error as error:
            # As it is, the file would continue an earlier state.
            failure = str(error)
            file.discard()
        if left is not None:
            left.remove()
        note = "; ".join(self._notes)
        return _Loaded(file, fresh, replay.state(time.monotonic(), shift), note, failure)

    def _left_queue(self, file: JournalFile, run: Run | None) -> JournalQueue | None:
        """Return the queue of the latest run, if it has all changes behind the last batch."""
        if run is None or not run.token:
            return None
        left = JournalQueue.open(run.queue, run.token)
        if left is None:
            return None
        if left.is_incomplete or not left.head <= max(file.position, 1) <= left.tail:
            left.remove()
            return None
        return left

    def _is_whole(self, file: JournalFile, run: Run) -> bool:
        """Whether the batches have all changes of the latest run that a client may know of."""
        if not run.token:
            return not file.was_changed_after(run)
        return run.fsync == "always" and run.complete and run.inode == file.inode


def wall_shift() -> float:
    """Return the seconds from the monotonic clock to Unix time."""
    return time.time() - time.monotonic()


def _batch(position: int, shift: float, record: Change | StatePart) -> Batch:
    data = frame(record)
    return Batch(position, position + len(data), shift, data)


class _Thread:
    """Runs functions one after another, in a thread of its own."""

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor
        self._jobs: queue.SimpleQueue[tuple[Callable[[], Any], Callable[[Any, BaseException | None], None]]] = (
            queue.SimpleQueue()
        )
        threading.Thread(target=self._work, name="journal", daemon=True).start()

    def run(self, job: Callable[[], Any], done: Callable[[Any, BaseException | None], None]) -> None:
        """Run a function; its result or exception goes to `done`, on the loop."""
        self._jobs.put((job, done))

    def _work(self) -> None:
        while True:
            job, done = self._jobs.get()
            result, failure = None, None
            try:
                result = job()
            except BaseException as error:
                failure = error
            self._reactor.callFromThread(done, result, failure)


class Persistence:
    """Writes the changes of the streams and keys to the file. See the module.

    streams, keys: for the core. on_stored: called with a position once everything before it is in the file, by a
    broker whose answers wait (`waits`).
    """

    def __init__(
        self, settings: MemorySettings, max_channels: int, metrics: Metrics, reactor: Any, broker: Persistable
    ) -> None:
        self._settings = settings
        self._reactor = reactor
        self._broker = broker
        self._thread = _Thread(reactor)
        self.streams = JournaledStreams(max_channels, self._write, settings.queue_size // 4)
        self.keys = JournaledKeys(max_channels, self._write)
        self.waits = settings.fsync == "always"
        self.on_stored: Callable[[int], None] = lambda position: None
        self._stored = 0
        self._is_open = False  # whether changes go to the queue
        self._is_over = False  # the file is another process's
        self._is_incomplete = False  # the file lacks changes, until the next snapshot is complete
        self._is_removing = False  # it is to be removed for that
        self._remove: Callable[[], None] = lambda: self._file.discard()
        self._is_relied_on = False  # whether the file may be all that is left after a loss of power
        self._is_committing = False
        self._timer: IDelayedCall | None = None
        self._sync_timer: IDelayedCall | None = None
        self._held_since: float | None = None
        self._retry_delay = RETRY_MIN
        self._snapshot: Iterator[StatePart] | None = None
        self._snapshot_begin = self._snapshot_end = 0
        self._snapshot_bytes = 0
        self._file: JournalFile
        self._queue: JournalQueue
        self._commits = metrics.counter("realtime_broker_stored_batches", "Batches of changes written to the file.")
        self._bytes = metrics.counter("realtime_broker_stored_bytes", "Bytes of changes written to the file.")
        self._waits = metrics.counter(
            "realtime_broker_storage_waits", "Times that requests waited because the file was behind."
        )
        self._failures = metrics.counter("realtime_broker_storage_failures", "Suspensions of the storage of channels.")
        metrics.gauge("realtime_broker_storage_suspended", "1 while channels are in memory alone.", self._suspended)
        metrics.gauge("realtime_broker_unstored_bytes", "Bytes of changes not in the file yet.", self._unstored)
        metrics.gauge("realtime_broker_file_bytes", "Size of the file.", lambda: self._file_bytes)
        self._file_bytes = 0

    def _suspended(self) -> int:
        return int(self._is_incomplete)

    def _unstored(self) -> int:
        return self._queue.used if self._is_open else 0

    @property
    def is_behind(self) -> bool:
        """Whether the file lacks changes that a client must not know of before it has them."""
        return self._is_removing or (self._is_relied_on and self._queue.tail > self._stored)

    @property
    def is_holding_back(self) -> bool:
        """Whether requests wait for the file."""
        return self._held_since is not None

    @property
    def position(self) -> int:
        """The position behind the latest change."""
        return self._queue.tail

    # The start

    async def load(self, take: Callable[[Any], None]) -> None:
        """Open the file, and pass its state to `take`, in parts. Raises RealtimeError with a line for the operator."""
        loaded = await self._run(_Loader(self._settings).load)
        self._file, self._queue = loaded.file, loaded.queue
        for number, part in enumerate(loaded.parts, 1):
            take(part)
            if number % IMPORTED == 0:
                await deferLater(self._reactor, 0)
        if loaded.note:
            _log.warn("{note}", note=loaded.note)
        self._stored = self._queue.tail
        self._is_open = self._is_relied_on = True
        if loaded.failure:
            self._suspend(loaded.failure)
        else:
            self._snapshot_bytes = self._file.position - self._file.begin
            self._file_bytes = self._file.size

    def _run(self, job: Callable[[], Any]) -> Deferred[Any]:
        finished: Deferred[Any] = Deferred()

        def done(result: Any, error: BaseException | None) -> None:
            if error is None:
                finished.callback(result)
            else:
                finished.errback(error)

        self._thread.run(job, done)
        return finished

    # Changes

    def _write(self, record: Change | StatePart) -> None:
        """Queue the record of a change."""
        if not self._is_open:
            return
        changes = self._queue
        if not changes.append(frame(record)):
            self._suspend("the disk is too slow, and engine.memory.queue_size has no room for more changes")
        elif self._timer is None and not self._is_committing:
            self._timer = self._reactor.callLater(0 if self.waits else COMMIT_INTERVAL, self._commit)
        elif changes.used > changes.capacity // 4 and not self._is_committing:
            self._commit()
        elif changes.used > changes.capacity // 2 and self._held_since is None:
            self._waits.value += 1
            self._held_since = self._reactor.seconds()
            self._broker.hold_back(True)
            self._reactor.callLater(BACK_PRESSURE, self._check_pressure, self._held_since)

    def _check_pressure(self, since: float) -> None:
        if self._held_since == since and not self.waits:
            self._suspend(f"the disk has not taken {self._queue.used} bytes of changes within {BACK_PRESSURE:g} s")

    def _relieve(self) -> None:
        if self._held_since is not None:
            self._held_since = None
            self._broker.hold_back(False)

    def _commit(self) -> None:
        """Have the thread write everything that is queued."""
        if self._timer is not None and self._timer.active():
            self._timer.cancel()
        self._timer = None
        if not self._is_open or self._is_committing:
            return
        self._is_committing = True
        file, changes, end = self._file, self._queue, self._queue.tail
        start = changes.head

        def store() -> int:
            if end > start:
                file.add(Batch(start, end, wall_shift(), changes.read(start, end)))
                changes.free(end, wall_shift())
            return file.size

        self._thread.run(store, lambda size, error: self._committed(start, end, size, error))

    def _committed(self, start: int, end: int, size: int, error: BaseException | None) -> None:
        self._is_committing = False
        if not self._is_open:
            return  # suspended meanwhile
        if error is not None:
            self._suspend(str(error))
            return
        self._commits.value += 1
        self._bytes.value += end - start
        self._file_bytes = size
        self._stored = max(self._stored, end)
        if self._queue.used <= self._queue.capacity // 4:
            self._relieve()
        if self._snapshot_end and end >= self._snapshot_end:
            self._end_snapshot()
        elif self._snapshot is None and not self._snapshot_end and end - self._file.begin > self._snapshot_due():
            self._begin_snapshot()
        if self._settings.fsync == "interval" and self._sync_timer is None:
            self._sync_timer = self._reactor.callLater(self._settings.fsync_interval, self._sync)
        if self._queue.tail > end:
            if self.waits or self._queue.used > self._queue.capacity // 4:
                self._commit()
            elif self._timer is None:
                self._timer = self._reactor.callLater(COMMIT_INTERVAL, self._commit)
        self.on_stored(end)

    def _sync(self) -> None:
        self._sync_timer = None
        if self._is_open:
            self._thread.run(self._file.sync, self._synced)

    def _synced(self, result: None, error: BaseException | None) -> None:
        if error is not None and self._is_open:
            self._suspend(str(error))

    # Snapshots

    def _snapshot_due(self) -> int:
        """Bytes of a journal from which on it gets shorter by a snapshot."""
        wanted = min(SNAPSHOT_MIN + 2 * self._snapshot_bytes, self._settings.max_file_size // 2)
        return max(wanted, self._snapshot_bytes * 3 // 2)

    def _begin_snapshot(self) -> None:
        self._snapshot_begin, self._snapshot_end = self._queue.tail, 0
        self._snapshot = self._state()
        self._reactor.callLater(0, self._continue_snapshot)

    def _state(self) -> Iterator[StatePart]:
        yield from self.streams.snapshot()
        yield from self.keys.snapshot()

    def _continue_snapshot(self) -> None:
        snapshot, end = self._snapshot, self._reactor.seconds() + SNAPSHOT_SLICE
        if snapshot is None or not self._is_open:
            return
        while self._is_open and self._queue.used < self._queue.capacity // 2:
            part = next(snapshot, None)
            if part is None:
                self._snapshot, self._snapshot_end, self._is_relied_on = None, self._queue.tail, True
                self._snapshot_bytes = self._snapshot_end - self._snapshot_begin
                self._commit()
                return
            self._write(part)
            if self._reactor.seconds() >= end:
                break
        self._reactor.callLater(SNAPSHOT_PAUSE, self._continue_snapshot)

    def _end_snapshot(self) -> None:
        """Drop everything before the snapshot, which is in the file now."""
        begin, self._snapshot_end = self._snapshot_begin, 0
        file, changes, was_incomplete = self._file, self._queue, self._is_incomplete

        def drop() -> None:
            if was_incomplete:
                file.note(Run(changes.path, changes.token, self._settings.fsync, file.inode, file.position))
            file.drop(begin)

        self._thread.run(drop, self._dropped)

    def _dropped(self, result: None, error: BaseException | None) -> None:
        if not self._is_open:
            return
        if error is not None:
            self._suspend(str(error))
        elif self._is_incomplete:
            self._is_incomplete = False
            self._queue.mark(False)
            self._retry_delay = RETRY_MIN
            _log.info("channels are stored in {path} again", path=self._settings.path)

    # Suspension

    def _suspend(self, reason: str) -> None:
        """Continue in memory, and remove the file, which will lack changes from now on."""
        self._failures.value += 1
        self._is_open, self._is_incomplete, self._is_removing = False, True, True
        self._queue.mark(True)
        self._snapshot, self._snapshot_end = None, 0
        _log.error(
            "channels can't be stored in {path}: {reason}; they are in memory alone, and the server tries again in"
            " {delay:g} s",
            path=self._settings.path,
            reason=reason,
            delay=self._retry_delay,
        )
        self._relieve()
        self._discard()

    def _discard(self) -> None:
        self._thread.run(self._remove, self._discarded)

    def _discarded(self, result: None, error: BaseException | None) -> None:
        if error is not None:
            # Answers that wait go on waiting: after a loss of power the file would continue an earlier state.
            _log.error("{path} can't be removed: {error}; remove it", path=self._settings.path, error=error)
            self._reactor.callLater(RETRY_MIN, self._discard)
            return
        self._is_removing = self._is_relied_on = False
        self._stored = self._queue.tail
        self.on_stored(self._queue.tail)
        self._reactor.callLater(self._retry_delay, self._resume)
        self._remove = lambda: self._file.discard()
        self._retry_delay = min(max(2 * self._retry_delay, RETRY_MIN), RETRY_MAX)

    def _resume(self) -> None:
        """Start a fresh file with a snapshot."""
        if self._is_over:
            return
        position, changes, settings = self._queue.tail, self._queue, self._settings

        def create() -> JournalFile:
            file = JournalFile(Path(settings.path), settings.max_file_size)
            try:
                file.begin = file.position = position
                file.start(Run(changes.path, changes.token, settings.fsync, file.inode, complete=False), [])
            except BaseException:
                file.discard()
                raise
            return file

        self._thread.run(create, self._resumed)

    def _resumed(self, file: JournalFile | None, error: BaseException | None) -> None:
        if file is None:
            _log.error(
                "{path} can't be made: {error}; channels are in memory alone, and the server tries again in"
                " {delay:g} s",
                path=self._settings.path,
                error=error,
                delay=self._retry_delay,
            )
            self._reactor.callLater(self._retry_delay, self._resume)
            self._retry_delay = min(max(2 * self._retry_delay, RETRY_MIN), RETRY_MAX)
            return
        self._file = file
        self._queue.free(self._queue.tail, wall_shift())
        self._is_open = True
        self._begin_snapshot()

    # Another process that takes the place of this one: `realtime.broker.handover`

    def freeze(self) -> bool:
        """Stop before another process goes on with all channels, which changes them in a file of its own.

        False if answers wait for a disk that is slow. Blocks for FREEZE_TIMEOUT at most.
        """
        if self._is_removing or (self.waits and self.is_behind and not self._store_now()):
            return False
        self._queue.mark(True)
        return True

    def _store_now(self) -> bool:
        file, changes, end, stored = self._file, self._queue, self._queue.tail, threading.Event()

        def store() -> None:
            if end > changes.head:
                file.add(Batch(changes.head, end, wall_shift(), changes.read(changes.head, end)))
                changes.free(end, wall_shift())
            stored.set()

        self._thread.run(store, lambda result, error: None)  # an error comes again with the next batch
        if not stored.wait(FREEZE_TIMEOUT):
            return False
        self._stored = end
        self.on_stored(end)
        return True

    def thaw(self) -> None:
        """Go on, as no other process does."""
        self._queue.mark(self._is_incomplete)

    def release(self) -> None:
        """Close the file: another process goes on."""
        is_open, self._is_open, self._is_over, changes = self._is_open, False, True, self._queue
        if is_open:
            self._thread.run(self._file.close, lambda result, error: None)
        changes.remove()

    def take_over(self) -> None:
        """Go on with the channels of another process, and store them in a fresh file in place of its own."""
        path, max_bytes, settings = Path(self._settings.path), self._settings.max_file_size, self._settings

        def discard() -> None:
            try:
                JournalFile(path, max_bytes).discard()  # waits for the other process to close it
            except (BadJournal, sqlite3.DatabaseError) as error:
                if isinstance(error, sqlite3.OperationalError):
                    raise
                set_aside(path)

        self._queue = JournalQueue.create(settings.queue_size, secrets.token_bytes(16), 1, wall_shift())
        self._queue.mark(True)
        self._is_incomplete = self._is_removing = True
        self._retry_delay = 0.0
        self._remove = discard
        self._thread.run(discard, self._discarded)

    # The end

    async def close(self) -> None:
        """Store everything, note the clean end, and close the file."""
        if not self._is_open:
            if not self._is_removing:
                self._queue.remove()
            return
        self._is_open = False
        file, changes, is_incomplete = self._file, self._queue, self._is_incomplete

        def end() -> None:
            if is_incomplete:
                file.discard()
                return
            if changes.used:
                file.add(Batch(changes.head, changes.tail, wall_shift(), changes.read(changes.head, changes.tail)))
            file.end()

        try:
            await self._run(end)
        except (sqlite3.Error, OSError) as error:
            _log.error("the end of {path} can't be stored: {error}", path=file.path, error=error)
            return
        changes.remove()
