"""Sessions for tests: the core of a worker without sockets, and clients of it. No reactor, no clock."""

from __future__ import annotations

from functools import partial
from typing import Any
from weakref import WeakSet

import jwt
import msgspec
from centrifuge.protocol import client_pb2
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from realtime.auth.tokens import TokenVerifier
from realtime.client_log import ClientLog
from realtime.config.settings import (
    ChannelOptions,
    ChannelSettings,
    ClientSettings,
    EngineSettings,
    Namespace,
    RPCPingSettings,
    TokenSettings,
)
from realtime.deadlines import RESOLUTION, Deadlines
from realtime.http.handshake import OpeningRequest
from realtime.metrics import Metrics
from realtime.protocol.channel_rules import ChannelRules
from realtime.protocol.commands import COMMANDS
from realtime.protocol.context import SessionCounters, SessionServices, SessionSettings
from realtime.protocol.json_encoding import JSON_ENCODING, JSON_PUSHES
from realtime.protocol.orders import Order, encode_order
from realtime.protocol.protobuf import PROTOBUF
from realtime.protocol.session import Session
from realtime.protocol.sessions import Sessions
from realtime.protocol.wire_formats import WireFormat
from realtime.pubsub.engine import AddPresence, GetHistory, Publish, Receiver, Subscribe, worker_address
from realtime.pubsub.hub import Hub
from realtime.pubsub.time_slices import TimeSlicer
from tests.pubsub.memory_engine import MemoryEngine
from tests.pubsub.sinks import FillableSocket

SECRET = "a secret of thirty-two characters"
NOW = 1_700_000_000.0


class Gate:
    """An awaitable that a test opens."""

    def __init__(self) -> None:
        self.waiting: list[Any] = []

    def __await__(self):
        return (yield self)

    def open(self, value: Any = None) -> None:
        for resume in self.waiting:
            resume(value)


def run(coroutine, done) -> None:
    """The Runner of these tests: resumes a coroutine at once, or when its Gate opens."""

    def step(value=None):
        try:
            coroutine.send(value).waiting.append(step)
        except StopIteration as stop:
            done(stop.value, None)
        except BaseException as error:
            done(None, error)

    step()


async def gather(coroutines) -> list[Any]:
    """As the worker's: starts all coroutines, and returns or raises when all have ended."""
    outcomes: dict[int, Any] = {}
    errors: list[BaseException] = []
    gate = Gate()

    def done(number, result, error):
        outcomes[number] = result
        errors.extend([error] if error else [])
        if len(outcomes) == len(coroutines):
            gate.open()

    for number, coroutine in enumerate(coroutines):
        run(coroutine, partial(done, number))
    if len(outcomes) < len(coroutines):
        await gate
    if errors:
        raise errors[0]
    return [outcomes[number] for number in range(len(coroutines))]


# Pushes without framing, which belongs to the transports.
BARE = WireFormat(JSON_ENCODING, lambda payload: payload)
BARE_PUSHES = WireFormat(JSON_PUSHES, lambda payload: payload)
BARE_PROTOBUF = WireFormat(PROTOBUF, lambda payload: payload)


class Handler:
    """A coroutine function as a handler, see `realtime.protocol.context.CommandHandler`."""

    is_immediate = False

    def __init__(self, function: Any) -> None:
        self.function = function

    def call_now(self, *args: Any) -> Any:
        raise AssertionError("it was called at once")

    async def __call__(self, *args: Any) -> Any:
        return await self.function(*args)


class ImmediateHandler(Handler):
    """A plain function as a handler that never waits."""

    is_immediate = True

    def call_now(self, *args: Any) -> Any:
        return self.function(*args)


class App:
    """The handlers that a test sets: coroutine functions or `ImmediateHandler`s."""

    connecting = connected = disconnected = None
    on_message: Any = None

    def __init__(self) -> None:
        self.subscribe_handlers: dict[str, Any] = {}
        self.publish_handlers: dict[str, Any] = {}
        self.procedures: dict[str, Any] = {}

    @property
    def has_procedures(self) -> bool:
        return bool(self.procedures)

    def subscribing(self, channel):
        return self.subscribe_handlers.get(channel)

    def publishing(self, channel):
        return self.publish_handlers.get(channel)

    def procedure(self, method):
        found = self.procedures.get(method)
        return found if found is None or isinstance(found, Handler) else Handler(found)

    @property
    def message(self):
        return self.on_message and Handler(self.on_message)


