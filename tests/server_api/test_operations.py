"""The operations of the server API as tables: arguments, results and refusals of each."""

from __future__ import annotations

import base64
import json
from functools import partial
from typing import Any

import msgspec
import pytest

from realtime.errors import ClientError
from realtime.protocol.channel_rules import ChannelRules
from realtime.protocol.orders import DisconnectOrder, Order, RefreshOrder, SubscribeOrder, UnsubscribeOrder
from realtime.pubsub.engine import AddClient, AddPresence, Publish, ReportSubscriptions
from realtime.server_api import http_api, operations
from realtime.server_api.http_api import BadBody
from realtime.types import ClientInfo, Position, Publication, SubscribeOptions
from tests.server_api.bench import SETTINGS, Bench, finish

# -- publish and broadcast --------------------------------------------------------------------------------------------


def test_publish_answers_with_the_position_in_a_channel_with_history(bench: Bench) -> None:
    first = bench.call("publish", {"channel": "chat:1", "data": {"n": 1}, "tags": {"a": "b"}})
    second = bench.call("publish", {"channel": "chat:1", "data": None})
    assert (first["offset"], second["offset"]) == (1, 2)
    assert first["epoch"] == second["epoch"] != ""
    [(_, one), (_, two)] = bench.receiver.publications
    assert (json.loads(one.data), one.tags, one.info) == ({"n": 1}, {"a": "b"}, None)
    assert (two.data, two.tags) == (b"null", None)


def test_publish_without_history_answers_with_nothing(bench: Bench) -> None:
    assert bench.call("publish", {"channel": "plain", "data": 1}) == {}
    assert bench.call("publish", {"channel": "chat:1", "data": 1, "skip_history": True}) == {}
    assert [publication.offset for _, publication in bench.receiver.publications] == [0, 0]
    assert bench.call("history", {"channel": "chat:1", "limit": -1})["publications"] == []


@pytest.mark.parametrize(
    ("sent", "passed"),
    [
        (b'{"b":1, "a":1.0e5,"a":12345678901234567890}', b'{"b":1, "a":1.0e5,"a":12345678901234567890}'),
        (b'{\r\n "a": [1,\n2]}', b'{ "a": [1,2]}'),
        (b'"\\u00e9\xc3\xa9\\n"', b'"\\u00e9\xc3\xa9\\n"'),
        (b"0.10", b"0.10"),
        (b"null", b"null"),
    ],
)
def test_data_passes_byte_for_byte_but_for_line_ends(bench: Bench, sent: bytes, passed: bytes) -> None:
    bench.call("publish", b'{"data":' + sent + b',"channel":"plain"}')
    bench.call("publish", json.dumps({"channel": "plain", "b64data": base64.b64encode(sent).decode()}).encode())
    assert [publication.data for _, publication in bench.receiver.publications] == [passed, passed]


@pytest.mark.parametrize(
    "body",
    [
        {"channel": "plain"},
        {"channel": "plain", "b64data": "no base64!"},
        {"channel": "plain", "b64data": "ü"},
        {"channel": "plain", "b64data": base64.b64encode(b"").decode(), "data": msgspec.UNSET},
        {"channel": "json:1"},
        {"channel": "json:1", "b64data": base64.b64encode(b"{no json").decode()},
        {"channel": "json:1", "b64data": base64.b64encode(b'"\xff"').decode()},
        {"channel": "json:1", "b64data": base64.b64encode(b"1 2").decode()},
        {"channel": "object:1", "data": [1]},
        {"channel": "object:1", "data": "{}"},
        {"channel": "object:1", "b64data": base64.b64encode(b"null").decode()},
    ],
)
def test_data_that_is_none_is_refused(bench: Bench, body: dict[str, Any]) -> None:
    assert (
        bench.refusal("publish", msgspec.json.encode({k: v for k, v in body.items() if v is not msgspec.UNSET})) == 107
    )
    assert bench.receiver.publications == []


