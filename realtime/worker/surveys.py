"""Which channels have subscribers, over all workers: each is asked for its own, and what they say is added up.

The questions and the answers are orders that pass through the broker. A worker may hold a million channels, so it looks
through them in slices, between which its loop does other things; and what it tells has a limit.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater
from twisted.logger import Logger

from realtime.errors import LIMIT_EXCEEDED, TOO_MANY_REQUESTS, ClientError, EngineUnavailable
from realtime.handlers.coroutines import drive
from realtime.protocol import channel_patterns
from realtime.protocol.orders import ChannelsAnswer, ChannelsOrder, encode_order
from realtime.pubsub.engine import Engine, SendOrder
from realtime.pubsub.hub import Hub

ANSWER_BYTES = 4 * 1024 * 1024
"""Bytes of channel names, with the few that the rest takes, in one worker's answer and in a whole result."""

SLICE = 2000
"""Channels that are looked at in one turn of the loop."""

TIMEOUT = 5.0
"""Seconds for all workers to answer."""

MOST = 16
"""Surveys that one worker may have under way."""

_log = Logger()


class Surveys:
    """The surveys of one worker, and its part in those of others."""

    def __init__(self, engine: Engine, hub: Hub, address: str, reactor: Any) -> None:
        """address: this worker's, see `SendOrder`. reactor: IReactorTime."""
        self._engine = engine
        self._hub = hub
        self._address = address
        self._reactor = reactor
        self._last_id = 0
        self._waiting: dict[int, _SurveyResult] = {}

    async def __call__(self, pattern: str) -> dict[str, int]:
        """The numbers of subscribers by channel, of the channels whose name fits (see `protocol.globs`).

        Raises ClientError 106 when they are too many to tell, 111 when too many ask, and EngineUnavailable when a
        worker does not answer in time.
        """
        if len(self._waiting) >= MOST:
            raise ClientError(*TOO_MANY_REQUESTS)
        self._last_id += 1
        number = self._last_id
        tally = self._waiting[number] = _SurveyResult()
        timer = self._reactor.callLater(TIMEOUT, tally.fail, EngineUnavailable("a worker did not answer in time"))
        try:
            order = encode_order(ChannelsOrder(number, self._address, pattern))
            tally.expect(await self._engine.ask(SendOrder(order)))
            return await tally.whole
        finally:
            del self._waiting[number]
            tally.whole.addErrback(lambda failure: None)  # nobody waits for it when the question could not be asked
            if timer.active():
                timer.cancel()

    def obey(self, order: ChannelsOrder | ChannelsAnswer) -> None:
        """A question of some worker, or an answer to one of ours."""
        if isinstance(order, ChannelsOrder):
            drive(self._answer(order), _finished)
        elif order.id in self._waiting:
            self._waiting[order.id].add(order.found)

    async def _answer(self, order: ChannelsOrder) -> None:
        answer = encode_order(ChannelsAnswer(order.id, await self._find(order.pattern)))
        await self._engine.ask(SendOrder(answer, order.address))

    async def _find(self, pattern: str) -> dict[str, int] | None:
        fits = channel_patterns.compile_pattern(pattern)
        found: dict[str, int] = {}
        room = ANSWER_BYTES
        names = self._hub.channels()
        for begin in range(0, len(names), SLICE):
            if begin:
                await deferLater(self._reactor, 0)
            for name in names[begin : begin + SLICE]:
                subscribers = self._hub.subscribers(name) if fits(name) else 0
                if subscribers:
                    found[name] = subscribers
                    room -= _weight(name)
            if room < 0:
                return None
        return found


class _SurveyResult:
    """What has come of one survey. whole: fires when all workers have answered."""

    def __init__(self) -> None:
        self.whole: Deferred[dict[str, int]] = Deferred()
        self._found: Counter[str] = Counter()
        self._room = ANSWER_BYTES
        self._missing = 0  # answers, below zero for those that came before we knew how many will

    def expect(self, workers: int) -> None:
        """So many answers come in all."""
        self._missing += workers
        self._look()

    def add(self, found: dict[str, int] | None) -> None:
        """One worker's answer."""
        self._missing -= 1
        names = found or {}
        self._room -= sum(_weight(name) for name in names if name not in self._found)
        if found is None or self._room < 0:
            self.fail(ClientError(*LIMIT_EXCEEDED))
            return
        self._found.update(names)
        self._look()

    def fail(self, error: Exception) -> None:
        if not self.whole.called:
            self.whole.errback(error)

    def _look(self) -> None:
        if self._missing == 0 and not self.whole.called:
            self.whole.callback(dict(self._found))


def _weight(name: str) -> int:
    return len(name) + 24


def _finished(result: object, error: BaseException | None) -> None:
    if error is not None and not isinstance(error, EngineUnavailable):
        _log.error("a survey of channels was not answered: {error}", error=error)
