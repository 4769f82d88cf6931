"""Reports the ends of connections that ended with the worker that this one replaces.

A worker that dies calls no handlers for its clients any more. The broker keeps their ids and users, and gives them to
the worker in its place: the next one, or the one to which it was handing over. Nothing of this costs a connection
anything: the broker knows both anyway.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any

from realtime.errors import WORKER_LOST, ClientError, Disconnect, EngineUnavailable
from realtime.protocol.client import lost_client
from realtime.protocol.context import Gather
from realtime.pubsub.engine import Engine, TakeLostClients
from realtime.types import ClientInfo

# Clients whose handlers run side by side. The broker forgets this many at a time, so that a worker which dies as well
# loses no more.
AT_ONCE = 100

DisconnectedHandler = Callable[[Any, int, str], Awaitable[Any]]


async def report_lost_clients(engine: Engine, disconnected: DisconnectedHandler, gather: Gather) -> None:
    """Call `disconnected` for each client that an earlier worker in this place has left behind."""
    with suppress(EngineUnavailable):
        while lost := await engine.ask(TakeLostClients(AT_ONCE)):
            await report_ends(lost, disconnected, gather, *WORKER_LOST)


async def report_ends(
    clients: Sequence[ClientInfo], disconnected: DisconnectedHandler, gather: Gather, code: int, reason: str
) -> None:
    """Call `disconnected` for clients without a session here."""
    for start in range(0, len(clients), AT_ONCE):
        await gather([_report(info, disconnected, code, reason) for info in clients[start : start + AT_ONCE]])


async def _report(info: ClientInfo, disconnected: DisconnectedHandler, code: int, reason: str) -> None:
    with suppress(ClientError, Disconnect):  # as at the end of any connection
        await disconnected(lost_client(info), code, reason)