@pytest.mark.parametrize(("data", "refusal"), [(b'"\\ud800"', BadBody), (b"[" * 200 + b"]" * 200, ClientError)])
def test_data_that_would_harm_readers_is_refused(bench: Bench, data: bytes, refusal: type[Exception]) -> None:
    with pytest.raises(refusal):
        bench.call("publish", b'{"channel":"plain","data":' + data + b"}")
    assert bench.receiver.publications == []


@pytest.mark.parametrize("data", [b"{no json", b"\xff\x00", b'"\xff"', b"1 2", b"[" * 200 + b"]" * 200, b" "])
def test_data_that_is_no_json_is_for_clients_of_protobuf(bench: Bench, data: bytes) -> None:
    for channel in ("plain", "bytes:1"):
        bench.call("publish", {"channel": channel, "b64data": base64.b64encode(data).decode()})
    for _, publication in bench.receiver.publications:
        assert (publication.data, publication.binary) == (data, True)
    [found] = bench.call("history", {"channel": "bytes:1", "limit": -1})["publications"]
    assert found == {"data": None, "b64data": base64.b64encode(data).decode(), "offset": 1}


def test_a_channel_may_take_even_nothing(bench: Bench) -> None:
    bench.call("publish", {"channel": "bytes:1"})
    bench.call("publish", {"channel": "bytes:1", "data": {}})
    assert [(one.data, one.binary) for _, one in bench.receiver.publications] == [(b"", False), (b"{}", False)]


@pytest.mark.parametrize("data", [b"", b"\n", b"\r\n"])
def test_empty_data_is_for_all_clients(bench: Bench, data: bytes) -> None:
    encoded = base64.b64encode(data).decode()
    bench.call("publish", {"channel": "bytes:1", "b64data": encoded})
    assert [(one.data, one.binary) for _, one in bench.receiver.publications] == [(data, False)]
    [found] = bench.call("history", {"channel": "bytes:1", "limit": -1})["publications"]
    assert found == {"data": None, "b64data": encoded, "offset": 1}


def test_a_subscription_with_an_expiry_in_the_past_is_refused(bench: Bench) -> None:
    assert bench.refusal("subscribe", {"user": "ada", "channel": "chat:1", "expire_at": 1000000000}) == 110


def test_formats_that_fit(bench: Bench) -> None:
    bench.call("publish", {"channel": "json:1", "data": [1]})
    bench.call("publish", {"channel": "object:1", "b64data": base64.b64encode(b' \n{"a":1}').decode()})
    assert [(one.data, one.binary) for _, one in bench.receiver.publications] == [(b"[1]", False), (b' {"a":1}', False)]


@pytest.mark.parametrize("version", [2**64, 10**1000])
def test_a_version_has_64_bits(bench: Bench, version: int) -> None:
    assert bench.refusal("publish", {"channel": "chat:1", "data": 1, "version": version}) == 107


@pytest.mark.parametrize("field", ["channel", "idempotency_key", "version_epoch"])
def test_what_is_kept_by_name_has_a_size(bench: Bench, field: str) -> None:
    body = {"channel": "plain", "data": 1, "version": 1, field: "x" * operations.MAX_NAME}
    assert bench.call("publish", body) == {}
    assert bench.refusal("publish", body | {field: "x" * (operations.MAX_NAME + 1)}) == 107


def test_deltas_are_for_those_that_ask_and_where_the_channel_says_so(bench: Bench) -> None:
    for body in ({"channel": "plain"}, {"channel": "plain", "delta": True}, {"channel": "deltas:1"}):
        bench.call("publish", body | {"data": 1})
    assert [one.delta for _, one in bench.receiver.publications] == [False, True, True]


