"""CPU of one uninterrupted step: the dearest inputs within the default limits, at each entrance but commands.

`tests/protocol/test_step_costs.py` has the commands of clients.
"""

from __future__ import annotations

import base64
import json
import random
import time
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

import jwt
import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from realtime.auth.keys import MAX_KEYS, MAX_SET_BYTES, RSA_BITS, VerificationKey, key_set
from realtime.auth.tokens import TokenVerifier
from realtime.config import settings
from realtime.handlers.coroutines import drive
from realtime.http.body import BodyParser
from realtime.http.request import CHUNKED, RequestParser, parse_whole_head
from realtime.metrics import Metrics
from realtime.protocol.json_encoding import JSON_ENCODING
from realtime.protocol.orders import decode_order
from realtime.protocol.protobuf import PROTOBUF, EmulationRequest
from realtime.pubsub import broker_messages
from realtime.pubsub.broker_core import BrokerCore
from realtime.pubsub.engine import (
    PRESENCE_PAGE,
    AddClient,
    AddPresence,
    GetHistory,
    GetPresence,
    GetPresenceStats,
    GetStats,
    Publish,
    SendOrder,
    Subscribe,
    new_listing,
)
from realtime.pubsub.time_slices import TimeSlicer
from realtime.server_api.http_api import HTTPAPI
from realtime.transports.emulation import Emulation, EmulationLimits
from realtime.types import ClientInfo, HistoryOptions
from realtime.worker.surveys import Surveys
from tests.protocol.sessions import run
from tests.protocol.test_step_costs import BOUND, MESSAGE, SLICE, Turn, shortest
from tests.server_api.bench import Bench
from tests.transports.stage import frame
from tests.transports.test_incoming import Server

HTTP = settings.HTTPServerSettings()
BODY = settings.HTTPAPISettings().max_body_size


def cost(function: Callable[..., Any], *args: Any) -> float:
    start = time.thread_time()
    function(*args)
    return time.thread_time() - start


class Steps:
    """Slices in real time, and the CPU of the longest step."""

    def __init__(self, waiter: Callable[[], Any] = Turn) -> None:
        """waiter: see `TimeSlicer`."""
        self.turns: list[Callable[[], None]] = []
        self.longest = 0.0
        self.slices = TimeSlicer(time.thread_time, SLICE, self.turns.append, waiter)

    def step(self, function: Callable[..., Any], *args: Any) -> Any:
        start = time.thread_time()
        result = function(*args)
        self.longest = max(self.longest, time.thread_time() - start)
        return result

    def run(self) -> None:
        while self.turns:
            self.step(self.turns.pop(0))


# HTTP

_HEAD = b"GET / HTTP/1.1\r\nHost: a\r\n"
HEADS = {
    "many lines": _HEAD + b"".join(b"X%d: %b\r\n" % (n, b"v" * 140) for n in range(HTTP.max_headers - 2)) + b"\r\n",
    "one long line": _HEAD + b"X: " + b"v" * 8000 + b"\r\n\r\n",
    "a long query": b"GET /?" + b"a=%61&" * 1300 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
    "empty names": _HEAD + b": \r\n" * 90 + b"\r\n",
    "no end": _HEAD + b"X" * MESSAGE,
}


@pytest.mark.parametrize("name", HEADS)
def test_heads(name: str) -> None:
    head = HEADS[name]
    limits = HTTP.max_header_bytes, HTTP.max_headers
    assert shortest(lambda: cost(parse_whole_head, head, 0, *limits)) < BOUND
    assert shortest(lambda: cost(lambda: RequestParser(*limits).feed(head))) < BOUND


