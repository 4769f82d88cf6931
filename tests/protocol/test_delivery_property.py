"""No publication is lost silently: real sessions on two workers, links to one broker core, and random stories.

A link carries requests and answers in order, and stands still until a step of the story moves it by one message. So a
client may leave, and the engine may be replaced, between any two messages. The clients behave as the SDKs: they keep
the position of the last publication, and reconnect with it. Some subscribe by a command, some when they connect, and
half of them use deltas. A client's socket may be full for a while; what a reply has no room for is replayed then.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import msgspec
from centrifuge.fossil import apply_delta
from hypothesis import given, settings
from hypothesis import strategies as st

from realtime.auth.tokens import TokenVerifier
from realtime.config.settings import ChannelOptions, ChannelSettings, ClientSettings, TokenSettings
from realtime.deadlines import Deadlines
from realtime.errors import ClientError, EngineUnavailable
from realtime.http.handshake import OpeningRequest
from realtime.metrics import Metrics
from realtime.protocol.channel_rules import ChannelRules
from realtime.protocol.commands import COMMANDS
from realtime.protocol.context import SessionCounters, SessionServices, SessionSettings
from realtime.protocol.session import Session
from realtime.protocol.sessions import Sessions
from realtime.pubsub.broker_core import BrokerCore
from realtime.pubsub.engine import (
    AddPresence,
    Cut,
    EngineNotice,
    EngineRequest,
    GetHistory,
    GetPresence,
    Publish,
    RemoveHistory,
    RemovePresence,
    Subscribe,
    Unsubscribe,
)
from realtime.pubsub.hub import Hub
from realtime.pubsub.time_slices import TimeSlicer
from realtime.types import ClientInfo, HistoryOptions, Publication
from tests.protocol.sessions import BARE, App, Gate, gather, run
from tests.pubsub.sinks import FillableSocket

NAME = "news"
SETTINGS = SessionSettings(
    client=ClientSettings(allow_anonymous_connect_without_token=True, recovery_max_publication_limit=2), version="test"
)
OPTIONS = ChannelOptions(
    presence=True,
    join_leave=True,
    force_push_join_leave=True,
    force_recovery=True,
    history_size=4,
    history_ttl=60.0,
    allowed_delta_types=("fossil",),
    allow_subscribe_for_client=True,
    allow_subscribe_for_anonymous=True,
)
CACHE = msgspec.structs.replace(OPTIONS, force_recovery_mode="cache", auto_cache_recover=True)
# One publication in a reply and in a page of a replay, and twenty in history.
SMALL_REPLY = msgspec.structs.replace(
    SETTINGS,
    client=msgspec.structs.replace(SETTINGS.client, recovery_max_publication_limit=15, recovery_reply_size=200),
)
LONG = msgspec.structs.replace(OPTIONS, history_size=20)
# Common to all publications, so that a delta is shorter than the full data.
PADDING = "as in most publications much of it is always the same "


class Deliveries:
    """Deliveries of the broker core: each goes behind the other messages of a link."""

    def _each(self, name: str, links: Collection[Link], *args: Any) -> None:
        for link in links:
            link.inbox.append(partial(getattr(link.hub, name), *args))

    def deliver_publication(self, links: Collection[Link], channel: str, publication: Publication, epoch: str) -> None:
        self._each("on_publication", links, channel, publication, epoch)

    def deliver_join(self, links: Collection[Link], channel: str, info: ClientInfo) -> None:
        self._each("on_join", links, channel, info)

    def deliver_leave(self, links: Collection[Link], channel: str, info: ClientInfo) -> None:
        self._each("on_leave", links, channel, info)

    def deliver_order(self, links: Collection[Link], order: bytes) -> None:
        raise AssertionError("there are no orders in these stories")

    def deliver_cut(self, link: Link, request: Cut, clients: list[ClientInfo]) -> None:
        link.inbox.append(partial(link.on_cut, request))


class Answer:
    """The answer to a request, for the coroutine that awaits it."""

    def __init__(self) -> None:
        self.gate = Gate()

    async def wait(self) -> Any:
        value = await self.gate
        if isinstance(value, Exception):
            raise value
        return value


class Link:
    """An engine: one worker's link to the broker core, with the same guarantees as the real one over a stream."""

    serial = 0

    def __init__(self, world: World) -> None:
        Link.serial += 1
        self.address = f"worker {Link.serial}"
        self.world = world
        self.hub: Hub
        self.arrivals: dict[str, Cut] = {}  # of this stream, by batch
        self.requests: deque[tuple[Callable[[], Any], Answer | None]] = deque()
        self.inbox: deque[Callable[[], None]] = deque()
        self.waiting: dict[Answer, None] = {}
        self.channels: set[str] = set()
        self.present: dict[tuple[str, str], AddPresence] = {}

    def move(self, to_worker: bool) -> None:
        """Move one message, if there is one: to the broker core, or to the worker."""
        if to_worker and self.inbox:
            self.inbox.popleft()()
        elif not to_worker and self.requests:
            work, answer = self.requests.popleft()
            try:
                result = work()
            except ClientError as error:
                result = error
            if answer is not None:
                self.inbox.append(partial(self.answer, answer, result))

    def flow(self) -> bool:
        """Move all messages; return whether there were any."""
        moved = False
        while self.requests or self.inbox:
            moved = True
            self.move(to_worker=not self.requests)
        return moved

    def damage(self, *, repeat: bool) -> None:
        """Deliver a publication twice, or never."""
        self.world.publish()
        if self.inbox and getattr(self.inbox[-1], "func", None) == self.hub.on_publication:
            message = self.inbox.pop()
            self.inbox.extend([message, message] if repeat else [])

    def answer(self, answer: Answer, result: Any) -> None:
        if answer in self.waiting:
            del self.waiting[answer]
            answer.gate.open(result)

    def cut(self) -> None:
        """End the stream with all messages on their way; a new one takes its place and restores the state."""
        core = self.world.core
        core.detach(self, self.world.now)
        self.arrivals.clear()
        self.requests.clear()
        self.inbox.clear()
        for answer in list(self.waiting):
            self.answer(answer, EngineUnavailable("cut"))
        core.attach(self, self.address)
        core.restore(self, self.channels, self.present.values(), (), {}, announce=True)
        self.hub.on_interruption()

    async def ask(self, request: EngineRequest[Any]) -> Any:
        match request:
            case Subscribe(channel=channel):
                self.channels.add(channel)
            case AddPresence(channel=channel, info=info):
                self.present[channel, info.client] = request
            case RemovePresence(channel=channel, client=client):
                self.present.pop((channel, client), None)
        answer = Answer()
        self.waiting[answer] = None
        self.requests.append((lambda: self.world.core.carry_out(self, self.world.now, request), answer))
        if not isinstance(request, Cut):
            return await answer.wait()
        keys = {(channel, client) for channel, clients in request.presence.items() for client in clients}
        try:
            await answer.wait()
        except (EngineUnavailable, ClientError):
            self.restore([self.present[key] for key in keys if key in self.present])
            raise
        for key in keys:
            self.present.pop(key, None)
        return None

    def restore(self, presence: list[AddPresence]) -> None:
        """Tell the broker core again who is present."""

        def restore() -> None:
            self.world.core.restore(self, (), presence, (), {}, announce=True)

        self.requests.append((restore, None))

    def on_cut(self, request: Cut) -> None:
        self.arrivals[request.batch] = request
        self.hub.on_cut(request.batch)

    def claim(self, batch: str, info: ClientInfo, secret: str, presence: list[AddPresence]) -> None:
        self.present.update(((one.channel, info.client), one) for one in presence)
        cut = self.arrivals.get(batch)
        if cut is None or info.client not in cut.clients:
            self.restore(presence)
        else:
            cut.clients.remove(info.client)

    def forget_arrivals(self, batch: str) -> list[ClientInfo]:
        cut = self.arrivals.pop(batch, None)
        for client in cut.clients if cut is not None else ():
            for channel, clients in cut.presence.items() if cut is not None else ():
                if client in clients:
                    request = RemovePresence(channel, client)
                    self.requests.append((partial(self.world.core.carry_out, self, self.world.now, request), None))
        return []

    def tell(self, notice: EngineNotice) -> None:
        if isinstance(notice, Unsubscribe):
            self.channels.discard(notice.channel)
            self.requests.append((lambda: self.world.core.take_note(self, self.world.now, notice), None))