def test_an_old_version_is_dropped_and_answered_with_the_position(bench: Bench) -> None:
    body = {"channel": "chat:1", "data": 1, "version": 2**64 - 2, "version_epoch": "e"}
    first = bench.call("publish", body)
    assert first["offset"] == 1
    assert bench.call("publish", body) == first
    assert bench.call("publish", body | {"version": 5}) == first
    assert bench.call("publish", body | {"version": 2**64 - 1})["offset"] == 2
    assert bench.call("publish", body | {"version": 1, "version_epoch": "f"})["offset"] == 3
    assert [one.offset for _, one in bench.receiver.publications] == [1, 2, 3]


def test_b64data_wins_over_data(bench: Bench) -> None:
    encoded = base64.b64encode(b"2").decode()
    bench.call("publish", {"channel": "plain", "data": 1, "b64data": encoded})
    assert bench.receiver.publications[0][1].data == b"2"


def test_repeated_idempotency_key_publishes_once_and_repeats_the_answer(bench: Bench) -> None:
    body = {"channel": "chat:1", "data": 1, "idempotency_key": "k"}
    first = bench.call("publish", body)
    assert bench.call("publish", body | {"data": 2}) == first
    assert bench.call("publish", body | {"idempotency_key": "other"})["offset"] == 2
    bench.now = 301
    assert bench.call("publish", body)["offset"] == 3


def test_broadcast_answers_for_each_channel_in_order(bench: Bench) -> None:
    answer = bench.call("broadcast", {"channels": ["plain", "nope:1", "chat:1", "", "chat:1"], "data": {"x": 1}})
    one, two, three, four, five = answer["responses"]
    assert one == {"result": {}}
    assert two == {"error": {"code": 102, "message": "unknown channel"}}
    assert (three["result"]["offset"], five["result"]["offset"]) == (1, 2)
    assert four["error"]["code"] == 107
    assert [channel for channel, _ in bench.receiver.publications] == ["plain", "chat:1", "chat:1"]


def test_broadcast_needs_channels_and_data(bench: Bench) -> None:
    assert bench.refusal("broadcast", {"data": 1}) == 107
    assert bench.refusal("broadcast", {"channels": [], "data": 1}) == 107
    assert bench.call("broadcast", {"channels": ["plain"]})["responses"][0]["error"]["code"] == 107


def test_broadcast_begins_with_all_channels_before_it_waits(bench: Bench) -> None:
    begun: list[int] = []

    async def together(coroutines: Any) -> list[Any]:
        begun.append(len(coroutines))
        return [await coroutine for coroutine in coroutines]

    bench.use(bench.engine, together)
    bench.call("broadcast", {"channels": ["plain"] * 3, "data": 1})
    commands = [{"info": {}}] * 2
    bench.call("batch", {"commands": commands})
    bench.call("batch", {"commands": commands, "parallel": True})
    assert begun == [3, 2]


