"""Replays: missed publications that exceed the room in a reply, and follow it as pushes.

A reply that had to hold all of them would take longer over a slow link than the client waits for it, and the next
attempt would begin anew. So a reply carries what fits its room, and a replay reads the rest from history, a page at a
time, whenever the socket has taken everything before it. The client counts on with each publication, and recovers from
there when its connection breaks meanwhile.

New publications of the channel stay in history until the replay gets to them: the hub delivers joins and leaves alone
(`Hub.begin_replay`). With the page that reaches the top the subscription becomes like any other. If history has lost
the next publication by then, the client subscribes again, and learns of the gap.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Protocol

from realtime.errors import SERVER_ERROR, ClientError, Disconnect, EngineUnavailable
from realtime.protocol.context import Connection, SessionServices
from realtime.protocol.messages import Pub
from realtime.protocol.session_state import CONNECTED, Departure, SessionState
from realtime.protocol.subscription import Replay, Subscription


class ReplayingSession(Protocol):
    """The session, as its replays see it. departure: set while no page may be sent, as the session moves."""

    services: SessionServices
    state: SessionState
    departure: Departure | None

    def push_publications(self, channel: str, publications: Iterable[Pub]) -> None:
        """Send publications of a channel to the client, without regard to the limit of its outbox."""

    def disconnect(self, code: int, reason: str) -> None: ...

    def subscription_lost_position(self, subscription: Subscription) -> None:
        """Have the client subscribe again."""

    def settle(self) -> None:
        """Note that no page is being sent, during a departure."""

    def drained(self) -> None:
        """Handle a connection that was waited for with `when_drained`: it calls `resume`."""

    def describe(self) -> dict[str, object]:
        """Return the facts about the client for the log."""


class Replays:
    """The replays of one session, which take turns: each sends a page while the connection is drained.

    is_sending: a page is being read or sent.
    """

    __slots__ = ("_connection", "_session", "_waiting", "is_sending")

    def __init__(self, session: ReplayingSession, connection: Connection) -> None:
        self._session = session
        self._connection = connection
        self._waiting: deque[tuple[Subscription, Replay]] = deque()
        self.is_sending = False

    def begin(self, subscription: Subscription, replay: Replay) -> None:
        """Begin to send the publications behind `replay.position`."""
        self._session.services.counters.replays["begun"].value += 1
        self.add(subscription, replay)
        self.resume()

    def add(self, subscription: Subscription, replay: Replay) -> None:
        """Add a replay that has begun, perhaps in another worker. Call `resume` afterwards."""
        if not (self._waiting or self.is_sending):
            self._connection.pace(True)
        self._waiting.append((subscription, replay))

    def channels(self) -> list[str]:
        """Return the channels of the replays in the order of their turns, while no page is being sent."""
        return [subscription.channel for subscription, _ in self._waiting if subscription.is_active]

    def resume(self) -> None:
        """Send pages as long as the connection is drained."""
        if self._waiting and not self.is_sending and self._session.departure is None:
            self.is_sending = True
            self._session.services.run(self._send_pages(), self._sent)

    async def _send_pages(self) -> None:
        while self._waiting:
            if self._session.state is not CONNECTED:
                self._waiting.clear()
                return
            if self._session.departure is not None:
                return
            if not self._connection.is_drained:
                self._connection.when_drained(self._session.drained)
                return
            subscription, replay = self._waiting.popleft()
            if await self._send_page(subscription, replay):
                self._waiting.append((subscription, replay))
        if self._session.state is CONNECTED:
            self._connection.pace(False)

    def _sent(self, result: None, error: BaseException | None) -> None:
        self.is_sending = False
        self._session.settle()
        if error is not None:
            # A bug. The client recovers over another connection; on this one it would wait for the rest in vain.
            self._session.services.report_error(error)
            self._session.disconnect(*SERVER_ERROR)

    async def _send_page(self, subscription: Subscription, replay: Replay) -> bool:
        """Send the next page of a replay, if its subscription has not ended. Returns whether more follow."""
        services = self._session.services
        try:
            page = await subscription.read_page(replay) if subscription.is_active else None
        except Disconnect:
            subscription.log_unencodable()
            page = None
        except (ClientError, EngineUnavailable):
            page = None
        if not subscription.is_active:
            return False
        if page is None:
            services.counters.replays["lost"].value += 1
            services.client_log.refuse(
                "replay", self._session.describe, channel=repr(subscription.channel), offset=replay.position.offset
            )
            self._session.subscription_lost_position(subscription)
            return False
        self._session.push_publications(subscription.channel, page.pubs)
        if page.is_last:
            services.counters.replays["completed"].value += 1
            if not subscription.end_replay():
                self._session.subscription_lost_position(subscription)
        return not page.is_last