class SDK(FillableSocket):
    """A client that behaves as the official SDKs, subscribed or not.

    by_server: the subscription comes with the connect reply, and lasts as long as the connection.
    """

    def __init__(self, world: World, link: int, *, by_server: bool, delta: bool) -> None:
        self.world = world
        self.link = link
        self.by_server = by_server
        self.features = {"delta": "fossil"} if delta else {}
        self.session: Session | None = None
        self.position: tuple[int, str] | None = None
        self.base = b""
        self.wanted = by_server
        self.subscribed = False
        self.pending_id = 0  # the id of the subscribing command without an answer, 0 for none
        self.closed: tuple[int, str] | None = None
        self.last_id = 1
        self.received: list[dict] = []

    def connect(self) -> None:
        if self.session is None:
            worker = self.world.workers[self.link]
            self.is_drained = True
            self.session = Session(self.world.settings, worker, COMMANDS, self, OpeningRequest({}, {}, "/", "10.0.0.1"))
            if self.by_server:
                self.pending_id = self.last_id + 1
                self.command(connect={"subs": {NAME: self.request()}})
            else:
                self.command(connect={})
                self.ask()

    def vanish(self) -> None:
        if self.session is not None:
            session = self.session
            self.forget()
            session.closed()

    def reconnect(self) -> None:
        self.vanish()
        self.connect()

    def stall(self) -> None:
        """Fill the socket: it takes no further frames for now."""
        self.is_drained = False

    def forget(self) -> None:
        """Drop the connection."""
        self.session = self.closed = None
        self.subscribed, self.pending_id = False, 0
        self.received.clear()

    def subscribe(self) -> None:
        self.wanted = True
        self.ask()

    def unsubscribe(self) -> None:
        if self.wanted and self.session is not None and not self.by_server:
            self.wanted = self.subscribed = False
            self.pending_id = 0
            self.command(unsubscribe={"channel": NAME})

    def ask(self) -> None:
        """Subscribe, if the client wants to be subscribed and is not."""
        if self.session is None or not self.wanted or self.subscribed or self.pending_id or self.by_server:
            return
        self.pending_id = self.last_id + 1
        self.command(subscribe={"channel": NAME, **self.request()})

    def request(self) -> dict[str, Any]:
        """Return the request for the channel, with the last position, if there is one."""
        if self.position is None:
            return self.features
        return {"recover": True, "offset": self.position[0], "epoch": self.position[1], **self.features}

    def command(self, **request: Any) -> None:
        assert self.session is not None
        self.last_id += 1
        self.session.receive(msgspec.json.encode({"id": self.last_id, **request}))

    # Called by the session

    form, secret, needs_pings = BARE, "", True

    def send(self, payload: bytes, *, is_push: bool = False) -> None:
        if self.session is not None:
            self.received.append(msgspec.json.decode(payload))

    deliver = send

    def close(self, code: int, reason: str) -> None:
        assert self.by_server and code == 3010, code
        self.closed = (code, reason)

    def pause(self) -> None: ...

    resume = release = pause

    def hold(self) -> bool:
        return False

    # Handling of received messages

    def listen(self) -> None:
        """Handle the received messages. As on a network, this never happens inside a call of the server."""
        received, self.received = self.received, []
        refused = False
        for message in received:
            if "push" in message:
                self.handle_push(message["push"])
            elif message["id"] == self.pending_id:
                self.pending_id = 0
                refused |= self.handle_reply(message)
        if self.closed or (refused and self.by_server):
            self.vanish()
            self.connect()
        self.ask()

    def handle_reply(self, reply: dict) -> bool:
        """Handle the reply to the subscribing command; return whether it is an error."""
        if "error" in reply:
            assert reply["error"]["temporary"], reply
            return True
        self.subscribe_succeeded(reply["connect"]["subs"][NAME] if self.by_server else reply["subscribe"])
        return False

    def subscribe_succeeded(self, result: dict) -> None:
        self.subscribed = True
        assert result.get("delta", False) == bool(self.features)
        cached = self.world.options is CACHE
        assert result.get("was_recovering", False) == (self.position is not None or cached)
        offset, publications = result.get("offset", 0), result.get("publications", [])
        if not result.get("recovered"):
            assert not publications
        elif cached:
            assert offset == (self.position[0] if self.position else 0) and len(publications) <= 1
            # The newest publication after any gap, unless the client has it already.
            assert publications or self.position == (offset, result["epoch"])
            offset = publications[0]["offset"] - 1 if publications else offset
        else:
            assert self.position == (offset, result["epoch"])
        self.position = (offset, result["epoch"])
        for publication in publications:
            self.take(publication)

    def handle_push(self, push: dict) -> None:
        if not self.subscribed:
            return  # a push that crossed the client's command
        if "pub" in push:
            self.take(push["pub"])
        elif "unsubscribe" in push:
            assert push["unsubscribe"]["code"] == 2500 and not self.by_server
            self.subscribed = False

    def take(self, publication: dict) -> None:
        assert self.position is not None
        offset, epoch = self.position
        assert publication["offset"] == offset + 1
        assert self.read(publication) == self.world.published[epoch, offset + 1]
        self.position = (offset + 1, epoch)

    def read(self, publication: dict) -> Any:
        data = publication["data"]
        if not self.features:
            assert "delta" not in publication
            return data
        self.base = apply_delta(self.base, data.encode()) if publication.get("delta") else data.encode()
        return msgspec.json.decode(self.base)