def test_what_is_under_way_at_a_time_is_bounded(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []

    async def together(coroutines: Any) -> list[Any]:
        begun.append(len(coroutines))
        return [await coroutine for coroutine in coroutines]

    bench.use(bench.engine, together)
    monkeypatch.setattr(operations, "BROADCAST_CHANNELS", 4)
    monkeypatch.setattr(operations, "BROADCAST_BYTES", 300)
    monkeypatch.setattr(http_api, "BATCH_AT_A_TIME", 3)
    assert len(bench.call("broadcast", {"channels": ["plain"] * 9, "data": 1})["responses"]) == 9
    bench.call("broadcast", {"channels": ["plain"] * 5, "data": "x" * 98})
    bench.call("broadcast", {"channels": ["plain"] * 2, "data": "x" * 1000})
    commands = [{"publish": {"channel": "chat:1", "data": number}} for number in range(7)]
    replies = bench.call("batch", {"commands": commands, "parallel": True})["replies"]
    assert [reply["publish"]["offset"] for reply in replies] == [1, 2, 3, 4, 5, 6, 7]
    assert begun == [4, 4, 1, 3, 2, 1, 1, 3, 3, 1]


# -- presence ---------------------------------------------------------------------------------------------------------


def test_presence_and_its_numbers(bench: Bench) -> None:
    assert bench.call("presence", {"channel": "chat:1"}) == {"presence": {}}
    assert bench.call("presence_stats", {"channel": "chat:1"}) == {"num_clients": 0, "num_users": 0}
    for client, user, info in (("c1", "ada", b'{"n":1}'), ("c2", "ada", b""), ("c3", "", b"")):
        bench.engine.execute(AddPresence("chat:1", ClientInfo(user, client, info), present=True, announce=False))
    assert bench.call("presence", {"channel": "chat:1"}) == {
        "presence": {
            "c1": {"user": "ada", "client": "c1", "conn_info": {"n": 1}},
            "c2": {"user": "ada", "client": "c2"},
            "c3": {"user": "", "client": "c3"},
        }
    }
    assert bench.call("presence_stats", {"channel": "chat:1"}) == {"num_clients": 3, "num_users": 2}


# -- history ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def stream(bench: Bench) -> str:
    """Seven publications, of which the last five are kept; their epoch."""
    for number in range(1, 8):
        epoch = bench.call("publish", {"channel": "chat:1", "data": number})["epoch"]
    return str(epoch)


@pytest.mark.parametrize(
    ("options", "offsets"),
    [
        ({}, []),
        ({"limit": 0}, []),
        ({"limit": -1}, [3, 4, 5, 6, 7]),
        ({"limit": 2}, [3, 4]),
        ({"limit": 1000}, [3, 4, 5, 6, 7]),
        ({"limit": -1, "since": {"offset": 5, "epoch": "E"}}, [6, 7]),
        ({"limit": -1, "since": {"offset": 5}}, [6, 7]),
        ({"limit": 1, "since": {"offset": 5, "epoch": "E"}}, [6]),
        ({"limit": -1, "since": {"offset": 7, "epoch": "E"}}, []),
        ({"limit": -1, "since": {"offset": 1, "epoch": "E"}}, [3, 4, 5, 6, 7]),
        ({"limit": 2, "reverse": True}, [7, 6]),
        ({"limit": -1, "reverse": True, "since": {"offset": 5, "epoch": "E"}}, [4, 3]),
    ],
)
def test_history(bench: Bench, stream: str, options: dict[str, Any], offsets: list[int]) -> None:
    if options.get("since", {}).get("epoch"):
        options = options | {"since": options["since"] | {"epoch": stream}}
    answer = bench.call("history", {"channel": "chat:1", **options})
    assert [one["offset"] for one in answer["publications"]] == offsets
    assert [one["data"] for one in answer["publications"]] == offsets
    assert (answer["epoch"], answer["offset"]) == (stream, 7)


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"since": {"offset": 3, "epoch": "other"}}, 112),
        ({"reverse": True, "since": {"offset": 0}}, 107),
        ({"limit": -5}, 107),
    ],
)
def test_history_refusals(bench: Bench, stream: str, options: dict[str, Any], code: int) -> None:
    assert bench.refusal("history", {"channel": "chat:1", **options}) == code


def test_publication_in_history_has_the_keys_it_needs_and_no_others(bench: Bench) -> None:
    history_options = ChannelRules(SETTINGS).options("chat:1").history_options
    bench.engine.execute(Publish("chat:1", b"1", history_options))
    bench.engine.execute(Publish("chat:1", b"2", history_options, ClientInfo("ada", "c1"), {"a": "b"}))
    assert bench.call("history", {"channel": "chat:1", "limit": -1})["publications"] == [
        {"data": 1, "offset": 1},
        {"data": 2, "offset": 2, "info": {"user": "ada", "client": "c1"}, "tags": {"a": "b"}},
    ]


def test_a_page_of_history_has_a_size(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "PAGE_BYTES", 3000)
    for _ in range(5):
        bench.call("publish", {"channel": "chat:1", "data": "x" * 1000})
    answer = bench.call("history", {"channel": "chat:1", "limit": -1})
    assert ([one["offset"] for one in answer["publications"]], answer["offset"]) == ([1, 2], 5)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("limit", [-1, 3, 4, 5, 0])
