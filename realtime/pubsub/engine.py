"""The engine contract: numbers, stores and routes publications, tracks presence and counts clients, over all workers.

The core talks to an `Engine` and does not know the implementation. There is one embedded engine, the broker process
(`realtime.broker.process`), which every worker reaches through `realtime.worker.engine`, also when there is one worker
alone: history and presence then survive a crash or a reload of that worker.

An engine carries out a request and returns its answer (`Engine.ask`, `Engine.ask_then`), or takes note of a fact and
returns none (`Engine.tell`). Each operation is one Struct below, which the caller builds and which travels whole. A
subclass of `EngineRequest[Answer]` names the type of its answer. To add an operation, write its Struct here, a method
of `realtime.pubsub.broker_core.BrokerCore` marked with `carries_out`, and the call; the bytes are derived.

Order is part of the contract:

* An engine carries out the requests and notices of one worker in the order of the calls, awaited or not.
* It calls `Receiver` in the loop's thread. The publications of a channel arrive in the order of their offsets.
* A publication that an answer already counts (`GetHistory`, `Publish`) arrives before that answer; all others arrive
  after it.

An engine remembers what a worker subscribed to, who is present and who is connected through it, and restores that on
its own after an interruption. When a worker dies, the engine drops the worker's subscriptions, removes its presence
(subscribers receive the leaves) and no longer counts its clients.

tests/pubsub/test_engine.py runs one suite over every engine.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from enum import IntEnum
from itertools import count
from typing import Any, Generic, Protocol, TypeVar

from msgspec import Struct

from realtime.types import ClientInfo, EngineStats, HistoryOptions, HistoryPage, NodeInfo, Position, Publication

PAGE_BYTES = 12 * 1024 * 1024
"""Upper limit in bytes of one page of history, so that a page fits into one frame between broker and worker.

A page always holds at least one publication, so paging on reads everything.
"""

PRESENCE_PAGE = 500
"""Clients in one page of `GetPresence`: a millisecond of work for the worker that encodes them."""

new_listing: Callable[[], int] = count(1).__next__
"""Returns a number for `GetPresence.listing`, unique in this process."""

MESSAGES_DROPPED = ("realtime_messages_dropped", "Publications, joins and leaves lost on their way to subscribers.")
"""Name and help of the counter of lost messages, by `reason`."""


def worker_address(slot: int, generation: int, node: str = "") -> str:
    """Return the address of a worker's process, as in `SendOrder.worker`. It contains no dot.

    generation: tells the processes of one slot apart; two of them are there during a hand-over. node: the id of its
    node; "" for the node of the engine that gets the address.
    """
    return f"{node}/{slot}-{generation}" if node else f"{slot}-{generation}"


def split_address(address: str) -> tuple[str, str]:
    """Return the id of the node in a worker's address, and the address on that node."""
    node, _, local = address.rpartition("/")
    return node, local


Answer = TypeVar("Answer")

AnswerCallback = Callable[[Any, BaseException | None], None]
"""Gets (answer, None) or (None, error). It must not raise."""


class EngineRequest(Struct, Generic[Answer], frozen=True, array_like=True, gc=False):
    """An operation whose answer has the type `Answer`.

    The tag of each subclass is its number on the wire. A number that an earlier version used gets no other meaning.
    """


class EngineNotice(Struct, frozen=True, array_like=True, gc=False):
    """A fact that an engine takes note of without an answer. Tags share one range of numbers with `EngineRequest`."""


# Publications and history


class Publish(EngineRequest[Position], tag=3, frozen=True, gc=False):
    """Number, store and route one publication. Answer: its position, or (0, "") without history.

    history_options: of the channel; HistoryOptions() routes the publication without a number and stores nothing.
    idempotency_key: a repeat within 300 s on the same channel publishes nothing and returns the first position.
    version: of the state that `data` describes, up to 2**64 - 1; 0 for none. If the channel has published this version
    or a later one, nothing is published, and the answer is the position of the top. version_epoch: a value other than
    the last one restarts the versions; "" never does. Without history there is nothing to compare with, and both are
    ignored (client protocol, section 7.1). delta, binary: see `Publication`.
    """

    channel: str
    data: bytes
    history_options: HistoryOptions
    info: ClientInfo | None = None
    tags: dict[str, str] | None = None
    idempotency_key: str = ""
    version: int = 0
    version_epoch: str = ""
    delta: bool = False
    binary: bool = False