class World:
    def __init__(self, options: ChannelOptions = OPTIONS, settings: SessionSettings = SETTINGS) -> None:
        self.options = options
        self.settings = settings
        self.retention = HistoryOptions(options.history_size, options.history_ttl)
        self.now = 0.0
        self.count = 0
        self.published: dict[tuple[str, int], str] = {}
        self.mistakes: list[BaseException] = []
        self.core: BrokerCore[Link] = BrokerCore(Deliveries(), 100)
        self.links = [Link(self), Link(self)]
        self.workers = [self.worker(link) for link in self.links]
        self.clients = [SDK(self, n % 2, by_server=n >= 2, delta=n in (1, 2)) for n in range(4)]

    def worker(self, link: Link) -> SessionServices:
        self.core.attach(link, link.address)
        sessions = Sessions()
        hub = link.hub = Hub(
            lambda hub: link,  # type: ignore[arg-type, return-value]
            sessions.apply,
            begin_arrivals=sessions.begin_arrivals,
        )
        return SessionServices(
            rules=ChannelRules(ChannelSettings(without_namespace=self.options)),
            tokens=TokenVerifier(TokenSettings(), lambda: 0.0),
            engine=link,  # type: ignore[arg-type]
            hub=hub,
            sessions=sessions,
            deadlines=Deadlines(0.0),
            handlers=App(),
            slices=TimeSlicer.unlimited(),
            run=run,
            gather=gather,
            wall_clock=lambda: 0.0,
            report_error=self.mistakes.append,
            counters=SessionCounters(Metrics()),
        )

    def act(self, step: tuple[str, int]) -> None:
        name, number = step
        if name == "publish":
            self.publish()
        elif name == "trim":
            self.core.carry_out(self.links[0], self.now, RemoveHistory(NAME))
        elif name == "expire":
            self.now += OPTIONS.history_ttl + 1
            self.core.sweep(self.now)
        elif name == "replace":
            self.core = BrokerCore(Deliveries(), 100)
            for link in self.links:
                link.cut()
        elif name == "crash":
            self.crash(number % 2)
        elif name == "cut":
            self.links[number % 2].cut()
        elif name in ("drop", "repeat"):
            self.links[number % 2].damage(repeat=name == "repeat")
        elif name in ("ask", "answer"):
            self.links[number % 2].move(to_worker=name == "answer")
        elif name == "flow":
            self.links[number % 2].flow()
        elif name == "settle":
            self.settle()
        else:
            getattr(self.clients[number], name)()

    def crash(self, number: int) -> None:
        """Replace a worker by another, without any notice."""
        self.core.detach(self.links[number], self.now)
        for client in self.clients:
            if client.link == number:
                client.forget()
        self.links[number] = Link(self)
        self.workers[number] = self.worker(self.links[number])

    def publish(self) -> None:
        self.count += 1
        content = f"{PADDING}{self.count}"
        request = Publish(NAME, msgspec.json.encode(content), self.retention, delta=self.count % 5 > 0)
        position = self.core.carry_out(self.links[0], self.now, request)
        self.published[position.epoch, position.offset] = content

    def present(self) -> dict[str, ClientInfo]:
        return self.core.carry_out(self.links[0], self.now, GetPresence(NAME))

    def settle(self) -> None:
        """Move messages, and drain the sockets, until there is nothing left to move."""
        moving = True
        while moving:
            moving = False
            for client in self.clients:
                moving |= not client.is_drained
                client.drain()
            for link in self.links:
                moving |= link.flow()
            for client in self.clients:
                moving |= bool(client.received or client.closed)
                client.listen()