def test_a_page_of_history_is_read_in_parts(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, limit: int, reverse: bool
) -> None:
    for number in range(5):
        bench.call("publish", {"channel": "chat:1", "data": number})
    query = {"channel": "chat:1", "limit": limit, "reverse": reverse}
    whole = bench.call("history", query)
    assert len(whole["publications"]) == (5 if limit < 0 else limit)
    monkeypatch.setattr(operations, "HISTORY_PART", 2)
    assert bench.call("history", query) == whole


@pytest.mark.parametrize("happens", ["publish", "expire", "remove"])
def test_a_page_of_history_has_no_gap_though_the_stream_changes_meanwhile(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, happens: str
) -> None:
    for number in range(5):
        bench.call("publish", {"channel": "chat:1", "data": number})
    monkeypatch.setattr(operations, "HISTORY_PART", 2)
    ask, requests = bench.engine.ask, []

    async def ask_slowly(request: Any) -> Any:
        requests.append(request)
        if len(requests) == 2:
            monkeypatch.setattr(bench.engine, "ask", ask)
            if happens == "remove":
                bench.call("history_remove", {"channel": "chat:1"})
            for number in range({"publish": 1, "expire": 4, "remove": 1}[happens]):
                bench.call("publish", {"channel": "chat:1", "data": 5 + number})
        return await ask(request)

    monkeypatch.setattr(bench.engine, "ask", ask_slowly)
    answer = bench.call("history", {"channel": "chat:1", "limit": -1})
    expected = [1, 2, 3, 4, 5] if happens == "publish" else [1, 2]
    assert [one["offset"] for one in answer["publications"]] == expected
    assert answer["offset"] == 5


def test_history_of_an_unused_channel_has_its_epoch(bench: Bench) -> None:
    answer = bench.call("history", {"channel": "chat:new"})
    assert (answer["publications"], answer["offset"]) == ([], 0)
    assert bench.call("publish", {"channel": "chat:new", "data": 1})["epoch"] == answer["epoch"] != ""


def test_history_remove_keeps_the_position(bench: Bench, stream: str) -> None:
    assert bench.call("history_remove", {"channel": "chat:1"}) == {}
    assert bench.call("history", {"channel": "chat:1", "limit": -1}) == {
        "publications": [],
        "epoch": stream,
        "offset": 7,
    }


# -- clients and the node ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "order"),
    [
        ({}, DisconnectOrder("")),
        ({"user": "ada"}, DisconnectOrder("ada", code=3503, reason="force disconnect")),
        (
            {"user": "ada", "client": "c1", "whitelist": ["c2"], "disconnect": {"code": 4501, "reason": "bye"}},
            DisconnectOrder("ada", "c1", ("c2",), 4501, "bye"),
        ),
        ({"user": "ada", "session": "s1", "whitelist": []}, DisconnectOrder("ada", session="s1")),
    ],
)
def test_disconnect_is_an_order_to_every_worker(bench: Bench, body: Any, order: Order) -> None:
    assert bench.call("disconnect", body) == {}
    assert bench.receiver.orders == [order]


@pytest.mark.parametrize(
    "disconnect",
    [
        {},
        {"code": 2999, "reason": "x"},
        {"code": 5000, "reason": "x"},
        {"code": 4000},
        {"code": 4000, "reason": "é" * 62},
    ],
)
def test_disconnect_that_can_not_be_sent_is_refused(bench: Bench, disconnect: Any) -> None:
    assert bench.refusal("disconnect", {"user": "ada", "disconnect": disconnect}) == 107
    assert bench.receiver.orders == []


def test_unsubscribe_is_an_order_to_every_worker(bench: Bench) -> None:
    assert bench.call("unsubscribe", {"user": "ada", "channel": "chat:1", "client": "c1"}) == {}
    assert bench.call("unsubscribe", {"channel": "chat:1", "session": "s1"}) == {}
    assert bench.receiver.orders == [UnsubscribeOrder("ada", "chat:1", "c1"), UnsubscribeOrder("", "chat:1", "", "s1")]


