"""The calls of an application to its server."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from realtime.app import App
from realtime.types import WorkerInfo
from tests.app.declaring import plain, problem


class Recorder:
    """Takes the place of the server: notes each call."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **options: self.calls.append((name, args, options))


def test_methods_reach_the_server(app: App) -> None:
    server = Recorder()
    app.bind(server, lambda result: "performed")  # type: ignore[arg-type]
    assert app.publish("news", {"a": 1}, tags={"t": "1"}, idempotency_key="k") == "performed"
    app.publish("news", msgspec.Raw(b'{"as": 1.0}'))
    app.broadcast(iter(["a", "b"]), None, skip_history=True)
    app.publish("news", b"\xff", binary=True)
    app.history("news", limit=3)
    app.channels("chat:*")
    app.disconnect("ada", whitelist=["c1"], code=4500, reason="bye")
    app.unsubscribe("ada", "news", client="c1")
    app.subscribe("ada", "news", info={"n": 1}, data=False, override={"presence": True}, expire_at=7)
    app.refresh("ada", session="s1", expire_at=7, info=[])
    app.refresh("", expired=True)
    subscribed = {"recover_since": None, "override": {"presence": True}, "expire_at": 7}
    assert server.calls == [
        ("publish", ("news", b'{"a":1}'), {"tags": {"t": "1"}, "idempotency_key": "k"}),
        ("publish", ("news", b'{"as": 1.0}'), {}),
        ("broadcast", (["a", "b"], b"null"), {"skip_history": True}),
        ("publish", ("news", b"\xff"), {"binary": True}),
        ("history", ("news",), {"limit": 3, "since": None, "reverse": False}),
        ("channels", ("chat:*",), {}),
        ("disconnect", ("ada",), {"client": "", "session": "", "whitelist": ("c1",), "code": 4500, "reason": "bye"}),
        ("unsubscribe", ("ada", "news"), {"client": "c1", "session": ""}),
        (
            "subscribe",
            ("ada", "news"),
            {"client": "", "session": "", "info": b'{"n":1}', "data": b"false"} | subscribed,
        ),
        ("refresh", ("ada",), {"client": "", "session": "s1", "expired": False, "expire_at": 7, "info": b"[]"}),
        ("refresh", ("",), {"client": "", "session": "", "expired": True, "expire_at": 0.0, "info": b""}),
    ]


def test_binary_data_is_bytes(app: App) -> None:
    app.bind(Recorder(), lambda result: result)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="bytes, not str"):
        app.publish("news", "text", binary=True)


def test_data_that_is_no_json_fails_at_the_caller(app: App) -> None:
    server = Recorder()
    app.bind(server, lambda result: result)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        app.publish("news", object())
    assert server.calls == []


def test_nothing_can_be_published_before_the_server_runs(app: App) -> None:
    with pytest.raises(RuntimeError, match="only while a server runs it"):
        app.publish("news", 1)


def test_nothing_can_be_declared_after_it(app: App) -> None:
    app.bind(Recorder(), lambda result: result)  # type: ignore[arg-type]
    assert "after the server started" in problem(lambda: app.rpc("f")(plain))


def test_an_application_that_does_not_run_is_under_no_pressure(app: App) -> None:
    assert app.pressure == ()


def test_the_worker_is_known_once_the_application_is_bound() -> None:
    app = App()
    with pytest.raises(RuntimeError, match="during the import"):
        _ = app.worker
    app.bind(Recorder(), lambda result: result, worker=WorkerInfo(1, 4, "node"))  # type: ignore[arg-type]
    assert (app.worker.slot, app.worker.count, app.worker.node) == (1, 4, "node")
