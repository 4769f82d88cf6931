"""Who is charged for the time of a worker's loop, on a clock that the test turns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.protocol import Protocol

from realtime.handlers.coroutines import drive, gather, start_future
from realtime.process.link import Link
from realtime.process.transport import DirectServer
from realtime.supervision.loop_time import LoopTimeLedger, LoopWork
from realtime.types import ClientInfo, Publication
from realtime.worker.loop_time import ChargedReceiver, charged_transport
from tests.driving import on_loop


class Bill:
    """Accounts, and work that takes time."""

    def __init__(self) -> None:
        self.time = 0
        self.accounts = LoopTimeLedger(lambda: self.time)

    def work(self, nanoseconds: int) -> None:
        self.time += nanoseconds

    def charged(self) -> dict[tuple[LoopWork, str], int]:
        """What each account was charged so far, but those with nothing."""
        self.accounts.switch(self.accounts.current)
        return {(account.kind, account.name): account.spent for account in self.accounts if account.spent}


@pytest.fixture
def bill() -> Bill:
    return Bill()


class Hub:
    """A receiver that works as many nanoseconds as its test says."""

    def __init__(self, bill: Bill) -> None:
        self.bill = bill
        self.seen: list[Any] = []

    def _take(self, nanoseconds: int, *what: Any) -> None:
        self.bill.work(nanoseconds)
        self.seen.append(what)

    def on_publication(self, channel: str, publication: Publication, epoch: str) -> None:
        self._take(10, channel, publication, epoch)

    def on_join(self, channel: str, info: ClientInfo) -> None:
        self._take(3, channel, info)

    def on_leave(self, channel: str, info: ClientInfo) -> None:
        self._take(2, channel, info)

    def on_order(self, order: bytes) -> None:
        self._take(1, order)

    def on_interruption(self) -> None:
        raise ValueError("a mistake")


def namespace(channel: str) -> str | None:
    name, boundary, _ = channel.partition(":")
    return name if boundary else None


def test_deliveries_are_charged_to_the_namespace_of_their_channel(bill: Bill) -> None:
    hub = Hub(bill)
    fan_out = ChargedReceiver(hub, bill.accounts, ["chat", "news"], namespace)
    publication, info = Publication(b"{}"), ClientInfo("ada", "1")
    fan_out.on_publication("chat:1", publication, "e")
    fan_out.on_publication("chat:2", publication, "e")
    fan_out.on_join("news:1", info)
    fan_out.on_leave("plain", info)
    fan_out.on_leave("unknown:1", info)
    fan_out.on_order(b"order")
    assert bill.charged() == {
        (LoopWork.FANOUT, "chat"): 20,
        (LoopWork.FANOUT, "news"): 3,
        (LoopWork.FANOUT, ""): 4,
        (LoopWork.OTHER, ""): 1,
    }
    assert hub.seen == [
        ("chat:1", publication, "e"), ("chat:2", publication, "e"), ("news:1", info), ("plain", info),
        ("unknown:1", info), (b"order",),
    ]  # fmt: skip
    with pytest.raises(ValueError):
        fan_out.on_interruption()


def test_what_is_delivered_later_is_charged_to_the_namespace_too(bill: Bill) -> None:
    fan_out = ChargedReceiver(Hub(bill), bill.accounts, ["chat"], namespace)

    def delivering() -> Iterator[None]:
        for _ in range(3):
            bill.work(5)
            yield

    for _ in fan_out.steps("chat:1", delivering()):
        bill.work(1)
    assert bill.charged() == {(LoopWork.FANOUT, "chat"): 15, (LoopWork.OTHER, ""): 3}


def test_a_client_is_charged_to_http_until_it_speaks_something_else(
    bill: Bill, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Front(Protocol):
        pass

    def read(self: DirectServer) -> str:
        bill.work(7)
        return "lost"

    monkeypatch.setattr(DirectServer, "doRead", read)
    transport: Any = charged_transport(bill.accounts, Front)
    client = transport.__new__(transport)
    client.protocol = Front()
    assert client.doRead() == "lost"
    client.protocol = Protocol()
    assert client.doRead() == client.doRead() == "lost"
    assert bill.charged() == {(LoopWork.HTTP, ""): 7, (LoopWork.PROTOCOL, ""): 14}


def test_the_link_is_charged_for_what_comes_over_it(bill: Bill) -> None:
    link = Link(None, lambda function: None, 100, lambda number, body: None, lambda link, reason: None, bill.accounts)

    class Reader:
        def feed(self, data: bytes) -> list[Any]:
            bill.work(len(data))
            return []

    link._reader = Reader()  # type: ignore[assignment]
    link.dataReceived(b"12345")
    assert bill.charged() == {(LoopWork.ENGINE, ""): 5}


class Waiting:
    """A coroutine that works before and after it waits, and again when it is done."""

    def __init__(self, bill: Bill) -> None:
        self.bill = bill
        self.gate: Deferred[None] = Deferred()

    async def __call__(self) -> str:
        self.bill.work(1)
        await self.gate
        self.bill.work(10)
        return "done"

    def done(self, result: Any, error: BaseException | None) -> None:
        self.bill.work(100)

    def open(self, account: tuple[LoopWork, str]) -> None:
        """Let it go on while another account is charged."""
        before = self.bill.accounts.switch(self.bill.accounts.open(*account))
        self.gate.callback(None)
        self.bill.work(1000)
        self.bill.accounts.switch(before)


def test_a_coroutine_that_goes_on_is_charged_to_whoever_started_it(bill: Bill) -> None:
    waiting = Waiting(bill)
    protocol = bill.accounts.open(LoopWork.PROTOCOL)
    bill.accounts.charging(protocol, drive)(waiting(), waiting.done, bill.accounts)
    waiting.open((LoopWork.ENGINE, ""))
    assert bill.charged() == {(LoopWork.PROTOCOL, ""): 111, (LoopWork.ENGINE, ""): 1000}


def test_without_accounts_it_is_charged_to_whoever_lets_it_go_on(bill: Bill) -> None:
    waiting = Waiting(bill)
    drive(waiting(), waiting.done)
    waiting.open((LoopWork.ENGINE, ""))
    assert bill.charged() == {(LoopWork.OTHER, ""): 1, (LoopWork.ENGINE, ""): 1110}


@on_loop
async def test_the_same_holds_for_futures_and_for_several_at_once(bill: Bill) -> None:
    one, two, three = (Waiting(bill) for _ in range(3))
    handler = bill.accounts.open(LoopWork.HANDLER, "rpc f")
    future = bill.accounts.charging(handler, start_future)(one(), bill.accounts)
    both = bill.accounts.charging(handler, start_future)(gather([two(), three()], bill.accounts), bill.accounts)
    for waiting in (one, two, three):
        waiting.open((LoopWork.TIMERS, ""))
    assert await future == "done"
    assert await both == ["done", "done"]
    assert bill.charged() == {(LoopWork.HANDLER, "rpc f"): 33, (LoopWork.TIMERS, ""): 3000}