class Peer(FillableSocket):
    """A client: the connection of its session, and the received messages.

    Sent and received messages are in the form of JSON, in every encoding.
    """

    def __init__(
        self,
        server: Server,
        form: WireFormat = BARE,
        *,
        secret: str = "",
        needs_pings: bool = True,
        transport_name: str = "websocket",
        headers: dict[str, str] | None = None,
    ) -> None:
        self.form = form
        self.secret = secret
        self.needs_pings = needs_pings
        self.transport_name = transport_name
        self.raw: list[bytes] = []
        self.close_code: tuple[int, str] | None = None
        self.paused = False
        request = OpeningRequest(headers or {}, {}, "/connection/websocket", "10.0.0.1")
        self.session = Session(server.settings, server.services, COMMANDS, self, request)
        server.peers.add(self)

    # Called by the session
    def send(self, payload: bytes, *, is_push: bool = False) -> None:
        self.deliver(payload)
        self.is_drained = self.is_drained and not self.fills

    def deliver(self, payload: bytes) -> None:
        assert self.close_code is None, "sent after the close"
        self.raw.append(payload)

    def close(self, code: int, reason: str) -> None:
        assert self.close_code is None, "closed twice"
        self.close_code = (code, reason)

    def hold(self) -> bool:
        return False

    def release(self) -> None: ...

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False

    # Called by tests
    def say(self, *commands: dict | bytes) -> list[dict]:
        """Send these commands in one message; return the messages received since."""
        if self.form is BARE_PROTOBUF:
            self.session.receive(b"".join(c if isinstance(c, bytes) else in_protobuf(c) for c in commands))
        else:
            self.session.receive(b"\n".join(c if isinstance(c, bytes) else msgspec.json.encode(c) for c in commands))
        return self.heard()

    def heard(self) -> list[dict]:
        raw, self.raw = self.raw, []
        read = from_protobuf if self.form is BARE_PROTOBUF else msgspec.json.decode
        return [read(line) for line in raw]

    def subscribe(self, channel: str, **request: Any) -> dict:
        """Subscribe; return the result."""
        reply, *rest = self.say({"id": 2, "subscribe": {"channel": channel, **request}})
        assert not rest and self.close_code is None
        return reply["subscribe"]

    def publications(self) -> list[Any]:
        """Return the data of all received messages, which must be publications."""
        return [message["push"]["pub"]["data"] for message in self.heard()]

    def connect(self, **request: Any) -> str:
        reply, *_ = self.say({"id": 1, "connect": request})
        return reply["connect"]["client"]


class Server:
    """The core of a worker, without sockets."""

    def __init__(
        self,
        channel: ChannelSettings | None = None,
        slices: TimeSlicer | None = None,
        beside: Server | None = None,
        **client: Any,
    ) -> None:
        """beside: another worker, with the same broker core."""
        self.now = 0.0
        self.wall = NOW
        self.mistakes: list[BaseException] = []
        self.info: list[str] = []  # lines of the log
        self.debug: list[str] = []
        self.app = App()
        self.metrics = Metrics()
        self.sessions = Sessions()
        self.peers: WeakSet[Peer] = WeakSet()
        self._core = beside.engine.core if beside is not None else None
        begin_arrivals = self.sessions.begin_arrivals
        self.hub = Hub(self._make_engine, self.sessions.apply, begin_arrivals=begin_arrivals)
        settings = ClientSettings(**{"token": TokenSettings(hmac_secret_key=SECRET), **client})
        self.settings = SessionSettings(
            client=settings, version="test", uid="node", rpc_ping=RPCPingSettings(enabled=True)
        )
        self.services = SessionServices(
            rules=ChannelRules(channel or CHANNEL),
            tokens=TokenVerifier(settings.token, lambda: self.wall),
            engine=self.engine,
            hub=self.hub,
            sessions=self.sessions,
            deadlines=Deadlines(0.0),
            handlers=self.app,
            slices=slices or TimeSlicer.unlimited(),
            run=run,
            gather=gather,
            wall_clock=lambda: self.wall,
            report_error=self.mistakes.append,
            counters=SessionCounters(self.metrics),
            client_log=ClientLog(self.metrics, lambda: self.now, self.info.append, self.debug.append),
        )

    def _make_engine(self, hub: Receiver) -> MemoryEngine:
        address = worker_address(0, 0) if self._core is None else worker_address(1, 0)
        self.engine = MemoryEngine(hub, EngineSettings(), lambda: self.now, address, self._core)
        return self.engine

    def change(self, **client: Any) -> None:
        """Change client settings, also for existing peers."""
        settings = msgspec.structs.replace(self.settings.client, **client)
        self.settings = msgspec.structs.replace(self.settings, client=settings)
        for peer in self.peers:
            peer.session.settings = self.settings

    def peer(self, form: WireFormat = BARE, **connection: Any) -> Peer:
        return Peer(self, form, **connection)

    def client(self, user: str = "") -> Peer:
        """A connected client."""
        peer = self.peer()
        peer.connect(**({"token": token(sub=user)} if user else {}))
        return peer

    def order(self, order: Order) -> None:
        """Deliver an order of the server API."""
        self.sessions.apply(encode_order(order))

    def publish(self, channel: str, *contents: Any, **options: Any) -> None:
        """Publish from the server's side."""
        history_options = self.services.rules.options(channel).history_options
        for content in contents:
            data = content if isinstance(content, bytes) else msgspec.json.encode(content)
            run(self.engine.carry_out(Publish(channel, data, history_options, **options)), self._published)

    def _published(self, result: Any, error: BaseException | None) -> None:
        assert error is None, error

    def delay_engine(self) -> list[Gate]:
        """What the engine comes to in a subscription's beginning waits from now on, each behind a gate of its own."""
        gates: list[Gate] = []

        async def late(request):
            result = await self.engine.carry_out(request)
            gates.append(Gate())
            await gates[-1]
            return result

        self.engine.overrides.update(dict.fromkeys((Subscribe, GetHistory, AddPresence), late))
        return gates

    def count(self, name: str, **labels: str) -> int:
        """Return the value of a counter."""
        return self.metrics.counter(name, "", **labels).value

    def clean(self) -> bool:
        """Return whether no client has left anything behind."""
        empty = (self.hub.subscriptions, len(self.sessions), self.services.deadlines._buckets) == (0, 0, {})
        return empty and self.engine.core.channels == 0 and not self.mistakes

    def advance(self, seconds: float) -> None:
        """Advance time, with the sweeps of a worker."""
        end = self.now + seconds
        while self.now < end:
            step = min(RESOLUTION, end - self.now)
            self.now += step
            self.wall += step
            self.services.deadlines.sweep(self.now)

    def ping(self, peer: Peer) -> None:
        """Advance time until the peer is pinged, one interval at most."""
        for _ in range(int(25 / RESOLUTION) + 2):
            self.advance(RESOLUTION)
            if heard := peer.heard():
                assert heard == [{}]
                return
        raise AssertionError("no ping came")