def encoded(text: bytes) -> str:
    return base64.b64encode(text).decode()


@pytest.mark.parametrize(
    ("body", "order"),
    [
        ({}, SubscribeOrder("", "chat:1")),
        ({"user": "ada", "client": "c1"}, SubscribeOrder("ada", "chat:1", SubscribeOptions(), "c1")),
        (
            {"user": "ada", "session": "s1", "info": {"n": 1}, "data": None, "expire_at": 1900000000},
            SubscribeOrder("ada", "chat:1", SubscribeOptions(b'{"n": 1}', b"null", 1900000000.0), "", "s1"),
        ),
        (
            {"info": 1, "b64info": encoded(b'{"n":\n1}'), "data": 2, "b64data": encoded(b"3")},
            SubscribeOrder("", "chat:1", SubscribeOptions(b'{"n":1}', b"3")),
        ),
        (
            {"recover_since": {"offset": 7, "epoch": "e"}, "override": None},
            SubscribeOrder("", "chat:1", SubscribeOptions(), "", "", Position(7, "e")),
        ),
        (
            {"override": {"presence": {"value": True}, "force_recovery": {"value": False}, "join_leave": None}},
            SubscribeOrder("", "chat:1", SubscribeOptions(override={"presence": True, "force_recovery": False})),
        ),
    ],
)
def test_subscribe_is_an_order_to_every_worker(bench: Bench, body: Any, order: Order) -> None:
    assert bench.call("subscribe", {"channel": "chat:1", **body}) == {}
    assert bench.receiver.orders == [order]


@pytest.mark.parametrize(
    "body", [{"b64info": "no base64!"}, {"info": json.loads("[" * 200 + "]" * 200)}, {"b64data": "ü"}]
)
def test_subscribe_refuses_text_that_is_not_base64_and_json_that_is_too_deep(bench: Bench, body: Any) -> None:
    assert bench.refusal("subscribe", {"user": "ada", "channel": "chat:1", **body}) == 107
    assert bench.receiver.orders == []


def test_subscribe_with_bytes_that_are_not_json(bench: Bench) -> None:
    assert bench.call("subscribe", {"channel": "chat:1", "b64info": encoded(b"\xff\n"), "b64data": encoded(b"{")}) == {}
    assert bench.receiver.orders == [SubscribeOrder("", "chat:1", SubscribeOptions(b"\0\xff\n", b"\0{"))]


def test_base64_may_have_line_ends(bench: Bench) -> None:
    text = json.dumps("x" * 100).encode()
    for spelled in (base64.encodebytes(text).decode(), base64.encodebytes(text).decode().replace("\n", "\r\n")):
        bench.call("publish", {"channel": "plain", "b64data": spelled})
        bench.call("subscribe", {"channel": "chat:1", "b64info": spelled, "b64data": spelled})
        assert bench.receiver.publications[-1][1].data == text
        assert bench.receiver.orders[-1] == SubscribeOrder("", "chat:1", SubscribeOptions(text, text))


@pytest.mark.parametrize("limit", [2**63, 2**64, 10**100, -2, -(2**64)])
def test_a_number_beyond_64_bits_is_a_bad_request(bench: Bench, limit: int) -> None:
    assert bench.refusal("history", {"channel": "chat:1", "limit": limit}) == 107
    for method in (bench.operations.history, partial(bench.operations.subscribe, "ada")):
        with pytest.raises(ClientError) as caught:
            name = "since" if method == bench.operations.history else "recover_since"
            finish(method("chat:1", **{name: Position(limit, "e")}))
        assert caught.value.code == 107
    assert bench.receiver.orders == []


