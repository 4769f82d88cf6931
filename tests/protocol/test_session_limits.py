"""Limits of one client: rates, concurrency, failures, connections and channels."""

from __future__ import annotations

from collections import Counter

import pytest

from realtime.errors import ClientError
from realtime.protocol.session_timers import EXPIRY_SPREAD
from realtime.pubsub.engine import AddPresence, GetHistory, Subscribe
from realtime.pubsub.time_slices import TimeSlicer
from tests.protocol.sessions import BARE, BARE_PROTOBUF, CHANNEL, NOW, Gate, Server, error_of, token
from tests.protocol.test_step_costs import sized

LEAVE = {"unsubscribe": {"channel": "a"}}


def make(slices: TimeSlicer | None = None, **client) -> Server:
    return Server(slices=slices, allow_anonymous_connect_without_token=True, **client)


def answers(replies: list[dict]) -> Counter:
    return Counter(reply["error"]["code"] if "error" in reply else 0 for reply in replies)


class TestRate:
    def test_a_burst_passes_more_is_refused_and_much_more_ends(self):
        server = make(commands_per_second=200)
        peer = server.client()
        replies = peer.say(*({"id": n, **LEAVE} for n in range(2, 1002)))
        # One of the first 400 commands was its connect.
        assert answers(replies) == {0: 399, 111: 400}
        assert all(reply["error"]["temporary"] for reply in replies if "error" in reply)
        assert peer.close_code == (3013, "too many requests")
        assert server.count("realtime_bad_input", kind="command_rate") == 400
        assert server.count("realtime_bad_input", kind="command_flood") == 1

    def test_commands_at_the_allowed_rate_are_never_refused(self):
        server = make(commands_per_second=20, pong_timeout=0.0)
        peer = server.client()
        for _ in range(100):
            assert answers(reply for reply in peer.say(*({"id": n, **LEAVE} for n in range(2, 7))) if reply) == {0: 5}
            server.advance(0.25)
        assert peer.close_code is None

    def test_a_client_that_slows_down_is_served_again(self):
        server = make(commands_per_second=10)
        peer = server.client()
        assert answers(peer.say(*({"id": n, **LEAVE} for n in range(2, 31)))) == {0: 19, 111: 10}
        server.advance(2)
        assert answers(peer.say({"id": 40, **LEAVE})) == {0: 1}

    def test_a_refused_command_has_no_effect(self):
        server = make(commands_per_second=1)
        peer = server.client()
        assert error_of(peer.say({"id": 2, **LEAVE}, {"id": 3, "subscribe": {"channel": "a"}})[1:]) == 111
        assert server.hub.subscriptions == 0

    def test_no_limit(self):
        peer = make(commands_per_second=0).client()
        assert answers(peer.say(*({"id": n, **LEAVE} for n in range(2, 5000)))) == {0: 4998}


class TestFields:
    """The items of one command, by `client.max_command_fields`."""

    def connect(self, form, subs):
        if form is BARE:
            named = ",".join(f'"{"c" * 40}{number}":{{}}' for number in range(subs))
            return f'{{"id":1,"connect":{{"subs":{{{named}}}}}}}'.encode()
        named = [b"\x1a" + sized(b"\x0a" + sized(b"c%d" % each) + b"\x12\x02\x18\x01") for each in range(subs)]
        return sized(b"\x08\x01\x22" + sized(b"".join(named)))

    @pytest.mark.parametrize("form", [BARE, BARE_PROTOBUF])
    @pytest.mark.parametrize(("limit", "channel_limit"), [(8192, 100), (2048, 250), (8192, 0)])
    def test_a_first_message_may_recover_as_many_subscriptions_as_a_client_has(self, form, limit, channel_limit):
        for subs, refused in ((channel_limit or 800, False), (5000, True)):
            server = make(max_command_fields=limit, channel_limit=channel_limit)
            peer = server.peer(form)
            peer.session.receive(self.connect(form, subs))
            assert (peer.close_code is not None) is refused
            assert server.count("realtime_bad_input", kind="command_fields") == refused

    def test_later_commands_have_their_own_limit(self):
        server = make(channel_limit=100)
        peer = server.client()
        long = '{"id":2,"unsubscribe":{"channel":"a","x":[' + ",".join(["{}"] * 4000) + "]}}"
        peer.session.receive(long.encode())
        assert peer.close_code is None
        peer.session.receive(long.replace("[{}", "[{},{},{},{},{}" + ",{}" * 200).encode())
        assert peer.close_code[0] == 3501


