"""The contract with clients, as tables: every command in every state, with every permission; and invalid messages."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec
import pytest

from realtime.config.settings import ChannelOptions, ChannelSettings
from realtime.protocol.wire_formats import WireFormat
from realtime.pubsub.engine import EngineRequest, GetHistory
from tests.protocol.sessions import ALL, BARE, BARE_PROTOBUF, CHANNEL, KEPT, NOW, Gate, Peer, Server, in_protobuf, token

FORMS = pytest.mark.parametrize("form", [BARE, BARE_PROTOBUF], ids=["json", "protobuf"])
ROOM = "room:a"

# The outcome of a command: the code of an error, minus the code of a disconnect, or one of these.
OK, NOTHING = "ok", "nothing"
BAD = -3501


def what_came(peer: Peer, id: int, replies: list[dict]) -> Any:
    """The outcome of command `id`."""
    if peer.close_code is not None:
        return -peer.close_code[0]
    for reply in replies:
        if reply.get("id") == id:
            return reply["error"]["code"] if "error" in reply else OK
    return NOTHING


# -- every command in every state -------------------------------------------------------------------------------------

REQUESTS: dict[str, dict] = {
    "connect": {},
    "subscribe": {"channel": ROOM},
    "unsubscribe": {"channel": ROOM},
    "publish": {"channel": ROOM, "data": 1},
    "presence": {"channel": ROOM},
    "presence_stats": {"channel": ROOM},
    "history": {"channel": ROOM},
    "rpc": {"method": "echo"},
    "refresh": {"token": token(sub="42", exp=NOW + 60)},
    "sub_refresh": {"channel": ROOM, "token": token(sub="42", channel=ROOM, exp=NOW + 60)},
}
COMMANDS: dict[str, dict] = {
    **{name: {"id": 9, name: request} for name, request in REQUESTS.items()},
    "send": {"send": {"data": 1}},
    "a pong": {},
    "an id alone": {"id": 9},
    "ping": {"id": 9, "ping": {}},
    "two requests": {"id": 9, "history": {"channel": ROOM}, "presence": {"channel": ROOM}},
    **{f"{name} without an id": {name: REQUESTS[name]} for name in ("connect", "subscribe", "rpc")},
    **{
        f"{name} without a channel": {"id": 9, name: {}}
        for name in ("subscribe", "unsubscribe", "publish", "presence", "presence_stats", "history", "sub_refresh")
    },
}
# The states: before the connect command, connected, and subscribed to the channel of the command.
EXPECTED: dict[str, tuple[Any, Any, Any]] = {
    "connect": (OK, BAD, BAD),
    "subscribe": (BAD, OK, 105),
    "unsubscribe": (BAD, OK, OK),
    "publish": (BAD, OK, OK),
    "presence": (BAD, OK, OK),
    "presence_stats": (BAD, OK, OK),
    "history": (BAD, OK, OK),
    "rpc": (BAD, OK, OK),
    "refresh": (BAD, OK, OK),
    "sub_refresh": (BAD, 103, OK),
    "send": (BAD, NOTHING, NOTHING),
}


def expected(name: str) -> tuple[Any, Any, Any]:
    return EXPECTED.get(name, (BAD, BAD, BAD))


@pytest.fixture
def server() -> Server:
    server = Server(CHANNEL, allow_anonymous_connect_without_token=True)

    async def echo(client, data):
        return data

    server.app.procedures["echo"] = echo
    server.app.on_message = echo
    return server


def late(server: Server, kind: type[EngineRequest[Any]]) -> Gate:
    """Delay the engine's answers to requests of this kind until the gate is opened."""
    gate = Gate()

    async def answer(request):
        if gate.shut:
            await gate
        return await server.engine.carry_out(request)

    gate.shut = True
    server.engine.overrides[kind] = answer
    return gate


def open_(gate: Gate) -> None:
    gate.shut = False
    gate.open()


def connected(server: Server, form: WireFormat) -> Peer:
    peer = server.peer(form)
    peer.connect(token=token(sub="42"))
    return peer