def token(**claims: Any) -> str:
    return jwt.encode(claims, SECRET, algorithm="HS256")


ALL = {
    "allow_subscribe_for_client": True,
    "allow_subscribe_for_anonymous": True,
    "allow_publish_for_client": True,
    "allow_publish_for_anonymous": True,
    "allow_presence_for_client": True,
    "allow_presence_for_anonymous": True,
    "allow_history_for_client": True,
    "allow_history_for_anonymous": True,
}
KEPT = {"history_size": 10, "history_ttl": 300.0}
CHANNEL = ChannelSettings(
    without_namespace=ChannelOptions(**ALL),
    namespaces=(
        Namespace(
            name="room", presence=True, join_leave=True, force_push_join_leave=True, force_recovery=True, **KEPT, **ALL
        ),
        Namespace(name="kept", **KEPT, **ALL),
        Namespace(name="users", allow_subscribe_for_client=True, allow_publish_for_subscriber=True),
        Namespace(name="limited", allow_user_limited_channels=True, allow_subscribe_for_client=True),
        Namespace(name="nothing"),
    ),
)


def error_of(replies: list[dict]) -> int:
    (reply,) = replies
    assert reply["error"]["message"]
    return reply["error"]["code"]


# -- Protobuf ---------------------------------------------------------------------------------------------------------


def in_protobuf(command: dict) -> bytes:
    """Return a command with its length. `data` is JSON text, as in the JSON encoding."""
    message = _filled(client_pb2.Command(), command).SerializeToString()
    assert len(message) < 0x4000
    length = (len(message),) if len(message) < 0x80 else (len(message) & 0x7F | 0x80, len(message) >> 7)
    return bytes(length) + message


def _filled(message: Message, content: dict) -> Message:
    message.SetInParent()
    for name, value in content.items():
        field = message.DESCRIPTOR.fields_by_name.get(name)
        if field is None:
            continue  # newer than the SDK's schema
        target, inner = getattr(message, name), field.message_type
        if inner is not None and inner.GetOptions().map_entry:
            for key, item in value.items():
                _filled(target[key], item) if isinstance(item, dict) else target.__setitem__(key, item)
        elif field.is_repeated:
            for item in value:
                _filled(target.add(), item) if inner is not None else target.append(item)
        elif inner is not None:
            _filled(target, value)
        else:
            setattr(message, name, msgspec.json.encode(value) if field.type == FieldDescriptor.TYPE_BYTES else value)
    return message


def from_protobuf(payload: bytes) -> dict:
    """Return a reply, without its length, in the form of JSON."""
    size = next(n for n, byte in enumerate(payload, 1) if byte < 0x80)
    return _read(client_pb2.Reply.FromString(payload[size:]))


def _read(message: Message) -> dict:
    return {field.name: _value(field, value) for field, value in message.ListFields()}


def _value(field: FieldDescriptor, value: Any) -> Any:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return {key: _read(item) if isinstance(item, Message) else item for key, item in value.items()}
    if field.is_repeated:
        return [_read(item) if isinstance(item, Message) else item for item in value]
    if isinstance(value, Message):
        return _read(value)
    return PROTOBUF.decode_data(value) if isinstance(value, bytes) else value
