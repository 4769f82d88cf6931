"""Surveys of channels: several workers in this process, which pass orders to each other as the broker does."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest
from twisted.internet import reactor
from twisted.internet.task import Clock
from twisted.logger import capturedLogs, formatEvent

from realtime.errors import ClientError, EngineUnavailable
from realtime.handlers.coroutines import start_future
from realtime.protocol.orders import ChannelsAnswer, ChannelsOrder, Order
from realtime.pubsub.engine import SendOrder
from realtime.types import ChannelCounts
from realtime.worker import surveys
from realtime.worker.surveys import Surveys
from tests.driving import on_loop


class Worker:
    """A worker with its channels and subscribers. ignores_orders: it answers no survey."""

    def __init__(self, others: list[Worker], channels: dict[str, int], clock: Any = reactor) -> None:
        self.members = channels
        self.others = others
        self.address = str(len(others))
        self.ignores_orders = False
        self.passed: list[Order] = []
        self.surveys = Surveys(self, self, self.address, clock)  # type: ignore[arg-type]
        others.append(self)

    def channels(self) -> list[str]:
        return list(self.members)

    def subscribers(self, channel: str) -> int:
        return self.members.get(channel, 0)

    async def ask(self, request: SendOrder) -> int:
        decoded = msgspec.msgpack.decode(request.order, type=ChannelsOrder | ChannelsAnswer)
        self.passed.append(decoded)
        to = [other for other in self.others if request.worker in ("", other.address)]
        for other in to:
            if not other.ignores_orders:
                other.surveys.on_order(decoded)
        return len(to)

    def survey(self, pattern: str = "") -> asyncio.Future[ChannelCounts]:
        return start_future(self.surveys(pattern))


def workers(*channels: dict[str, int], clock: Any = reactor) -> list[Worker]:
    made: list[Worker] = []
    for each in channels:
        Worker(made, each, clock)
    return made


async def refusal(waiting: asyncio.Future[Any]) -> int:
    with pytest.raises(ClientError) as error:
        await waiting
    return error.value.code


@on_loop
async def test_subscribers_of_all_workers_are_added_up() -> None:
    here, _, _ = workers({"a": 1, "chat:1": 2}, {"a": 3, "chat:2": 1, "empty": 0}, {})
    assert await here.survey() == {"a": 4, "chat:1": 2, "chat:2": 1}
    assert await here.survey("chat:*") == {"chat:1": 2, "chat:2": 1}
    assert await here.survey("{a,empty}") == {"a": 4}


@on_loop
async def test_many_channels_are_searched_while_the_loop_does_other_work() -> None:
    here, there = workers({}, {f"c{number}": 1 for number in range(10 * surveys.CHANNELS_PER_TURN)})
    waiting = here.survey("c*")
    gone = [f"c{10 * surveys.CHANNELS_PER_TURN - 1}", f"c{5 * surveys.CHANNELS_PER_TURN}"]
    turns = 0
    while not waiting.done():
        turns += 1
        for name in gone:
            there.members.pop(name, None)  # a channel that has gone by then is not counted
        await asyncio.sleep(0)
    assert turns >= 9
    assert len(await waiting) == 10 * surveys.CHANNELS_PER_TURN - 2


@on_loop
async def test_surveys_at_the_same_time_do_not_mix() -> None:
    here, there = workers({"a": 1, "b": 1}, {"a": 1, "c": 1})
    results = [here.survey("a"), there.survey("b"), here.survey(), there.survey("c")]
    assert [await result for result in results] == [{"a": 2}, {"b": 1}, {"a": 2, "b": 1, "c": 1}, {"c": 1}]


@on_loop
async def test_more_names_than_an_answer_holds_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surveys, "MAX_ANSWER_BYTES", 1000)
    few = {f"few{number}": 1 for number in range(30)}
    here, there, _ = workers({}, few, dict(few))
    assert len(await here.survey()) == 30
    there.members["x" * 200] = 1
    assert await refusal(here.survey()) == 106
    assert there.passed[-1] == ChannelsAnswer(2, None)
    there.members = {f"others{number}": 1 for number in range(20)}
    assert await refusal(here.survey()) == 106  # each fits, but not both
    assert len(await here.survey("few*")) == 30


@on_loop
async def test_a_result_without_a_silent_worker_says_so() -> None:
    clock = Clock()
    here, there = workers({"a": 1}, {"a": 1, "b": 1}, clock=clock)
    there.ignores_orders = True
    waiting = here.survey()
    clock.advance(surveys.TIMEOUT - 0.01)
    assert not waiting.done()
    with capturedLogs() as lines:
        clock.advance(0.01)
    counts = await waiting
    assert (counts, counts.silent_workers) == ({"a": 1}, 1)
    assert str(formatEvent(lines[0])).startswith("1 of 2 workers did not answer a survey of channels")
    assert clock.getDelayedCalls() == []
    here.surveys.on_order(ChannelsAnswer(1, {"a": 1}))  # too late, and harmless
    there.ignores_orders = False
    counts = await here.survey()
    assert (counts, counts.silent_workers) == ({"a": 2, "b": 1}, 0)


@on_loop
async def test_a_survey_without_any_answer_fails() -> None:
    clock = Clock()
    (here,) = workers({"a": 1}, clock=clock)
    here.ignores_orders = True
    waiting = here.survey()
    clock.advance(surveys.TIMEOUT)
    with pytest.raises(EngineUnavailable):
        await waiting


@on_loop
async def test_an_engine_that_is_gone_ends_a_survey(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    (here,) = workers({"a": 1}, clock=clock)

    async def gone(request: SendOrder) -> int:
        raise EngineUnavailable("gone")

    monkeypatch.setattr(here, "ask", gone)
    with pytest.raises(EngineUnavailable):
        await here.survey()
    assert clock.getDelayedCalls() == []


@on_loop
async def test_the_number_of_surveys_is_limited() -> None:
    here, there = workers({"a": 1}, {}, clock=(clock := Clock()))
    here.ignores_orders = there.ignores_orders = True
    waiting = [here.survey() for _ in range(surveys.MAX_SURVEYS)]
    assert await refusal(here.survey()) == 111
    clock.advance(surveys.TIMEOUT)
    for result in waiting:
        with pytest.raises(EngineUnavailable):
            await result
    here.ignores_orders = there.ignores_orders = False
    assert await here.survey() == {"a": 1}


@on_loop
async def test_an_answer_comes_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surveys, "CHANNELS_PER_TURN", 2)
    asking, other = workers({"a": 1, "b": 2, "c": 3, "x": 0}, {"c": 4, "d": 5})
    assert await asking.survey() == {"a": 1, "b": 2, "c": 7, "d": 5}
    answers = [order for order in (*asking.passed, *other.passed) if isinstance(order, ChannelsAnswer)]
    assert sorted(len(answer.found or ()) for answer in answers) == [1, 2, 2]
    assert [answer.has_more for answer in answers].count(False) == 2
