"""The vitals page: what is written is read, and nothing else ever is."""

from __future__ import annotations

import fcntl
import math
import mmap
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as profile
from hypothesis import strategies as st
from msgspec.structs import replace

from realtime.supervision.vitals import ProcessState, RunningHandler, Vitals, VitalsPage

READING = Vitals(
    beat=123_456_789,
    lag=0.25,
    connections=5000,
    subscriptions=7000,
    state=ProcessState.READY,
    utilization=0.75,
    turns=80,
    callbacks=90,
    queued_bytes=100,
    threads_busy=2,
    threads_waiting=3,
    rss=60_000_000,
)


@pytest.fixture
def page() -> Iterator[VitalsPage]:
    page = VitalsPage.create()
    yield page
    page.close()


def other_side(page: VitalsPage) -> VitalsPage:
    return VitalsPage.open(os.dup(page.fd))


def test_a_new_page_has_no_reading(page: VitalsPage) -> None:
    assert page.read() is None


def test_the_other_side_reads_what_was_written(page: VitalsPage) -> None:
    reader = other_side(page)
    for beat in range(1, 5):
        written = Vitals(beat, beat / 2, beat * 3, beat * 4, ProcessState.DRAINING)
        page.write(written)
        assert reader.read() == written
    reader.close()


def test_every_field_survives(page: VitalsPage) -> None:
    page.write(READING)
    assert other_side(page).read() == READING


def test_busy_since_needs_no_reading_of_its_own(page: VitalsPage) -> None:
    page.write(READING)
    page.set_busy_since(7)
    reader = other_side(page)
    assert reader.read() == replace(READING, busy_since=7)
    page.set_busy_since(0)
    assert reader.read() == READING


def test_the_latest_long_turn_is_whole_or_none(page: VitalsPage) -> None:
    page.write(READING)
    page.record_block(5, 9)
    assert other_side(page).read() == replace(READING, block_since=5, block_until=9)
    page.record_block(20, 3)
    assert other_side(page).read() == READING


def test_the_handler_that_runs_shows(page: VitalsPage) -> None:
    reader = other_side(page)
    assert reader.running() is None
    page.mark(b"on_publish chat:*", b"chat:7")
    assert reader.running() == RunningHandler("on_publish chat:*", "chat:7")
    page.mark(b"rpc report", b"")
    assert reader.running() == RunningHandler("rpc report", "")
    page.unmark()
    assert reader.running() is None


def test_a_name_that_is_too_long_is_cut(page: VitalsPage) -> None:
    page.mark(b"h" * 100, ("x" * 63 + "\u00e9").encode())
    assert other_side(page).running() == RunningHandler("h" * 64, "x" * 63 + "\ufffd")


def test_a_handler_that_just_changes_is_none(page: VitalsPage) -> None:
    page.mark(b"rpc a", b"")
    memory = mmap.mmap(page.fd, mmap.PAGESIZE)
    struct.pack_into("=q64s", memory, 384, 2, b"rpc b")  # the writer has come half the way
    assert page.running() is None
    memory.close()


def test_relief_goes_the_other_way(page: VitalsPage) -> None:
    worker = other_side(page)
    assert not worker.has_relief()
    page.set_relief(True)
    worker.write(READING)
    assert worker.has_relief()
    page.set_relief(False)
    assert not worker.has_relief()


@given(
    beat=st.integers(1, 2**63 - 1),
    lag=st.floats(0, 1e9),
    connections=st.integers(0, 2**63 - 1),
    subscriptions=st.integers(0, 2**63 - 1),
    state=st.sampled_from(ProcessState),
)
@profile(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_true_reading_survives(
    page: VitalsPage, beat: int, lag: float, connections: int, subscriptions: int, state: ProcessState
) -> None:
    vitals = Vitals(beat, lag, connections, subscriptions, state)
    page.write(vitals)
    assert page.read() == vitals


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (0, 0),
        (0, -5),
        (1, math.nan),
        (1, math.inf),
        (1, -0.1),
        (2, -1),
        (3, -1),
        (4, 0),
        (4, 5),
        (5, math.nan),
        (5, -0.1),
        (5, 1.1),
        (8, -1),
        (11, -1),
    ],
)
def test_nonsense_is_no_reading(page: VitalsPage, field: int, value: float) -> None:
    values: list[float] = [1, 0.0, 0, 0, 1, 0.0, 0, 0, 0, 0, 0, 0]
    values[field] = value
    memory = mmap.mmap(page.fd, mmap.PAGESIZE)
    struct.pack_into("=Qqdqqqdqqqqqq", memory, 0, 2, *values)
    memory.close()
    assert page.read() is None


@given(content=st.binary(min_size=1024, max_size=1024))
@profile(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_arbitrary_bytes_never_raise(page: VitalsPage, content: bytes) -> None:
    memory = mmap.mmap(page.fd, mmap.PAGESIZE)
    memory[: len(content)] = content
    memory.close()
    reading = page.read()
    assert reading is None or reading.beat > 0
    page.running()
    page.has_relief()


def test_a_torn_page_is_no_reading_until_the_next_write(page: VitalsPage) -> None:
    page.write(READING)
    reader = other_side(page)
    memory = mmap.mmap(page.fd, mmap.PAGESIZE)
    struct.pack_into("=Q", memory, 0, 3)  # a writer that was killed in the middle
    assert reader.read() is None
    successor = other_side(page)
    successor.write(READING)
    assert reader.read() == READING
    memory.close()
    reader.close()
    successor.close()


def test_nobody_can_resize_the_page_under_the_other(page: VitalsPage) -> None:
    for size in (0, 100, 8192):
        with pytest.raises(PermissionError):
            os.ftruncate(page.fd, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(page.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


def test_what_is_not_a_page_is_refused(tmp_path: object) -> None:
    with open(f"{tmp_path}/short", "w+b") as file, pytest.raises(ValueError):
        VitalsPage.open(file.fileno())


WRITER = """
import sys
from realtime.supervision.vitals import ProcessState, Vitals, VitalsPage
page = VitalsPage.open(int(sys.argv[1]))
count = 0
while True:
    count += 1
    page.write(Vitals(count, float(count), count, count, ProcessState.READY))
"""


def test_a_reader_never_sees_a_mixture_of_two_writes(page: VitalsPage) -> None:
    command = [sys.executable, "-c", WRITER, str(page.fd)]
    writer = subprocess.Popen(command, pass_fds=[page.fd])
    try:
        seen: set[int] = set()
        deadline = time.monotonic() + 20
        while len(seen) < 2000 and time.monotonic() < deadline:
            reading = page.read()
            if reading is not None:
                assert reading.beat == reading.lag == reading.connections == reading.subscriptions
                seen.add(reading.beat)
        assert len(seen) > 100
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
