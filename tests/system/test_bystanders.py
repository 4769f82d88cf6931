"""Clients that mean no good, all kinds of them, beside some that only listen: these hear everything, in order.

Nothing here measures time: what an attack may cost is for the benchmarks.
"""

from __future__ import annotations

import json
import random
import re
import socket
import struct
import threading
import time
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

import jwt
import psutil
import pytest
from websockets.sync.client import ClientConnection, connect

from tests.system.serving import Server, ServerStarter, wait_until

CHANNEL = "stream:watched"
DICE = random.Random(8)


def token(user: str) -> str:
    return jwt.encode({"sub": user}, "secret", algorithm="HS256")


def say(client: ClientConnection, *commands: dict[str, object]) -> None:
    client.send("\n".join(map(json.dumps, commands)))


def subscribed(client: ClientConnection, user: str) -> None:
    subscribe = {"channel": CHANNEL, "flag": 1}
    say(client, {"id": 1, "connect": {"token": token(user)}}, {"id": 2, "subscribe": subscribe})


class Listener(threading.Thread):
    """Keeps the offsets that it is sent, until the last."""

    def __init__(self, client: ClientConnection, name: str) -> None:
        super().__init__(daemon=True)
        self.client = client
        self.offsets: list[int] = []
        self.ready = threading.Event()
        self.failure: Exception | None = None
        subscribed(client, name)
        self.start()

    def run(self) -> None:
        try:
            for message in self.client:
                for line in str(message).split("\n"):
                    self.take(json.loads(line))
        except Exception as error:
            self.failure = error

    def take(self, reply: dict) -> None:
        assert "error" not in reply
        if reply.get("id") == 2:
            self.ready.set()
        elif (pub := reply.get("push", {}).get("pub")) is not None:
            self.offsets.append(pub["offset"])
        elif not reply:
            self.client.send("{}")


class Publisher(threading.Thread):
    """Publishes one after another until it is told to stop; `count` of them were accepted."""

    def __init__(self, client: ClientConnection) -> None:
        super().__init__(daemon=True)
        self.client = client
        self.count = 0
        self.stopping = threading.Event()
        subscribed(client, "publisher")
        self.start()

    def run(self) -> None:
        while not self.stopping.wait(0.005):
            say(self.client, {"id": 9, "publish": {"channel": CHANNEL, "data": {"number": self.count}}})
            while True:
                replies = [json.loads(line) for line in str(self.client.recv(timeout=20)).split("\n")]
                if {} in replies:
                    self.client.send("{}")
                if any(reply.get("id") == 9 for reply in replies):
                    break
            self.count += 1


# -- attacks: each takes a fresh connection to the server -------------------------------------------------------------


def frame(opcode: int, payload: bytes = b"", fin: bool = True, rsv: int = 0) -> bytes:
    """A client's frame, masked with zeros."""
    size = len(payload)
    first, flag = (0x80 if fin else 0) | rsv << 4 | opcode, 0x80
    if size < 126:
        head = struct.pack("!BB", first, flag | size)
    elif size < 65536:
        head = struct.pack("!BBH", first, flag | 126, size)
    else:
        head = struct.pack("!BBQ", first, flag | 127, size)
    return head + b"\0\0\0\0" + payload


def handshake(*more: str) -> bytes:
    lines = [
        "GET /connection/websocket HTTP/1.1",
        "Host: localhost",
        "Upgrade: websocket",
        "Connection: Upgrade",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        *more,
    ]
    return "\r\n".join([*lines, "", ""]).encode()


def command(**fields: object) -> bytes:
    return frame(1, json.dumps(fields).encode())


CONNECT = command(id=1, connect={"token": token("mallory")})
SUBSCRIBE = command(id=2, subscribe={"channel": CHANNEL})
DEFLATE = "Sec-WebSocket-Extensions: permessage-deflate"


def post(path: str, content: object) -> bytes:
    body = json.dumps(content).encode()
    return f"POST {path} HTTP/1.1\r\nHost: h\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def bomb() -> bytes:
    deflater = zlib.compressobj(9, zlib.DEFLATED, -15)
    return (deflater.compress(bytes(60 << 20)) + deflater.flush(zlib.Z_SYNC_FLUSH)).removesuffix(b"\0\0\xff\xff")


