"""Deliveries and answers of the broker, on their way to the workers: one frame, shared by all links that it goes to."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from realtime.errors import INTERNAL_ERROR, LIMIT_EXCEEDED, ClientError
from realtime.metrics import Metrics
from realtime.process.link import Link
from realtime.pubsub import broker_messages
from realtime.pubsub.broker_messages import BadFrame
from realtime.pubsub.engine import Cut
from realtime.types import ClientInfo, Publication


class LinkDelivery:
    """Delivers to workers.

    asker, number: of the request that is carried out. A publication that goes to the asker is the answer, too, and sets
    `number` to 0.
    """

    def __init__(self, metrics: Metrics) -> None:
        self.asker: Link | None = None
        self.number = 0
        self._routed = metrics.counter(
            "realtime_broker_deliveries", "Publications sent to workers, counted once for each worker."
        )

    def deliver_publication(self, peers: Collection[Link], channel: str, publication: Publication, epoch: str) -> None:
        self._routed.value += len(peers)
        message = broker_messages.Published(channel, publication, epoch)
        number, asker = self.number, self.asker
        if number and asker is not None and asker in peers:
            asker.send(broker_messages.pack(message, number | broker_messages.ANSWERS))
            self.number = 0
            if len(peers) == 1:
                return
            peers = [peer for peer in peers if peer is not asker]
        _send(peers, message)

    def deliver_join(self, peers: Collection[Link], channel: str, info: ClientInfo) -> None:
        _send(peers, broker_messages.Joined(channel, info))

    def deliver_leave(self, peers: Collection[Link], channel: str, info: ClientInfo) -> None:
        _send(peers, broker_messages.Left(channel, info))

    def deliver_order(self, peers: Collection[Link], order: bytes) -> None:
        _send(peers, broker_messages.OrderSent(order))

    def deliver_cut(self, peer: Link, request: Cut, clients: list[ClientInfo]) -> None:
        _send((peer,), broker_messages.CutReached(request.batch, clients, request.sessions, request.presence))

    def deliver_missed(self, peers: Collection[Link], channel: str, *, publications: bool) -> None:
        _send(peers, broker_messages.Missed(channel, publications))

    # Answers that come later

    def postpone(self) -> Reply:
        """Take over the answer to the request that is carried out: what its operation returns is no answer."""
        assert self.asker is not None
        reply = Reply(self.asker, self.number)
        self.number = 0
        return reply


class Reply:
    """The answer to one request, which comes later. For a request without a number it goes nowhere."""

    __slots__ = ("link", "number")

    def __init__(self, link: Link, number: int) -> None:
        self.link = link
        self.number = number

    def __call__(self, answer: Any, error: BaseException | None = None) -> None:
        """Send the answer, or the error; any but a `ClientError` becomes a temporary internal error."""
        if not self.number:
            return
        if error is None:
            try:
                frame = broker_messages.pack(answer, self.number)
            except BadFrame:
                frame = failed(self.number, *LIMIT_EXCEEDED)
        elif isinstance(error, ClientError):
            frame = failed(self.number, error.code, error.message, error.temporary)
        else:
            frame = failed(self.number, *INTERNAL_ERROR)
        self.link.send(frame)


def failed(number: int, code: int, message: str, temporary: bool) -> bytes:
    """Return the frame of a failed request."""
    return broker_messages.pack(broker_messages.RequestFailed(number, code, message, temporary))


def _send(peers: Collection[Link], message: broker_messages.BrokerMessage) -> None:
    frame = broker_messages.pack(message)
    for peer in peers:
        peer.send(frame)
