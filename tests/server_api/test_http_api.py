"""The HTTP API: bodies, fields, counters and batches."""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from realtime.errors import ClientError, EngineUnavailable
from realtime.protocol.orders import SubscribeOrder
from realtime.pubsub.engine import AnswerCallback
from realtime.pubsub.time_slices import TimeSlicer
from realtime.server_api import http_api
from realtime.server_api.http_api import BadBody, UnknownMethod
from realtime.types import Position, SubscribeOptions
from tests.protocol.sessions import Gate, run
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


NULLS: list[tuple[str, dict[str, Any]]] = [
    ("publish", dict.fromkeys(("b64data", "skip_history", "tags", "idempotency_key", "delta", "version"))),
    ("publish", {"version_epoch": None, "tags": {"a": "1", "b": None}}),
    ("broadcast", {"channels": ["plain"], "channel": None, "b64data": None, "delta": None}),
    ("subscribe", dict.fromkeys(("client", "session", "b64info", "b64data", "recover_since", "override", "expire_at"))),
    ("subscribe", {"override": {"presence": {"value": None}}, "recover_since": {"offset": None, "epoch": None}}),
    ("unsubscribe", {"user": None, "client": None, "session": None}),
    ("disconnect", {"whitelist": [None, "c1"], "disconnect": {"code": 4000, "reason": "gone"}, "client": None}),
    ("disconnect", {"whitelist": None, "disconnect": None}),
    ("refresh", {"user": None, "expired": None, "expire_at": None}),
    ("channels", {"pattern": None}),
    ("history", {"limit": None, "reverse": None, "since": {"offset": None}}),
    ("history", {"since": None, "limit": 1}),
    ("batch", {"commands": None, "parallel": None}),
]


@pytest.mark.parametrize(("method", "fields"), NULLS)
def test_null_means_absent(bench: Bench, method: str, fields: dict[str, Any]) -> None:
    body = {"channel": "chat:1", "data": None} | fields
    present = {name: value for name, value in body.items() if value is not None or name == "data"}
    assert bench.call(method, body) == bench.call(method, present) | ({"offset": 1} if method == "publish" else {})
    with pytest.raises(BadBody):
        bench.call(method, body | {"user": 5, "channel": 5, "pattern": 5, "commands": 5})


def test_null_in_fields_that_orders_carry(bench: Bench) -> None:
    body = {"user": None, "channel": "chat:1", "data": [None, {"a": None}], "override": {"presence": {"value": None}}}
    bench.call("subscribe", body | {"recover_since": {"offset": 7, "epoch": None}, "client": None})
    terms = SubscribeOptions(data=b'[null, {"a": null}]', override={"presence": False})
    assert bench.receiver.orders == [SubscribeOrder("", "chat:1", terms, "", "", Position(7, ""))]


def test_null_as_data_and_in_data_stays(bench: Bench) -> None:
    for data in (b"null", b'{"a":null}', b"[null]"):
        body = b'{"channel":"plain","data":%b,"tags":{"a":"1","b":null},"delta":null}' % data
        bench.call("publish", body)
        bench.call("batch", b'{"commands":[{"publish":%b}],"parallel":null}' % body)
        bench.call("broadcast", body.replace(b'"channel":"plain"', b'"channels":["plain"]'))
        for channel, publication in bench.receiver.publications[-3:]:
            assert (channel, publication.data, publication.tags) == ("plain", data, {"a": "1"})


def test_a_channel_that_is_null_has_a_response_in_its_place(bench: Bench) -> None:
    responses = bench.call("broadcast", {"channels": ["plain", None, "plain"], "data": 1})["responses"]
    assert ["error" in response for response in responses] == [False, True, False]


# -- several commands in one body -------------------------------------------------------------------------------------


def pipeline(bench: Bench, *lines: bytes | dict[str, Any]) -> list[Any]:
    body = b"\n".join(line if isinstance(line, bytes) else msgspec.json.encode(line) for line in lines)
    return [json.loads(line) for line in finish(bench.api.call_named(body)).lines]


def publish_line(text: Any, **fields: Any) -> dict[str, Any]:
    return {"method": "publish", "params": {"channel": "plain", "data": text, **fields}}


def test_commands_one_a_line_are_answered_one_a_line(bench: Bench) -> None:
    responses = pipeline(
        bench,
        publish_line("a\nb"),
        {"method": "presence_stats", "params": {"channel": "chat:1"}},
        publish_line(2, channel="nope:1"),
        {"method": "nothing"},
        {"method": "publish", "params": []},
        {"method": "channels", "params": None},
        publish_line(3),
    )
    assert responses[:2] == [{"result": {}}, {"result": {"num_clients": 0, "num_users": 0}}]
    assert [response["error"]["code"] for response in responses[2:5]] == [102, 104, 107]
    assert set(responses[5]["result"]["channels"]) == {"chat:1", "chat:2"}
    assert responses[6] == {"result": {}}
    assert [publication.data for _, publication in bench.receiver.publications] == [b'"a\\nb"', b"3"]
    assert len(pipeline(bench, publish_line(1), b"\r", publish_line(2), b"")) == 2


@pytest.mark.parametrize("line", [b"{", b"[]", b"7", b"null", b'{"method":1}', b'{"a":"\xff"}', b"{} {}"])
def test_no_command_runs_if_a_line_is_not_a_command(bench: Bench, line: bytes) -> None:
    with pytest.raises(BadBody):
        pipeline(bench, publish_line(1), line, publish_line(2))
    assert bench.receiver.publications == []