@pytest.mark.parametrize(
    ("body", "order"),
    [
        ({}, RefreshOrder("")),
        ({"user": "ada", "expired": True, "client": "c1"}, RefreshOrder("ada", expired=True, client="c1")),
        ({"user": "ada", "expire_at": 1900000000, "session": "s"}, RefreshOrder("ada", 1900000000.0, session="s")),
        ({"user": "ada", "info": {"n": 1}}, RefreshOrder("ada", info=b'{"n": 1}')),
    ],
)
def test_refresh_is_an_order_to_every_worker(bench: Bench, body: Any, order: Order) -> None:
    assert bench.call("refresh", body) == {}
    assert bench.receiver.orders == [order]


def test_channels_are_those_with_subscribers(bench: Bench) -> None:
    assert bench.call("channels") == {"channels": {"chat:1": {"num_clients": 2}, "chat:2": {"num_clients": 1}}}
    assert bench.call("channels", {"pattern": "chat:1*"}) == {"channels": {"chat:1": {"num_clients": 2}}}
    bench.surveyed = {}
    assert bench.call("channels", {}) == {"channels": {}}
    bench.silent_workers = 2
    assert bench.call("channels", {}) == {"channels": {}, "silent_workers": 2}


@pytest.mark.parametrize("pattern", ["{", "{a,b", "x" * 2000, "{a,b}" * 20])
def test_patterns_that_can_not_be(bench: Bench, pattern: str) -> None:
    assert bench.refusal("channels", {"pattern": pattern}) == 107


def test_there_are_no_procedures(bench: Bench) -> None:
    assert bench.refusal("rpc", {"method": "report", "params": {}}) == 104
    assert bench.refusal("rpc", {"params": {}}) == 107


def test_info_has_every_number_even_when_zero(bench: Bench) -> None:
    [node] = bench.call("info")["nodes"]
    assert (node["uid"], node["name"], node["version"], node["uptime"]) == ("u1", "here", "1.2", 61)
    assert (node["num_clients"], node["num_users"], node["num_subs"]) == (0, 0, 0)
    bench.engine.tell(AddClient(ClientInfo("ada", "c1")))
    bench.engine.tell(AddClient(ClientInfo("ada", "c2")))
    bench.engine.tell(ReportSubscriptions(4))
    [node] = bench.call("info")["nodes"]
    assert (node["num_clients"], node["num_users"], node["num_channels"], node["num_subs"]) == (2, 1, 7, 4)


# -- calls of the application ----------------------------------------------------------------------------------------


def test_coroutines_take_and_give_records(bench: Bench) -> None:
    http_api = bench.operations
    assert finish(http_api.publish("plain", b'{\n"a":\r 1}')) == Position()
    assert bench.receiver.publications[-1][1].data == b'{"a": 1}'
    for wrong in ({"tags": {"t": 1}}, {"idempotency_key": 5}, {"version": -1}, {"version_epoch": 1}, {"delta": 3}):
        with pytest.raises(msgspec.ValidationError):
            finish(http_api.publish("chat:1", b"1", **wrong))
    position = finish(http_api.publish("chat:1", b'{"a":1}', tags={"t": "1"}))
    assert position.offset == 1
    page = finish(http_api.history("chat:1", limit=-1, since=Position(0, position.epoch)))
    assert page.publications == [Publication(b'{"a":1}', 1, tags={"t": "1"})]
    [first, second] = finish(http_api.broadcast(["chat:1", "nope:1"], b"2"))
    assert first == Position(2, position.epoch)
    assert second.code == 102
    assert finish(http_api.info())[0]["uid"] == "u1"
    with pytest.raises(ClientError) as caught:
        finish(http_api.subscribe("ada", "chat:1", override={"history_size": True}))
    assert caught.value.code == 107
    for wrong_order in (http_api.refresh(7), http_api.subscribe("ada", "chat:1", override={"presence": 1})):  # type: ignore
        with pytest.raises(msgspec.ValidationError):
            finish(wrong_order)
    assert bench.receiver.orders == []
