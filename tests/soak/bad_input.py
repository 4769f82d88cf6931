"""Bad input at every entrance, from the seed: each input must get an error or a close, and no process may die of it."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import re
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from random import Random

from tests.soak import wire
from tests.soak.account import BROKEN, Account
from tests.soak.wire import BINARY, CLOSE, JSON, TEXT, Protobuf, frame, handshake, request, sized
from tests.soak.world import KEY, SECRET

# Seconds for an answer before the peer ends its half, after that, and until a silent input is tried again.
ANSWER = 3.0
AFTER_END = 25.0
TRIES = 3
STATUS = re.compile(rb"HTTP/1\.[01] (\d{3})")
# Asked behind every message that may be harmless: its answer shows that the connection lives.
PROBE = {"id": 4_000_000_000, "rpc": {"method": "wait", "data": 1}}

REFUSED, ANSWERED = "refused", "answered"


@dataclass(frozen=True, slots=True)
class BadInput:
    """One input. opening: the handshake before it, b"" for none. wanted: REFUSED, or ANSWERED if it may be valid.
    is_cut: the peer resets the connection behind it, and gets no answer."""

    entrance: str
    data: bytes
    opening: bytes = b""
    wanted: str = REFUSED
    is_cut: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """status: of HTTP, 0 for none. close: code, 0 for none. is_error, is_result: whether replies came with either."""

    status: int = 0
    close: int = 0
    is_error: bool = False
    is_result: bool = False
    is_end: bool = False

    def is_refusal(self) -> bool:
        """Return whether the server refused the input, by a status, a code, an error or the end of the connection."""
        return self.status >= 400 or bool(self.close) or self.is_error or (self.is_end and self.status in (0, 101))


# What valid peers send, for mutations.

CONNECT = {"id": 1, "connect": {"data": {"user": "stranger"}}}
COMMANDS = [
    {"id": 2, "subscribe": {"channel": "stream:0", "recover": True, "offset": 3, "epoch": "abcdefgh"}},
    {
        "id": 3,
        "subscribe": {"channel": "tags:0", "tf": {"op": "and", "nodes": [{"key": "a", "cmp": "eq", "val": "b"}]}},
    },
    {"id": 4, "subscribe": {"channel": "delta:0", "delta": "fossil"}},
    {"id": 5, "unsubscribe": {"channel": "stream:0"}},
    {"id": 6, "presence": {"channel": "room:0"}},
    {"id": 7, "history": {"channel": "stream:0", "limit": 5, "since": {"offset": 1, "epoch": "x"}}},
    {"id": 8, "rpc": {"method": "wait", "data": {"a": [1, 2.5, None, "\u00e4"]}}},
    {"id": 9, "refresh": {"token": "a.b.c"}},
]
HEAD = (
    b"GET /connection/websocket HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)
API_BODY = json.dumps({"channel": "bad:input", "data": {"a": 1}, "tags": {"a": "b"}, "idempotency_key": "k"}).encode()


def mutated(random: Random, data: bytes) -> bytes:
    """Return `data` with a few changes of its bytes."""
    out = bytearray(data)
    for _ in range(random.randrange(1, 5)):
        at, size = random.randrange(len(out) + 1), random.choice((1, 1, 2, 8, 40))
        match random.randrange(6):
            case 0:
                out[at : at + size] = b""
            case 1:
                out[at:at] = random.randbytes(size)
            case 2:
                out[at : at + size] = random.randbytes(min(size, max(0, len(out) - at)))
            case 3 if at < len(out):
                out[at] ^= 1 << random.randrange(8)
            case 4:
                out[at:at] = out[at : at + size] * random.choice((2, 10))
            case 5:
                out[at:at] = random.choice(
                    (b"\0", b"\r\n", b"\n", b'"', b"\\", b"{", b"[" * 200, b"\xff", b"\x80" * 11)
                )
    return bytes(out)


def http_head(random: Random) -> BadInput:
    lines = [
        b"Bad Name: x",
        b"NoColon",
        b": empty",
        b"A : b",
        b"\x01: b",
        b"A: \x00b",
        b"A: b\x0bc",
        b" folded",
        b"A: b\x7f",
        b"Host: other",
        b"Content-Length: +5",
        b"Content-Length: 1_0",
        b"Content-Length: -1",
        b"Content-Length: 5\r\nContent-Length: 6",
        b"Transfer-Encoding: xchunked",
        b"Transfer-Encoding: chunked\r\nContent-Length: 4",
        b"X: " + b"a" * 9000,
        b"\r\n".join([b"X: y"] * 150),
    ]
    firsts = [b"GET / HTTP/1.1", b"POST /api/publish HTTP/1.1", b"GET /connection/sse?cf_connect=%7B%7D HTTP/1.1"]
    bad_firsts = [
        b"GET /" + b"a" * 9000 + b" HTTP/1.1",
        b"GET / HTTP/9.9",
        b"GET  / HTTP/1.1",
        b"G\x00T / HTTP/1.1",
        b"GET /",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET /\xff HTTP/1.1",
        b"get / http/1.1",
    ]
    match random.randrange(4):
        case 0:
            head = random.choice(bad_firsts) + b"\r\nHost: 127.0.0.1"
        case 1:
            head = random.choice(firsts)  # no Host
        case 2:
            head = random.randbytes(random.randrange(1, 200)).replace(b"\n", b"x")
        case _:
            head = random.choice(firsts) + b"\r\nHost: 127.0.0.1\r\n" + random.choice(lines)
    return BadInput("HTTP head", head + b"\r\n\r\n")


def http_mutation(random: Random) -> BadInput:
    return BadInput("HTTP head, mutated", mutated(random, HEAD + b"\r\n"), wanted=ANSWERED)


def opening_handshake(random: Random) -> BadInput:
    head = HEAD
    match random.randrange(7):
        case 0:
            head = head.replace(b"Version: 13", b"Version: " + random.choice((b"8", b"12", b"14", b"x", b"")))
        case 1:
            head = head.replace(b"dGhlIHNhbXBsZSBub25jZQ==", random.choice((b"", b"short", b"=" * 24, b"a" * 100)))
        case 2:
            head = head.replace(b"GET", random.choice((b"POST", b"PUT", b"FOO")))
        case 3:
            head = head.replace(b"Upgrade: websocket", b"Upgrade: " + random.choice((b"h2c", b"web\x00socket")))
        case 4:
            head += (
                b"Origin: "
                + random.choice((b"null", b"http://evil.example", b"http://127.0.0.1@evil", b"\xff"))
                + b"\r\n"
            )
        case 5:
            head = head.replace(b"HTTP/1.1", b"HTTP/1.0")
        case _:
            head = head.replace(
                b"/connection/websocket", random.choice((b"/connection/../x", b"/none", b"//x", b"/%00"))
            )
    return BadInput("opening handshake", head + b"\r\n")


def web_socket_frame(random: Random) -> BadInput:
    mask = b"\0\0\0\0"
    bad = [
        b"\x81\x03abc",  # no mask
        bytes([0x80 | random.choice((0x10, 0x20, 0x40)) | TEXT, 0x82]) + mask + b"{}",  # reserved bits
        bytes([0x80 | random.choice((3, 4, 5, 6, 7, 11, 12, 13, 14, 15)), 0x80]) + mask,  # reserved opcodes
        b"\x89\xfe\x00\x7e" + mask + b"p" * 126,  # long control frame
        b"\x09\x80" + mask,  # fragmented control frame
        b"\x81\xff" + (1 << 63 | random.getrandbits(20)).to_bytes(8, "big") + mask,
        b"\x81\xff" + (1 << random.randrange(20, 60)).to_bytes(8, "big") + mask,  # far too long
        b"\x81\xfe\x00\x05" + mask + b"hello",  # not minimal
        b"\x80\x80" + mask,  # a continuation of nothing
        frame(TEXT, b"{", final=False) + frame(TEXT, b"}"),  # a message inside another
        frame(TEXT, b"\xc3\x28"),  # not UTF-8
        frame(TEXT, b'{"id":1,\xff'),
        frame(CLOSE, b"x"),
        frame(CLOSE, random.choice((0, 999, 1004, 1005, 1006, 1015, 2999, 5000, 65535)).to_bytes(2, "big")),
        frame(TEXT, b"x" * 70_000),
        frame(TEXT, b"", final=False) + b"".join(frame(0, b"", final=False) for _ in range(1500)),
        frame(wire.PING, b"p") * 300,
        random.randbytes(random.randrange(2, 100)),
    ]
    return BadInput("WebSocket frame", random.choice(bad), handshake("/connection/websocket"))


def json_command(random: Random) -> BadInput:
    texts = [
        b"",
        b"\n",
        b"nonsense",
        b"[]",
        b"1",
        b'{"id":1}',
        b'{"connect":{}}',
        b'{"id":-1,"connect":{}}',
        b"\xef\xbb\xbf{}",
        b'{"id":1.5,"connect":{}}',
        b'{"id":true,"connect":{}}',
        b'{"id":4294967296,"connect":{}}',
        b'{"id":1,"connect":[]}',
        b'{"id":1e400,"connect":{}}',
        b'{"id":NaN,"connect":{}}',
        b'{"id":1,"connect":{},}',
        b"[" * 60_000,
        b'{"a":' * 10_000,
        b'{"id":1,"subscribe":{"channel":"stream:0"}}',
        b'{"id":1,"connect":{},"rpc":{}}',
        b"\n" * 60_000,
        b'{"id":1,"connect":{"data":"\\ud800"}}',
        b'{"id":1,"connect":{"token":5}}',
        b'{"id":1,"connect":{"subs":[1]}}',
        b'{"id":' + b"9" * 5000 + b',"connect":{}}',
        b'{"id":1,"connect":{"data":' + b"[" * 200 + b"]" * 200 + b"}}",
        b'{"id":1,"connect":{"data":{"user":1}}} {}',
    ]
    if random.random() < 0.5:
        return BadInput("JSON command", frame(TEXT, random.choice(texts)), handshake("/connection/websocket"))
    bad = [
        {"id": 2, "subscribe": {"channel": ""}},
        {"id": 2, "subscribe": {"channel": "x" * 300}},
        {"id": 2, "subscribe": {"channel": "none:such"}},
        {"id": 2, "subscribe": {"channel": "closed:0"}},
        {"id": 2, "subscribe": {"channel": "stream:0", "delta": "other"}},
        {"id": 2, "subscribe": {"channel": "b\u00e4d"}},
        {"id": 2, "subscribe": {"channel": "stream:0", "tf": {"key": "a", "cmp": "eq"}}},
        {"id": 2, "subscribe": {"channel": "tags:0", "tf": {"op": "not", "nodes": []}}},
        {"id": 2, "subscribe": {"channel": "stream:0", "offset": 2**64}},
        {"id": 2, "connect": {}},
        {"id": 2, "subscribe": {"channel": "stream:0", "token": "x.y.z"}},
        {"id": 2, "subscribe": {"channel": "stream:0", "type": 1}},
        {"id": 2, "publish": {"channel": "stream:0", "data": 1}},
        {"id": 2, "publish": {"channel": "stream:0"}},
        {"id": 2, "presence": {"channel": "stream:0"}},
        {"id": 2, "history": {"channel": "plain:0"}},
        {"id": 2, "ping": {}},
        {"id": 2, "rpc": {"method": "none"}},
        {"send": {"data": 1}},
        {"id": 2, "refresh": {"token": ""}},
        {},
        {"id": 2, "sub_refresh": {"channel": "stream:0", "token": "x"}},
        {"id": 2, "history": {"channel": "stream:0", "limit": 2**40}},
    ]
    data = frame(TEXT, json.dumps(CONNECT).encode()) + frame(TEXT, json.dumps(random.choice(bad)).encode())
    return BadInput("JSON command, connected", data, handshake("/connection/websocket"))


def json_mutation(random: Random) -> BadInput:
    text = mutated(random, json.dumps(random.choice(COMMANDS)).encode())
    data = frame(TEXT, json.dumps(CONNECT).encode()) + frame(TEXT, text) + frame(TEXT, JSON.encode([PROBE]))
    return BadInput("JSON command, mutated", data, handshake("/connection/websocket"), ANSWERED)


def protobuf_command(random: Random) -> BadInput:
    bad = [
        b"\x80" * 11,
        b"\xff\xff\xff\xff\x0f",
        b"\x05\x08",
        b"\x02\x08\x01",
        b"\x02\x0b\x0c",
        b"\x03\x22\x05\x0a",
        sized(b"\x08\x01\x22\x05\x0a\x03\xff\xfe\xfd"),
        sized(b"\x0a\x01\x01"),
        sized(b"\x80\x01\x01" * 15_000),
        b"\0" * 60_000,
        sized(b"\x08\x01" + b"\x32\x02\x0a\x00" * 5000),
        random.randbytes(random.randrange(1, 300)),
    ]
    opening = handshake("/connection/websocket", "centrifuge-protobuf")
    return BadInput("Protobuf command", frame(BINARY, random.choice(bad)), opening)


def protobuf_mutation(random: Random) -> BadInput:
    commands = Protobuf.encode([random.choice(COMMANDS)])
    data = frame(BINARY, Protobuf.encode([CONNECT])) + frame(BINARY, mutated(random, commands))
    opening = handshake("/connection/websocket", "centrifuge-protobuf")
    return BadInput("Protobuf command, mutated", data + frame(BINARY, Protobuf.encode([PROBE])), opening, ANSWERED)


def token(random: Random) -> BadInput:
    def part(value: object) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()

    claims = random.choice(
        [
            {"sub": "x"},
            {"sub": "x", "exp": 1},
            {"sub": "x", "exp": "soon"},
            {"sub": 5},
            {"sub": "x", "nbf": 2**40},
            [],
            "x",
        ]
    )
    header = random.choice(
        [
            {"alg": "none"},
            {"alg": "HS256"},
            {"alg": "HS256", "crit": ["x"]},
            {"alg": "RS256"},
            {"typ": "x"},
            {"alg": 5},
            [],
        ]
    )
    signed = f"{part(header)}.{part(claims)}"
    key = random.choice((SECRET.encode(), b"another"))
    signature = base64.urlsafe_b64encode(hmac.digest(key, signed.encode(), hashlib.sha256)).rstrip(b"=").decode()
    whole = f"{signed}.{signature}"
    good = header == {"alg": "HS256"} and claims == {"sub": "x"} and key == SECRET.encode()
    forms = [
        signed + ".",
        whole[:-3],
        mutated(random, whole.encode()).decode("latin1"),
        "." * 5000,
        "x",
        "a.b",
        whole + "." + whole,
    ]
    chosen = random.choice(forms) if good or random.random() < 0.5 else whole
    wanted = ANSWERED if chosen is forms[2] else REFUSED
    command = {"id": 1, "connect": {"token": chosen}}
    return BadInput("token", frame(TEXT, json.dumps(command).encode()), handshake("/connection/websocket"), wanted)


def api_request(path: str, body: bytes, key: str = KEY, more: str = "") -> bytes:
    return request("POST", path, "application/json", body, f"X-API-Key: {key}\r\n{more}")


def api_body(random: Random) -> BadInput:
    bodies = [
        b"",
        b"x",
        b"[]",
        b"null",
        b"{}",
        b'{"channel":5,"data":1}',
        b'{"channel":"","data":1}',
        b'{"channel":"stream:0"}',
        b'{"channel":"none:such","data":1}',
        b'{"channel":"stream:0","data":' + b"[" * 5000,
        b'{"channel":"a","data":NaN}',
        b'{"channel":"stream:0","b64data":"!"}',
        b'{"channel":"stream:0","data":1,"tags":[]}',
        b"\xff" * 100,
        b'{"channel":"stream:0","data":1,"version":-1}',
        b'{"channel":"stream:0","data":1,"tags":{"a":5}}',
    ]
    match random.randrange(4):
        case 0:
            data = api_request("/api/publish", random.choice(bodies))
        case 1:
            data = api_request("/api/publish", API_BODY, random.choice(("", "wrong", KEY[:-1], KEY + "x")))
        case 2:
            data = api_request("/api/" + random.choice(("none", "history", "disconnect", "rpc", "batch")), b'{"a":')
        case _:
            more = random.choice(
                ("Content-Encoding: gzip\r\n", "Transfer-Encoding: chunked\r\n", "Content-Length: 3\r\n")
            )
            data = api_request("/api/publish", b"zz\r\n" + API_BODY, more=more)
    return BadInput("API", data)


def api_mutation(random: Random) -> BadInput:
    method = random.choice(("history", "presence", "channels", "info", "batch", "history_remove", "unsubscribe"))
    body = {
        "channel": "bad:input",
        "limit": 3,
        "since": {"offset": 1, "epoch": "x"},
        "commands": [{"info": {}}],
        "user": "nobody",
    }
    data = api_request(f"/api/{method}", mutated(random, json.dumps(body).encode()))
    return BadInput("API, mutated", data, wanted=ANSWERED)


def emulation(random: Random) -> BadInput:
    good = {"session": "8d4c2a30-0000-4000-8000-000000000000", "node": "0", "data": "{}"}
    bodies = [b"", b"x", b"[]", b'{"session":5}', b'{"session":"x","data":{}}', b"x" * 70_000, b"[" * 60_000]
    body = random.choice(bodies) if random.random() < 0.4 else mutated(random, json.dumps(good).encode())
    kind = random.choice(("application/json", "application/octet-stream"))
    return BadInput("emulation", request("POST", "/emulation", kind, body), wanted=ANSWERED)


def stream(random: Random) -> BadInput:
    body = mutated(random, json.dumps(random.choice(COMMANDS)).encode())
    path = random.choice(("/connection/http_stream", "/connection/sse", "/connection/uni_sse"))
    kind = random.choice(("application/json", "application/octet-stream"))
    return BadInput("stream", request("POST", path, kind, body), wanted=ANSWERED)


def cut(random: Random) -> BadInput:
    """A valid conversation that ends by a reset at any byte."""
    data = HEAD + b"\r\n" + frame(TEXT, json.dumps(CONNECT).encode()) + frame(TEXT, JSON.encode(COMMANDS[:4]))
    return BadInput("cut", data[: random.randrange(1, len(data))], is_cut=True)


GENERATORS: list[tuple[Callable[[Random], BadInput], int]] = [
    (http_head, 3),
    (http_mutation, 2),
    (opening_handshake, 2),
    (web_socket_frame, 4),
    (json_command, 4),
    (json_mutation, 4),
    (protobuf_command, 2),
    (protobuf_mutation, 4),
    (token, 3),
    (api_body, 3),
    (api_mutation, 2),
    (emulation, 2),
    (stream, 2),
    (cut, 2),
]


def generate(random: Random) -> BadInput:
    """Return the next bad input of this random source."""
    (generator,) = random.choices([one for one, _ in GENERATORS], [weight for _, weight in GENERATORS])
    return generator(random)


class Attack:
    """Sends bad input and judges the answers. sent: by entrance. answers: by kind."""

    def __init__(self, account: Account, port: int) -> None:
        self._port = port
        self.sent: Counter[str] = Counter()
        self.answers: Counter[str] = Counter()
        self._account = account

    async def run(self, rate: float, seed: int, attackers: int = 64) -> None:
        """Send `rate` inputs a second, from several peers at once, until cancelled."""
        async with asyncio.TaskGroup() as group:
            for index in range(attackers):
                group.create_task(self._run_one(rate / attackers, Random(f"bad input {index} of {seed}")))

    async def _run_one(self, rate: float, random: Random) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time() + random.random() / rate
        while True:
            await asyncio.sleep(max(0.0, due - loop.time()))
            due += 1 / rate
            await self.attack(generate(random))

    async def attack(self, one: BadInput) -> None:
        """Send an input until it has an answer, and judge that. A server that is stopped or down is asked again."""
        silences = 0
        while silences < TRIES:
            try:
                answer = await self.answer(one)
            except OSError:  # no server at the moment
                await asyncio.sleep(0.5)
                continue
            if answer is not None:
                break
            silences += 1
        self.sent[one.entrance] += 1
        text = f"{(one.opening and 'frames ') or ''}{one.data[:200]!r} ({len(one.data)} bytes)"
        if answer is None:
            self._report(one, f"no answer to {text}")
            return
        kind = f"close {answer.close}" if answer.close else f"status {answer.status}" if answer.status else "end"
        self.answers["error" if answer.is_error else "result" if answer.is_result else kind] += 1
        if one.wanted == REFUSED and not one.is_cut and not answer.is_refusal():
            self._report(one, f"{answer} to {text}")

    def _report(self, one: BadInput, text: str) -> None:
        self._account.require(False, "bad input", BROKEN, "stranger", one.entrance, text)

    async def answer(self, one: BadInput) -> Answer | None:
        """Send an input on a new connection; return its answer, None for silence. OSError: can't connect."""
        try:
            async with asyncio.timeout(AFTER_END):
                reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        except TimeoutError:
            return None
        read = b""
        try:
            with suppress(ConnectionError):
                writer.write(one.opening + one.data)
                if one.is_cut:
                    await asyncio.sleep(0)
                    return Answer(is_end=True)
                for limit in (ANSWER, AFTER_END):
                    try:
                        async with asyncio.timeout(limit):
                            while part := await reader.read(65536):
                                read += part
                                if (found := understood(one, read)) is not None:
                                    return found
                            return understood(one, read, is_end=True)
                    except TimeoutError:
                        if writer.can_write_eof():
                            writer.write_eof()
                return understood(one, read, is_end=True) if read else None
            return understood(one, read, is_end=True)
        finally:
            writer.transport.abort()


def understood(one: BadInput, read: bytes, is_end: bool = False) -> Answer | None:
    """Return the answer in the bytes that were read, None while it may go on."""
    head, blank, rest = read.partition(b"\r\n\r\n")
    status = int(found[1]) if (found := STATUS.match(head)) else 0
    if not one.opening:
        if not blank and not is_end:
            return None
        if status == 200 and b"application/json" in head and not rest and not is_end:
            return None
        return Answer(
            status, is_error=b'"error"' in rest or b'"disconnect"' in rest, is_result=0 < status < 400, is_end=is_end
        )
    if status != 101:
        return Answer(status, is_end=is_end) if blank or is_end else None
    close, is_error, results = 0, False, 0
    for opcode, payload in wire.frames(rest)[0]:
        if opcode == CLOSE:
            close = int.from_bytes(payload[:2], "big") or 1005
        elif opcode in (TEXT, BINARY):
            is_error |= b'"error"' in payload or b"\x12" in payload[:12]
            results += payload.count(b"\n") + 1 if opcode == TEXT else 1
    enough = close or is_end or is_error or (one.wanted == ANSWERED and results > 1)
    return Answer(101, close, is_error, results > 0, is_end) if enough else None