@FORMS
@pytest.mark.parametrize("name", COMMANDS)
class TestStates:
    def test_opened(self, server, form, name):
        peer = server.peer(form)
        assert what_came(peer, 9, peer.say(COMMANDS[name])) == expected(name)[0]

    def test_connecting(self, server, form, name):
        gate = Gate()

        async def connecting(request):
            await gate

        server.app.connecting = connecting
        peer = server.peer(form)
        peer.say({"id": 1, "connect": {"token": token(sub="42")}})
        assert what_came(peer, 9, peer.say(COMMANDS[name])) == NOTHING
        gate.open()
        assert what_came(peer, 9, peer.heard()) == expected(name)[1]

    def test_refused(self, server, form, name):
        peer = server.peer(form)
        peer.say({"id": 1, "connect": {"token": token(sub="42", exp=1)}})
        assert what_came(peer, 9, peer.say(COMMANDS[name])) == NOTHING

    def test_connected(self, server, form, name):
        peer = connected(server, form)
        assert what_came(peer, 9, peer.say(COMMANDS[name])) == expected(name)[1]

    def test_subscribing(self, server, form, name):
        peer = connected(server, form)
        gate = late(server, GetHistory)
        assert peer.say({"id": 2, "subscribe": {"channel": ROOM}}) == []
        assert what_came(peer, 9, peer.say(COMMANDS[name])) == NOTHING
        open_(gate)
        assert what_came(peer, 9, peer.heard()) == expected(name)[2]

    def test_subscribed(self, server, form, name):
        peer = connected(server, form)
        peer.say({"id": 2, "subscribe": {"channel": ROOM}})
        assert what_came(peer, 9, peer.say(COMMANDS[name])) == expected(name)[2]

    def test_subscribed_by_the_server(self, server, form, name):
        peer = server.peer(form)
        peer.connect(token=token(sub="42", channels=[ROOM]))
        # The token of the refresh names other channels than the first one, namely none.
        outcome = -3010 if name == "refresh" else expected(name)[2]
        assert what_came(peer, 9, peer.say(COMMANDS[name])) == outcome

    @pytest.mark.parametrize("how", ["gone", "kicked"])
    def test_closed(self, server, form, name, how):
        peer = connected(server, form)
        peer.session.closed() if how == "gone" else peer.session.handle.disconnect()
        assert peer.say(COMMANDS[name]) == []
        assert server.clean()


def test_every_command_is_in_the_table(server):
    assert set(server.services.counters.commands) <= EXPECTED.keys() == set(EXPECTED) & set(COMMANDS)


# -- permissions ------------------------------------------------------------------------------------------------------

VERBS = {
    "publish": ["publish"],
    "presence": ["presence", "presence_stats"],
    "history": ["history"],
}
# All features, and no permissions.
FEATURES = {"presence": True, **KEPT}


def outcomes(options: dict[str, Any], user: str, subscribed: bool, names: list[str], **client: Any) -> set[Any]:
    server = Server(
        ChannelSettings(without_namespace=ChannelOptions(**options)),
        allow_anonymous_connect_without_token=True,
        **client,
    )
    watcher, peer = server.client(), server.client(user)
    watcher.say({"id": 2, "subscribe": {"channel": "a", "token": token(sub="", channel="a")}})
    if subscribed:
        peer.say({"id": 2, "subscribe": {"channel": "a", "token": token(sub=user, channel="a")}})
    watcher.heard()
    found = set()
    for name in names:
        request = {"channel": "a", "data": 1} if name == "publish" else {"channel": "a"}
        outcome = what_came(peer, 9, peer.say({"id": 9, name: request}))
        found.add(outcome)
        # A refused command has no effect.
        assert len(watcher.heard()) == (1 if name == "publish" and outcome == OK else 0)
    return found


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("for_client", "for_subscriber", "for_anonymous"), list(itertools.product([False, True], repeat=3))
)
@pytest.mark.parametrize("subscribed", [False, True])
@pytest.mark.parametrize("user", ["42", ""])
def test_every_command_with_every_permission(verb, for_client, for_subscriber, for_anonymous, subscribed, user):
    others = {
        f"allow_{other}_for_{whom}": True
        for other in VERBS
        if other != verb
        for whom in ("client", "subscriber", "anonymous")
    }
    bits = {
        f"allow_{verb}_for_client": for_client,
        f"allow_{verb}_for_subscriber": for_subscriber,
        f"allow_{verb}_for_anonymous": for_anonymous,
    }
    permitted = {
        ("42", False): for_client,
        ("42", True): for_client or for_subscriber,
        ("", False): for_client and for_anonymous,
        ("", True): (for_client or for_subscriber) and for_anonymous,
    }[user, subscribed]
    options = {**FEATURES, **ALL, **others, **bits}
    assert outcomes(options, user, subscribed, VERBS[verb]) == {OK if permitted else 103}


