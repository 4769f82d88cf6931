"""The source of a hand-over loses no client, whatever its target does."""

from __future__ import annotations

import os
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace
from twisted.internet import reactor
from twisted.internet.defer import Deferred

from realtime.process.fd_stream import FdStream, stream_pair
from realtime.worker import handover, handover_source
from realtime.worker.handover import VERSION, Accepted, Expected, Refused, Taken
from tests.driving import on_loop
from tests.transports.stage import eventually
from tests.worker.moving import Scene, arrive, publish, scene


class Target:
    """The target's end of a hand-over, in the hands of the test. answers: by the kind of the source's message."""

    def __init__(self, **answers: Any) -> None:
        self.answers = answers
        self.received: list[str] = []
        self.descriptors: list[int] = []
        ours, self.theirs = stream_pair()
        self.stream = FdStream(reactor, ours.detach(), self._receive, lambda: self.received.append("end"))

    def _receive(self, body: bytes, descriptors: list[int]) -> None:
        message = handover.decode_at_target(body)
        kind = type(message).__name__.lower()
        self.received.append(kind)
        self.descriptors += descriptors
        answer = self.answers.get(kind)
        if answer is None:
            return
        if answer == "close":
            self.stream.close()
            return
        if isinstance(answer, Expected):
            answer = replace(answer, batch=message.batch)
        self.stream.send(msgspec.msgpack.encode(answer))

    def close(self) -> None:
        self.stream.close()
        for descriptor in self.descriptors:
            os.close(descriptor)


async def hand_over_to(stage: Scene, target: Target, timeout: float = 10.0) -> dict[str, Any]:
    result: dict[str, Any] = await stage.source.worker.hand_over(target.theirs.detach(), -1, timeout)
    target.close()
    return result


@on_loop
@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ({"offered": Accepted(VERSION + 1, "0-1")}, "version"),
        ({"offered": Refused("it is drained")}, "it is drained"),
        ({"offered": Taken([])}, "no acceptance"),
        ({"offered": "close"}, "has ended"),
        ({"offered": Accepted(VERSION, "0-1"), "announced": "close"}, "has ended"),
        ({"offered": Accepted(VERSION, "0-1"), "announced": Refused("no descriptors")}, "no descriptors"),
        ({"offered": Accepted(VERSION, "9-9"), "announced": Expected("")}, "the broker did not move"),
    ],
    ids=["version", "refused", "no acceptance", "ends", "ends later", "refused later", "no such target"],
)
async def test_a_failure_before_the_cut_leaves_the_clients_at_their_worker(
    answers: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handover_source, "_FAILURE_PAUSE", 0.0)
    async with scene() as stage:
        client = await arrive(stage.source)
        result = await hand_over_to(stage, Target(**answers))
        assert (result["moved"], result["closed"], result["left"]) == (0, 0, 1)
        assert reason in result["reason"]
        assert "busy" not in [failure["reason"] for failure in result["failures"]]
        await publish(client, stage.source, 1)
        await eventually(lambda: client.numbers == [1])
        client.leave()


@on_loop
@pytest.mark.parametrize("answer", ["close", None, Taken(["unsupported"] * 2)], ids=["ends", "silent", "refuses"])
async def test_clients_that_the_target_does_not_claim_are_closed_with_3001(
    answer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handover_source, "ANSWER_TIMEOUT", 0.2)
    async with scene() as stage:
        client, stream = await arrive(stage.source), await arrive(stage.source, "http_stream")
        target = Target(offered=Accepted(VERSION, "0-1"), announced=Expected(""), moved=answer)
        result = await hand_over_to(stage, target)
        assert (result["moved"], result["closed"], result["left"]) == (0, 2, 0)
        assert await client.client.closed() == (3001, "shutdown")
        await eventually(lambda: stream.client.lost)
        assert stream.pushes("disconnect") == [{"code": 3001, "reason": "shutdown"}]
        await eventually(lambda: sorted(code for _, code in stage.source_app.ended) == [3001, 3001])
        client.leave()
        await eventually(lambda: stage.counts == (0, 0))


@on_loop
async def test_clients_that_the_target_has_claimed_before_its_end_are_closed_without_a_frame() -> None:
    async with scene() as stage:
        client = await arrive(stage.source)
        target = Target(offered=Accepted(VERSION, "0-1"), announced=Expected(""))
        handed: list[Any] = []
        Deferred.fromCoroutine(stage.source.worker.hand_over(target.theirs.detach(), -1, 10.0)).addCallback(
            handed.append
        )
        await eventually(lambda: len(target.descriptors) == 2)
        assert os.eventfd_read(target.descriptors[0]) == 1
        target.close()
        await eventually(lambda: bool(handed) and client.client.lost)
        assert client.client.close is None
