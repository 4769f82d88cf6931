"""The wiring of a worker: which objects belong together, as their effects show."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace
from twisted.logger import globalLogPublisher

from realtime import cache
from realtime.app import App
from realtime.config.settings import (
    ChannelSettings,
    Namespace,
    Settings,
    SSESettings,
    WebSocketSettings,
    WorkersSettings,
)
from realtime.protocol.orders import ChannelsAnswer, ChannelsOrder, encode_order
from realtime.pubsub.fanout import broadcast
from realtime.supervision.loop_time import LoopWork
from realtime.supervision.vitals import ProcessState, Vitals
from realtime.types import Publication
from realtime.worker import wiring
from realtime.worker.wiring import (
    HandlerParts,
    ProtocolParts,
    PubSubParts,
    TransportParts,
    wire_handlers,
    wire_protocol,
    wire_pubsub,
    wire_transports,
)
from tests.driving import on_loop
from tests.transports.stage import eventually
from tests.worker.serving import OPTIONS, SETTINGS, WorkerChild


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch) -> cache.Host:
    """A host of caches in place of the process's own."""
    host = cache.Host()
    monkeypatch.setattr(cache, "HOST", host)
    return host


class Parts:
    """The parts of a worker without a broker. Use it within the loop."""

    def __init__(self, settings: Settings = SETTINGS, app: App | None = None) -> None:
        self.child = WorkerChild(settings)
        self.app = app or App()
        self.pubsub = wire_pubsub(self.child, self.app)
        self.handlers = wire_handlers(self.child, self.app, self.pubsub.node)
        self.protocol = wire_protocol(self.child, self.pubsub, self.handlers)
        self.transports = wire_transports(self.child, self.pubsub, self.handlers, self.protocol)

    def series(self) -> set[str]:
        return {sample.name for sample in self.child.metrics.snapshot()}


@on_loop
async def test_records_can_not_be_changed_afterwards() -> None:
    parts = Parts()
    records: list[PubSubParts | HandlerParts | ProtocolParts | TransportParts] = [
        parts.pubsub,
        parts.handlers,
        parts.protocol,
        parts.transports,
    ]
    for record in records:
        name = next(iter(record.__dataclass_fields__))
        with pytest.raises(AttributeError):
            setattr(record, name, None)


@on_loop
async def test_hub_and_engine_have_each_other_and_deliveries_are_charged_to_the_namespace() -> None:
    namespace = Namespace(name="chat")
    parts = Parts(replace(SETTINGS, channel=ChannelSettings(without_namespace=OPTIONS, namespaces=(namespace,))))
    hub, engine, ledger = parts.pubsub.hub, parts.pubsub.engine, parts.child.accounts
    assert hub.engine is engine
    account = ledger.open(LoopWork.FANOUT, "chat")
    engine._receiver.on_publication("chat:1", Publication(b"{}"), "")
    assert account.spent > 0
    assert hub.fanout.sent is parts.child.metrics.counter("realtime_messages_sent", "Messages to clients.")


@on_loop
async def test_orders_from_the_engine_reach_surveys_and_sessions() -> None:
    parts = Parts()
    sent: list[Any] = []

    class Recorder:
        async def ask(self, request: Any) -> Any:
            sent.append(request)

    surveys = parts.pubsub.sessions._handlers[ChannelsOrder].__self__  # type: ignore[attr-defined]
    surveys._engine = Recorder()
    parts.pubsub.engine._receiver.on_order(encode_order(ChannelsOrder(7, "3", "*")))
    await eventually(lambda: bool(sent))
    assert (sent[0].order, sent[0].worker) == (encode_order(ChannelsAnswer(7, {})), "3")


@on_loop
async def test_the_application_is_bound_and_its_caches_know_the_load(host: cache.Host) -> None:
    app = App()
    parts = Parts(app=app)
    assert app.pressure == ()
    vitals = Vitals(int(parts.child.reactor.seconds() * 1e9), 10.0, 0, 0, ProcessState.READY)
    parts.handlers.shedding.beat(vitals)
    assert app.pressure == ("lag",)
    assert host.load() >= 1


@pytest.mark.parametrize(
    ("changes", "paths"),
    [
        ({}, {"/connection/websocket"}),
        ({"websocket": WebSocketSettings(disabled=True)}, set()),
        ({"sse": SSESettings(enabled=True)}, {"/connection/websocket", "/connection/sse"}),
    ],
)
@on_loop
async def test_endpoints_follow_the_settings(changes: dict[str, Any], paths: set[str]) -> None:
    parts = Parts(replace(SETTINGS, **changes))
    assert set(parts.transports.frontend.endpoints) == paths


@on_loop
async def test_fan_out_uses_the_ring_if_it_is_enabled_and_available(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ring:
        def broadcast(self, frame: bytes, sinks: Any) -> None: ...

    class NoRing:
        def __init__(self) -> None:
            raise PermissionError("forbidden")

    enabled = replace(SETTINGS, workers=WorkersSettings(count=1, io_uring=True))
    monkeypatch.setattr(wiring, "IOURing", Ring)
    assert Parts(enabled).pubsub.hub.fanout.broadcast.__qualname__.endswith("Ring.broadcast")
    disabled = replace(SETTINGS, workers=WorkersSettings(count=1, io_uring=False))
    assert Parts(disabled).pubsub.hub.fanout.broadcast is broadcast
    monkeypatch.setattr(wiring, "IOURing", NoRing)
    assert Parts(enabled).pubsub.hub.fanout.broadcast is broadcast


@on_loop
async def test_a_bug_of_the_server_is_logged_with_its_traceback() -> None:
    events: list[dict[str, Any]] = []
    globalLogPublisher.addObserver(events.append)
    try:
        wiring._report_error(ValueError("a bug"))
    finally:
        globalLogPublisher.removeObserver(events.append)
    assert [event["log_failure"].value.args for event in events] == [("a bug",)]


@on_loop
async def test_every_part_registers_its_metrics() -> None:
    assert {
        "realtime_clients",
        "realtime_connections",
        "realtime_subscriptions",
        "realtime_undelivered_bytes",
        "realtime_undelivered_overflows",
        "realtime_messages_sent",
        "realtime_pressure",
        "realtime_handler_threads_busy",
        "realtime_engine_requests",
        "realtime_commands",
    } <= Parts().series()