@pytest.mark.parametrize("subscribed", [False, True])
@pytest.mark.parametrize("user", ["42", ""])
@pytest.mark.parametrize("verb", VERBS)
def test_an_insecure_server_permits_every_feature_of_the_channel(verb, user, subscribed):
    assert outcomes(FEATURES, user, subscribed, VERBS[verb], insecure=True) == {OK}
    assert outcomes({}, user, subscribed, VERBS[verb], insecure=True) == {OK if verb == "publish" else 108}


@pytest.mark.parametrize("user", ["42", ""])
@pytest.mark.parametrize(("for_client", "for_anonymous"), list(itertools.product([False, True], repeat=2)))
def test_permission_to_subscribe(for_client, for_anonymous, user):
    options = ChannelOptions(
        **{**ALL, "allow_subscribe_for_client": for_client, "allow_subscribe_for_anonymous": for_anonymous}
    )
    server = Server(ChannelSettings(without_namespace=options), allow_anonymous_connect_without_token=True)
    peer = server.client(user)
    permitted = for_client and (bool(user) or for_anonymous)
    assert what_came(peer, 9, peer.say({"id": 9, "subscribe": {"channel": "a"}})) == (OK if permitted else 103)
    # A private channel needs a token in any case.
    assert what_came(peer, 9, peer.say({"id": 9, "subscribe": {"channel": "$a"}})) == 103


WISHES = ("positioned", "recoverable", "join_leave")
NO_HISTORY = {f"allow_history_for_{whom}": False for whom in ("client", "subscriber", "anonymous")}
NO_PRESENCE = {f"allow_presence_for_{whom}": False for whom in ("client", "subscriber", "anonymous")}


@pytest.mark.parametrize(
    ("options", "wish", "granted"),
    [
        ({**NO_HISTORY, **KEPT}, {}, set()),
        ({**NO_HISTORY, **KEPT}, dict.fromkeys(WISHES, True), set()),
        (KEPT, {}, set()),
        (KEPT, {"positioned": True}, {"positioned"}),
        (KEPT, {"recoverable": True}, {"positioned", "recoverable"}),
        ({**NO_HISTORY, **KEPT, "allow_positioning": True}, {"positioned": True}, {"positioned"}),
        ({**NO_HISTORY, **KEPT, "allow_positioning": True}, {"recoverable": True}, set()),
        ({**NO_HISTORY, **KEPT, "allow_recovery": True}, {"recoverable": True}, {"positioned", "recoverable"}),
        ({**NO_HISTORY, **KEPT, "force_positioning": True}, {}, {"positioned"}),
        ({**NO_HISTORY, **KEPT, "force_recovery": True}, {}, {"positioned", "recoverable"}),
        ({"force_positioning": True}, dict.fromkeys(WISHES, True), set()),
        ({"join_leave": True}, {}, set()),
        ({"join_leave": True}, {"join_leave": True}, {"join_leave"}),
        ({**NO_PRESENCE, "join_leave": True}, {"join_leave": True}, set()),
        ({**NO_PRESENCE, "join_leave": True, "force_push_join_leave": True}, {}, {"join_leave"}),
        ({"force_push_join_leave": True}, {"join_leave": True}, set()),
    ],
)
def test_what_a_subscriber_is_granted(options, wish, granted):
    server = Server(
        ChannelSettings(without_namespace=ChannelOptions(**{**ALL, **options})),
        allow_anonymous_connect_without_token=True,
    )
    reply, *pushes = server.client("42").say({"id": 2, "subscribe": {"channel": "a", **wish}})
    result = reply["subscribe"]
    found = {name for name in ("positioned", "recoverable") if result.get(name)}
    assert found | ({"join_leave"} if pushes else set()) == granted
    assert ("epoch" in result) == ("positioned" in granted)


