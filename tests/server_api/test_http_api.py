"""The HTTP API: bodies, fields, counters and batches."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from realtime.errors import ClientError, EngineUnavailable
from realtime.server_api import http_api
from realtime.server_api.http_api import BadBody, UnknownMethod
from tests.server_api.bench import Bench, finish

# -- the form of a call -----------------------------------------------------------------------------------------------

METHODS = [
    "publish",
    "broadcast",
    "subscribe",
    "refresh",
    "channels",
    "presence",
    "presence_stats",
    "history",
    "history_remove",
    "info",
    "disconnect",
    "unsubscribe",
    "batch",
]


FIELDS = set(METHODS) | {
    *("channel", "channels", "data", "b64data", "skip_history", "tags", "idempotency_key", "delta", "version"),
    *("version_epoch", "user", "client", "session", "info", "b64info", "recover_since", "offset", "epoch", "override"),
    *("value", "expire_at", "whitelist", "code", "reason", "expired", "limit", "since", "reverse", "pattern"),
    *("method", "params", "commands", "parallel", "force_recovery"),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("body", [b"", b" ", b"{", b"[]", b"null", b"7", b"{} {}", b'{"a":"\xff"}', b"[" * 100_000])
def test_body_must_be_one_object(bench: Bench, method: str, body: bytes) -> None:
    with pytest.raises(BadBody):
        bench.call(method, body)


@pytest.mark.parametrize(
    ("method", "body"),
    [
        ("publish", {"channel": 1}),
        ("publish", {"channel": "c", "data": 1, "tags": {"a": 1}}),
        ("publish", {"channel": "c", "data": 1, "skip_history": "yes"}),
        ("broadcast", {"channels": "c"}),
        ("history", {"channel": "chat:1", "limit": 1.5}),
        ("history", {"channel": "chat:1", "since": {"offset": -1}}),
        ("disconnect", {"user": 42}),
        ("disconnect", {"user": "ada", "whitelist": "c1"}),
        ("subscribe", {"user": "ada", "channel": "plain", "override": {"presence": True}}),
        ("subscribe", {"user": "ada", "channel": "plain", "expire_at": "tomorrow"}),
        ("subscribe", {"user": "ada", "channel": "plain", "expire_at": -1}),
        ("refresh", {"user": "ada", "expired": 1}),
        ("refresh", {"user": "ada", "expire_at": 1e300}),
        ("publish", {"channel": "c", "data": 1, "version": -1}),
        ("publish", {"channel": "c", "data": 1, "version_epoch": 7}),
        ("publish", {"channel": "c", "data": 1, "delta": "fossil"}),
        ("channels", {"pattern": None}),
        ("rpc", {"method": []}),
        ("batch", {"commands": {}}),
    ],
)
def test_field_of_another_type_is_a_bad_body(bench: Bench, method: str, body: Any) -> None:
    with pytest.raises(BadBody):
        bench.call(method, body)


@pytest.mark.parametrize("method", ["", "nothing", "Publish", "publish/", "map_publish", "__init__"])
def test_unknown_method(bench: Bench, method: str) -> None:
    with pytest.raises(UnknownMethod):
        bench.call(method)


def test_unknown_keys_are_ignored(bench: Bench) -> None:
    assert bench.call("publish", {"channel": "plain", "data": 1, "new": {"x": []}}) == {}
    assert bench.call("subscribe", {"user": "ada", "channel": "plain", "override": {"new": {"value": 7}}}) == {}


@pytest.mark.parametrize(
    ("body", "answer"),
    [
        ({"method": "publish", "params": {"channel": "plain", "data": 1}}, {}),
        ({"method": "presence_stats", "params": {"channel": "chat:1"}, "id": 7}, {"num_clients": 0, "num_users": 0}),
        ({"method": "channels"}, {"channels": {"chat:1": {"num_clients": 2}, "chat:2": {"num_clients": 1}}}),
    ],
)
def test_the_old_form_names_its_method_in_the_body(bench: Bench, body: Any, answer: Any) -> None:
    found = finish(bench.api.call_named(msgspec.json.encode(body)))
    assert json.loads(msgspec.json.encode(found)) == answer


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"{}", 104),
        (b'{"method":"nothing","params":{}}', 104),
        (b'{"method":"publish","params":{"channel":"nope:1","data":1}}', 102),
    ],
)
def test_refusals_in_the_old_form(bench: Bench, body: bytes, code: int) -> None:
    with pytest.raises(ClientError) as caught:
        finish(bench.api.call_named(body))
    assert caught.value.code == code


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"null", b'{"method":1}', b'{"method":"publish","params":[]}', b'{"method":"\xff"}']
)
def test_bad_bodies_in_the_old_form(bench: Bench, body: bytes) -> None:
    with pytest.raises(BadBody):
        finish(bench.api.call_named(body))


NEEDS_CHANNEL = ["publish", "presence", "presence_stats", "history", "history_remove", "unsubscribe"]
NEEDS_CHANNEL.append("subscribe")


@pytest.mark.parametrize("method", NEEDS_CHANNEL)
def test_channel_is_needed_and_its_namespace_known(bench: Bench, method: str) -> None:
    assert bench.refusal(method, {"data": 1, "user": "ada"}) == 107
    assert bench.refusal(method, {"channel": "nope:1", "data": 1, "user": "ada"}) == 102


@pytest.mark.parametrize("method", ["presence", "presence_stats", "history", "history_remove"])
def test_feature_that_is_off_is_not_available(bench: Bench, method: str) -> None:
    assert bench.refusal(method, {"channel": "bare:1"}) == 108
    assert bench.refusal(method, {"channel": "plain"}) == 108


@pytest.mark.parametrize("method", METHODS)
def test_engine_outage_is_error_100(bench: Bench, method: str) -> None:
    class Gone:
        async def ask(self, request: Any) -> Any:
            raise EngineUnavailable(type(request).__name__)

    bench.use(Gone())  # type: ignore[arg-type]
    body = {"channel": "chat:1", "channels": ["chat:1"], "data": 1, "user": "u", "commands": [{"info": {}}]}
    error = {"code": 100, "message": "internal server error"}
    match method:
        case "broadcast":
            assert bench.call(method, body) == {"responses": [{"error": error}]}
        case "batch":
            assert bench.call(method, body) == {"replies": [{"error": error}]}
        case _:
            assert bench.refusal(method, body) == 100


def test_calls_are_counted_by_method_and_error(bench: Bench) -> None:
    bench.call("batch", {"commands": [{"publish": {"channel": "plain", "data": 1}}] * 3 + [{"history": {}}]})
    bench.refusal("publish", {"channel": "nope:1", "data": 1})
    counted = {tuple(value for _, value in sorted(one.labels)): one.value for one in bench.metrics.snapshot()}
    assert counted == {("0", "publish"): 3, ("0", "batch"): 1, ("107", "history"): 1, ("102", "publish"): 1}


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**65), 2**65)
    | st.floats(allow_nan=False)
    | st.text("a:{}*#é\ud7ff", max_size=6)
    | st.sampled_from(["chat:1", "plain", "bytes:1", "e30=", "//8="]),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.sampled_from(sorted(FIELDS)), values, max_size=5),
    max_leaves=8,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(METHODS), st.dictionaries(st.sampled_from(sorted(FIELDS)), JSON_VALUES, max_size=8))
def test_whatever_a_body_holds_there_is_an_answer(bench: Bench, method: str, body: Any) -> None:
    with contextlib.suppress(BadBody, ClientError):
        bench.call(method, msgspec.json.encode(body))


# -- batch ------------------------------------------------------------------------------------------------------------


def test_batch_answers_each_command_in_order_without_a_wrapper(bench: Bench) -> None:
    commands = [
        {"publish": {"channel": "chat:1", "data": 1}},
        {"presence": {"channel": "bare:1"}},
        {"nothing": {}},
        {},
        None,
        {"publish": None},
        {"publish": {"channel": 7}},
        {"batch": {"commands": []}},
        {"unknown": {}, "presence_stats": {"channel": "chat:1"}},
        {"history": {"channel": "chat:1"}},
        {"disconnect": {"user": "ada"}},
    ]
    answer = bench.call("batch", {"commands": commands, "parallel": False})
    epoch = answer["replies"][0]["publish"]["epoch"]
    not_found = {"error": {"code": 104, "message": "not found"}}
    bad_request = {"error": {"code": 107, "message": "bad request"}}
    assert answer["replies"] == [
        {"publish": {"offset": 1, "epoch": epoch}},
        {"error": {"code": 108, "message": "not available"}},
        not_found,
        not_found,
        bad_request,
        bad_request,
        bad_request,
        not_found,
        {"presence_stats": {"num_clients": 0, "num_users": 0}},
        {"history": {"publications": [], "epoch": epoch, "offset": 1}},
        {"disconnect": {}},
    ]


def test_replies_to_one_batch_have_a_size(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_api, "BATCH_BYTES", 2000)
    for _ in range(2):
        bench.call("publish", {"channel": "chat:1", "data": "x" * 1000})
    commands = [{"history": {"channel": "chat:1", "limit": -1}}, {"publish": {"channel": "plain", "data": 1}}]
    for parallel in (False, True):
        replies = bench.call("batch", {"commands": commands * 10, "parallel": parallel})["replies"]
        answered = 8 if parallel else 1
        assert len(replies[0]["history"]["publications"]) == 2
        assert replies[answered:] == [{"error": {"code": 106, "message": "limit exceeded"}}] * (20 - answered)
        assert "error" not in replies[answered - 1]
    # What was refused was not done either.
    assert len([channel for channel, _ in bench.receiver.publications if channel == "plain"]) == 4
