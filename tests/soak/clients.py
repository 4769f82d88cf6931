"""The clients of a soak: small objects on one asyncio loop, which behave as the official SDKs where it matters.

They come back after every end of a connection, recover from their last position, and report what they see to the
account.
"""

from __future__ import annotations

import asyncio
import re
import select
import socket
import struct
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from random import Random
from typing import Any
from urllib.parse import quote

import aiohttp
import msgspec
from centrifuge.fossil import apply_delta

from tests.soak import wire
from tests.soak.account import BROKEN, Account, PlainSubscription, Subscription
from tests.soak.members import Room
from tests.soak.wire import JSON, Encoding, Protobuf, Reply, Unidirectional
from tests.soak.world import FILTER, Place, World, text

# Seconds until a client gives an attempt to connect up, and until it takes a silent connection for dead.
CONNECT_LIMIT = 20.0
SILENCE = 25.0 + 10.0
# Seconds until an SDK reconnects because a subscribe or unsubscribe command has no answer. Commands of a client with a
# stream may get lost between two nodes.
ANSWER_LIMIT = 5.0
EMULATION = aiohttp.ClientTimeout(total=20.0)
# Connections begun in one tick at most, and seconds between two ticks.
AT_ONCE = 60
TICK = 0.05
STATUS = re.compile(rb"HTTP/1\.1 (\d{3})")
RETRY_AFTER = re.compile(rb"\r\nretry-after: (\d+)", re.IGNORECASE)
OFF, ASKED, ON, LEAVING = "off", "asked", "on", "leaving"


class _Payload(msgspec.Struct):
    n: int


_number = msgspec.json.Decoder(_Payload).decode


class Part:
    """One channel of a client. due: time of the next attempt to subscribe. asked: time of the latest command. list: the
    members that a watcher knows. lies: the client claims positions that it can't have, and leaves again."""

    __slots__ = ("asked", "base", "book", "channel", "delta", "due", "lies", "list", "listed_since", "room", "state")

    def __init__(self, channel: str, book: Subscription | PlainSubscription | None, room: Room | None = None) -> None:
        self.channel = channel
        self.book = book
        self.room = room
        self.lies = False
        self.delta = channel.startswith("delta:")
        self.state = OFF
        self.base = b""
        self.due = self.asked = 0.0
        self.list: set[str] | None = None
        self.listed_since = 0.0

    @property
    def is_settled(self) -> bool:
        """Whether the client is subscribed, or will not be for long."""
        return self.state == ON or self.lies or self.channel.startswith("closed:")