class TestErrors:
    BAD = {"publish": {"channel": "unknown:a", "data": 1}}

    def test_too_many_within_five_seconds_close_with_3509(self):
        server = make(error_limit=3)
        peer = server.client()
        assert answers(peer.say(*({"id": n, **self.BAD} for n in range(2, 5)))) == {102: 3}
        server.advance(4)
        assert answers(peer.say({"id": 5, **self.BAD})) == {102: 1}
        assert peer.close_code == (3509, "too many errors")
        assert server.count("realtime_bad_input", kind="command_errors") == 1
        assert server.count("realtime_command_errors", command="publish", code="102") == 4

    def test_refused_subscribes_do_not_count_up_to_the_limit_of_channels(self):
        server = make(error_limit=3, channel_limit=20)
        peer = server.client()
        refused = {"subscribe": {"channel": "unknown:a"}}
        assert answers(peer.say(*({"id": n, **refused} for n in range(2, 22)))) == {102: 20}
        assert peer.close_code is None
        peer.say(*({"id": n, **refused} for n in range(22, 25)))
        assert peer.close_code is None
        peer.say({"id": 25, **refused})
        assert peer.close_code == (3509, "too many errors")

    def test_a_few_failures_at_a_time_are_allowed(self):
        server = make(error_limit=3, pong_timeout=0.0)
        peer = server.client()
        for _ in range(10):
            peer.say(*({"id": n, **self.BAD} for n in range(2, 5)))
            server.advance(6)
        assert peer.close_code is None

    @pytest.mark.parametrize("error", [ClientError(100, "later", True), ClientError(109, "token expired")])
    def test_temporary_errors_do_not_count(self, error):
        async def fail(client, data):
            raise error

        server = make(error_limit=3)
        server.app.procedures["fail"] = fail
        peer = server.client()
        assert answers(peer.say(*({"id": n, "rpc": {"method": "fail"}} for n in range(2, 52)))) == {error.code: 50}
        assert peer.close_code is None

    def test_a_message_that_fails_counts_too(self):
        async def fail(client, data):
            raise ClientError(1000, "no")

        server = make(error_limit=3)
        server.app.on_message = fail
        peer = server.client()
        peer.say(*({"send": {"data": 1}} for _ in range(4)))
        assert peer.close_code == (3509, "too many errors")

    def test_no_limit(self):
        peer = make(error_limit=0).client()
        peer.say(*({"id": n, **self.BAD} for n in range(2, 502)))
        assert peer.close_code is None


class TestConnectionsOfOneUser:
    def test_a_connection_over_the_limit_is_closed_and_may_come_back(self):
        server = make(user_connection_limit=2)
        one, two, three, other = server.client("42"), server.client("42"), server.peer(), server.client("43")
        three.say({"id": 1, "connect": {"token": token(sub="42")}})
        assert three.close_code == (3000, "connection limit")
        assert server.count("realtime_bad_input", kind="user_connections") == 1
        assert (one.close_code, two.close_code, other.close_code) == (None, None, None)
        one.session.closed()
        assert server.client("42").close_code is None

    def test_anonymous_clients_are_not_counted(self):
        server = make(user_connection_limit=1)
        assert [server.client().close_code for _ in range(3)] == [None] * 3

    @pytest.mark.parametrize("stage", [Subscribe, GetHistory, AddPresence])
    def test_a_connect_that_fails_is_not_counted(self, stage):
        server = make(user_connection_limit=1)
        gate = Gate()

        async def late(request):
            await gate
            return await server.engine.carry_out(request)

        server.engine.overrides[stage] = late
        peer = server.peer()
        peer.say({"id": 1, "connect": {"token": token(sub="42", channels=["room:a"])}})
        peer.session.closed()
        gate.open()
        del server.engine.overrides[stage]
        assert server.client("42").close_code is None