# -- invalid messages -------------------------------------------------------------------------------------------------


def data_commands(data: bytes) -> dict[str, bytes]:
    """Return one command for each place of a client's own data."""
    return {
        "publish": b'{"id":9,"publish":{"channel":"a","data":%b}}' % data,
        "rpc": b'{"id":9,"rpc":{"method":"echo","data":%b}}' % data,
        "send": b'{"send":{"data":%b}}' % data,
        "subscribe": b'{"id":9,"subscribe":{"channel":"a","data":%b}}' % data,
        "connect": b'{"id":9,"connect":{"data":%b,"subs":{"a":{"data":%b}}}}' % (data, data),
    }


def asked(server: Server, place: str) -> Peer:
    """Return a client that may send data, of a server that decodes all of it."""

    async def connecting(request):
        return None

    async def may(client, channel, data):
        return None

    server.app.connecting = connecting
    server.app.subscribe_handlers["a"] = may
    return server.peer() if place == "connect" else server.client()


@pytest.mark.parametrize("place", data_commands(b"1"))
@pytest.mark.parametrize(("opening", "closing"), [(b"[", b"]"), (b'{"a":', b"}")])
@pytest.mark.parametrize("depth", [127, 128, 129, 1000, 20000])
def test_nesting(server, place, opening, closing, depth):
    peer = asked(server, place)
    peer.session.receive(data_commands(opening * depth + b"1" + closing * depth)[place])
    outcome = what_came(peer, 9, peer.heard())
    if depth <= 128:
        assert outcome == (NOTHING if place == "send" else OK)
    else:
        assert outcome in (107, BAD) or (place == "send" and outcome == NOTHING)
    assert not server.mistakes


@pytest.mark.parametrize(
    ("id", "outcome"),
    [
        (b"1", OK),
        (b"4294967295", OK),
        *((bad, BAD) for bad in (b"0", b"-1", b"1.5", b"1.0", b"1e3", b"true", b'"1"', b"null", b"[1]", b"NaN")),
        *((bad, BAD) for bad in (b"4294967296", b"18446744073709551616", b"9" * 5000, b"01", b"")),
    ],
)
def test_ids(server, id, outcome):
    peer = server.client()
    peer.session.receive(b'{"id":%b,"unsubscribe":{"channel":"a"}}' % id)
    assert what_came(peer, 1 if id == b"1" else 4294967295, peer.heard()) == outcome
    assert not server.mistakes


@pytest.mark.parametrize(
    ("offset", "outcome"),
    [
        (b"0", OK),
        (b"9223372036854775807", OK),
        *((bad, BAD) for bad in (b"-1", b"1.5", b"true", b'"1"', b"18446744073709551616", b"9" * 400)),
    ],
)
def test_offsets(server, offset, outcome):
    peer = server.client()
    peer.session.receive(b'{"id":9,"history":{"channel":"kept:a","since":{"offset":%b}}}' % offset)
    assert what_came(peer, 9, peer.heard()) == outcome


@pytest.mark.parametrize(
    "text", [b"12345678901234567890", b"1e400", b"-0.0", b"1.10", b"9" * 5000, b'{"b":1,"a":2,"b":3}']
)
def test_data_is_passed_on_as_it_was_written(server, text):
    peer = server.client()
    peer.say({"id": 2, "subscribe": {"channel": "a"}})
    peer.session.receive(b'{"id":3,"publish":{"channel":"a","data":%b}}' % text)
    assert any(b'"data":%b,"info"' % text in message for message in peer.raw)