class GetHistory(EngineRequest[HistoryPage], tag=6, frozen=True, gc=False):
    """Read publications after `since` (exclusive), oldest first. Answer: the page, with the current top of the stream.

    limit: 0 for the position alone, -1 for all stored publications. reverse: newest first, those before `since`.
    max_bytes: ends the page early, though never before its first publication; values over PAGE_BYTES count as
    PAGE_BYTES. Without history (`history_options.enabled`): no publications and (0, "").
    A channel without a publication has an epoch as well, which is its first publication's, and takes no memory. The
    caller compares `since.epoch`.
    """

    channel: str
    history_options: HistoryOptions
    since: Position | None = None
    limit: int = 0
    reverse: bool = False
    max_bytes: int = PAGE_BYTES


class RemoveHistory(EngineRequest[None], tag=7, frozen=True, gc=False):
    """Drop the stored publications of a channel. Offset and epoch continue."""

    channel: str


# Routing


class Subscribe(EngineRequest[None], tag=4, frozen=True, gc=False):
    """Deliver the channel's publications, joins and leaves to this worker's receiver from now on. Idempotent."""

    channel: str


class Unsubscribe(EngineNotice, tag=5, frozen=True, gc=False):
    """Undo `Subscribe`. Idempotent; a subscription that failed needs it too."""

    channel: str


class SendOrder(EngineRequest[int], tag=16, frozen=True, gc=False):
    """Deliver an order to every worker of all nodes, this one included. Answer: the number of workers it was sent to.

    order: opaque to the engine (`realtime.protocol.orders`). worker: the address of the only recipient, "" for all
    (`worker_address`); the answer is 0 for an unknown one. session: the secret of a client's session; if a `Cut` has
    moved that session, the recipient is the worker of the same node that has it now.
    """

    order: bytes
    worker: str = ""
    session: str = ""


# Roles


class Term(Struct, frozen=True, array_like=True, gc=False):
    """number: of the term that a worker holds a role in, 0 if another one holds it. left: seconds of the holder."""

    number: int
    left: float


class HoldRole(EngineRequest[Term], tag=51, frozen=True, gc=False):
    """Take a role for some seconds, or renew it: work that one worker of all nodes does. Answer: the term.

    holder: the address of this worker with its node, which no other worker ever has (`worker_address`). term: the one
    that this worker holds the role in by its own clock, 0 for none; an engine that has lost its state believes it. Two
    workers never hold a role at one moment: the holder counts its time from the moment before the request.
    """

    name: str
    holder: str
    seconds: float
    term: int = 0


class ResignRole(EngineRequest[None], tag=52, frozen=True, gc=False):
    """End the term of this holder, and deliver an order to every worker of all nodes, so that one takes the role.

    Of no effect if another worker holds it. order: see `SendOrder`.
    """

    name: str
    holder: str
    order: bytes


class TakeLease(EngineRequest[str], tag=32, frozen=True, gc=False):
    """Ask to be the only worker of this machine that computes the value of this key of a cache.

    flight: a new name for the lease. Answer: `flight` if this worker has the lease; the flight of another worker's
    lease, whose end this worker receives as an order; "" if there is no room for a lease. seconds: after which the
    lease ends by itself. lost: the order for the waiting workers then, or when this worker ends.
    """

    cache: str
    key: bytes
    flight: str
    seconds: float
    lost: bytes


class EndLease(EngineRequest[None], tag=33, frozen=True, gc=False):
    """End a lease of this worker. order: for the waiting workers. Without effect once it has ended."""

    flight: str
    order: bytes