class TestSeveralAtATime:
    def server(self, concurrency: int) -> tuple[Server, dict[str, Gate]]:
        server = make(concurrency=concurrency)
        gates: dict[str, Gate] = {}

        async def wait(client, data):
            gate = gates[data] = Gate()
            await gate
            return data

        async def publishing(client, channel, data):
            await wait(client, data)

        server.app.procedures["wait"] = wait
        for channel in ("a", "b"):
            server.app.publish_handlers[channel] = publishing
        return server, gates

    def call(self, name: str, id: int) -> dict:
        return {"id": id, "rpc": {"method": "wait", "data": name}}

    def publish(self, channel: str, name: str, id: int) -> dict:
        return {"id": id, "publish": {"channel": channel, "data": name}}

    @pytest.mark.parametrize("concurrency", [0, 1])
    def test_one_after_another(self, concurrency):
        server, gates = self.server(concurrency)
        server.client().say(self.call("x", 2), self.call("y", 3))
        assert gates.keys() == {"x"}

    def test_recovery_up_to_the_limit(self):
        server, gates = self.server(2)
        peer = server.client()
        assert peer.say(self.call("x", 2), self.call("y", 3), self.call("z", 4)) == []
        assert gates.keys() == {"x", "y"}
        gates["y"].open()
        assert [reply["id"] for reply in peer.heard()] == [3]
        assert gates.keys() == {"x", "y", "z"}
        gates["z"].open()
        gates["x"].open()
        assert [reply["id"] for reply in peer.heard()] == [4, 2]

    def test_commands_of_one_channel_keep_their_order(self):
        server, gates = self.server(8)
        peer = server.client()
        replies = peer.say(
            self.call("a call for as long as all this lasts", 7),
            self.publish("a", "a1", 2),
            self.publish("a", "a2", 3),
            self.publish("b", "b1", 4),
            {"id": 5, "history": {"channel": "a"}},
            {"id": 6, "history": {"channel": "kept:x"}},
        )
        assert gates.keys() - {"a1", "b1"} == {"a call for as long as all this lasts"}
        assert [reply["id"] for reply in replies] == [6]
        gates["b1"].open()
        assert [reply["id"] for reply in peer.heard()] == [4]
        gates["a1"].open()
        assert [reply["id"] for reply in peer.heard()] == [2]
        gates["a2"].open()
        assert [reply["id"] for reply in peer.heard()] == [3, 5]

    def test_connect_runs_alone(self):
        server, gates = self.server(8)
        connecting = Gate()

        async def connect(request):
            await connecting

        server.app.connecting = connect
        peer = server.peer()
        assert peer.say({"id": 1, "connect": {}}, self.call("x", 2), {"id": 3, **LEAVE}) == []
        assert not gates
        connecting.open()
        assert [reply["id"] for reply in peer.heard()] == [1, 3]

    def test_an_invalid_command_waits_for_earlier_ones(self):
        server, gates = self.server(8)
        peer = server.client()
        peer.say(self.call("x", 2), b"junk", self.call("y", 3))
        assert (peer.close_code, gates.keys()) == (None, {"x"})
        gates["x"].open()
        assert [reply["id"] for reply in peer.heard()] == [2]
        assert peer.close_code == (3501, "bad request")

    def test_a_client_that_leaves_during_a_long_reply_leaves_nothing_behind(self):
        server, gates = self.server(8)
        peer = server.client()
        peer.say(self.publish("a", "a1", 2), self.publish("a", "a2", 3), self.publish("b", "b1", 4))
        peer.session.closed()
        for gate in list(gates.values()):
            gate.open()
        assert gates.keys() == {"a1", "b1"}
        assert peer.heard() == [] and server.clean()

    def test_a_channel_is_subscribed_to_once(self):
        server, _ = self.server(8)
        peer = server.client()
        replies = peer.say(*({"id": n, "subscribe": {"channel": "a"}} for n in (2, 3)), {"id": 4, **LEAVE})
        assert answers(replies) == {0: 2, 105: 1}
        assert server.hub.subscriptions == 0


