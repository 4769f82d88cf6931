"""The end of a session, and actions of the server API on it."""

from __future__ import annotations

import gc

import pytest
from msgspec import Raw

from realtime.errors import EngineUnavailable
from realtime.protocol.orders import DisconnectOrder, UnsubscribeOrder, encode_order
from realtime.pubsub.engine import AddPresence, GetHistory, GetPresence, RemovePresence, Subscribe
from tests.protocol.sessions import Gate, Server, error_of


@pytest.fixture
def server() -> Server:
    return Server(allow_anonymous_connect_without_token=True)


class TestLeaving:
    """A client that leaves at any moment, with an engine in any state, leaves nothing behind on this worker."""

    def test_its_session_is_in_no_reference_cycle(self, server):
        peer = server.client("ann")
        peer.subscribe("a")
        kept = peer.session.handle
        peer.session.closed()
        assert peer.session not in gc.get_referents(kept)
        assert (kept.user, kept.channels) == ("ann", [])
        for say in (lambda: kept.send(1), kept.disconnect, kept.refresh):
            say()
        kept.subscribe("a")
        kept.unsubscribe("a")

    @pytest.fixture
    def leaves(self, server) -> list[str]:
        """The channels of the leave requests that the engine has received; it answers none of them."""
        channels = []

        async def leave(request):
            channels.append(request.channel)
            await Gate()

        server.engine.overrides[RemovePresence] = leave
        return channels

    def test_an_engine_that_does_not_answer_keeps_no_subscription(self, server, leaves):
        gone = []

        async def disconnected(client, code, reason):
            gone.append(client.user)

        server.app.disconnected = disconnected
        peer = server.client("ann")
        for n, channel in enumerate(("room:a", "room:b", "kept:c"), 2):
            peer.say({"id": n, "subscribe": {"channel": channel}})
        peer.session.closed()
        assert leaves == ["room:a", "room:b"]
        assert server.hub.subscriptions == 0
        assert gone == ["ann"]

    def test_an_unsubscribe_is_answered_at_once(self, server, leaves):
        peer, other = server.client("ann"), server.client("bob")
        peer.say({"id": 2, "subscribe": {"channel": "room:a"}})
        peer.heard()
        assert peer.say({"id": 3, "unsubscribe": {"channel": "room:a"}}) == [{"id": 3, "unsubscribe": {}}]
        assert (leaves, peer.session.channels(), server.hub.subscriptions) == (["room:a"], [], 0)
        other.say({"id": 2, "subscribe": {"channel": "room:a"}})
        assert peer.heard() == []
        assert "subscribe" in peer.say({"id": 4, "subscribe": {"channel": "room:a"}})[0]

    def test_a_subscribe_that_fails_is_answered_at_once(self, server, leaves):
        async def enter(request):
            raise EngineUnavailable("away")

        server.engine.overrides[AddPresence] = enter
        peer = server.client()
        assert error_of(peer.say({"id": 2, "subscribe": {"channel": "room:a"}})) == 100
        assert peer.say({"id": 3, "subscribe": {"channel": "a"}}) == [{"id": 3, "subscribe": {}}]
        assert (leaves, peer.session.channels()) == (["room:a"], ["a"])

    @pytest.mark.parametrize("how", ["closed", "kicked"])
    @pytest.mark.parametrize("stage", [Subscribe, GetHistory, AddPresence])
    def test_during_a_subscribe(self, server, stage, how):
        gate = Gate()

        async def late(request):
            await gate
            return await server.engine.carry_out(request)

        server.engine.overrides[stage] = late
        peer = server.client("ann")
        assert peer.say({"id": 2, "subscribe": {"channel": "room:a"}}, {"id": 3, "history": {"channel": "a"}}) == []
        if how == "closed":
            peer.session.closed()
        else:
            peer.session.handle.disconnect()
        gate.open()
        assert peer.heard() == []
        assert (server.hub.subscriptions, len(server.sessions), peer.session.subscriptions) == (0, 0, {})
        assert server.engine.execute(GetPresence("room:a")) == {}
        assert server.engine.core.channels == 0
        assert server.services.deadlines._buckets == {}
        assert not server.mistakes


