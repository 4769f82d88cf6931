"""The server API over the engine in memory, for its tests."""

from __future__ import annotations

import json
from collections.abc import Coroutine
from typing import Any

import msgspec
import pytest

from realtime.config.settings import ChannelOptions, ChannelSettings, EngineSettings, Namespace
from realtime.errors import ClientError
from realtime.metrics import Metrics
from realtime.protocol.channel_rules import ChannelRules
from realtime.protocol.context import Gather
from realtime.protocol.orders import Order
from realtime.pubsub.broker_core import BrokerCore
from realtime.pubsub.engine import Engine, GetStats, Subscribe
from realtime.server_api.http_api import HTTPAPI
from realtime.server_api.operations import ServerAPI, sequentially
from realtime.types import ChannelCounts, ClientInfo, NodeInfo, Publication
from tests.pubsub.memory_engine import DirectDelivery, MemoryEngine

SETTINGS = ChannelSettings(
    without_namespace=ChannelOptions(),
    namespaces=(
        Namespace(name="chat", presence=True, history_size=5, history_ttl=60.0),
        Namespace(name="bare"),
        Namespace(name="json", publication_data_format="json"),
        Namespace(name="object", publication_data_format="json_object"),
        Namespace(name="bytes", publication_data_format="binary", history_size=5, history_ttl=60.0),
        Namespace(name="deltas", delta_publish=True),
    ),
)


class Receiver:
    """Notes what reaches a worker."""

    def __init__(self) -> None:
        self.publications: list[tuple[str, Publication]] = []
        self.orders: list[Order] = []

    def on_publication(self, channel: str, publication: Publication, epoch: str) -> None:
        self.publications.append((channel, publication))

    def on_join(self, channel: str, info: ClientInfo) -> None: ...

    def on_leave(self, channel: str, info: ClientInfo) -> None: ...

    def on_order(self, order: bytes) -> None:
        self.orders.append(msgspec.msgpack.decode(order, type=Order))

    def on_cut(self, batch: str) -> None: ...

    def on_missed(self, channel: str, publications: bool) -> None: ...

    def on_interruption(self) -> None: ...


def finish(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """The result of a coroutine that never waits, as none does over the engine in memory."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("the coroutine waits")


class Bench:
    def __init__(self) -> None:
        self.now = 0.0
        self.receiver = Receiver()
        settings = EngineSettings()
        core: BrokerCore[Any] = BrokerCore(
            DirectDelivery(), settings.max_channels, describe_node=lambda: NodeInfo("u1", "here", "1.2", 61.9)
        )
        self.engine = MemoryEngine(self.receiver, settings, lambda: self.now, core=core)
        self.surveyed, self.silent_workers = {"chat:1": 2, "chat:2": 1}, 0
        self.use(self.engine)
        for channel in ("chat:1", "bare:1", "plain", "json:1", "object:1", "bytes:1", "deltas:1"):
            self.engine.execute(Subscribe(channel))

    def use(self, engine: Engine, together: Gather = sequentially) -> None:
        self.operations = ServerAPI(engine, ChannelRules(SETTINGS), self._survey, together)
        self.metrics = Metrics()
        self.api = HTTPAPI(self.operations, together, self.metrics)

    async def _survey(self, pattern: str) -> ChannelCounts:
        await self.operations._engine.ask(GetStats())  # which fails when the engine does
        counts = {name: count for name, count in self.surveyed.items() if name.startswith(pattern.rstrip("*"))}
        return ChannelCounts(counts, self.silent_workers)

    def call(self, method: str, body: Any = None) -> Any:
        """The JSON of a result, decoded. body: bytes as they are, all else as JSON.

        A publication takes the short path, as from the HTTP port; those in batches take the general one.
        """
        raw = body if isinstance(body, bytes) else json.dumps({} if body is None else body).encode()
        result = self._publish(raw) if method == "publish" else finish(self.api.call(method, raw))
        return json.loads(msgspec.json.encode(result))

    def _publish(self, body: bytes) -> Any:
        outcomes: list[tuple[Any, BaseException | None]] = []
        self.api.publish(body, lambda result, error: outcomes.append((result, error)))
        ((result, error),) = outcomes
        if error is not None:
            raise error
        return result

    def refusal(self, method: str, body: Any = None) -> int:
        with pytest.raises(ClientError) as caught:
            self.call(method, body)
        return caught.value.code
