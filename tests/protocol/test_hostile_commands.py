"""Well formed commands with hostile or unsupported content, and damaged bytes."""

from __future__ import annotations

import random

import msgspec
import pytest

from realtime.config.settings import ChannelOptions, ChannelSettings, Namespace
from realtime.protocol.json_encoding import JSON_ENCODING
from realtime.protocol.messages import ProtocolError
from realtime.protocol.orders import UnsubscribeOrder
from realtime.protocol.protobuf import PROTOBUF
from realtime.types import Credentials
from tests.protocol.sessions import ALL, BARE, BARE_PROTOBUF, CHANNEL, NOW, Server, error_of, in_protobuf, token


@pytest.fixture
def server():
    return Server(allow_anonymous_connect_without_token=True)


# -- names ------------------------------------------------------------------------------------------------------------

# Names with a special meaning in shells, databases, browsers, file systems, and parts of servers like this one.
_TRICKY = """
* ** ? [a] [!a] [a-z]* {a,b} {a a* \\* .* ^a$ (a|b) a+ %41 %2e%2e %s %n {0} ${PATH} $(id) `id` ;ls |ls &ls >a <a
../a ../../etc/passwd /etc/passwd a/../b ./a ~ ~root a//b C:\\a nul -a --help
'or'1'='1 ";-- a;drop <script>alert(1)</script> "onload=1 &lt; javascript:1
a,b #a a#b @a !a =1+1 a=b a&b a'b a^b \\0 \\n a\\ null true 0 -1 1e9 NaN __proto__ constructor toString
"""
TRICKY = [name for name in _TRICKY.split() if ":" not in name and not name.startswith("$")]


def test_hostile_names_are_ordinary_names(server):
    listener, other = server.client(), server.client()
    for number, name in enumerate(TRICKY, 2):
        (reply,) = listener.say({"id": number, "subscribe": {"channel": name}})
        assert "subscribe" in reply
    assert len(set(TRICKY)) == len(TRICKY) > 60
    for number, name in enumerate(TRICKY, 2):
        assert other.say({"id": number, "publish": {"channel": name, "data": number}}) == [
            {"id": number, "publish": {}}
        ]
        (push,) = listener.heard()
        assert (push["push"]["channel"], push["push"]["pub"]["data"]) == (name, number)
    other.say({"id": 999, "publish": {"channel": "a", "data": 1}})
    assert listener.heard() == []
    listener.session.closed()
    other.session.closed()
    assert server.clean()


REFUSED_NAMES = [
    *(f"a{chr(code)}b" for code in (*range(0x20), 0x7F)),
    *(f"a{chr(code)}" for code in (0x80, 0x85, 0xA0, 0xE4, 0x131, 0x202E, 0x2028, 0xFEFF, 0xFF0A, 0x1F600)),
    "a" * 256,
    "a\u0301",
]


@pytest.mark.parametrize("form", [BARE, BARE_PROTOBUF], ids=["json", "protobuf"])
@pytest.mark.parametrize("command", ["subscribe", "publish", "history", "presence"])
def test_names_that_are_refused_everywhere(server, form, command):
    peer = server.peer(form)
    peer.connect()
    server.change(error_limit=0)
    for name in REFUSED_NAMES:
        assert error_of(peer.say({"id": 9, command: {"channel": name, "data": 1}})) == 107
    assert peer.close_code is None
    assert server.hub.subscriptions == 0


def test_a_pattern_for_names_admits_no_control_characters():
    any_name = Namespace(name="any", channel_regex=".*", **ALL)
    server = Server(ChannelSettings(namespaces=(any_name,)), allow_anonymous_connect_without_token=True)
    peer = server.client()
    assert "subscribe" in peer.say({"id": 2, "subscribe": {"channel": "any:\u6f22\u00e4\U0001f600"}})[0]
    for code in (*range(0x20), 0x7F, *range(0x80, 0xA0)):
        assert error_of(peer.say({"id": 9, "subscribe": {"channel": f"any:a{chr(code)}b"}})) == 107


# -- unsupported features ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("type", [1, 2, 3, 4, -1, 99])
def test_subscriptions_of_another_type(server, type):
    peer = server.client()
    assert error_of(peer.say({"id": 9, "subscribe": {"channel": "a", "type": type}})) == 108
    assert error_of(peer.say({"id": 9, "publish": {"channel": "a", "data": 1, "type": type}})) == 107
    assert server.hub.subscriptions == 0


def test_channels_are_always_named(server):
    peer = server.client()
    assert "id" not in peer.subscribe("kept:a", flag=1)
    server.publish("kept:a", 1)
    (message,) = peer.heard()
    assert message["push"].keys() == {"channel", "pub"}


# -- expired tokens and anonymous clients -----------------------------------------------------------------------------


def test_credentials_that_have_expired_are_110(server):
    ended = token(sub="42", exp=NOW + 60, expire_at=NOW - 1)
    assert error_of(server.peer().say({"id": 1, "connect": {"token": ended}})) == 110
    ended = token(sub="", channel="a", exp=NOW + 60, expire_at=NOW - 1)
    assert error_of(server.client().say({"id": 2, "subscribe": {"channel": "a", "token": ended}})) == 110

    async def let_in(request):
        return Credentials(user="42", expire_at=int(NOW) - 1)

    server.app.connecting = let_in
    assert error_of(server.peer().say({"id": 1, "connect": {}})) == 110


