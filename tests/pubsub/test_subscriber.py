"""A sink: whole, partial and refused writes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from realtime.pubsub.subscriber import Sink


def refuse(frame: bytes) -> int:
    raise BlockingIOError


@pytest.mark.parametrize(
    ("write", "kept"),
    [(len, []), (lambda frame: 2, [(b"frame", 2)]), (refuse, [(b"frame", 0)])],
    ids=["whole", "in part", "not at all"],
)
def test_unwritten_bytes_are_kept(write: Callable[[bytes], int], kept: list[tuple[bytes, int]]) -> None:
    queued: list[tuple[bytes, int]] = []
    Sink(write, lambda frame, written: queued.append((frame, written))).deliver(b"frame")
    assert queued == kept


def test_a_new_sink_has_no_socket() -> None:
    assert Sink(len, lambda frame, written: None).fd == -1
