"""Charges the work of a worker's loop for its clients: to the client protocol, to HTTP, or to a channel namespace.

Handlers are charged by their `HandlerCall`, coroutines that have waited by `realtime.handlers.coroutines`. The charges
here are added from outside, by the wiring: the charged objects do not know of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any, TypeVar

from twisted.internet.protocol import Protocol

from realtime.process.transport import DirectServer
from realtime.pubsub.engine import Receiver
from realtime.supervision.loop_time import LoopAccount, LoopTimeLedger, LoopWork
from realtime.types import ClientInfo, Publication

# Channels whose account is remembered.
_REMEMBERED = 1024

HTTPProtocol = TypeVar("HTTPProtocol", bound=Protocol)


def charged_frontend(ledger: LoopTimeLedger, http_protocol: type[HTTPProtocol]) -> type[HTTPProtocol]:
    """Return a subclass of a protocol whose received data is charged to HTTP."""
    account, data_received = ledger.open(LoopWork.HTTP), http_protocol.dataReceived

    class ChargedFrontend(http_protocol):  # type: ignore[valid-type, misc]
        def dataReceived(self, data: bytes) -> None:
            charged_before = ledger.switch(account)
            try:
                data_received(self, data)
            finally:
                ledger.switch(charged_before)

    return ChargedFrontend


def charged_transport(ledger: LoopTimeLedger, http_protocol: type) -> type[DirectServer]:
    """Return a transport class for clients whose work is charged to the client protocol.

    While the protocol of a connection is an instance of exactly `http_protocol`, it is charged to HTTP. The selector
    reads and charges to the client protocol; see `charged_frontend`.
    """
    http_account, protocol_account = ledger.open(LoopWork.HTTP), ledger.open(LoopWork.PROTOCOL)

    def charging(method: Callable[..., Any]) -> Callable[..., Any]:
        def charged(self: Any, *args: Any) -> Any:
            charged_before = ledger.switch(http_account if type(self.protocol) is http_protocol else protocol_account)
            try:
                return method(self, *args)
            finally:
                ledger.switch(charged_before)

        return charged

    class ChargedServer(DirectServer):
        doRead = charging(DirectServer.doRead)
        doWrite = charging(DirectServer.doWrite)
        connectionLost = charging(DirectServer.connectionLost)

    return ChargedServer


def charge_steps(ledger: LoopTimeLedger, account: LoopAccount, steps: Iterator[None]) -> Iterator[None]:
    """Yield the same steps of work, each charged to `account`."""
    while True:
        charged_before = ledger.switch(account)
        try:
            next(steps)
        except StopIteration:
            return
        finally:
            ledger.switch(charged_before)
        yield


class NamespaceAccounts:
    """The accounts of the channel namespaces. ledger: the one that they belong to."""

    def __init__(
        self, ledger: LoopTimeLedger, namespaces: Iterable[str], namespace_of: Callable[[str], str | None]
    ) -> None:
        """namespaces: the names of the configured ones. namespace_of: returns a channel's, None for none."""
        self.ledger = ledger
        self._namespace_of = namespace_of
        self._default = ledger.open(LoopWork.FANOUT)  # channels without a namespace
        self._by_name: dict[str | None, LoopAccount] = {name: ledger.open(LoopWork.FANOUT, name) for name in namespaces}
        self.account = lru_cache(maxsize=_REMEMBERED)(self._account)

    def _account(self, channel: str) -> LoopAccount:
        """Return the account of a channel's namespace."""
        return self._by_name.get(self._namespace_of(channel), self._default)

    def charge_steps(self, channel: str, steps: Iterator[None]) -> Iterator[None]:
        """Yield the steps of a delivery that is divided into several turns of the loop, each charged."""
        return charge_steps(self.ledger, self.account(channel), steps)


class ChargedReceiver:
    """A receiver whose deliveries are charged to the namespace of their channel."""

    def __init__(self, receiver: Receiver, accounts: NamespaceAccounts) -> None:
        self._receiver = receiver
        self._accounts = accounts
        self._ledger = accounts.ledger
        self._on_publication = receiver.on_publication
        self.on_order = receiver.on_order
        self.on_cut = receiver.on_cut
        self.on_missed = receiver.on_missed
        self.on_interruption = receiver.on_interruption

    def on_publication(self, channel: str, publication: Publication, epoch: str) -> None:
        # As `_charge`, without a further call for each publication.
        charged_before = self._ledger.switch(self._accounts.account(channel))
        try:
            self._on_publication(channel, publication, epoch)
        finally:
            self._ledger.switch(charged_before)

    def on_join(self, channel: str, info: ClientInfo) -> None:
        self._charge(channel, self._receiver.on_join, info)

    def on_leave(self, channel: str, info: ClientInfo) -> None:
        self._charge(channel, self._receiver.on_leave, info)

    def _charge(self, channel: str, deliver: Callable[..., None], *event: Any) -> None:
        charged_before = self._ledger.switch(self._accounts.account(channel))
        try:
            deliver(channel, *event)
        finally:
            self._ledger.switch(charged_before)