class Client:
    """One client over all its connections. due: time of its next attempt to connect, None while it has a connection."""

    def __init__(self, crowd: Crowd, place: Place) -> None:
        self.name = place.name
        self.crowd = crowd
        self.transport, _, encoding = place.transport.partition(" ")
        self.is_unidirectional = self.transport.startswith("uni_")
        self.encoding: Encoding = Unidirectional if self.is_unidirectional else Protobuf if encoding else JSON
        self.parts = {part.channel: part for part in self._parts(crowd, place)}
        self.watches = bool(place.watches)
        self.id = self.session = self.node = ""
        self.connection: Connection | None = None
        self.is_connected = False
        self.attempts = 0
        self.due: float | None = 0.0
        self.heard = 0.0
        self._pending: dict[int, Callable[[Reply | None], None]] = {}
        self._last_id = 0

    def _parts(self, crowd: Crowd, place: Place) -> list[Part]:
        account, world = crowd.account, crowd.world
        if place.watches:
            return [Part(place.watches, None, world.rooms[place.watches])]
        parts = []
        for name in place.channels:
            kind = name.partition(":")[0]
            book: Subscription | PlainSubscription | None = None
            if kind == "plain":
                book = PlainSubscription(account, place.name, world.channels[name])
            elif name in world.channels:
                channel = world.channels[name]
                filtered = kind == "tags" and int(place.name.rpartition(" ")[2]) % 3 > 0
                book = Subscription(account, place.name, channel, cached=kind == "cache", filtered=filtered)
            parts.append(Part(name, book, world.rooms.get(name)))
        if place.lies_in:
            parts.append(Part(place.lies_in, None))
            parts[-1].lies = True
        return parts

    @property
    def local_port(self) -> int:
        """The client's port, 0 without a connection."""
        transport = self.connection and self.connection.transport
        name = transport.get_extra_info("sockname") if transport else None
        return name[1] if name else 0

    # Connecting.

    def connect(self) -> None:
        self.due = None
        self.heard = self.crowd.now()
        self._last_id = 0
        self._pending.clear()
        self.connection = CONNECTIONS[self.transport](self)
        self.crowd.spawn(self._open(self.connection))

    async def _open(self, connection: Connection) -> None:
        port = self.crowd.random.choice(self.crowd.ports)  # as a load balancer does
        try:
            await self.crowd.loop.create_connection(lambda: connection, "127.0.0.1", port)
        except OSError:
            self.lost(connection, 0)

    def hello(self) -> bytes:
        """Return the first message: connect, and subscribe to all channels."""
        data: dict[str, Any] = {"user": self.name}
        command: dict[str, Any] = {"data": data}
        own = [part for part in self.parts.values() if part.channel.startswith("own:")]
        if own:
            data["subs"] = [part.channel for part in own]
            command["subs"] = {part.channel: self._position(part, {}) for part in own}
        commands = [self._command(self._connected, connect=command)]
        if self.is_unidirectional:
            return msgspec.json.encode(command)
        commands += [self._subscribe(part) for part in self.parts.values() if part not in own]
        return self.encoding.encode(commands)

    def _command(self, reply: Callable[[Reply | None], None], **request: Any) -> dict[str, Any]:
        self._last_id += 1
        self._pending[self._last_id] = reply
        return {"id": self._last_id, **request}

    def _position(self, part: Part, request: dict[str, Any]) -> dict[str, Any]:
        assert isinstance(part.book, Subscription)
        if place := part.book.ask():
            request.update(recover=True, epoch=place[0], offset=place[1])
        return request

    def _subscribe(self, part: Part) -> dict[str, Any]:
        part.state, part.asked = ASKED, self.crowd.now()
        request: dict[str, Any] = {"channel": part.channel}
        if isinstance(part.book, Subscription):
            self._position(part, request)
            if part.book.filtered:
                request["tf"] = FILTER
        if part.lies:
            request.update(recover=True, **self._lie(part))
        if part.delta:
            request["delta"] = "fossil"
        if self.watches:
            request["join_leave"] = True
        return self._command(lambda reply: self._subscribed(part, reply), subscribe=request)

    def _lie(self, part: Part) -> dict[str, Any]:
        """Return a position from the future, or of an epoch that never was."""
        epochs = self.crowd.world.channels[part.channel].epochs
        if not epochs or self.crowd.random.random() < 0.5:
            return {"epoch": "_", "offset": self.crowd.random.randrange(3)}
        return {"epoch": epochs[-1].name, "offset": epochs[-1].top + 1_000_000}

    def send(self, *commands: dict[str, Any]) -> None:
        if self.connection:
            self.connection.send(self.encoding.encode(commands))

    # Messages.

    def received(self, message: bytes) -> None:
        self.heard = self.crowd.now()
        for reply in self.encoding.replies(message):
            if reply.id:
                if handle := self._pending.pop(reply.id, None):
                    handle(reply)
            elif reply.push:
                self._pushed(reply.push)
            elif self.connection:
                self.connection.send(self.encoding.pong)

    def _connected(self, reply: Reply | None) -> None:
        if reply is None:
            return
        if reply.error or reply.connect is None:
            self._refused("connect", reply)
            if self.connection:
                self.connection.cut()
            return
        self.id, self.session, self.node = reply.connect.client, reply.connect.session, reply.connect.node
        self.is_connected = True
        self.attempts = 0
        self.crowd.counts["connects"] += 1
        for channel, result in reply.connect.subs.items():
            self._take_result(self.parts[channel], result)

    def _refused(self, command: str, reply: Reply) -> None:
        error = reply.error or wire.Error(0, "no result")
        self.crowd.counts[f"{command} refused with {error.code}"] += 1
        self.crowd.account.require(
            error.temporary, "refused", BROKEN, self.name, command, f"error {error.code} {error.message} for good"
        )

    def _subscribed(self, part: Part, reply: Reply | None) -> None:
        if reply is None:
            return
        if part.channel.startswith("closed:"):
            refused = reply.error is not None and reply.error.code in (103, 100)
            self.crowd.account.require(refused, "N13", BROKEN, self.name, part.channel, "a closed channel opened")
            part.state = OFF
            part.due = self.crowd.now() + 60
        elif reply.error or reply.subscribe is None:
            self._refused("subscribe", reply)
            part.state = OFF
            part.due = self.crowd.now() + self.crowd.random.uniform(0.5, 2)
        else:
            self._take_result(part, reply.subscribe)

    def _take_result(self, part: Part, result: wire.Subscribed) -> None:
        part.state = ON
        if isinstance(part.book, Subscription):
            found = [(pub.offset, self._read(part, pub)) for pub in result.publications]
            if not result.recovered:
                part.base = b""
            part.book.subscribed(result.epoch, result.offset, result.recovered, result.was_recovering, found)
        elif part.book:
            part.book.subscribed()
        elif self.watches:
            self.send(self._command(lambda reply: self._listed(part, reply), presence={"channel": part.channel}))
        elif part.room:
            part.room.join(self.id)
        elif part.lies:
            text = f"recovered from a position that nothing has: {result!r:.200}"
            self.crowd.account.require(not result.recovered, "N6", BROKEN, self.name, part.channel, text)
            self.unsubscribe(part, 30)

    def _listed(self, part: Part, reply: Reply | None) -> None:
        if reply and reply.presence and part.state == ON:
            part.list, part.listed_since = set(reply.presence.presence), self.crowd.now()
        elif reply and part.state == ON:
            self.unsubscribe(part)

    def _read(self, part: Part, pub: wire.Pub) -> int:
        data = self.encoding.text(pub, part.delta)
        if pub.delta:
            try:
                data = apply_delta(part.base, data)
            except Exception as error:
                self.crowd.account.require(
                    False, "N9", BROKEN, self.name, part.channel, f"delta at {pub.offset}: {error!r}"
                )
                return -pub.offset
        if part.delta:
            part.base = data
        return _number(data).n

    def _pushed(self, push: wire.Push) -> None:
        if push.disconnect:
            self.closed(push.disconnect.code)
            return
        part = self.parts.get(push.channel)
        if part is None or part.state not in (ON, LEAVING):
            state = part.state if part else "unknown"
            self.crowd.account.require(
                False,
                "N13",
                BROKEN,
                self.name,
                push.channel,
                f"a push while the subscription is {state}: {push!r:.200}",
            )
        elif push.pub:
            number = self._read(part, push.pub)
            if isinstance(part.book, Subscription):
                part.book.publication(push.pub.offset, number, push.pub.epoch)
            elif part.book:
                part.book.publication(number)
            self.crowd.on_delivery(push.channel, number)
        elif push.unsubscribe:
            self.crowd.counts[f"unsubscribed with {push.unsubscribe.code}"] += 1
            self._ended(part)
            if self.is_unidirectional and self.connection:
                self.connection.cut()  # its next connect request subscribes it again
            else:
                self.send(self._subscribe(part))
        elif part.list is not None and push.join:
            self.crowd.counts["joins seen"] += 1
            part.list.add(push.join.info.client)
        elif part.list is not None and push.leave:
            self.crowd.counts["leaves seen"] += 1
            part.list.discard(push.leave.info.client)

    # Ends.

    def unsubscribe(self, part: Part, pause: float = 0.0) -> None:
        """Unsubscribe, and subscribe again some time after the answer. pause: the shortest time, in seconds."""
        part.state, part.asked = LEAVING, self.crowd.now()

        def left(reply: Reply | None) -> None:
            if reply is not None and part.state == LEAVING:
                self._ended(part)
                part.due = self.crowd.now() + pause + self.crowd.random.uniform(0, 5)

        self.send(self._command(left, unsubscribe={"channel": part.channel}))

    def _ended(self, part: Part) -> None:
        part.state = OFF
        part.list = None
        if part.book:
            part.book.ended()
        elif part.room and not self.watches:
            part.room.leave(self.id)

    def publish(self, channel: str, number: int, done: Callable[[Reply | None], None]) -> None:
        """Publish. done: gets the reply, or None at the connection's end."""
        data = msgspec.Raw(text(channel, number))
        self.send(self._command(done, publish={"channel": channel, "data": data}))

    def call(self, done: Callable[[Reply | None], None]) -> None:
        """Call the application. done: gets the reply, or None at the connection's end."""
        self.send(self._command(done, rpc={"method": "wait", "data": 1}))

    def closed(self, code: int) -> None:
        """The server closes the connection with `code`."""
        self.crowd.counts[f"closed with {code}"] += 1
        final = 3500 <= code < 4000 or code >= 4500 or 1002 <= code < 1010
        self.crowd.account.require(not final, "refused", BROKEN, self.name, "connection", f"closed with {code}")

    def lost(self, connection: Connection, pause: float) -> None:
        """The connection is no more. pause: seconds to wait before the next attempt, beside the usual ones."""
        if connection is not self.connection:
            return
        self.crowd.counts["connections lost"] += 1
        self.connection = None
        self.is_connected = False
        pending, self._pending = self._pending, {}
        for handle in pending.values():
            handle(None)
        for part in self.parts.values():
            self._ended(part)
        self.attempts += 1
        backoff = min(5.0, 0.1 * 2 ** min(self.attempts, 6))
        self.due = self.crowd.now() + pause + self.crowd.random.uniform(0.05, backoff)

    def sweep(self, now: float) -> None:
        """Do what is due."""
        if self.connection is None:
            return
        limit = SILENCE if self.is_connected else CONNECT_LIMIT
        if now - self.heard > limit and not self.connection.is_deaf and not self.connection.has_unread():
            kind = "silent connections given up" if self.is_connected else "connects without an answer"
            self.crowd.counts[kind] += 1
            self.connection.cut()
        elif self.is_connected and self._lacks_an_answer(now):
            self.crowd.counts["commands without an answer"] += 1
            self.connection.cut()
        elif self.is_connected:
            due = [part for part in self.parts.values() if part.state == OFF and part.due <= now]
            if due:
                self.send(*(self._subscribe(part) for part in due if not part.channel.startswith("own:")))

    def _lacks_an_answer(self, now: float) -> bool:
        if len(self.crowd.ports) == 1 or not isinstance(self.connection, Stream) or self.connection.is_deaf:
            return False
        asked = [part for part in self.parts.values() if part.state in (ASKED, LEAVING)]
        return any(now - part.asked > ANSWER_LIMIT for part in asked) and not self.connection.has_unread()

    # Faults of its own network.

    def forget(self) -> Connection | None:
        """Lose the connection without a word to the server; return it, half-open."""
        connection = self.connection
        if connection is None or connection.transport is None or not self.is_connected:
            return None
        self.doubt()
        self.lost(connection, 0)
        connection.pause()
        return connection

    def doubt(self) -> None:
        for part in self.parts.values():
            if part.room:
                part.room.doubt(self.id)


