"""Which handler runs on the loop, as the marker records it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from twisted.internet import reactor as global_reactor
from twisted.internet.task import deferLater

from realtime.app import App, Request
from realtime.handlers.marking import ChargingMarker, call_marked, names_reader
from realtime.supervision.loop_time import LoopTimeLedger, LoopWork
from tests.driving import on_loop
from tests.handlers.bench import Bench, RecordingMarker, refusal


@on_loop
async def test_each_step_of_a_handler_on_the_loop_is_marked(bench: Bench) -> None:
    running = bench.marker.running
    seen = []

    @bench.app.rpc("f")
    async def f(data: Any) -> None:
        seen.append(list(running))
        await asyncio.sleep(0.001)
        seen.append(list(running))
        await deferLater(global_reactor, 0.001, lambda: None)
        seen.append(list(running))

    @bench.app.rpc("g", run="loop")
    def g(data: Any) -> None:
        seen.append(list(running))

    @bench.app.on_subscribe("chat:*")
    async def may_join(client: Any, channel: str) -> bool:
        seen.append(list(running))
        raise ValueError("a bug")

    dispatcher = await bench.start()
    call = bench.begin("f")
    while not call.done():
        assert running == []
        await asyncio.sleep(0)
    await call
    assert seen == [[(b"rpc f", b"f")]] * 3
    await bench.call("g")
    assert seen.pop() == [(b"rpc g", b"g")]
    subscribing = dispatcher.subscribing("chat:7")
    assert subscribing is not None
    await refusal(subscribing(bench.client, "chat:7", None))
    assert seen.pop() == [(b"on_subscribe chat:*", b"chat:7")]
    assert running == []


def test_charging_marker_charges_nested_handlers_exclusively() -> None:
    now = 0
    ledger = LoopTimeLedger(lambda: now)
    marker = ChargingMarker(ledger)
    outer, inner = (ledger.open(LoopWork.HANDLER, name) for name in ("outer", "inner"))

    def work(nanoseconds: int) -> None:
        nonlocal now
        now += nanoseconds

    def nested() -> None:
        work(1)
        call_marked(marker, (b"inner", b""), inner, work, 10)
        work(2)

    call_marked(marker, (b"outer", b""), outer, nested)
    work(100)
    assert (outer.spent, inner.spent) == (3, 10)


def test_marker_is_left_when_the_function_raises() -> None:
    marker = RecordingMarker()
    with pytest.raises(ZeroDivisionError):
        call_marked(marker, (b"f", b""), LoopTimeLedger(int).current, lambda: 1 / 0)
    assert marker.running == []


@pytest.mark.parametrize(
    ("kind", "key", "args", "subject"),
    [
        ("on_subscribe", "chat:*", (None, "chat:7"), b"chat:7"),
        ("on_publish", "chat:*", (None, "chat:\ud800", b""), b"chat:?"),
        ("rpc", "sum of", (None, 1), b"sum of"),
        ("http", "/page", (Request("GET", "/page", {}, {}, b""),), b"/page"),
    ],
)
def test_subject_is_the_channel_the_method_or_the_path(kind: str, key: str, args: Any, subject: bytes) -> None:
    app = App()
    declare = app.http.get if kind == "http" else getattr(app, kind)
    declare(key)(lambda *args: None)
    [handler] = app.handlers(kind).values()
    assert names_reader(handler)(args) == (handler.name.encode(), subject)