class TestUserOfAProxy:
    """`client.user_id_http_header`"""

    def server(self, **client) -> Server:
        return Server(user_id_http_header="X-User-Id", **client)

    def user(self, server: Server, headers: dict[str, str], **request: str) -> str:
        peer = server.peer(headers=headers)
        peer.say({"id": 1, "connect": request})
        return peer.session.user if peer.close_code is None else str(peer.close_code[0])

    def test_it_names_the_user(self):
        assert self.user(self.server(), {"x-user-id": "42"}) == "42"

    def test_without_the_header_the_other_rules_apply(self):
        assert self.user(self.server(), {}) == "3501"
        assert self.user(self.server(), {"x-user-id": ""}) == "3501"
        assert self.user(self.server(allow_anonymous_connect_without_token=True), {}) == ""

    def test_a_token_takes_precedence(self):
        assert self.user(self.server(), {"x-user-id": "42"}, token=token(sub="43")) == "43"

    def test_it_is_ignored_unless_configured(self):
        assert self.user(Server(), {"x-user-id": "42"}) == "3501"


def test_connections_that_expire_together_do_not_end_together():
    server = Server(CHANNEL, pong_timeout=0.0)
    peers = [server.peer() for _ in range(200)]
    for peer in peers:
        peer.connect(token=token(sub="42", exp=NOW + 10))
    ended = []
    server.advance(34.9)
    while any(peer.close_code is None for peer in peers):
        server.advance(0.25)
        ended.append(sum(peer.close_code is not None for peer in peers) - sum(ended))
    assert max(ended) < 100
    assert len(ended) * 0.25 <= 25 * EXPIRY_SPREAD + 1
    assert {peer.close_code for peer in peers} == {(3005, "connection expired")}


class TestTurns:
    """Messages with thousands of commands: other work gets its turns between them."""

    @pytest.fixture
    def turns(self) -> list:
        """The calls for the next turn of the loop."""
        return []

    @pytest.fixture
    def server(self, turns) -> Server:
        clock = iter(range(10**9))
        # Each reading of this clock is a millisecond later.
        slices = TimeSlicer(lambda: next(clock) / 1000, 0.005, turns.append)
        return make(slices, commands_per_second=0)

    def test_all_are_answered_in_order_over_several_turns(self, server, turns):
        peer = server.client()
        answered = [reply["id"] for reply in peer.say(*({"id": n, **LEAVE} for n in range(2, 1002)))]
        assert 0 < len(answered) < 300
        assert peer.paused
        answered += [reply["id"] for reply in peer.say({"id": 1002, **LEAVE})]
        number = 0
        while turns:
            turns.pop(0)()
            number += 1
            before = len(answered)
            answered += [reply["id"] for reply in peer.heard()]
            assert len(answered) - before < 300
        assert answered == list(range(2, 1003))
        assert number > 3 and not peer.paused

    def test_clients_take_turns(self, server, turns):
        peers = [server.client(), server.client()]
        for peer in peers:
            peer.say(*({"id": n, **LEAVE} for n in range(2, 1002)))
        turns.pop(0)()
        assert all(peer.heard() for peer in peers)

    def test_commands_of_a_client_that_leaves_are_dropped(self, server, turns):
        peer, other = server.client(), server.client()
        other.subscribe("a")
        peer.say(*({"id": n, "publish": {"channel": "a", "data": n}} for n in range(2, 1002)))
        heard = len(other.publications())
        peer.session.closed()
        while turns:
            turns.pop(0)()
        assert heard < 300 and other.heard() == []

    def test_queued_commands_start_when_a_channel_becomes_free(self, server, turns):
        gate = Gate()

        async def wait(client, data):
            await gate

        server.app.procedures["wait"] = wait
        peer = server.client()
        commands = [{"id": n, **LEAVE} for n in range(2, 302)]
        commands[250] = {"id": 252, "rpc": {"method": "wait"}}
        answered = peer.say(*commands)
        while turns:
            turns.pop(0)()
        answered += peer.heard()
        assert [reply["id"] for reply in answered] == list(range(2, 252))
        gate.open()
        while turns:
            turns.pop(0)()
        assert [reply["id"] for reply in peer.heard()] == list(range(252, 302))
