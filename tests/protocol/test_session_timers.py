"""Time limits of a session: the opening, pings and pongs, expiry and refresh. The clock is the test's."""

from __future__ import annotations

import pytest

from tests.protocol.sessions import NOW, Gate, Server, token


@pytest.fixture
def server() -> Server:
    return Server(allow_anonymous_connect_without_token=True)


class TestTime:
    def test_a_client_without_a_connect_is_closed_and_may_come_back(self, server):
        peer = server.peer()
        server.advance(9.5)
        assert peer.close_code is None
        server.advance(1)
        assert peer.close_code == (3000, "stale")
        assert server.count("realtime_bad_input", kind="stale") == 1

    def test_pings_come_on_schedule_and_are_answered(self, server):
        peer = server.client()
        for _ in range(4):
            server.ping(peer)
            peer.say(b"{}")
        assert peer.close_code is None

    def test_pings_come_on_a_busy_connection_too(self, server):
        peer = server.client()
        pings = 0
        for _ in range(300):
            server.advance(0.25)
            replies = peer.say({"id": 2, "unsubscribe": {"channel": "a"}})
            if {} in replies:
                pings += 1
                peer.say(b"{}")
        assert pings in (2, 3)

    def test_no_pong_is_3012(self, server):
        peer = server.client()
        server.ping(peer)
        server.advance(9)
        assert peer.close_code == (3012, "no pong")

    @pytest.mark.parametrize("pongs", [1, 2])
    def test_a_pong_without_a_ping_is_3501(self, server, pongs):
        peer = server.client()
        if pongs == 2:
            server.ping(peer)
        for _ in range(pongs):
            peer.say(b"{}")
        assert peer.close_code == (3501, "bad request")

    def test_a_pong_does_not_wait_behind_a_slow_command(self, server):
        gate = Gate()

        async def slow(client, data):
            await gate

        server.app.procedures["slow"] = slow
        peer = server.client()
        peer.say({"id": 2, "rpc": {"method": "slow"}})
        server.ping(peer)
        peer.say(b"{}")
        server.advance(9)
        assert peer.close_code is None
        gate.open()
        assert peer.heard() == [{"id": 2, "rpc": {"data": None}}]

    def test_the_pong_limit_starts_anew_when_a_paused_client_is_read_again(self):
        server = Server(allow_anonymous_connect_without_token=True, command_queue=4)
        gate = Gate()

        async def slow(client, data):
            await gate

        server.app.procedures["slow"] = slow
        peer = server.client()
        peer.say(
            {"id": 2, "rpc": {"method": "slow"}}, *({"id": n, "unsubscribe": {"channel": "a"}} for n in range(3, 9))
        )
        assert peer.paused
        server.ping(peer)
        server.advance(40)
        assert peer.heard() == []
        assert peer.close_code is None
        gate.open()
        assert not peer.paused
        server.advance(7)
        assert peer.close_code is None
        peer.heard()
        peer.say(b"{}")
        server.ping(peer)
        server.advance(9)
        assert peer.close_code == (3012, "no pong")

    def test_the_pong_limit_starts_when_the_socket_has_taken_the_ping(self, server):
        """A ping may be behind a long reply; `websocket.write_timeout` finds a client that is gone."""
        peer = server.client()
        server.ping(peer)
        peer.is_drained = False
        server.advance(40)
        assert peer.close_code is None
        peer.drain()
        server.advance(17)
        assert peer.close_code == (3012, "no pong")

    def test_a_connect_that_the_server_delays_too_long_closes_with_a_temporary_code(self, server):
        async def connecting(request):
            await Gate()

        server.app.connecting = connecting
        peer = server.peer()
        peer.say({"id": 1, "connect": {}})
        server.advance(11)
        assert peer.close_code == (3004, "internal server error")

    def test_a_stalled_loop_blames_no_client(self, server):
        peer = server.client()
        server.ping(peer)
        server.now += 60
        server.services.deadlines.sweep(server.now)
        assert peer.close_code is None
        peer.say(b"{}")
        server.advance(9)
        assert peer.close_code is None

    def test_without_an_interval_there_are_no_pings(self):
        server = Server(allow_anonymous_connect_without_token=True, ping_interval=0.0)
        peer = server.peer()
        (reply,) = peer.say({"id": 1, "connect": {}})
        assert "ping" not in reply["connect"] and "pong" not in reply["connect"]
        server.advance(100)
        assert peer.heard() == []

    def test_an_expired_connection_has_a_grace_then_3005(self, server):
        peer = server.peer()
        peer.connect(token=token(sub="42", exp=NOW + 10))
        server.change(pong_timeout=0.0)
        server.advance(30)
        assert peer.close_code is None
        server.advance(10)
        assert peer.close_code == (3005, "connection expired")

    def test_refresh_moves_the_expiry(self, server):
        peer = server.peer()
        peer.connect(token=token(sub="42", exp=NOW + 10))
        reply = peer.say({"id": 2, "refresh": {"token": token(sub="42", exp=NOW + 100)}})
        assert reply == [{"id": 2, "refresh": {"expires": True, "ttl": 100}}]

    @pytest.mark.parametrize(
        ("request_token", "code"),
        [("", 3501), ("junk", 3500), (token(sub="43"), 3500), (token(sub="42", exp=1), 3005)],
    )
    def test_a_refresh_that_fails_closes(self, server, request_token, code):
        peer = server.client("42")
        peer.say({"id": 2, "refresh": {"token": request_token}})
        assert peer.close_code[0] == code
