"""The engine: what numbers, keeps and routes publications, and knows who is present.

Everything above talks to the `Engine` protocol and does not know which one it has: `MemoryEngine` in this process
(tests, one worker), or the broker process behind a socket (`realtime.broker.process`). One contract suite,
tests/contracts/, holds both to the same behaviour.

What reaches a worker from the engine, it gets by calls on its `Receiver`, on the loop's thread, in order: the
publications of one channel arrive in offset order, and a publication that an answer to `history` already counted
never arrives after that answer.
"""

from __future__ import annotations

from typing import Protocol

from realtime.pubsub.history import PAGE_BYTES
from realtime.types import ClientInfo, EngineStats, HistoryOptions, HistoryPage, Position, Publication


class Receiver(Protocol):
    """What an engine needs of its worker: somewhere to deliver. The hub is one."""

    def published(self, channel: str, publication: Publication, epoch: str) -> None:
        """A publication of a channel that this worker subscribed to. epoch: "" when the channel keeps no history."""

    def joined(self, channel: str, info: ClientInfo) -> None:
        """A client entered a channel that announces it."""

    def left(self, channel: str, info: ClientInfo) -> None:
        """A client left a channel that announces it."""

    def instructed(self, order: bytes) -> None:
        """An order to this worker (see `Engine.instruct`)."""

    def interrupted(self) -> None:
        """Continuity was lost, and is restored now: publications may be missing in every channel.

        The engine knows this worker's subscriptions and present clients again when it calls this.
        """


class Engine(Protocol):
    """What is asked of an engine is worked off in the order in which it was asked, whether it is waited for or not.

    Every coroutine may raise EngineUnavailable; then nothing was accepted or changed as far as the engine knows. It may
    also raise ClientError 106, when a limit of the engine (channels, idempotency keys, the size of a message)
    leaves no room for what was asked.
    """

    async def publish(
        self,
        channel: str,
        data: bytes,
        *,
        retention: HistoryOptions,
        info: ClientInfo | None = None,
        tags: dict[str, str] | None = None,
        idempotency_key: str = "",
        version: int = 0,
        version_epoch: str = "",
        delta: bool = False,
        binary: bool = False,
    ) -> Position:
        """Number, keep and route one publication; its position, or (0, "") when `retention` keeps nothing.

        idempotency_key: a repeat within 300 s on the same channel publishes nothing and returns the first position.
        version: of what `data` describes, up to 2**64 - 1. If the history has had this version or a later one already,
        nothing is published, and the position is that of the top; 0 for no version. version_epoch: another one than
        before starts the versions anew, "" does not. Without history there is nothing to compare with. (Client
        protocol, section 7.1.) delta, binary: see `Publication`.
        """

    async def subscribe(self, channel: str) -> None:
        """Have the channel's publications, joins and leaves delivered to the receiver from now on."""

    def unsubscribe(self, channel: str) -> None:
        """Undo `subscribe`. Never fails; without an engine there is nothing to undo."""

    async def history(
        self,
        channel: str,
        *,
        retention: HistoryOptions,
        since: Position | None = None,
        limit: int = 0,
        reverse: bool = False,
        max_bytes: int = PAGE_BYTES,
    ) -> HistoryPage:
        """Publications after `since` (exclusive), oldest first, and the current top of the stream.

        limit: 0 for the position alone, -1 for all that is kept. reverse: newest first, those before `since`.
        max_bytes: a page ends before its limit when it would be longer, but holds one publication at least; never more
        than PAGE_BYTES. Without `retention.kept`: nothing, (0, "").
        An unknown channel gets its epoch here, and keeps it. Whether `since.epoch` fits is for the caller to judge.
        """

    async def remove_history(self, channel: str) -> None:
        """Drop the publications; offset and epoch go on."""

    async def enter(self, channel: str, info: ClientInfo, *, present: bool, announce: bool) -> None:
        """A client's subscription began. present: list it in `presence`. announce: tell subscribers (`joined`).

        Again for the same client: its `info` is another now, which is announced to nobody. Should this worker die, the
        engine makes the client leave.
        """

    async def leave(self, channel: str, client: str) -> None:
        """A client's subscription ended; announced if `enter` was."""

    async def presence(self, channel: str) -> dict[str, ClientInfo]:
        """Who is present, by client id."""

    async def presence_stats(self, channel: str) -> tuple[int, int]:
        """The number of clients present, and of distinct users among them."""

    def connected(self, info: ClientInfo) -> None:
        """A client connected to this worker. Never fails."""

    async def admit(self, info: ClientInfo, limit: int) -> bool:
        """Count a client as `connected`, unless its user has `limit` connections already, over all workers.

        False: it was not counted. No limit applies to the anonymous user, and 0 is none. If this raises, the client is
        not counted either.
        """

    def disconnected(self, client: str) -> None:
        """A client of this worker is gone. Never fails."""

    def tally(self, subscriptions: int) -> None:
        """How many subscriptions this worker holds now, for the census. Never fails."""

    async def census(self) -> EngineStats:
        """The counts over all workers."""

    async def instruct(self, order: bytes, *, worker: str = "") -> int:
        """Pass an order to every worker, this one included; to how many it was passed. Its meaning is the caller's.

        worker: the address of the only one that is to have it.
        """