FREQUENT = ["publish", "ask", "answer", "listen", "flow"]
OCCASIONAL = ["connect", "vanish", "reconnect", "subscribe", "unsubscribe", "settle"]
RARE = ["trim", "expire", "cut", "replace", "crash", "drop", "drop", "repeat"]
STEPS = st.tuples(st.sampled_from(3 * FREQUENT + 2 * OCCASIONAL + RARE), st.integers(0, 3))
# Of each property; five times as many with the profile `thorough`, see tests/conftest.py.
EXAMPLES = settings.default.max_examples  # type: ignore[union-attr]
STORIES = st.lists(STEPS, min_size=20, max_size=100)
# A client is away while much is published, and its socket is full when it comes back, and at times later.
SLOW_STEPS = st.tuples(
    st.sampled_from(3 * [*FREQUENT, "stall", "drain"] + 2 * ["reconnect", "trim"] + OCCASIONAL[:-1] + RARE),
    st.integers(0, 3),
)
ABSENCES = st.tuples(st.integers(0, 3), st.integers(1, 15)).map(
    lambda absence: [
        *[("vanish", absence[0]), *(("publish", 0),) * absence[1]],
        *[(name, absence[0]) for name in ("connect", "stall", "flow", "listen", "flow", "listen", "drain", "stall")],
    ]
)
SLOW_STORIES = st.lists(st.one_of(st.lists(SLOW_STEPS, min_size=1, max_size=8), ABSENCES), min_size=4, max_size=12).map(
    lambda parts: [("settle", 0), *(step for part in parts for step in part)]
)