class Connection(asyncio.Protocol):
    """One connection of a client, in whatever transport."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.transport: asyncio.Transport | None = None
        self.is_deaf = False
        self._rest = b""
        self._head = False
        self._pause = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        if self.client.connection is not self:
            transport.abort()
            return
        transport.write(self.first())

    def has_unread(self) -> bool:
        """Whether the server's answer has arrived, and this process was too late to read it."""
        opened = self.transport.get_extra_info("socket") if self.transport else None
        if opened is None or opened.fileno() < 0:
            return False
        poll = select.poll()
        poll.register(opened.fileno(), select.POLLIN)
        return bool(poll.poll(0))

    def first(self) -> bytes:
        raise NotImplementedError

    def send(self, message: bytes) -> None:
        raise NotImplementedError

    def feed(self, data: bytes) -> bytes:
        """Take the content of the connection; return the rest."""
        raise NotImplementedError

    def opened(self) -> None:
        """The head of the response is complete."""

    def data_received(self, data: bytes) -> None:
        if self.client.connection is not self:
            return
        data = self._rest + data
        if not self._head:
            head, blank, rest = data.partition(b"\r\n\r\n")
            if not blank:
                self._rest = data
                return
            status = STATUS.match(head)
            if status is None or status[1] not in (b"101", b"200"):
                self.client.crowd.counts[f"handshakes refused with {status[1].decode() if status else head!r}"] += 1
                after = RETRY_AFTER.search(head)
                self._pause = float(after[1]) if after else 0.0
                self.cut()
                return
            self._head, data = True, rest
            self.opened()
        self._rest = self.feed(data)

    def connection_lost(self, error: Exception | None) -> None:
        self.client.lost(self, self._pause)

    def cut(self) -> None:
        """End the connection by a reset."""
        if self.transport:
            sock = self.transport.get_extra_info("socket")
            if sock is not None and sock.fileno() >= 0:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.transport.abort()
        self.client.lost(self, self._pause)

    def pause(self) -> None:
        self.is_deaf = True
        if self.transport and self.transport.is_reading():
            self.transport.pause_reading()

    def resume(self) -> None:
        self.is_deaf = False
        self.client.heard = self.client.crowd.now()
        if self.transport and not self.transport.is_closing() and not self.transport.is_reading():
            self.transport.resume_reading()


