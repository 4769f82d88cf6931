"""A handler process on its own: its messages, as the worker reads them from the stream."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from realtime.config.settings import AppSettings, LogSettings
from realtime.errors import LIMIT_EXCEEDED, ClientError, EngineUnavailable
from realtime.handlers.compute_messages import (
    HEAD,
    MAX_REPLY,
    CallFailed,
    CallRefused,
    CallReturned,
    FromProcess,
    ProcessReady,
    ProcessSettings,
    ServerCall,
    call_of,
    pack,
    pack_error,
    pack_result,
)
from realtime.handlers.compute_process import ServerStub
from realtime.types import Position

HERE = Path(__file__).parent


class Worker:
    """The worker's end of a handler process."""

    def __init__(self, module: str) -> None:
        self.stream, theirs = socket.socketpair()
        self.stream.settimeout(30)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "realtime.handlers.compute_process", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                process_group=0,
            )
        app = AppSettings(module=module, path=str(HERE), options={"colour": "blue"})
        self.send(ProcessSettings(app, LogSettings(), "worker 0"))

    def send(self, message: Any) -> None:
        self.stream.sendall(pack(message))

    def receive(self) -> Any:
        return receive(self.stream)

    def close(self) -> int:
        """End the stream, and return the exit status."""
        self.stream.close()
        return self.process.wait(30)


def receive(stream: socket.socket) -> Any:
    head = stream.recv(HEAD.size, socket.MSG_WAITALL)
    if not head:
        return None
    return msgspec.msgpack.decode(stream.recv(*HEAD.unpack(head), socket.MSG_WAITALL), type=FromProcess)


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker("heavy_app:app")
    yield worker
    worker.process.kill()
    worker.close()


def test_it_announces_itself_carries_out_calls_and_ends_with_the_stream(worker: Worker) -> None:
    assert worker.receive() == ProcessReady(worker.process.pid)
    worker.send(call_of("rpc limited", (1,)))
    assert worker.receive() == CallReturned(b"1")
    worker.send(call_of("rpc refuse", (None,)))
    assert worker.receive() == CallRefused(444, "no such report", True)
    worker.send(call_of("rpc fail", (None,)))
    failure = worker.receive()
    assert isinstance(failure, CallFailed)
    assert failure.place[0].endswith("heavy_app.py")
    assert "SystemExit: the handler's own mistake" in failure.text
    assert worker.close() == 0


def test_an_application_that_cannot_be_loaded_is_reported() -> None:
    worker = Worker("heavy_app:nothing")
    failure = worker.receive()
    assert isinstance(failure, CallFailed)
    assert "nothing" in failure.text
    assert worker.close() == os.EX_CONFIG


def test_a_worker_that_dies_before_the_settings_leaves_no_process() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "realtime.handlers.compute_process", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
        )
    ours.close()
    assert process.wait(30) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_to_the_whole_group_do_not_end_it(worker: Worker, number: int) -> None:
    worker.receive()
    os.killpg(worker.process.pid, number)
    worker.send(call_of("rpc limited", (2,)))
    assert worker.receive() == CallReturned(b"2")


def test_calls_of_the_server_pass_over_the_stream(worker: Worker) -> None:
    worker.receive()
    worker.send(call_of("rpc voice", (["publish", ["news", 1]],)))
    assert worker.receive() == ServerCall("publish", ["news", b"1"], {})
    worker.stream.sendall(pack_result(Position(7, "epoch")))
    assert b"offset=7" in worker.receive().data


# The stub of the server.


def test_the_stub_returns_results_and_raises_errors() -> None:
    ours, theirs = socket.socketpair()
    server = ServerStub(ours)
    with ours, theirs:
        theirs.sendall(pack_result({}) + pack_error(ClientError(102, "unknown channel")))
        with server:
            assert server.perform(server.presence("news")) == {}
            with pytest.raises(ClientError, match="unknown channel"):
                server.perform(server.publish("news", b"1", delta=True))
        assert receive(theirs) == ServerCall("presence", ["news"], {})
        assert receive(theirs) == ServerCall("publish", ["news", b"1"], {"delta": True})


def test_the_stub_refuses_calls_that_are_too_long_or_outside_a_handler() -> None:
    ours, theirs = socket.socketpair()
    server = ServerStub(ours)
    with ours, theirs:
        with pytest.raises(RuntimeError, match="no longer"):
            server.perform(server.presence("news"))
        with server, pytest.raises(ClientError) as caught:
            server.perform(server.publish("news", b"x" * MAX_REPLY))
        assert (caught.value.code, caught.value.message, caught.value.temporary) == LIMIT_EXCEEDED
        theirs.close()
        with server, pytest.raises((EngineUnavailable, ConnectionError)):
            server.perform(server.presence("news"))


def test_threads_take_turns_on_the_stub() -> None:
    ours, theirs = socket.socketpair()
    server, results = ServerStub(ours), []
    with ours, theirs, server:
        threads = [
            threading.Thread(target=lambda: results.append(server.perform(server.presence_stats("news"))))
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for number in range(3):
            assert receive(theirs) == ServerCall("presence_stats", ["news"], {})
            time.sleep(0.01)
            assert len(results) == number  # the next call is not sent before this one has its result
            theirs.sendall(pack_result((number, number)))
        for thread in threads:
            thread.join()
    assert results == [(0, 0), (1, 1), (2, 2)]
