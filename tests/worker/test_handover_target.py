"""The target of a hand-over takes over what arrives whole, and refuses what it can't serve."""

from __future__ import annotations

import os
import resource
import signal
import socket
from typing import Any

import msgspec
import pytest
from twisted.internet import reactor
from twisted.logger import capturedLogs

from realtime.handlers.coroutines import start_future
from realtime.process.fd_stream import FdStream, stream_pair
from realtime.protocol import handover as protocol_handover
from realtime.worker import handover
from realtime.worker.handover import VERSION, Accepted, Offered, Refused
from tests.driving import on_loop
from tests.transports.stage import eventually
from tests.worker.moving import arrive, scene


@on_loop
async def test_a_target_without_free_descriptors_takes_nothing_and_the_clients_come_back() -> None:
    async with scene() as stage:
        clients = [await arrive(stage.source) for _ in range(3)]
        ours, theirs = stream_pair()
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        send = FdStream.send

        def send_and_limit(self: FdStream, body: bytes, descriptors: Any = ()) -> None:
            send(self, body, descriptors)
            if descriptors:
                free = os.dup(0)
                os.close(free)
                resource.setrlimit(resource.RLIMIT_NOFILE, (free + 2, limits[1]))  # room for the claim and one other

        stage.target.worker.take_over(theirs.detach())
        FdStream.send = send_and_limit  # type: ignore[method-assign]
        try:
            result = await stage.source.worker.hand_over(ours.detach(), -1, 10.0)
        finally:
            FdStream.send = send  # type: ignore[method-assign]
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert (result["moved"], result["closed"]) == (0, 3)
        for client in clients:
            assert (await client.client.closed())[0] == 3001
            client.leave()
        assert result["failures"] == [{"reason": "descriptors", "count": 3}]


@on_loop
async def test_a_source_that_ends_after_the_cut_leaves_no_client_behind() -> None:
    async with scene() as stage:
        witness = await arrive(stage.target)
        client = await arrive(stage.source)
        ours, theirs = stream_pair()
        stage.target.worker.take_over(theirs.detach())
        send = FdStream.send

        def die_instead(self: FdStream, body: bytes, descriptors: Any = ()) -> None:
            if descriptors:
                self.close()
            else:
                send(self, body)

        FdStream.send = die_instead  # type: ignore[method-assign]
        try:
            result = await stage.source.worker.hand_over(ours.detach(), -1, 10.0)
        finally:
            FdStream.send = send  # type: ignore[method-assign]
        assert (result["moved"], result["closed"]) == (0, 1)
        await eventually(lambda: len(witness.pushes("leave")) == 1)
        assert (await client.client.closed())[0] == 3001
        client.leave()
        witness.leave()


@on_loop
async def test_clients_of_a_source_that_dies_with_its_cut_on_the_way_are_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with scene() as stage:
        client = await arrive(stage.source)
        ours, theirs = stream_pair()
        stage.target.worker.take_over(theirs.detach())
        cut, wire = protocol_handover.cut, ours.dup()

        async def cut_and_die(services: Any, *arguments: Any) -> Any:
            stage.source.broker.signal(signal.SIGSTOP)
            cutting = start_future(cut(services, *arguments))
            services.engine.close()  # behind the `Cut`
            wire.shutdown(socket.SHUT_RDWR)
            await eventually(lambda: not stage.target.worker._takeovers[0]._stream.open)
            stage.source.broker.signal(signal.SIGCONT)
            return await cutting

        monkeypatch.setattr(protocol_handover, "cut", cut_and_die)
        with wire:
            await stage.source.worker.hand_over(ours.detach(), -1, 10.0)
        await eventually(lambda: [code for _, code in stage.target_app.ended] == [3000])
        client.leave()


@on_loop
async def test_a_target_refuses_another_version() -> None:
    async with scene() as stage:
        ours, theirs = stream_pair()
        stage.target.worker.take_over(theirs.detach())
        received: list[Any] = []
        stream = FdStream(
            reactor,
            ours.detach(),
            lambda body, descriptors: received.append(handover.decode_at_source(body)),
            lambda: None,
        )
        stream.send(msgspec.msgpack.encode(Offered(VERSION + 1, "0-9")))
        await eventually(lambda: bool(received))
        assert isinstance(received[0], Refused)
        stream.close()


@on_loop
async def test_a_target_refuses_more_connections_than_it_has_descriptors_for() -> None:
    async with scene() as stage:
        ours, theirs = stream_pair()
        stage.target.worker.take_over(theirs.detach())
        received: list[Any] = []
        stream = FdStream(
            reactor,
            ours.detach(),
            lambda body, descriptors: received.append(handover.decode_at_source(body)),
            lambda: None,
        )
        stream.send(handover.encode(Offered(VERSION, "0-9")))
        stream.send(handover.encode(handover.Announced("0-9/1", 10_000_000, ["news"], [])))
        await eventually(lambda: len(received) == 2)
        assert received[0] == Accepted(VERSION, stage.target.worker._handover.address)
        assert "limit of open files" in received[1].reason
        stream.close()


@on_loop
async def test_an_error_at_the_target_leaves_no_client_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    async def raise_error(*_: Any) -> None:
        raise RuntimeError("a bug")

    async with scene() as stage:
        witness = await arrive(stage.target)
        client = await arrive(stage.source)
        ours, theirs = stream_pair()
        stage.target.worker.take_over(theirs.detach())
        monkeypatch.setattr(protocol_handover, "arrived", raise_error)
        with capturedLogs() as events:
            result = await stage.source.worker.hand_over(ours.detach(), -1, 10.0)
        assert (result["moved"], result["closed"]) == (0, 1)
        await eventually(lambda: len(witness.pushes("leave")) == 1)
        assert (await client.client.closed())[0] == 3001
        assert [event["log_failure"].getErrorMessage() for event in events if "log_failure" in event] == ["a bug"]
        client.leave()
        witness.leave()
