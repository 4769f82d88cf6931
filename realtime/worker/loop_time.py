"""Who is charged for what a worker's loop does for its clients: their protocol, HTTP, or a namespace's fan-out.

Handlers are charged by their `Dispatcher`, coroutines that waited by `realtime.handlers.coroutines`. This is put
on from outside, when a worker is wired: what is charged knows nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from realtime.process.transport import DirectServer
from realtime.pubsub.engine import Receiver
from realtime.supervision.loop_time import LoopAccount, LoopTimeLedger, LoopWork
from realtime.types import ClientInfo, Publication


def charged_transport(accounts: LoopTimeLedger, http: type) -> type[DirectServer]:
    """The clients' transport, whose work is charged to the client protocol; while its protocol is of type `http`, to
    HTTP."""
    is_http, is_other = accounts.open(LoopWork.HTTP), accounts.open(LoopWork.PROTOCOL)

    def charging(method: Callable[..., Any]) -> Callable[..., Any]:
        def charged(self: Any, *args: Any) -> Any:
            before = accounts.switch(is_http if type(self.protocol) is http else is_other)
            try:
                return method(self, *args)
            finally:
                accounts.switch(before)

        return charged

    class Charged(DirectServer):
        doRead = charging(DirectServer.doRead)
        doWrite = charging(DirectServer.doWrite)
        connectionLost = charging(DirectServer.connectionLost)

    return Charged


def charged_steps(accounts: LoopTimeLedger, account: LoopAccount, steps: Iterator[None]) -> Iterator[None]:
    """The same steps of work, each charged to `account`."""
    while True:
        before = accounts.switch(account)
        try:
            next(steps)
        except StopIteration:
            return
        finally:
            accounts.switch(before)
        yield


class ChargedReceiver:
    """A receiver whose deliveries are charged to the namespace of their channel."""

    def __init__(
        self,
        receiver: Receiver,
        accounts: LoopTimeLedger,
        namespaces: Iterable[str],
        namespace: Callable[[str], str | None],
    ) -> None:
        """namespaces: those that are configured. namespace: a channel's, None for none."""
        self._receiver = receiver
        self._accounts = accounts
        self._without = accounts.open(LoopWork.FANOUT)
        self._namespaces: dict[str | None, LoopAccount] = {
            name: accounts.open(LoopWork.FANOUT, name) for name in namespaces
        }
        self._namespace = namespace
        self.on_order = receiver.on_order
        self.on_interruption = receiver.on_interruption

    def on_publication(self, channel: str, publication: Publication, epoch: str) -> None:
        self._charge(channel, self._receiver.on_publication, publication, epoch)

    def on_join(self, channel: str, info: ClientInfo) -> None:
        self._charge(channel, self._receiver.on_join, info)

    def on_leave(self, channel: str, info: ClientInfo) -> None:
        self._charge(channel, self._receiver.on_leave, info)

    def steps(self, channel: str, steps: Iterator[None]) -> Iterator[None]:
        """The same for what could not be delivered at once: steps that are taken later."""
        return charged_steps(self._accounts, self._account(channel), steps)

    def _charge(self, channel: str, deliver: Callable[..., None], *what: Any) -> None:
        before = self._accounts.switch(self._account(channel))
        try:
            deliver(channel, *what)
        finally:
            self._accounts.switch(before)

    def _account(self, channel: str) -> LoopAccount:
        return self._namespaces.get(self._namespace(channel), self._without)
