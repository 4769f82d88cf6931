"""The vitals page: readers see whole readings, and only those that the process wrote."""

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

from realtime.supervision.vitals import LatestCalls, ProcessState, RunningHandler, Vitals, VitalsPage

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


def another_mapping(page: VitalsPage) -> VitalsPage:
    return VitalsPage.open(os.dup(page.fd))


def test_a_new_page_has_no_reading(page: VitalsPage) -> None:
    assert page.read() is None


def test_another_mapping_reads_each_written_reading(page: VitalsPage) -> None:
    reader = another_mapping(page)
    for beat in range(1, 5):
        written = Vitals(beat, beat / 2, beat * 3, beat * 4, ProcessState.DRAINING)
        page.write(written)
        assert reader.read() == written
    reader.close()


def test_every_field_is_read_back(page: VitalsPage) -> None:
    page.write(READING)
    assert another_mapping(page).read() == READING


def test_busy_since_changes_without_a_new_reading(page: VitalsPage) -> None:
    page.write(READING)
    page.set_busy_since(7)
    reader = another_mapping(page)
    assert reader.read() == replace(READING, busy_since=7)
    page.set_busy_since(0)
    assert reader.read() == READING


def test_the_latest_long_turn_is_read_whole_or_not_at_all(page: VitalsPage) -> None:
    page.write(READING)
    page.record_block(5, 9)
    assert another_mapping(page).read() == replace(READING, block_since=5, block_until=9)
    page.record_block(20, 3)
    assert another_mapping(page).read() == READING


def test_the_running_handler_is_on_the_page(page: VitalsPage) -> None:
    reader = another_mapping(page)
    assert reader.running() is None
    page.mark(b"on_publish chat:*", b"chat:7")
    assert reader.running() == RunningHandler("on_publish chat:*", "chat:7")
    page.mark(b"rpc report", b"")
    assert reader.running() == RunningHandler("rpc report", "")
    page.unmark()
    assert reader.running() is None


def test_the_calls_of_a_turn_stay_on_the_page_after_the_last_one(page: VitalsPage) -> None:
    reader = another_mapping(page)
    assert reader.latest_calls() is None
    page.mark(b"rpc cpu", b"cpu", 7_000, 14, 250_000_000)
    page.unmark()
    assert reader.latest_calls() == LatestCalls("rpc cpu", 7_000, 14, 0.25)


def test_a_long_name_is_cut(page: VitalsPage) -> None:
    page.mark(b"h" * 100, ("x" * 63 + "\u00e9").encode())
    assert another_mapping(page).running() == RunningHandler("h" * 64, "x" * 63 + "\ufffd")


def test_a_half_written_handler_is_not_read(page: VitalsPage) -> None:
    page.mark(b"rpc a", b"")
    memory = mmap.mmap(page.fd, mmap.PAGESIZE)
    struct.pack_into("=q64s", memory, 384, 2, b"rpc b")  # a writer that is half done
    assert page.running() is None
    memory.close()


def test_the_supervisor_publishes_a_substitute_to_the_worker(page: VitalsPage) -> None:
    worker = another_mapping(page)
    assert not worker.has_substitute()
    page.set_substitute(True)
    worker.write(READING)
    assert worker.has_substitute()
    page.set_substitute(False)
    assert not worker.has_substitute()


@given(
    beat=st.integers(1, 2**63 - 1),
    lag=st.floats(0, 1e9),
    connections=st.integers(0, 2**63 - 1),
    subscriptions=st.integers(0, 2**63 - 1),
    state=st.sampled_from(ProcessState),
)
@profile(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_valid_reading_is_read_back(
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
def test_an_invalid_field_gives_no_reading(page: VitalsPage, field: int, value: float) -> None:
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
    page.has_substitute()


def test_a_torn_page_is_no_reading_until_the_next_write(page: VitalsPage) -> None:
    page.write(READING)
    reader = another_mapping(page)
    memory = mmap.mmap(page.fd, mmap.PAGESIZE)
    struct.pack_into("=Q", memory, 0, 3)  # a writer that was killed during a write
    assert reader.read() is None
    successor = another_mapping(page)
    successor.write(READING)
    assert reader.read() == READING
    memory.close()
    reader.close()
    successor.close()


def test_neither_side_can_resize_the_page(page: VitalsPage) -> None:
    for size in (0, 100, 8192):
        with pytest.raises(PermissionError):
            os.ftruncate(page.fd, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(page.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


def test_a_file_that_is_no_page_is_refused(tmp_path: object) -> None:
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
