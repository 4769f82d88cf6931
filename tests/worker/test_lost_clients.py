"""The ends of connections that ended with the worker before this one."""

from __future__ import annotations

from typing import Any

from realtime.errors import ClientError, EngineUnavailable
from realtime.handlers.coroutines import drive, gather
from realtime.pubsub.engine import TakeLostClients
from realtime.types import ClientInfo
from realtime.worker.lost_clients import report_lost_clients


class Broker:
    """Stands for the engine: gives these clients, and then raises an error, if any."""

    def __init__(self, clients: list[ClientInfo], error: Exception | None = None) -> None:
        self.clients = clients
        self.error = error

    async def ask(self, request: TakeLostClients) -> list[ClientInfo]:
        if not self.clients and self.error is not None:
            raise self.error
        taken, self.clients = self.clients[: request.limit], self.clients[request.limit :]
        return taken


class Handler:
    """An `on_disconnected` that notes its calls, and refuses a user."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, int, str]] = []

    async def __call__(self, client: Any, code: int, reason: str) -> None:
        self.calls.append((client.id, client.user, code, reason))
        client.send("nobody hears this")
        assert (client.info, client.meta, client.channels, client.headers) == (None, None, [], {})
        if client.user == "refused":
            raise ClientError(400, "no")


def report(broker: Any, handler: Handler) -> None:
    ended: list[BaseException | None] = []
    drive(report_lost_clients(broker, handler, gather), lambda result, error: ended.append(error))
    assert ended == [None]


def test_the_handler_is_called_for_each_of_them() -> None:
    clients = [ClientInfo(f"user{number}", f"client{number}") for number in range(250)]
    handler = Handler()
    report(Broker(clients), handler)
    assert handler.calls == [(info.client, info.user, 3000, "worker lost") for info in clients]


def test_a_refusal_and_a_broker_that_goes_away_end_nothing_else() -> None:
    handler = Handler()
    report(Broker([ClientInfo("refused", "a"), ClientInfo("ann", "b")], EngineUnavailable("gone")), handler)
    assert [call[0] for call in handler.calls] == ["a", "b"]
