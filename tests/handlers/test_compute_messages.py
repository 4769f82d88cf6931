"""Messages between a worker and its compute processes."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from realtime.config.settings import AppSettings
from realtime.errors import ClientError
from realtime.handlers.compute_messages import (
    HEAD,
    CallDisconnected,
    CallFailed,
    CallRefused,
    CallReturned,
    ComputeCall,
    ProcessReady,
    ServerCall,
    ServerResult,
    pack,
)
from realtime.types import Position


@pytest.mark.parametrize(
    "message",
    [
        AppSettings(module="shop:app", options={"colour": "blue"}),
        ProcessReady(7),
        ComputeCall("rpc f", (1, {"a": None})),
        ServerCall("publish", ("news", b"1"), {"delta": True}),
        ServerResult(Position(1, "epoch")),
        CallReturned(b"{}"),
        CallRefused(444, "no", True),
        CallDisconnected(4500, "go away"),
        CallFailed(("report.py", 7), "Traceback"),
    ],
)
def test_a_message_is_its_length_and_its_pickle(message: Any) -> None:
    packed = pack(message)
    (size,) = HEAD.unpack_from(packed)
    assert size == len(packed) - HEAD.size
    assert pickle.loads(packed[HEAD.size :]) == message


def test_an_error_keeps_its_code() -> None:
    error = pickle.loads(pack(ClientError(102, "unknown channel"))[HEAD.size :])
    assert (error.code, error.message) == (102, "unknown channel")


def test_an_object_that_pickle_cannot_encode_raises() -> None:
    with pytest.raises((pickle.PicklingError, AttributeError)):
        pack(CallReturned(lambda: None))
