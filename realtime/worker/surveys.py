"""Surveys of the channels of all workers of all nodes: each worker lists its own, and the answers are added up.

The questions and the answers are orders that pass through the broker. A worker may hold a million channels, so it
searches them in slices, between which its loop does other work, and sends a part of its answer after each. The size of
an answer is limited. A result without the answers of all workers says so.
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
from realtime.types import ChannelCounts

MAX_ANSWER_BYTES = 4 * 1024 * 1024
"""The most bytes of channel names, plus the few for each number, in one worker's answer and in a whole result."""

CHANNELS_PER_TURN = 2000
"""Channels that are searched in one turn of the loop."""

TIMEOUT = 5.0
"""Seconds for all workers to answer. The result lacks the channels of slower ones."""

MAX_SURVEYS = 16
"""The most surveys of one worker at a time."""

_log = Logger()


class Surveys:
    """The surveys that this worker makes, and its answers to those of other workers."""

    def __init__(self, engine: Engine, hub: Hub, address: str, reactor: Any) -> None:
        """address: this worker's, see `SendOrder`. reactor: IReactorTime."""
        self._engine = engine
        self._hub = hub
        self._address = address
        self._reactor = reactor
        self._last_id = 0
        self._running: dict[int, _SurveyResult] = {}

    async def __call__(self, pattern: str) -> ChannelCounts:
        """Count the subscribers of each channel that matches (see `protocol.channel_patterns`).

        Raises ClientError 106 when the channels exceed MAX_ANSWER_BYTES, 111 beyond MAX_SURVEYS surveys at a time, and
        EngineUnavailable when no worker answers in time.
        """
        if len(self._running) >= MAX_SURVEYS:
            raise ClientError(*TOO_MANY_REQUESTS)
        self._last_id += 1
        id = self._last_id
        result = self._running[id] = _SurveyResult()
        timer = self._reactor.callLater(TIMEOUT, result.stop_waiting)
        try:
            question = encode_order(ChannelsOrder(id, self._address, pattern))
            result.expect(await self._engine.ask(SendOrder(question)))
            return await result.complete
        finally:
            del self._running[id]
            result.complete.addErrback(lambda failure: None)  # it is not awaited when sending the question failed
            if timer.active():
                timer.cancel()

    def on_order(self, order: ChannelsOrder | ChannelsAnswer) -> None:
        """Answer the question of a worker, or add an answer to this worker's survey."""
        if isinstance(order, ChannelsOrder):
            drive(self._answer(order), _answered)
        elif order.id in self._running:
            self._running[order.id].add(order.found, order.has_more)

    async def _answer(self, order: ChannelsOrder) -> None:
        """Send the numbers of subscribers of matching channels, a part in each turn; None beyond MAX_ANSWER_BYTES."""
        matches = channel_patterns.compile_pattern(order.pattern)
        room = MAX_ANSWER_BYTES
        found: dict[str, int] = {}
        names = self._hub.channels()
        for start in range(0, len(names), CHANNELS_PER_TURN):
            if found:
                await self._send(order, ChannelsAnswer(order.id, found, has_more=True))
                found = {}
            if start:
                await deferLater(self._reactor, 0)
            for name in names[start : start + CHANNELS_PER_TURN]:
                subscribers = self._hub.subscribers(name) if matches(name) else 0
                if subscribers:
                    found[name] = subscribers
                    room -= _size(name)
            if room < 0:
                await self._send(order, ChannelsAnswer(order.id, None))
                return
        await self._send(order, ChannelsAnswer(order.id, found))

    async def _send(self, order: ChannelsOrder, answer: ChannelsAnswer) -> None:
        await self._engine.ask(SendOrder(encode_order(answer), order.address))


class _SurveyResult:
    """The answers to one survey so far. complete: fires when all workers have answered or had time to, or fails."""

    def __init__(self) -> None:
        self.complete: Deferred[ChannelCounts] = Deferred()
        self._found: Counter[str] = Counter()
        self._room = MAX_ANSWER_BYTES
        # Answers that are missing. Below zero while answers have arrived and their total is not known yet.
        self._missing = self._answered = 0
        self._is_total_known = False

    def expect(self, answers: int) -> None:
        """Set the total number of answers."""
        self._missing += answers
        self._is_total_known = True
        self._check_complete()

    def add(self, found: dict[str, int] | None, has_more: bool = False) -> None:
        """Add the answer of one worker, or a part of it."""
        self._missing -= not has_more
        self._answered += not has_more
        names = found or {}
        self._room -= sum(_size(name) for name in names if name not in self._found)
        if found is None or self._room < 0:
            self.fail(ClientError(*LIMIT_EXCEEDED))
            return
        self._found.update(names)
        self._check_complete()

    def stop_waiting(self) -> None:
        """Complete the result without the answers that are missing."""
        if self.complete.called:
            return
        if not self._answered:
            self.fail(EngineUnavailable("no worker answered in time"))
            return
        silent = max(1, self._missing)
        _log.warn(
            "{silent} of {total} workers did not answer a survey of channels within {timeout:g} s, and its result lacks"
            " their channels; look for blocked workers, and for nodes that have lost their network",
            silent=silent,
            total=self._answered + silent,
            timeout=TIMEOUT,
        )
        self.complete.callback(ChannelCounts(dict(self._found), silent))

    def fail(self, error: Exception) -> None:
        if not self.complete.called:
            self.complete.errback(error)

    def _check_complete(self) -> None:
        if self._is_total_known and self._missing <= 0 and not self.complete.called:
            self.complete.callback(ChannelCounts(dict(self._found)))


def _size(name: str) -> int:
    return len(name) + 24


def _answered(result: object, error: BaseException | None) -> None:
    if error is not None and not isinstance(error, EngineUnavailable):
        _log.error("can't answer a survey of channels, which fails in the asking worker: {error}", error=error)