@pytest.mark.parametrize("text", [b"NaN", b"Infinity", b"-Infinity", b"1e", b".5", b"'a'", b"{a:1}", b"[1,]", b"tru"])
@pytest.mark.parametrize("place", data_commands(b"1"))
def test_text_that_is_not_json_is_no_command(server, text, place):
    peer = asked(server, place)
    peer.session.receive(data_commands(text)[place])
    assert what_came(peer, 9, peer.heard()) == BAD


@pytest.mark.parametrize("place", data_commands(b"1"))
@pytest.mark.parametrize("text", [b'"\\ud800"', b'"\\udc00x"', b'{"\\ud800":1}', b'"\\ud800\\u0041"'])
def test_text_that_is_not_unicode_is_refused(server, text, place):
    peer = asked(server, place)
    peer.session.receive(data_commands(text)[place])
    outcome = what_came(peer, 9, peer.heard())
    assert outcome in (107, BAD) or (place == "send" and outcome == NOTHING)
    assert not server.mistakes


@pytest.mark.parametrize("place", data_commands(b"1"))
def test_a_zero_character_is_text_like_any_other(server, place):
    peer = asked(server, place)
    peer.session.receive(data_commands(b'"\\u0000"')[place])
    assert what_came(peer, 9, peer.heard()) in (OK, NOTHING) and peer.close_code is None


def test_the_last_of_repeated_keys_is_checked_and_used(server):
    peer = server.client()
    peer.session.receive(b'{"id":9,"subscribe":{"channel":"a","channel":"nothing:a"}}')
    assert what_came(peer, 9, peer.heard()) == 103
    peer.session.receive(b'{"id":9,"subscribe":{"channel":"nothing:a","channel":"a"}}')
    assert what_came(peer, 9, peer.heard()) == OK
    assert peer.session.channels() == ["a"]


def test_very_many_keys(server):
    keys = {f"key {n}": n for n in range(6000)}
    peer = server.client()
    command = {**keys, "id": 9, "publish": {**keys, "channel": "a", "data": keys}}
    assert what_came(peer, 9, peer.say(command)) == OK


GOOD_NAMES = ["a", "*", "a?b", "[x]", "{a,b}", "a b", "a/b", "../etc/passwd", "<script>", "a|b", "%00", "users:1", "#x"]
NAMES = [
    *((name, OK) for name in GOOD_NAMES),
    *(
        (name, 107)
        for name in ("a" * 256, "\u00e4", "\u6f22", "\U0001f600", "a\n", "\ra", "\x00", "a\x7f", "\t", "\x1b[0m")
    ),
    *((name, 102) for name in ("no:a", "no:", "Room:a", "room :a", "$no:a")),
    *((name, OK) for name in (":a", ":no:a")),
    *((name, 103) for name in ("$a", "$room:a", "nothing:a", "limited:a#43", "limited:a#", "limited:a#,")),
    ("", BAD),
]


@FORMS
@pytest.mark.parametrize(("name", "outcome"), NAMES)
def test_channel_names(server, form, name, outcome):
    peer = connected(server, form)
    assert what_came(peer, 9, peer.say({"id": 9, "subscribe": {"channel": name}})) == outcome
    assert server.hub.subscriptions == (outcome == OK)


@pytest.mark.parametrize(
    ("messages", "executed"),
    [
        ([b""], 0),
        ([b"\n"], 0),
        ([b"{}{}"], 0),
        ([b"\xef\xbb\xbf{}"], 0),
        ([b"[]"], 0),
        ([b'"a"'], 0),
        ([b"null"], 0),
        ([b"\n" * 65536], 0),
        ([b"%b\n\n%b"], 1),
        ([b"%b\n%b\n\n"], 2),
        ([b"%b\n{"], 1),
        ([b"%b\n%b junk"], 1),
        ([b"%b,\n%b"], 0),
        ([b"%b %b"], 0),
    ],
)
def test_what_can_not_be_read_ends_it_after_the_commands_before(server, messages, executed):
    listener, peer = server.client(), server.client()
    listener.subscribe("a")
    publish = b'{"id":9,"publish":{"channel":"a","data":1}}'
    for message in messages:
        peer.session.receive(message.replace(b"%b", publish))
    assert what_came(peer, 0, []) == BAD
    assert len(listener.heard()) == executed


