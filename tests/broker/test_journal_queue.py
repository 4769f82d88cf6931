"""The queue in shared memory: what one process appends, the next one reads, whenever the first one was killed."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from realtime.broker import journal_queue
from realtime.broker.journal_queue import JournalQueue

TOKEN = os.urandom(16)


@pytest.fixture(autouse=True)
def shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(journal_queue, "DIRECTORY", tmp_path)
    yield tmp_path


@pytest.mark.parametrize("seed", range(10))
def test_another_process_reads_what_was_appended_and_not_freed(seed: int) -> None:
    chance, position = random.Random(seed), random.Random(seed).randrange(10_000)
    queue = JournalQueue.create(1000, TOKEN, position, 5.0)
    journal = bytes(position)
    for _ in range(500):
        data = chance.randbytes(chance.randrange(1, 300))
        if queue.append(data):
            journal += data
        else:
            assert queue.used + len(data) > 1000
        other = JournalQueue.open(queue.path, TOKEN)
        assert other is not None
        assert (other.head, other.tail) == (queue.head, len(journal))
        assert other.read(other.head, other.tail) == journal[other.head :]
        if chance.random() < 0.3:
            queue.free(chance.randint(queue.head, queue.tail), 7.0)


def test_the_marks_of_a_queue_outlive_its_process() -> None:
    queue = JournalQueue.create(1000, TOKEN, 3, 5.0)
    queue.append(b"abc")
    queue.free(4, 8.5)
    queue.mark(True)
    other = JournalQueue.open(queue.path, TOKEN)
    assert other is not None
    assert (other.head, other.shift, other.is_incomplete) == (4, 8.5, True)


def test_another_queue_is_refused(shared_memory: Path) -> None:
    queue = JournalQueue.create(1000, TOKEN, 0, 0.0)
    assert JournalQueue.open(queue.path, os.urandom(16)) is None
    assert JournalQueue.open(f"{queue.path}-other", TOKEN) is None
    assert JournalQueue.open(str(shared_memory), TOKEN) is None
    link = shared_memory / "link"
    link.symlink_to(queue.path)
    assert JournalQueue.open(str(link), TOKEN) is None
    for size in (1000, 10, 0):
        os.truncate(queue.path, size)
        assert JournalQueue.open(queue.path, TOKEN) is None
    queue.remove()
    assert JournalQueue.open(queue.path, TOKEN) is None
    queue.remove()


def test_without_shared_memory_the_queue_is_the_process_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_queue, "DIRECTORY", Path("/nowhere"))
    queue = JournalQueue.create(1000, TOKEN, 0, 0.0)
    assert queue.path == ""
    assert queue.append(b"abc")
    assert queue.read(0, 3) == b"abc"
    queue.remove()