class TestDrain:
    """The end of a worker: commands under way are answered before the disconnect."""

    def test_an_idle_client_is_disconnected_at_once(self, server):
        peer = server.client("ann")
        peer.session.drain()
        assert peer.close_code == (3001, "shutdown")

    def test_a_command_under_way_is_answered_first_and_others_are_refused(self, server):
        gate = Gate()

        async def slow(client, data):
            return await gate

        async def quick(client, data):
            return 1

        server.app.procedures.update(slow=slow, quick=quick)
        server.change(concurrency=2)
        peer = server.client("ann")
        assert peer.say({"id": 2, "rpc": {"method": "slow"}}) == []
        peer.session.drain()
        assert peer.close_code is None
        assert error_of(peer.say({"id": 3, "rpc": {"method": "quick"}})) == 100
        assert error_of(peer.say({"id": 4, "publish": {"channel": "a", "data": {}}})) == 100
        gate.open(Raw(b'"done"'))
        assert peer.heard() == [{"id": 2, "rpc": {"data": "done"}}]
        assert peer.close_code == (3001, "shutdown")
        assert not server.mistakes

    @pytest.mark.parametrize("concurrency", [0, 1, 2])
    def test_a_command_that_waits_behind_another_one_is_refused(self, server, concurrency):
        server.change(concurrency=concurrency)
        gate, began = Gate(), []

        async def slow(client, data):
            began.append(data)
            return await gate

        server.app.procedures["slow"] = slow
        peer = server.client("ann")
        number = max(concurrency, 1)
        ids = range(2, number + 4)
        peer.say(*({"id": id, "rpc": {"method": "slow", "data": 1}} for id in ids))
        peer.session.drain()
        gate.open(Raw(b"1"))
        replies = sorted(peer.heard(), key=lambda reply: reply["id"])
        assert [reply["id"] for reply in replies] == list(ids)
        assert ["rpc" in reply for reply in replies] == [True] * number + [False, False]
        assert all(error_of([reply]) == 100 for reply in replies[number:])
        assert (peer.close_code, began) == ((3001, "shutdown"), [1] * number)


class TestOrders:
    """Actions of the server API on connections."""

    def test_disconnect(self, server):
        ann, ann2, bob = server.client("ann"), server.client("ann"), server.client("bob")
        order = DisconnectOrder("ann", whitelist=(ann2.session.client,), code=4001, reason="tidy up")
        server.sessions.apply(encode_order(order))
        assert ann.close_code == (4001, "tidy up")
        assert ann2.close_code is None and bob.close_code is None
        server.sessions.apply(encode_order(DisconnectOrder("ann")))
        assert ann2.close_code == (3503, "force disconnect")
        assert len(server.sessions) == 1

    def test_unsubscribe(self, server):
        peer = server.client("ann")
        peer.say({"id": 2, "subscribe": {"channel": "a"}})
        server.sessions.apply(encode_order(UnsubscribeOrder("ann", "a")))
        assert peer.heard() == [
            {"push": {"channel": "a", "unsubscribe": {"code": 2000, "reason": "server unsubscribe"}}}
        ]
        assert server.hub.subscriptions == 0

    def test_the_disconnect_handler_is_called_once_with_the_reason(self, server):
        gone = []

        async def disconnected(client, code, reason):
            gone.append((client.user, code, reason))

        server.app.disconnected = disconnected
        server.client("eve").session.closed()
        peer = server.client("ann")
        peer.session.handle.disconnect()
        peer.session.closed()
        assert gone == [("eve", 3000, "connection closed"), ("ann", 3503, "force disconnect")]
        assert peer.close_code == (3503, "force disconnect")