@pytest.mark.parametrize("message", [b"\x00\x01", b"\x05\x08", b"\xff" * 11, b"\x02\x08\x01\x00", b"", in_protobuf({})])
def test_what_can_not_be_read_as_protobuf(server, message):
    peer = connected(server, BARE_PROTOBUF)
    peer.session.receive(message)
    assert what_came(peer, 0, []) == BAD


# -- pairs in flight --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", list(itertools.product(["subscribe", "unsubscribe"], repeat=4)))
@pytest.mark.parametrize("concurrency", [0, 8])
def test_subscribing_and_unsubscribing_in_any_order(names, concurrency):
    server = Server(CHANNEL, allow_anonymous_connect_without_token=True, concurrency=concurrency)
    peer = server.client()
    gate = late(server, GetHistory)
    replies = peer.say(*({"id": n, name: {"channel": ROOM}} for n, name in enumerate(names, 2)))
    open_(gate)
    replies += peer.heard()
    subscribed = False
    for n, name in enumerate(names, 2):
        outcome = 105 if name == "subscribe" and subscribed else OK
        assert what_came(peer, n, replies) == outcome
        subscribed = name == "subscribe"
    assert server.hub.subscriptions == subscribed


# -- positions of recovery -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0, 2, 4])
@pytest.mark.parametrize("top", [0, 1, 4, 5, 7])
@pytest.mark.parametrize("offset", [0, 1, 2, 4, 5, 6, 8])
@pytest.mark.parametrize("epoch", ["same", "", "other"])
def test_recovery(limit, top, offset, epoch):
    """Return a server whose channel keeps five publications, and recovers at most `limit` of them, 0 for any number."""
    options = ChannelOptions(**{**ALL, "history_size": 5, "history_ttl": 60.0, "force_recovery": True})
    server = Server(
        ChannelSettings(without_namespace=options),
        allow_anonymous_connect_without_token=True,
        recovery_max_publication_limit=limit,
    )
    same = server.client().subscribe("a")["epoch"]
    server.publish("a", *range(1, top + 1))
    missed = list(range(offset + 1, top + 1))
    kept = offset >= top - 5 and (not limit or len(missed) <= limit)
    recovered = epoch != "other" and offset <= top and kept
    result = server.client().subscribe("a", recover=True, offset=offset, epoch=same if epoch == "same" else epoch)
    assert (result.get("recovered", False), result["was_recovering"], result["epoch"]) == (recovered, True, same)
    assert result.get("offset", 0) == (offset if recovered else top)
    assert [one["data"] for one in result.get("publications", [])] == (missed if recovered else [])


@pytest.mark.parametrize(
    ("request_", "outcome"),
    [
        ({"limit": -1}, [1, 2, 3]),
        ({"limit": -2}, [1, 2, 3]),
        ({"limit": -(2**31)}, [1, 2, 3]),
        ({"limit": 2}, [1, 2]),
        ({"limit": 9}, [1, 2, 3]),
        ({}, []),
        ({"limit": 9, "since": {"offset": 1}}, [2, 3]),
        ({"limit": 9, "since": {"offset": 3}}, []),
        ({"limit": 9, "since": {"offset": 99}}, []),
        ({"limit": 9, "since": {"offset": 2**63}}, []),
        ({"limit": 9, "since": {"offset": 2**64 - 1}}, []),
        ({"limit": 9, "reverse": True, "since": {"offset": 2**64 - 1}}, []),
        ({"limit": 9, "since": {"offset": 1, "epoch": "other"}}, 112),
        ({"limit": 9, "reverse": True}, [3, 2, 1]),
        ({"limit": 9, "reverse": True, "since": {"offset": 3}}, [2, 1]),
        ({"limit": 9, "reverse": True, "since": {"offset": 0}}, 107),
    ],
)
def test_history(server, request_, outcome):
    server.publish("kept:a", 1, 2, 3)
    peer = server.client()
    (reply,) = peer.say({"id": 9, "history": {"channel": "kept:a", **request_}})
    if isinstance(outcome, int):
        assert reply["error"]["code"] == outcome
    else:
        assert [one["data"] for one in reply["history"]["publications"]] == outcome
        assert reply["history"]["offset"] == 3