CHUNKS = {
    "tiny chunks": b"1\r\nx\r\n" * (MESSAGE // 6),
    "extensions": (b"1;" + b"a" * 1000 + b"\r\nx\r\n") * 65,
    "trailers": b"0\r\n" + b"a: b\r\n" * 10_000,
}


@pytest.mark.parametrize("name", CHUNKS)
def test_chunked_bodies(name: str) -> None:
    assert shortest(lambda: cost(lambda: BodyParser(CHUNKED, BODY).feed(CHUNKS[name]))) < BOUND


# Frames

_MASK = b"\0\0\0\0"
FRAMES = {
    "tiny frames": frame(1, b"x", mask=_MASK) * (MESSAGE // 7),
    "pings": frame(9, b"", mask=_MASK) * 40,
    "fragments": frame(1, b"x", fin=False) + frame(0, b"x", fin=False) * (MESSAGE // 7),
    "a bomb": frame(1, zlib.compress(b"{}\n" * 218_000, 9, -15), rsv=4, mask=_MASK),
    "a bomb of one command": frame(1, zlib.compress(b" " * 650_000, 9, -15), rsv=4, mask=_MASK),
    "random deflate": frame(1, random.Random(2).randbytes(MESSAGE), rsv=4, mask=_MASK),
}


@pytest.mark.parametrize("name", FRAMES)
def test_frames(name: str) -> None:
    def measure() -> float:
        steps = Steps()
        server = Server(more="Sec-WebSocket-Extensions: permessage-deflate")
        factory = server.factory
        factory.slices = factory.strangers = steps.slices
        factory.message_size_limit, factory.decompressed_limit, factory.max_fragments = MESSAGE, 10 * MESSAGE, 1024
        server.sessions[0].receive = lambda payload: None  # type: ignore[method-assign]
        for start in range(0, len(FRAMES[name]), MESSAGE):
            steps.step(server.connection.dataReceived, FRAMES[name][start : start + MESSAGE])
        steps.run()
        return steps.longest

    assert shortest(measure) < BOUND


# Tokens and keys

_SECRET = "k" * 32
TOKENS: dict[str, Callable[[int], dict[str, Any]]] = {
    "claims": lambda n: {str(number): 0 for number in range(n)},
    "subs": lambda n: {"subs": {str(number): {} for number in range(n)}},
    "overrides": lambda n: {"subs": {str(number): {"override": {"presence": {"value": True}}} for number in range(n)}},
    "infos": lambda n: {"subs": {str(number): {"info": ["\ud83d\ude00"], "data": [[]]} for number in range(n)}},
    "channels": lambda n: {"channels": [str(number) for number in range(n)]},
    "surrogates": lambda n: {"info": ["\ud83d\ude00"] * n},
    "brackets": lambda n: {"info": [[]] * n},
    "base64": lambda n: {"b64info": base64.b64encode(b"[" * n).decode()},
    "audiences": lambda n: {"aud": ["a"] * n},
}


def longest_token(make: Callable[[int], dict[str, Any]]) -> str:
    limit = settings.TokenSettings().max_length
    number, token = 1, ""
    while len(longer := jwt.encode({"sub": "1"} | make(number), _SECRET, algorithm="HS256")) <= limit:
        number, token = number + 1 + number // 8, longer
    assert len(token) > limit / 2
    return token


@pytest.mark.parametrize("name", TOKENS)
def test_tokens(name: str) -> None:
    verifier = TokenVerifier(settings.TokenSettings(hmac_secret_key=_SECRET), time.time)
    token = longest_token(TOKENS[name])

    def verify() -> None:
        with pytest.raises(StopIteration):
            verifier.connection(token).send(None)

    assert shortest(lambda: cost(verify)) < BOUND


def number(value: int) -> str:
    return base64.urlsafe_b64encode(value.to_bytes((value.bit_length() + 7) // 8, "big")).rstrip(b"=").decode()


def modulus(bits: int) -> int:
    return random.Random(bits).getrandbits(bits) | 1 | 1 << bits - 1


def test_the_slowest_keys() -> None:
    bits = RSA_BITS[-1]
    keys = [VerificationKey(("RS512",), rsa.RSAPublicNumbers(65537, modulus(bits)).public_key())]
    keys.append(VerificationKey(("ES512",), ec.generate_private_key(ec.SECP521R1()).public_key()))
    for key, size in zip(keys, (bits // 8, 132), strict=True):
        signed = b"x" * settings.TokenSettings().max_length
        verify = partial(key.verifies, key.algorithms[0], signed, b"\1" * size)
        assert shortest(partial(cost, verify)) < BOUND


def _rsa_keys(bits: int, exponent: int) -> list[dict[str, str]]:
    one = {"kty": "RSA", "use": "sig", "n": number(modulus(bits)), "e": number(exponent)}
    return [one | {"kid": str(each)} for each in range(MAX_KEYS)]


KEY_SETS = {
    "long RSA keys": lambda: json.dumps({"keys": _rsa_keys(RSA_BITS[-1], 65537)[:90]}).encode(),
    "RSA keys": lambda: json.dumps({"keys": _rsa_keys(2048, 65537)}).encode(),
    "huge exponents": lambda: json.dumps({"keys": _rsa_keys(RSA_BITS[-1], modulus(16_000))[:45]}).encode(),
    "empty keys": lambda: b'{"keys":[' + b"{}," * (MAX_SET_BYTES // 3 - 10) + b"{}]}",
    "brackets": lambda: b'{"keys":' + b"[" * (MAX_SET_BYTES - 10),
}


@pytest.mark.parametrize("name", KEY_SETS)
def test_key_sets(name: str) -> None:
    text = KEY_SETS[name]()
    assert len(text) <= MAX_SET_BYTES

    def read() -> None:
        try:
            key_set(text)
        except Exception as error:
            assert "Key Set" in str(error)

    assert shortest(lambda: cost(read)) < BOUND


# The HTTP API


def filled(before: bytes, one: bytes, after: bytes) -> bytes:
    return before + b",".join([one] * ((BODY - len(before) - len(after)) // (len(one) + 1))) + after


CALLS = {
    "brackets": ("publish", filled(b'{"channel":"plain","data":[', b"[]", b"]}")),
    "surrogates": ("publish", filled(b'{"channel":"plain","data":[', b'"\\ud83d\\ude00"', b"]}")),
    "strings": ("publish", filled(b'{"channel":"plain","data":[[],', b'"["', b"]}")),
    "base64": (
        "publish",
        b'{"channel":"plain","b64data":"%b"}' % base64.b64encode(filled(b"[", b"[]", b"]")[:780_000]),
    ),
    "info": ("subscribe", filled(b'{"channel":"plain","info":[', b"[]", b"]}")),
    "unknown fields": ("publish", filled(b'{"channel":null,', b'"unknown":0', b"}")),
    "channels": ("broadcast", filled(b'{"data":1,"channels":[', b'"a%20long%20name"', b"]}")),
    "whitelist": ("disconnect", filled(b'{"user":"1","whitelist":[', b"null", b"]}")),
    "commands": ("batch", filled(b'{"commands":[', b'{"publish":{"x":0}}', b"]}")),
    "empty commands": ("batch", filled(b'{"commands":[', b"{}", b"]}")),
    "numbers as commands": ("batch", filled(b'{"commands":[', b"1", b"]}")),
    "short channels": ("broadcast", filled(b'{"data":1,"channels":[', b'"a"', b"]}")),
    "tags": ("publish", b'{"data":1,"tags":{%b}}' % b",".join(b'"%x":""' % number for number in range(95_000))),
    "lines": ("", b'{"method":"info"}\n' * 2 + b"\n" * (BODY - 40)),
    "calls": ("", b'{"method":"nothing"}\n' * (BODY // 21)),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_of_the_http_api(name: str) -> None:
    method, body = CALLS[name]
    assert len(body) <= BODY

    def measure() -> float:
        steps, bench = Steps(), Bench()
        bench.operations._slices = steps.slices
        api = HTTPAPI(bench.operations, slices=steps.slices)
        done: list[object] = []
        call = api.call(method, body) if method else api.call_named(body)
        steps.step(run, call, lambda result, error: done.append(error or result))
        steps.run()
        assert done
        return steps.longest

    assert shortest(measure) < BOUND


def test_the_history_of_a_very_long_stream() -> None:
    core: BrokerCore[str] = BrokerCore(Unheard(), 1000)
    core.attach("peer")
    options = HistoryOptions(100_000, 300.0, 300.0)
    for each in range(50_000):
        core.carry_out("peer", 0.0, Publish("chat:a", b"%d" % each, options))
    decode = broker_messages.answer_decoder(GetHistory)

    def measure() -> float:
        steps = Steps()

        class Engine:
            async def ask(self, request: GetHistory) -> Any:
                frame = steps.step(lambda: broker_messages.pack(core.carry_out("peer", 0.0, request), 1))
                await steps.slices.yield_to_loop()
                return steps.step(decode, frame[12:])

        bench = Bench()
        bench.operations._engine = Engine()  # type: ignore[assignment]
        done: list[Any] = []
        call = HTTPAPI(bench.operations, slices=steps.slices).call("history", b'{"channel":"chat:a","limit":-1}')
        steps.step(run, call, lambda result, error: done.append(error or result))
        steps.run()
        assert len(done[0].publications) == 50_000
        steps.step(msgspec.json.encode, done[0])
        return steps.longest

    assert shortest(measure) < BOUND


# Emulation


@pytest.mark.parametrize("encoding", [JSON_ENCODING, PROTOBUF], ids=["json", "protobuf"])
def test_bodies_of_emulation(encoding: Any) -> None:
    limit = settings.EmulationSettings().max_request_body_size
    data = b"{}\n" * (limit // 3) if encoding is JSON_ENCODING else b"\4abcd" * (limit // 5)

    def measure() -> float:
        steps = Steps()
        limits = EmulationLimits(settings.EmulationSettings(), MESSAGE, Metrics(), Clock().callLater)
        emulation = Emulation(None, "n", "1", limits, steps.slices)  # type: ignore[arg-type]
        request = EmulationRequest("n", "unknown", data)
        steps.step(run, emulation._forward(request, encoding), lambda result, error: None)
        steps.run()
        return steps.longest

    assert shortest(measure) < BOUND


# Presence


def test_presence_of_very_many() -> None:
    core: BrokerCore[str] = BrokerCore(Unheard(), 1_000_000)
    core.attach("peer")
    for each in range(30_000):
        info = ClientInfo(f"user {each}", f"a client with a name {each}", b'{"name":"A member with a name"}')
        core.take_note("peer", 0.0, AddClient(info))
        core.carry_out("peer", 0.0, AddPresence("a", info, present=True, announce=True))
    decode = broker_messages.answer_decoder(GetPresence)

    def measure() -> float:
        steps, request, listed = Steps(), GetPresence("a", new_listing()), 0
        while True:
            frame = steps.step(lambda: broker_messages.pack(core.carry_out("peer", 0.0, request), 1))
            page = steps.step(decode, frame[12:])
            listed += len(page)
            if len(page) < PRESENCE_PAGE:
                assert listed == 30_000
                return steps.longest

    assert shortest(measure) < BOUND
    assert cost(core.carry_out, "peer", 0.0, GetPresenceStats("a")) < BOUND


def test_the_end_of_a_worker_with_many_clients_and_channels() -> None:
    def measure() -> float:
        core: BrokerCore[str] = BrokerCore(Unheard(), 1_000_000)
        core.attach("peer")
        for each in range(10_000):
            info = ClientInfo(f"user {each}", f"client {each}")
            core.take_note("peer", 0.0, AddClient(info))
            core.carry_out("peer", 0.0, Subscribe(f"channel {each}"))
            core.carry_out("peer", 0.0, AddPresence("a", info, present=True, announce=True))
        steps, leaving = Steps(), core.detach_steps("peer", 0.0)
        while steps.step(next, leaving, leaving) is None:
            pass
        assert core.channels == 0
        assert core.carry_out("peer", 0.0, GetStats()).clients == 0
        return steps.longest

    assert shortest(measure) < BOUND


class OneTurn(Clock):
    """Calls due calls of one turn alone: `Clock.advance` calls those that they make, too."""

    def turn(self) -> None:
        due = [call for call in self.calls if call.getTime() <= self.seconds()]
        self.calls = [call for call in self.calls if call not in due]
        for call in due:
            call.called = 1
            call.func(*call.args, **call.kw)


def test_a_survey_of_very_many_channels() -> None:
    channels = {f"channel {each}": 1 for each in range(100_000)}

    class OneWorker:
        def channels(self) -> list[str]:
            return list(channels)

        def subscribers(self, channel: str) -> int:
            return channels[channel]

        async def ask(self, request: SendOrder) -> int:
            self.orders.append(request.order)
            return 1

        orders: list[bytes] = []

    def measure() -> float:
        steps, clock, bench, worker = Steps(Deferred), OneTurn(), Bench(), OneWorker()
        surveys = Surveys(worker, worker, "0", clock)  # type: ignore[arg-type]
        bench.operations._survey = surveys
        done: list[Any] = []
        api = HTTPAPI(bench.operations, slices=steps.slices)
        steps.step(drive, api.call("channels", b"{}"), lambda result, error: done.append(error or result))
        while not done:
            for order in worker.orders[:1]:
                del worker.orders[:1]
                steps.step(lambda order=order: surveys.on_order(decode_order(order)))  # type: ignore[arg-type]
            steps.step(clock.turn)
            steps.run()
        assert json.loads(steps.step(msgspec.json.encode, done[0]))["channels"].keys() == channels.keys()
        return steps.longest

    assert shortest(measure) < BOUND


class Unheard:
    """Drops all deliveries."""

    def deliver_publication(self, *_: object) -> None: ...

    deliver_join = deliver_leave = deliver_order = deliver_publication
