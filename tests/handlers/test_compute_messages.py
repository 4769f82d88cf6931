"""Messages between a worker and its compute processes."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from realtime.app import Request
from realtime.config.settings import AppSettings
from realtime.errors import ClientError, Disconnect, EngineUnavailable
from realtime.handlers.compute_messages import (
    HEAD,
    CallDisconnected,
    CallFailed,
    CallRefused,
    CallReturned,
    ComputeCall,
    FromProcess,
    ProcessReady,
    ServerCall,
    ServerOutcome,
    arguments_of,
    call_of,
    options_of,
    pack,
    pack_error,
    pack_result,
    result_of,
    returned,
    unpack_error,
    unpack_result,
)
from realtime.handlers.results import PreparedResponse
from realtime.types import ClientInfo, HistoryPage, Position, Publication


def unpacked(packed: bytes, type: Any) -> Any:
    (size,) = HEAD.unpack_from(packed)
    assert size == len(packed) - HEAD.size
    return msgspec.msgpack.decode(packed[HEAD.size :], type=type)


@pytest.mark.parametrize(
    ("message", "type"),
    [
        (AppSettings(module="shop:app", options={"colour": "blue"}), AppSettings),
        (ProcessReady(7), FromProcess),
        (ServerCall("publish", ["news", b"1"], {"delta": True}), FromProcess),
        (CallReturned(b"{}"), FromProcess),
        (CallReturned(response=PreparedResponse(201, b"a", "text/plain", (("x", "y"),))), FromProcess),
        (CallRefused(444, "no", True), FromProcess),
        (CallDisconnected(4500, "go away"), FromProcess),
        (CallFailed(("report.py", 7), "Traceback"), FromProcess),
    ],
)
def test_a_message_is_its_length_and_its_record(message: Any, type: Any) -> None:
    assert unpacked(pack(message), type) == message


@pytest.mark.parametrize(
    "argument",
    [
        *(None, 1, 2**70, "\u1234", [1, {"a": None}], b"", b"\xff"),
        Request("GET", "/", {}, {"a": "b"}, b"\0"),
        Request("GET", "/a/1", {}, {}, b"", path_parameters={"text": "1", "number": 1}),
    ],
)
def test_a_handler_gets_the_argument_of_its_call(argument: Any) -> None:
    call = unpacked(pack(call_of("rpc f", (argument,))), ComputeCall)
    assert call.handler == "rpc f"
    assert arguments_of(call) == (argument,)


@pytest.mark.parametrize("result", [None, b"", b"\xff", msgspec.Raw(b"[1]"), PreparedResponse(204)])
def test_the_worker_gets_the_result_of_a_handler(result: Any) -> None:
    got = result_of(unpacked(pack(returned(result)), FromProcess))
    assert type(got) is type(result)
    assert got == result or bytes(got) == bytes(result)


def test_a_response_of_wrong_types_is_the_handlers_error() -> None:
    response: Any = PreparedResponse(200, headers=(("x", 5),))  # type: ignore[arg-type]
    with pytest.raises(msgspec.ValidationError):
        returned(response)


@pytest.mark.parametrize(
    ("method", "result"),
    [
        ("publish", Position(1, "e")),
        ("broadcast", [Position(1, "e"), ClientError(107, "bad request")]),
        ("history", HistoryPage([Publication(b"1", 7, ClientInfo("ada", "c1"), {"t": "1"})], Position(7, "e"))),
        ("presence", {"c1": ClientInfo("ada", "c1", b"{}")}),
        ("presence_stats", (2, 1)),
        ("info", [{"name": "a", "uptime": 1.5}]),
        ("disconnect", None),
    ],
)
def test_a_call_of_the_server_returns_its_result(method: str, result: Any) -> None:
    outcome = unpacked(pack_result(result), ServerOutcome)
    assert repr(unpack_result(method, outcome.result)) == repr(result)


@pytest.mark.parametrize(
    "error",
    [
        ClientError(102, "unknown channel", True),
        Disconnect(4500, "go away"),
        EngineUnavailable("no broker"),
        ValueError("no such offset"),
    ],
)
def test_a_call_of_the_server_raises_its_error(error: Exception) -> None:
    got = unpack_error(unpacked(pack_error(error), ServerOutcome))
    assert (type(got), str(got), vars(got)) == (type(error), str(error), vars(error))


def test_a_bug_of_the_server_is_a_runtime_error() -> None:
    got = unpack_error(unpacked(pack_error(LookupError("odd")), ServerOutcome))
    assert (type(got), str(got)) == (RuntimeError, "LookupError('odd')")


def test_positions_arrive_as_positions() -> None:
    call = unpacked(pack(ServerCall("history", ["news"], {"since": Position(3, "e"), "limit": 1})), FromProcess)
    assert options_of(call) == {"since": Position(3, "e"), "limit": 1}


def test_an_object_that_can_not_be_sent_raises() -> None:
    with pytest.raises(TypeError, match="function"):
        pack(ServerCall("publish", [lambda: None]))


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_a_message_or_an_error_of_the_decoder(content: bytes) -> None:
    with suppress(msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        msgspec.msgpack.decode(content, type=FromProcess)
