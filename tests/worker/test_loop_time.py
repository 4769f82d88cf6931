"""The accounts that a worker's loop time is charged to, on a clock that the test moves."""

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
from realtime.worker.loop_time import ChargedReceiver, NamespaceAccounts, charged_frontend, charged_transport
from tests.driving import on_loop


class Bill:
    """A ledger, and work that takes time."""

    def __init__(self) -> None:
        self.time = 0
        self.ledger = LoopTimeLedger(lambda: self.time)

    def work(self, nanoseconds: int) -> None:
        self.time += nanoseconds

    def charged(self) -> dict[tuple[LoopWork, str], int]:
        """Return the charges of all accounts that have any."""
        self.ledger.switch(self.ledger.current)
        return {(account.kind, account.name): account.spent for account in self.ledger if account.spent}


@pytest.fixture
def bill() -> Bill:
    return Bill()


class Hub:
    """A receiver that works for a known number of nanoseconds on each event."""

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

    def on_cut(self, batch: str) -> None: ...

    def on_missed(self, channel: str, publications: bool) -> None: ...

    def on_interruption(self) -> None:
        raise ValueError("a mistake")


def namespace(channel: str) -> str | None:
    name, boundary, _ = channel.partition(":")
    return name if boundary else None


def test_deliveries_are_charged_to_the_namespace_of_their_channel(bill: Bill) -> None:
    hub = Hub(bill)
    fan_out = ChargedReceiver(hub, NamespaceAccounts(bill.ledger, ["chat", "news"], namespace))
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


def test_deliveries_in_later_turns_are_charged_to_the_namespace_too(bill: Bill) -> None:
    accounts = NamespaceAccounts(bill.ledger, ["chat"], namespace)

    def delivering() -> Iterator[None]:
        for _ in range(3):
            bill.work(5)
            yield

    for _ in accounts.charge_steps("chat:1", delivering()):
        bill.work(1)
    assert bill.charged() == {(LoopWork.FANOUT, "chat"): 15, (LoopWork.OTHER, ""): 3}


def test_a_connection_is_charged_to_http_until_it_has_another_protocol(
    bill: Bill, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Front(Protocol):
        pass

    def read(self: DirectServer) -> str:
        bill.work(7)
        return "lost"

    monkeypatch.setattr(DirectServer, "doRead", read)
    transport: Any = charged_transport(bill.ledger, Front)
    client = transport.__new__(transport)
    client.protocol = Front()
    assert client.doRead() == "lost"
    client.protocol = Protocol()
    assert client.doRead() == client.doRead() == "lost"
    assert bill.charged() == {(LoopWork.HTTP, ""): 7, (LoopWork.PROTOCOL, ""): 14}


def test_data_that_the_selector_reads_is_charged_to_http_while_the_frontend_receives_it(bill: Bill) -> None:
    class Front(Protocol):
        def dataReceived(self, data: bytes) -> None:
            bill.work(len(data))

    bill.ledger.switch(bill.ledger.open(LoopWork.PROTOCOL))  # as the selector does
    charged_frontend(bill.ledger, Front)().dataReceived(b"1234567")
    Front().dataReceived(b"12345")
    assert bill.charged() == {(LoopWork.HTTP, ""): 7, (LoopWork.PROTOCOL, ""): 5}


def test_messages_of_the_link_are_charged_to_the_engine(bill: Bill) -> None:
    link = Link(None, lambda function: None, 100, lambda number, body: None, lambda link, reason: None, bill.ledger)

    class Reader:
        def feed(self, data: bytes) -> list[Any]:
            bill.work(len(data))
            return []

    link._reader = Reader()  # type: ignore[assignment]
    link.dataReceived(b"12345")
    assert bill.charged() == {(LoopWork.ENGINE, ""): 5}


class Waiting:
    """A coroutine that works before and after it waits; its callback works too."""

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
        """Resume it while another account is charged."""
        before = self.bill.ledger.switch(self.bill.ledger.open(*account))
        self.gate.callback(None)
        self.bill.work(1000)
        self.bill.ledger.switch(before)


def test_a_resumed_coroutine_is_charged_to_the_account_that_started_it(bill: Bill) -> None:
    waiting = Waiting(bill)
    protocol = bill.ledger.open(LoopWork.PROTOCOL)
    bill.ledger.charging(protocol, drive)(waiting(), waiting.done, bill.ledger)
    waiting.open((LoopWork.ENGINE, ""))
    assert bill.charged() == {(LoopWork.PROTOCOL, ""): 111, (LoopWork.ENGINE, ""): 1000}


def test_without_a_ledger_it_is_charged_to_the_account_that_resumes_it(bill: Bill) -> None:
    waiting = Waiting(bill)
    drive(waiting(), waiting.done)
    waiting.open((LoopWork.ENGINE, ""))
    assert bill.charged() == {(LoopWork.OTHER, ""): 1, (LoopWork.ENGINE, ""): 1110}


@on_loop
async def test_futures_and_gathered_coroutines_are_charged_alike(bill: Bill) -> None:
    one, two, three = (Waiting(bill) for _ in range(3))
    handler = bill.ledger.open(LoopWork.HANDLER, "rpc f")
    future = bill.ledger.charging(handler, start_future)(one(), bill.ledger)
    both = bill.ledger.charging(handler, start_future)(gather([two(), three()], bill.ledger), bill.ledger)
    for waiting in (one, two, three):
        waiting.open((LoopWork.TIMERS, ""))
    assert await future == "done"
    assert await both == ["done", "done"]
    assert bill.charged() == {(LoopWork.HANDLER, "rpc f"): 33, (LoopWork.TIMERS, ""): 3000}