class WebSocket(Connection):
    def first(self) -> bytes:
        return wire.handshake(f"/connection/{self.client.transport}", self.client.encoding.subprotocol)

    def opened(self) -> None:
        self.send(self.client.hello())

    def send(self, message: bytes) -> None:
        if self.transport:
            self.transport.write(wire.frame(self.client.encoding.opcode, message))

    def feed(self, data: bytes) -> bytes:
        found, rest = wire.frames(data)
        for opcode, payload in found:
            if opcode == wire.CLOSE:
                if self.transport:
                    self.client.closed(int.from_bytes(payload[:2], "big"))
                    self.transport.write(wire.frame(wire.CLOSE, payload[:2]))
                    self.transport.close()
                self.client.lost(self, 0)
                return b""
            if opcode == wire.PING:
                if self.transport:
                    self.transport.write(wire.frame(wire.PONG, payload))
            else:
                self.client.received(payload)
        return rest


class Stream(Connection):
    """A response without an end; commands go by emulation."""

    def __init__(self, client: Client) -> None:
        super().__init__(client)
        self._line = b""

    def first(self) -> bytes:
        path = f"/connection/{self.client.transport}"
        if self.client.transport.endswith("sse"):
            return wire.request("GET", f"{path}?cf_connect={quote(self.client.hello())}")
        return wire.request("POST", path, self.client.encoding.content_type, self.client.hello())

    def send(self, message: bytes) -> None:
        self.client.crowd.spawn(self.client.crowd.emulate(self.client, message))

    def feed(self, data: bytes) -> bytes:
        content, rest = wire.chunks(data)
        if self.client.transport.endswith("sse"):
            *events, self._line = (self._line + content).replace(b"\r\n", b"").split(b"\n\n")
            for event in events:
                self._take(event.removeprefix(b"data: "))
        elif content:
            messages, self._line = self.client.encoding.whole(self._line + content)
            self._take(messages)
        return rest

    def _take(self, message: bytes) -> None:
        if message and self.client.connection is self:
            self.client.received(message)