class ValueState(IntEnum):
    """FOUND: here is the value. GRANTED: compute it. HELD: another worker computes it; ask again."""

    FOUND = 1
    GRANTED = 2
    HELD = 3


class FoundValue(Struct, frozen=True, array_like=True, gc=False):
    """made: Unix time of the value. stamp: for `StoreValue`, if the computation is granted."""

    state: ValueState
    value: bytes = b""
    made: float = 0.0
    stamp: bytes = b""


class FetchValue(EngineRequest[FoundValue], tag=34, frozen=True, gc=False):
    """Read a value of a cache that all nodes share, or get the permit to compute it.

    fresh_from: the Unix time from which on a value counts; an earlier one counts while another worker computes. token:
    a new name for the permit. lease: seconds of the permit. Raises ClientError 108 where nodes share nothing.
    """

    cache: str
    key: bytes
    tags: list[str]
    token: str
    lease: float
    fresh_from: float


class StoreValue(EngineRequest[bool], tag=35, frozen=True, gc=False):
    """Store a computed value, and give the permit back. Answer: whether it was stored.

    It is not if it was invalidated meanwhile, if the permit has expired, or if the value is b"". kept: seconds.
    """

    cache: str
    key: bytes
    tags: list[str]
    token: str
    stamp: bytes
    value: bytes
    made: float
    kept: float


class DropValues(EngineRequest[None], tag=36, frozen=True, gc=False):
    """Invalidate values of a shared cache: by key, by tag, or all (both None). kept: seconds that no value outlives."""

    cache: str
    keys: list[bytes] | None
    tags: list[str] | None
    kept: float


# Presence


class AddPresence(EngineRequest[None], tag=8, frozen=True, gc=False):
    """Add a client's subscription to the channel. Repeated for a client, it replaces `info` without a second join.

    present: list the client in `GetPresence`. announce: deliver a join now and a leave at the end to the subscribers.
    grace: seconds for which the client stays listed after the end of its connection. A client of the same user that
    comes meanwhile takes its place, without a leave and a join.
    """

    channel: str
    info: ClientInfo
    present: bool
    announce: bool
    grace: float = 0.0


class RemovePresence(EngineRequest[None], tag=9, frozen=True, gc=False):
    """Remove a client's subscription; delivers a leave if `AddPresence` delivered a join. Idempotent.

    is_returning: the client was asked to subscribe again. It stays listed for a few seconds; if it returns in time,
    there is neither a leave nor a join.
    """

    channel: str
    client: str
    is_returning: bool = False


class GetPresence(EngineRequest[dict[str, ClientInfo]], tag=10, frozen=True, gc=False):
    """List the clients that are present. Answer: their infos by client id, at most PRESENCE_PAGE.

    listing: `new_listing()`. Further requests with the same number get the following pages; a page with fewer clients
    is the last one. All pages list the clients that were present at the first request; the joins and leaves since then
    reach the worker after the first answer. 0: all clients are in one answer, whose length has no limit. Raises
    ClientError 111 while too many listings have further pages.
    """

    channel: str
    listing: int = 0


class GetPresenceStats(EngineRequest[tuple[int, int]], tag=11, frozen=True, gc=False):
    """Count presence. Answer: the number of clients present, and of distinct users among them."""

    channel: str


# Clients and statistics


class AddClient(EngineNotice, tag=12, frozen=True, gc=False):
    """Count a client as connected to this worker. Only its user and client id matter."""

    info: ClientInfo


class AdmitClient(EngineRequest[bool], tag=17, frozen=True, gc=False):
    """Count a client as `AddClient` does, unless its user has `limit` connections already, over all workers.

    Answer: whether it was counted; if the request fails, it was not. limit: 0 for none. The anonymous user has none.
    """

    info: ClientInfo
    limit: int


class RemoveClient(EngineNotice, tag=13, frozen=True, gc=False):
    """Stop counting a client of this worker. Idempotent."""

    client: str


