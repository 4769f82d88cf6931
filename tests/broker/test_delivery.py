"""Answers that come later than their requests."""

from __future__ import annotations

from realtime.broker.delivery import LinkDelivery, Reply
from realtime.errors import ClientError, EngineUnavailable
from realtime.metrics import Metrics
from realtime.pubsub import broker_messages
from realtime.pubsub.broker_messages import FrameReader, RequestFailed


class Link:
    """Collects frames."""

    def __init__(self) -> None:
        self.frames: list[tuple[int, bytes]] = []

    def send(self, frame: bytes) -> None:
        self.frames += FrameReader().feed(frame)


def test_a_postponed_answer_carries_the_number_of_its_request() -> None:
    delivery, link = LinkDelivery(Metrics()), Link()
    delivery.asker, delivery.number = link, 7  # type: ignore[assignment]
    reply = delivery.postpone()
    assert delivery.number == 0
    reply("answer")
    assert link.frames == [(7, broker_messages.pack("answer")[broker_messages.HEAD_SIZE :])]


def test_errors_are_told_apart_and_requests_without_a_number_get_none() -> None:
    link = Link()
    decode = broker_messages.message_decoder(broker_messages.TO_WORKER)
    Reply(link, 7)(None, ClientError(106, "limit exceeded"))  # type: ignore[arg-type]
    Reply(link, 8)(None, EngineUnavailable("away"))  # type: ignore[arg-type]
    Reply(link, 9)(b"x" * (broker_messages.FRAME_LIMIT + 1))  # type: ignore[arg-type]
    Reply(link, 0)(None)  # type: ignore[arg-type]
    assert [decode(body) for _, body in link.frames] == [
        RequestFailed(7, 106, "limit exceeded", False),
        RequestFailed(8, 100, "internal server error", True),
        RequestFailed(9, 106, "limit exceeded", False),
    ]