class UnidirectionalStream(Stream):
    """A stream to a client that sends no commands."""

    def send(self, message: bytes) -> None:
        pass


CONNECTIONS: dict[str, type[Connection]] = {
    "websocket": WebSocket,
    "http_stream": Stream,
    "sse": Stream,
    "uni_websocket": WebSocket,
    "uni_http_stream": UnidirectionalStream,
    "uni_sse": UnidirectionalStream,
}


class Crowd:
    """All clients, and their sweep. on_delivery: called with channel and number of each pushed publication."""

    def __init__(self, world: World, seed: int, http: aiohttp.ClientSession, ports: Sequence[int]) -> None:
        """ports: of the nodes. Each connection goes to one of them by chance."""
        self.on_delivery: Callable[[str, int], object] = lambda channel, number: None
        self.world = world
        self.account: Account = world.account
        self.now = world.account.now
        self.random = Random(f"crowd of {seed}")
        self.counts: Counter[str] = Counter()
        self.ports = ports
        self.loop = asyncio.get_running_loop()
        self._http = http
        self.clients = [Client(self, place) for place in world.places]
        self._tasks: set[asyncio.Task[None]] = set()
        self._swept = 0

    def spawn(self, coroutine: Any) -> None:
        task = self.loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def run(self) -> None:
        """Connect the clients, and connect them again, until cancelled."""
        while True:
            now = self.now()
            begun = 0
            for client in self.clients:
                if client.due is not None and client.due <= now and begun < AT_ONCE:
                    client.connect()
                    begun += 1
            # Each client is looked at once a second.
            share = max(1, round(len(self.clients) * TICK))
            for index in range(self._swept, self._swept + share):
                self.clients[index % len(self.clients)].sweep(now)
            self._swept = (self._swept + share) % len(self.clients)
            await asyncio.sleep(TICK)

    async def emulate(self, client: Client, message: bytes) -> None:
        """Send the commands of a client with a stream; the client reconnects if that fails, as an SDK does."""
        connection, kind = client.connection, client.encoding.content_type
        body = client.encoding.emulation(client.session, client.node, message)
        try:
            async with self._http.post(
                f"http://127.0.0.1:{self.random.choice(self.ports)}/emulation",
                data=body,
                headers={"Content-Type": kind},
                timeout=EMULATION,
            ) as answer:
                failed = answer.status >= 500 or answer.status == 404
        except (OSError, aiohttp.ClientError):
            failed = True
        if failed and connection is not None and client.connection is connection:
            connection.cut()

    def connected(self) -> list[Client]:
        return [client for client in self.clients if client.is_connected]

    def sample(self, random: Random, share: float) -> list[Client]:
        found = self.connected()
        return random.sample(found, min(len(found), max(1, round(share * len(self.clients)))))

    def compare_rooms(self) -> bool:
        """Compare the lists of all watchers with the members. Returns whether all are right."""
        are_right = True
        for client in self.clients:
            if client.watches and client.is_connected and client.connection and not client.connection.is_deaf:
                for part in client.parts.values():
                    if part.list is not None and part.room:
                        are_right &= part.room.compare(client.name, part.list, part.listed_since)
        for room in self.world.rooms.values():
            room.forget()
        return are_right

    async def find_silent(self, limit: float) -> list[Client]:
        """Call the server on every connection; return the clients that have no answer after `limit` seconds although
        their connections are as they were. Those of a unidirectional transport have none."""
        asked = {client: client.connection for client in self.connected() if not client.is_unidirectional}
        answered = set()
        for client in asked:
            client.call(partial(lambda client, reply: answered.add(client), client))
        until = self.now() + limit
        while self.now() < until and len(answered) < len(asked):
            await asyncio.sleep(0.05)
        return [
            client for client, connection in asked.items() if client not in answered and client.connection is connection
        ]

    async def close(self) -> None:
        for client in self.clients:
            if client.connection and client.connection.transport:
                client.connection.transport.abort()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