def test_an_anonymous_token_is_3507_where_disallowed():
    server = Server(disallow_anonymous_connection_tokens=True)
    for claims in ({}, {"sub": ""}):
        peer = server.peer()
        peer.say({"id": 1, "connect": {"token": token(**claims)}})
        assert peer.close_code == (3507, "permission denied")
    assert server.client("42").close_code is None


@pytest.mark.parametrize("include", [False, True])
def test_the_reply_carries_the_server_time_where_configured(include):
    server = Server(allow_anonymous_connect_without_token=True, connect_include_server_time=include)
    (reply,) = server.peer().say({"id": 1, "connect": {}})
    assert reply["connect"].get("time") == (int(NOW * 1000) if include else None)


def test_only_subscribers_are_notified_of_an_unsubscribe(server):
    ann, other = server.client("42"), server.client("42")
    ann.subscribe("a")
    server.order(UnsubscribeOrder("42", "a"))
    assert ann.heard() == [{"push": {"channel": "a", "unsubscribe": {"code": 2000, "reason": "server unsubscribe"}}}]
    assert other.heard() == []


# -- data that readers can't parse ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad",
    [b'"\\ud800"', b'["\\udfff\\ud800"]', b'{"a\\ud83d":1}', b"[" * 1000 + b"]" * 1000, b'"\x01"', b"[1}"],
    ids=range(6),
)
def test_refused_data_reaches_no_subscriber_and_no_history(server, bad):
    readers = [server.peer(form) for form in (BARE, BARE_PROTOBUF)]
    for reader in readers:
        reader.connect()
        reader.subscribe("kept:a")
    server.publish("kept:a", "before")
    author = server.client()
    author.session.receive(b'{"id":2,"publish":{"channel":"kept:a","data":%b}}' % bad)
    assert author.close_code == (3501, "bad request") or error_of(author.heard()) == 107
    server.publish("kept:a", "after")
    for reader in readers:
        assert reader.publications() == ["before", "after"]
        (reply,) = reader.say({"id": 9, "history": {"channel": "kept:a", "limit": -1}})
        assert [one["offset"] for one in reply["history"]["publications"]] == [1, 2]
    assert not server.mistakes


# -- damage -----------------------------------------------------------------------------------------------------------

SAMPLES: list[dict] = [
    {"id": 1, "connect": {"token": "a.b.c", "data": {"a": [1]}, "name": "js", "subs": {"a": {"recover": True}}}},
    {"id": 2, "subscribe": {"channel": "a", "recover": True, "epoch": "abc", "offset": 7, "data": {}, "flag": 1}},
    {"id": 3, "publish": {"channel": "a", "data": {"x": "\u00e4" * 40}}},
    {"id": 4, "history": {"channel": "a", "limit": 10, "since": {"offset": 3, "epoch": "abc"}, "reverse": True}},
    {"id": 5, "rpc": {"method": "f", "data": [1, 2, 3]}},
    {"send": {"data": "x"}},
]


def damaged(dice: random.Random, message: bytes) -> bytes:
    """Return the message with a few bytes changed, removed, repeated or added."""
    data = bytearray(message)
    for _ in range(dice.randint(1, 4)):
        place = dice.randrange(len(data) + 1)
        kind = dice.randrange(4)
        if kind == 0 and place < len(data):
            data[place] ^= 1 << dice.randrange(8)
        elif kind == 1:
            del data[place : place + dice.randint(1, 5)]
        elif kind == 2:
            data[place:place] = data[place : place + dice.randint(1, 20)]
        else:
            data[place:place] = dice.randbytes(dice.randint(1, 5))
    return bytes(data)


@pytest.mark.parametrize("encoding", [JSON_ENCODING, PROTOBUF], ids=["json", "protobuf"])
def test_damage_is_a_protocol_error_or_another_command(encoding):
    dice = random.Random(11)
    messages = [in_protobuf(one) if encoding is PROTOBUF else msgspec.json.encode(one) for one in SAMPLES]
    refused = 0
    for _ in range(20_000):
        try:
            for command in encoding.decode_commands(damaged(dice, dice.choice(messages))):
                command.request()
        except ProtocolError:
            refused += 1
    assert refused > 10_000


def test_damaged_messages_close_one_connection_and_no_other(server):
    dice = random.Random(12)
    bystander = server.client()
    bystander.subscribe("kept:watched")
    for number in range(500):
        form = BARE_PROTOBUF if number % 2 else BARE
        peer = server.peer(form)
        peer.connect()
        write = in_protobuf if form is BARE_PROTOBUF else msgspec.json.encode
        peer.session.receive(damaged(dice, write(dice.choice(SAMPLES))))
        assert peer.close_code in (None, (3501, "bad request"), (3508, "not available"))
        peer.session.closed()
    server.publish("kept:watched", "still here")
    assert bystander.publications() == ["still here"]
    assert not server.mistakes


# -- the rules of a channel with default options ----------------------------------------------------------------------


def test_without_options_everything_is_forbidden():
    server = Server(ChannelSettings(without_namespace=ChannelOptions()), allow_anonymous_connect_without_token=True)
    peer = server.client("42")
    for command, outcome in {"subscribe": 103, "publish": 103, "presence": 108, "history": 108}.items():
        assert error_of(peer.say({"id": 9, command: {"channel": "a", "data": 1}})) == outcome
    assert CHANNEL.without_namespace != ChannelOptions()