PUBLISH = command(id=3, publish={"channel": "stream:other", "data": "x" * 100})
NESTED = b'{"id":3,"publish":{"channel":"stream:other","data":' + b"[" * 30_000 + b"]" * 30_000 + b"}}"
ATTACKS: dict[str, Callable[[], bytes]] = {
    "ping flood": lambda: handshake() + CONNECT + frame(9, b"p" * 100) * 10_000,
    "pong flood": lambda: handshake() + CONNECT + frame(10) * 10_000,
    "tiny messages": lambda: handshake() + CONNECT + frame(1, b"{}") * 100_000,
    "commands": lambda: handshake() + CONNECT + command(id=3, unsubscribe={"channel": "a"}) * 10_000,
    "publications": lambda: handshake() + CONNECT + PUBLISH * 2_000,
    "errors": lambda: handshake() + CONNECT + command(id=3, publish={"channel": "no:a", "data": 1}) * 1_000,
    "subscriptions": lambda: (
        handshake() + CONNECT + b"".join(command(id=n, subscribe={"channel": f"stream:{n}"}) for n in range(2, 400))
    ),
    "empty fragments": lambda: handshake() + frame(1, b"{", fin=False) + frame(0, fin=False) * 10_000,
    "one-byte fragments": lambda: handshake() + frame(1, b"{", fin=False) + frame(0, b" ", fin=False) * 70_000,
    "a length of a terabyte": lambda: handshake() + b"\x81\xff" + struct.pack("!Q", 2**40) + b"\0\0\0\0x",
    "a message that is too long": lambda: handshake() + frame(1, b"x" * 100_000),
    "60 MB of zeros": lambda: handshake(DEFLATE) + frame(1, bomb(), rsv=4),
    "garbage that is compressed": lambda: handshake(DEFLATE) + frame(1, DICE.randbytes(5_000), rsv=4),
    "many brackets": lambda: handshake() + CONNECT + frame(1, NESTED),
    "newlines": lambda: handshake() + CONNECT + frame(1, b"\n" * 65_536),
    "binary": lambda: handshake() + CONNECT + frame(2, b"\0" * 1000),
    "frames of chance": lambda: handshake() + CONNECT + DICE.randbytes(100_000),
    "no mask": lambda: handshake() + b"\x81\x02{}",
    "bytes of chance": lambda: DICE.randbytes(20_000),
    "an endless head": lambda: b"GET / HTTP/1.1\r\nHost: h\r\n" + b"X: y\r\n" * 200_000,
    "many requests": lambda: b"GET /nothing HTTP/1.1\r\nHost: h\r\n\r\n" * 300 + b"the end\r\n\r\n",
    "a large body": lambda: (
        b"POST /api/publish HTTP/1.1\r\nHost: h\r\nX-API-Key: test-key\r\nContent-Length: 999999999\r\n\r\n"
        + b"x" * 500_000
    ),
    "requests to nobody": lambda: post("/emulation", {"session": 7, "data": "{}"}) * 300 + b"end\r\n\r\n",
    "a stream that is none": lambda: post("/connection/http_stream", {"id": 1, "subscribe": {"channel": CHANNEL}}),
    "a stream with too much to say": lambda: post("/connection/http_stream", {"connect": "x" * 100_000}),
    "a stream of events for nobody": lambda: b"GET /connection/sse?cf_connect={ HTTP/1.1\r\nHost: h\r\n\r\n",
    "half a handshake": lambda: handshake()[:100],
    "subscribed and gone": lambda: handshake() + CONNECT + SUBSCRIBE,
}
# Nobody is shown out for these.
PERMITTED = {"subscribed and gone"}
# What is counted of all this.
KINDS = (
    *("frame", "frame_data", "frame_rate", "frame_size", "pong"),
    *("command", "command_rate", "command_flood", "command_errors"),
    *("head_syntax", "head_size", "head_timeout", "body_too_large", "emulation"),
)