class TakeLostClients(EngineRequest[list[ClientInfo]], tag=18, frozen=True, gc=False):
    """Take over clients that an earlier worker of this slot has not removed before its process ended.

    Answer: `limit` of them at most; the engine has forgotten them, and keeps the others until the next request. A
    worker that will ask says so when it attaches (`Hello.takes_lost_clients`).
    """

    limit: int


class Cut(EngineRequest[None], tag=19, frozen=True, gc=False):
    """Move clients of this worker to another one, with their presence, at one point of the deliveries to both.

    The receiver of the other worker is called with `on_cut` at that point, and the answer comes at that point.
    There are no joins and no leaves, and `AdmitClient` counts the clients as before. batch: identifies the move.
    worker: the address of the other one. clients: their ids. sessions: the secrets of their sessions by client, of
    those that have one (see `SendOrder.session`). presence: the clients that are present, by channel. Raises
    ClientError 100 when there is no such worker; then, and when the request fails otherwise, this worker still has
    the clients.
    """

    batch: str
    worker: str
    clients: list[str]
    sessions: dict[str, str]
    presence: dict[str, list[str]]


class ReportSubscriptions(EngineNotice, tag=14, frozen=True, gc=False):
    """Report this worker's current number of subscriptions, for `GetStats`."""

    subscriptions: int


class GetStats(EngineRequest[EngineStats], tag=15, frozen=True, gc=False):
    """Count clients, users, channels and subscriptions over the workers of this node."""


class GetNodes(EngineRequest[list[NodeInfo]], tag=30, frozen=True, gc=False):
    """List the nodes that share this engine's channels, this one first. The numbers of others are seconds old."""


class Receiver(Protocol):
    """The worker's end of an engine: deliveries arrive here. The hub is one."""

    def on_publication(self, channel: str, publication: Publication, epoch: str) -> None:
        """Handle a publication of a subscribed channel. epoch: "" when the channel keeps no history."""

    def on_join(self, channel: str, info: ClientInfo) -> None:
        """Handle the join of a client (see `AddPresence.announce`)."""

    def on_leave(self, channel: str, info: ClientInfo) -> None:
        """Handle the leave of a client."""

    def on_order(self, order: bytes) -> None:
        """Carry out an order to this worker (see `SendOrder`)."""

    def on_cut(self, batch: str) -> None:
        """Handle a `Cut` towards this worker: it has the clients of the batch from now on."""

    def on_missed(self, channel: str, publications: bool) -> None:
        """Handle the loss of joins and leaves of a channel, and with `publications` of publications, after the latest
        delivery. The channel's deliveries go on behind it."""

    def on_interruption(self) -> None:
        """Handle a restored connection that does not continue the one before: publications may be missing in every
        channel.

        The engine has restored this worker's subscriptions, presence and clients before it calls this.
        """


class Engine(Protocol):
    """See the module for the contract."""

    def ask(self, request: EngineRequest[Answer]) -> Awaitable[Answer]:
        """Carry out a request; await the answer at once.

        Awaiting raises EngineUnavailable when there is no answer; whether the request was carried out is then unknown.
        It raises ClientError 106 when a limit of the engine leaves no room (channels, idempotency keys, message size).
        """

    def ask_then(self, request: EngineRequest[Answer], done: AnswerCallback) -> None:
        """Like `ask`, without an awaitable: the short path for frequent requests, in the same order.

        done: called once, perhaps before this returns. Its time is charged like that of the caller.
        """

    def tell(self, notice: EngineNotice) -> None:
        """Report a fact. Never fails: an engine that is away learns it when it is back."""

    def claim(self, batch: str, info: ClientInfo, secret: str, presence: list[AddPresence]) -> None:
        """Note that a client has arrived from another worker, by the `Cut` of this batch, if it reached this one.

        secret: of its session, "" without one. presence: as at the cut. Never fails.
        """

    def forget_arrivals(self, batch: str) -> list[ClientInfo]:
        """Remove the clients of a batch that have not been claimed, with their presence; return them. Idempotent."""