def play(
    steps: list[tuple[str, int]],
    options: ChannelOptions,
    settings: SessionSettings = SETTINGS,
    make: type[World] = World,
) -> World:
    world = make(options, settings)
    for client in world.clients:
        client.connect()
        client.subscribe()
    for step in steps:
        world.act(step)
    world.publish()  # the next publication after a dropped one reveals the loss
    world.settle()
    top = world.core.carry_out(world.links[0], world.now, GetHistory(NAME, world.retention)).position
    listening = [client for client in world.clients if client.session is not None and client.wanted]
    for client in listening:
        assert client.subscribed and client.position == (top.offset, top.epoch)
    assert world.present().keys() == {client.session.client for client in listening}
    for client in world.clients:
        client.vanish()
    world.settle()
    assert not world.mistakes
    assert world.core.channels == 0 and not world.present()
    for link, worker in zip(world.links, world.workers, strict=True):
        assert (link.hub.subscriptions, len(worker.sessions), worker.deadlines._buckets) == (0, 0, {})
    return world


@settings(max_examples=2 * EXAMPLES)
@given(STORIES)
def test_every_publication_arrives_once_and_in_order_or_its_loss_is_reported(steps: list[tuple[str, int]]) -> None:
    play(steps, OPTIONS)


@settings(max_examples=EXAMPLES)
@given(STORIES)
def test_in_cache_mode_the_newest_arrives_and_then_every_other(steps: list[tuple[str, int]]) -> None:
    play(steps, CACHE)


@settings(max_examples=EXAMPLES)
@given(SLOW_STORIES)
def test_what_a_reply_has_no_room_for_follows_in_order(steps: list[tuple[str, int]]) -> None:
    play(steps, LONG, SMALL_REPLY)