def attack(server: Server, data: bytes, how: int, patience: float) -> None:
    """Send half of it and no more; or all, and reset the connection; or all, and wait for the server to close."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as peer, suppress(OSError):
        peer.sendall(data if how else data[: len(data) // 2])
        if how == 0:
            peer.shutdown(socket.SHUT_WR)
        elif how == 1:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return
        peer.settimeout(patience)
        until = time.monotonic() + patience
        while time.monotonic() < until and peer.recv(65536):
            pass


@contextmanager
def never_reading(server: Server) -> Iterator[None]:
    """Some that listen and take nothing of what they are sent, and some that never say anything."""
    with ExitStack() as stack:
        for number in range(60):
            peer = stack.enter_context(socket.socket())
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            peer.connect(("127.0.0.1", server.port))
            if number < 20:
                peer.sendall(handshake() + CONNECT + SUBSCRIBE)
            elif number < 30:
                everything = jwt.encode({"sub": "mallory", "channels": [CHANNEL]}, "secret", algorithm="HS256")
                peer.sendall(post("/connection/http_stream", {"id": 1, "connect": {"token": everything}}))
            elif number < 45:
                peer.sendall(b"G")
        yield


def metric(server: Server, pattern: str) -> float:
    return sum(float(value) for value in re.findall(rf"^{pattern} (\S+)$", server.operate("/metrics")[1], re.MULTILINE))


def said(server: Server) -> list[str]:
    """The lines of the log that a slow machine alone does not bring about."""
    return [line for line in server.lines if not re.search(r"server\.(blame|rescue)#|under pressure", line)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One for both tests: after either, nothing is left of its clients."""
    starter = ServerStarter(tmp_path_factory.mktemp("bystanders"))
    yield starter(
        websocket={"compression": True},
        http_server={"header_timeout": "1s"},
        log={"level": "info"},
        sse={"enabled": True},
        http_stream={"enabled": True},
    )
    starter.finish()


@pytest.mark.timeout(120)
def test_whatever_others_do_who_listens_hears_everything_in_order(server: Server) -> None:
    workers = server.workers()
    with ExitStack() as stack:
        clients = [stack.enter_context(connect(server.endpoint, compression=None, max_queue=None)) for _ in range(7)]
        listeners = [Listener(client, f"listener {number}") for number, client in enumerate(clients[:-1])]
        assert all(listener.ready.wait(20) for listener in listeners)
        publisher = Publisher(clients[-1])
        before = {pid: psutil.Process(pid).memory_info().rss for pid in workers}
        with never_reading(server):
            for name, make in ATTACKS.items():
                data = make()
                for how in range(3):
                    attack(server, data, how, 0.2 if name in PERMITTED else 10.0)
                assert all(listener.is_alive() for listener in listeners), name
        publisher.stopping.set()
        publisher.join(20)
        assert publisher.count > 50
        for listener in listeners:
            wait_until(lambda listener=listener: len(listener.offsets) >= publisher.count, "the last publication")
            assert listener.failure is None
            assert listener.offsets == list(range(1, publisher.count + 1))
        wait_until(lambda: metric(server, r"realtime_connections\{[^}]*\}") == len(clients), "nobody else")
    for kind in KINDS:
        assert metric(server, rf'realtime_bad_input_total\{{kind="{kind}"[^}}]*\}}') > 0, kind
    assert server.workers() == workers
    for pid in workers:
        assert psutil.Process(pid).memory_info().rss - before[pid] < 100 * 1024 * 1024
    # Attackers do not fill a disk: each worker writes one line for each kind and minute.
    assert len(said(server)) < 60 + 2 * len(workers) * len(KINDS), server.log


CONVERSATION = b"".join(
    (
        handshake("Origin: http://localhost"),
        CONNECT,
        command(id=2, subscribe={"channel": "stream:cut"}),
        command(id=3, publish={"channel": "stream:cut", "data": {"a": 1}}),
        command(id=4, presence={"channel": "stream:cut"}),
        command(id=5, rpc={"method": "echo", "data": 1}),
        command(id=6, unsubscribe={"channel": "stream:cut"}),
        command(id=7, subscribe={"channel": "stream:cut", "recover": True}),
        frame(8, b"\x03\xe8"),
    )
)


def test_a_conversation_may_end_at_any_byte_and_leaves_nothing(server: Server) -> None:
    before = len(said(server))
    for cut in range(len(CONVERSATION) + 1):
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as peer:
            peer.sendall(CONVERSATION[:cut])
            if cut % 3 == 0:
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            elif cut % 3 == 1 and cut > 200:
                peer.recv(1)  # the server has begun to answer

    def left() -> list[float]:
        (node,) = api(server, "info")["result"]["nodes"]
        present = api(server, "presence", channel="stream:cut")["result"]["presence"]
        gauges = [
            metric(server, rf"{name}\{{[^}}]*\}}") for name in ("realtime_connections", "realtime_pending_connections")
        ]
        return [*gauges, len(present), node["num_clients"], node["num_subs"]]

    wait_until(lambda: not any(left()), "an end of all")
    assert len(said(server)) < before + 2 * len(server.workers()) * len(KINDS), server.log


def api(server: Server, method: str, **fields: object) -> dict:
    body = json.dumps(fields).encode()
    request = urllib.request.Request(f"{server.http}/api/{method}", body, {"X-API-Key": "test-key"})
    with urllib.request.urlopen(request, timeout=20) as response:
        return json.load(response)