def test_a_pipeline_is_bounded_like_a_batch(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_api, "BATCH_BYTES", 30)
    responses = pipeline(bench, *[publish_line(number) for number in range(5)])
    assert responses == [{"result": {}}] * 3 + [{"error": {"code": 106, "message": "limit exceeded"}}] * 2
    assert [publication.data for _, publication in bench.receiver.publications] == [b"0", b"1", b"2"]


@pytest.mark.parametrize("parallel", [False, True])
def test_many_commands_leave_turns_to_the_loop(bench: Bench, parallel: bool) -> None:
    turns = 0

    class Counted(TimeSlicer):
        async def yield_to_loop(self) -> None:
            nonlocal turns
            turns += 1

    api = http_api.HTTPAPI(bench.operations, slices=Counted(lambda: 0.0, 1.0, lambda run: None))
    commands: list[dict[str, Any]] = [{}] * 1000
    finish(api.call("batch", msgspec.json.encode({"commands": commands, "parallel": parallel})))
    assert turns >= 9
    turns = 0
    finish(api.call_named(b"\n".join([b"{}"] * 1000)))
    assert turns >= 9


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

        def ask_then(self, request: Any, done: AnswerCallback) -> None:
            done(None, EngineUnavailable(type(request).__name__))

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


NUMBERS = [
    ("history", {"channel": "chat:1", "limit": None}),
    ("history", {"channel": "chat:1", "since": {"offset": None, "epoch": ""}}),
    ("publish", {"channel": "chat:1", "data": 1, "version": None}),
    ("broadcast", {"channels": ["chat:1"], "data": 1, "version": None}),
    ("subscribe", {"user": "ada", "channel": "chat:1", "expire_at": None}),
    ("subscribe", {"user": "ada", "channel": "chat:1", "recover_since": {"offset": None}}),
    ("disconnect", {"user": "ada", "disconnect": {"code": None, "reason": "gone"}}),
    ("refresh", {"user": "ada", "expire_at": None}),
]


@pytest.mark.parametrize("number", [2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**100, -(2**63), -(2**64)])
@pytest.mark.parametrize(("method", "fields"), NUMBERS)
def test_a_number_of_any_size_has_an_answer(bench: Bench, method: str, fields: dict[str, Any], number: int) -> None:
    body = json.dumps(fields).replace("null", str(number)).encode()
    try:
        result = bench.call(method, body)
    except BadBody:
        return
    except ClientError as error:
        assert error.code == 107
        return
    assert "error" not in json.dumps(result) or '"code": 107' in json.dumps(result)
    for order in bench.receiver.orders:
        assert msgspec.msgpack.encode(order)


def test_the_commands_of_a_batch_and_the_channels_of_a_broadcast_are_limited(bench: Bench) -> None:
    bench.api._max_batch = 3
    publish = {"publish": {"channel": "plain", "data": 1}}
    assert len(bench.call("batch", {"commands": [publish] * 3})["replies"]) == 3
    assert bench.refusal("batch", {"commands": [publish] * 4}) == 106
    assert bench.refusal("broadcast", {"channels": ["plain"] * 4, "data": 1}) == 106
    line = b'{"method":"info"}\n\n  \n'
    assert len(finish(bench.api.call_named(line * 3)).lines) == 3
    with pytest.raises(ClientError) as refused:
        finish(bench.api.call_named(line * 4))
    assert refused.value.code == 106


@pytest.mark.parametrize(
    ("method", "field"), [("batch", "commands"), ("broadcast", "channels"), ("disconnect", "whitelist")]
)
def test_the_items_of_a_long_body_are_counted_before_they_are_decoded(bench: Bench, method: str, field: str) -> None:
    # Commas within an item, or in text, do not count.
    item = {"publish": {"channel": "no,no", "data": [1, "],", {"a": [2, 3]}]}} if field == "commands" else "a,b]"
    bench.api._max_batch = 3000
    body = {field: [item] * 3000, "user": "ada", "data": "x" * 70_000}
    assert bench.call(method, body) is not None
    body[field] = [item] * 3001
    assert bench.refusal(method, body) == 106


def test_the_tags_of_a_long_body_are_counted(bench: Bench) -> None:
    bench.api._max_batch = 3000
    body = {"channel": "chat:1", "data": "x" * 70_000, "delta": None}
    bodies = [json.dumps({**body, "tags": {f"tag {each}": "a,b" for each in range(n)}}).encode() for n in (1500, 1501)]
    finish(bench.api.call("publish", bodies[0]))
    with pytest.raises(ClientError) as refused:
        finish(bench.api.call("publish", bodies[1]))
    assert refused.value.code == 106


class Turn(Gate):
    def callback(self, result: None) -> None:
        self.open()


@pytest.mark.parametrize("name", ["brackets", "surrogates"])
def test_long_data_is_checked_in_slices(bench: Bench, name: str) -> None:
    data = b"[" + b",".join([b"[]" if name == "brackets" else b'"\\ud83d\\ude00"'] * 10_000) + b"]"
    turns: list[Callable[[], None]] = []
    slices = TimeSlicer(lambda: 0.0, 1.0, turns.append, Turn)
    operations = bench.operations
    operations._slices = slices
    api = http_api.HTTPAPI(operations, slices=slices)
    for encoding in (b'"data":%b' % data, b'"b64data":"%b"' % base64.b64encode(data)):
        outcomes: list[object] = []
        run(api.call("publish", b'{"channel":"plain",%b}' % encoding), lambda *outcome, to=outcomes: to.append(outcome))
        assert not outcomes
        while turns:
            turns.pop()()
        assert outcomes[0][1] is None
