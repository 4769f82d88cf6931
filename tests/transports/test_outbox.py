"""The queue before a slow socket: order, bytes, limit."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from realtime.transports.outbox import Outbox, QueuedBytes


def test_frames_are_taken_in_order_and_whole() -> None:
    outbox = Outbox(100, QueuedBytes())
    for frame in (b"one", b"two", b"three"):
        assert outbox.offer(frame)
    assert outbox.size == 11
    assert outbox.take(4) == b"onetwo"
    assert outbox.take(4) == b"three"
    assert outbox.take(4) == b""
    assert not outbox


def test_a_frame_over_the_limit_is_not_queued() -> None:
    outbox = Outbox(10, QueuedBytes())
    assert outbox.offer(b"x" * 10)
    assert not outbox.offer(b"y")
    assert outbox.size == 10
    outbox.take(1)
    assert outbox.offer(b"y" * 10)
    assert not Outbox(10, QueuedBytes()).offer(b"z" * 11)


def test_zero_is_no_limit() -> None:
    assert Outbox(0, QueuedBytes()).offer(b"x" * 10_000_000)


def test_the_last_frame_is_queued_above_the_limit_and_later_ones_are_dropped() -> None:
    outbox = Outbox(4, QueuedBytes())
    outbox.offer(b"full")
    outbox.finish(b"end")
    assert outbox.offer(b"dropped")
    assert outbox.take(100) == b"fullend"
    assert outbox.is_finished


def test_clear_drops_queued_frames() -> None:
    outbox = Outbox(10, QueuedBytes())
    outbox.offer(b"x" * 10)
    outbox.clear()
    assert (outbox.size, bool(outbox)) == (0, False)
    assert outbox.offer(b"y" * 10)


def test_a_reply_is_queued_above_the_limit_which_counts_anew_behind_it() -> None:
    outbox = Outbox(10, QueuedBytes())
    assert outbox.offer(b"p" * 10)
    outbox.add_reply(b"r" * 100)
    assert outbox.offer(b"q" * 10)
    assert not outbox.offer(b"q")
    outbox.take(1)
    assert not outbox.offer(b"q")  # the reply is still here
    outbox.take(100)
    assert outbox.size == 10
    assert not outbox.offer(b"q")
    outbox.take(1)
    assert outbox.offer(b"q" * 10)
    outbox.finish(b"end")
    outbox.add_reply(b"dropped")
    assert outbox.take(100) == b"q" * 10 + b"end"


@given(
    st.lists(st.one_of(st.binary(min_size=1, max_size=20), st.integers(1, 40)), max_size=60),
    st.integers(1, 100),
)
def test_the_outbox_behaves_like_a_list(steps: list[bytes | int], limit: int) -> None:
    outbox = Outbox(limit, QueuedBytes())
    queued: list[bytes] = []
    for step in steps:
        if isinstance(step, bytes):
            fits = sum(map(len, queued)) + len(step) <= limit
            assert outbox.offer(step) is fits
            if fits:
                queued.append(step)
        else:
            expected = b""
            while queued and len(expected) < step:
                expected += queued.pop(0)
            assert outbox.take(step) == expected
        assert outbox.size == sum(map(len, queued))


@given(st.lists(st.tuples(st.sampled_from(["offer", "take", "clear", "finish"]), st.integers(0, 2)), max_size=50))
def test_the_total_is_the_size_of_all_outboxes(steps: list[tuple[str, int]]) -> None:
    total = QueuedBytes()
    outboxes = [Outbox(limit, total) for limit in (0, 10, 30)]
    for action, number in steps:
        outbox = outboxes[number]
        if action in ("offer", "finish"):
            getattr(outbox, action)(b"seven b")
        elif action == "take":
            outbox.take(10)
        else:
            outbox.clear()
        assert total.size == sum(outbox.size for outbox in outboxes)