# -- tokens of other clients ------------------------------------------------------------------------------------------

CONNECTION = {"sub": "42"}
SUBSCRIPTION = {"sub": "42", "channel": "$p"}


@pytest.mark.parametrize(
    ("name", "claims", "outcome"),
    [
        ("connect", CONNECTION, OK),
        ("connect", SUBSCRIPTION, -3500),
        ("connect", {**CONNECTION, "exp": NOW - 1}, 109),
        ("connect", {**CONNECTION, "nbf": NOW + 6}, 109),
        ("connect", {"sub": 42}, -3500),
        ("refresh", CONNECTION, OK),
        ("refresh", SUBSCRIPTION, -3500),
        ("refresh", {"sub": "43"}, -3500),
        ("refresh", {**CONNECTION, "exp": NOW - 1}, -3005),
        ("subscribe", SUBSCRIPTION, OK),
        ("subscribe", CONNECTION, 103),
        ("subscribe", {**SUBSCRIPTION, "exp": NOW - 1}, 109),
        ("subscribe", {**SUBSCRIPTION, "channel": "$q"}, -3500),
        ("subscribe", {**SUBSCRIPTION, "channel": "p"}, -3500),
        ("subscribe", {**SUBSCRIPTION, "sub": "43"}, -3500),
        ("subscribe", {**SUBSCRIPTION, "sub": ""}, -3500),
        ("subscribe", {**SUBSCRIPTION, "client": "another"}, -3500),
        ("subscribe", {**SUBSCRIPTION, "client": "own"}, OK),
        ("sub_refresh", SUBSCRIPTION, OK),
        ("sub_refresh", CONNECTION, -3500),
        ("sub_refresh", {**SUBSCRIPTION, "exp": NOW - 1}, 109),
        ("sub_refresh", {**SUBSCRIPTION, "channel": "$q"}, -3500),
        ("sub_refresh", {**SUBSCRIPTION, "sub": "43"}, -3500),
        ("sub_refresh", {**SUBSCRIPTION, "client": "another"}, -3500),
    ],
)
def test_tokens(server, name, claims, outcome):
    peer = server.peer() if name == "connect" else connected(server, BARE)
    if name == "sub_refresh":
        peer.say({"id": 2, "subscribe": {"channel": "$p", "token": token(**SUBSCRIPTION)}})
    if claims.get("client") == "own":
        claims = {**claims, "client": peer.session.client}
    request = {"token": token(**claims), **({"channel": "$p"} if "sub" in name else {})}
    assert what_came(peer, 9, peer.say({"id": 9, name: request})) == outcome


@pytest.mark.parametrize(("name", "outcome"), [("connect", -3500), ("refresh", -3500), ("subscribe", 103)])
@pytest.mark.parametrize("bad", ["junk", "a.b.c", "." * 9000, token(sub="42")[:-3], token(sub="42") + "x"])
def test_invalid_tokens(server, name, outcome, bad):
    peer = server.peer() if name == "connect" else connected(server, BARE)
    assert what_came(peer, 9, peer.say({"id": 9, name: {"token": bad, "channel": "$p"}})) == outcome


def test_the_ping_procedure_of_the_server(server):
    assert server.client().say({"id": 9, "rpc": {"method": "ping", "data": 1}}) == [{"id": 9, "rpc": {}}]

    async def own(client, data):
        return msgspec.Raw(b"1")

    server.app.procedures["ping"] = own
    assert server.client().say({"id": 9, "rpc": {"method": "ping"}}) == [{"id": 9, "rpc": {"data": 1}}]
