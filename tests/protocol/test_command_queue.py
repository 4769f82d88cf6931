"""The order of a session's commands: one at a time, behind earlier ones, and no further reading when too many wait."""

from __future__ import annotations

from typing import Any

import pytest

from realtime.errors import ClientError
from realtime.protocol.commands import COMMANDS
from tests.protocol.sessions import Gate, ImmediateHandler, Server


@pytest.fixture
def server() -> Server:
    return Server(allow_anonymous_connect_without_token=True)


class TestOrder:
    @pytest.mark.parametrize("name", [name for name in COMMANDS if name != "connect"])
    def test_a_command_before_connect_closes_with_3501(self, server, name):
        peer = server.peer()
        assert peer.say({"id": 1, name: {"channel": "a"}}) == []
        assert peer.close_code == (3501, "bad request")

    def test_a_pong_before_connect_closes_with_3501(self, server):
        peer = server.peer()
        peer.say(b"{}")
        assert peer.close_code == (3501, "bad request")

    def test_a_second_connect_closes_with_3501(self, server):
        peer = server.client()
        peer.say({"id": 2, "connect": {}})
        assert peer.close_code == (3501, "bad request")

    @pytest.mark.parametrize(
        "message",
        [
            b"",
            b"not json",
            b"[]",
            b'{"id":2}',
            b'{"id":2,"ping":{}}',
            b'{"id":2,"publish":{"channel":"a","data":1},"history":{"channel":"a"}}',
            b'{"id":-1,"history":{"channel":"a"}}',
            b'{"id":4294967296,"history":{"channel":"a"}}',
            b'{"id":1.0,"history":{"channel":"a"}}',
            b'{"id":true,"history":{"channel":"a"}}',
            b'{"id":0,"history":{"channel":"a"}}',
            b'{"id":2,"history":{"channel":5}}',
            b'{"id":2,"publish":{"channel":"a","data":NaN}}',
            b'{"id":2,"publish":{"channel":"a","data":1e}}',
            b'{"id":2,"publish":{"channel":"a","data":' + b"[" * 60000,
            b'{"id":2,"history":{"channel":""}}',
            b'\xef\xbb\xbf{"id":2,"history":{"channel":"a"}}',
            b"\n" * 60000,
        ],
    )
    def test_an_invalid_command_closes_with_3501(self, server, message):
        peer = server.client()
        peer.session.receive(message)
        assert peer.close_code == (3501, "bad request")
        assert not server.mistakes

    def test_commands_before_an_invalid_one_are_carried_out_once(self, server):
        listener, peer = server.client(), server.client()
        listener.say({"id": 2, "subscribe": {"channel": "a"}})
        peer.say({"id": 2, "publish": {"channel": "a", "data": 1}}, b"junk", {"id": 3, "publish": {"channel": "a"}})
        assert [push["push"]["pub"]["data"] for push in listener.heard()] == [1]
        assert peer.close_code == (3501, "bad request")

    def test_unknown_keys_are_ignored(self, server):
        assert server.client().say(b'{"id":2,"x":[1],"unsubscribe":{"channel":"a","y":null}}') == [
            {"id": 2, "unsubscribe": {}}
        ]

    def test_a_newline_at_the_end_is_allowed(self, server):
        assert server.client().say(b'{"id":2,"unsubscribe":{"channel":"a"}}\n') == [{"id": 2, "unsubscribe": {}}]

    def test_commands_run_one_at_a_time_in_order(self, server):
        gate = Gate()

        async def slow(client, data):
            return await gate

        server.app.procedures["slow"] = slow
        peer = server.client()
        assert peer.say({"id": 2, "rpc": {"method": "slow"}}, {"id": 3, "unsubscribe": {"channel": "a"}}) == []
        assert peer.say({"id": 4, "unsubscribe": {"channel": "a"}}) == []
        gate.open("done")
        assert peer.heard() == [
            {"id": 2, "rpc": {"data": "done"}},
            {"id": 3, "unsubscribe": {}},
            {"id": 4, "unsubscribe": {}},
        ]

    def test_a_client_with_too_many_queued_commands_is_not_read(self):
        server = Server(allow_anonymous_connect_without_token=True, command_queue=4)
        gate = Gate()

        async def slow(client, data):
            await gate

        server.app.procedures["slow"] = slow
        peer = server.client()
        peer.say({"id": 2, "rpc": {"method": "slow"}})
        peer.say(*({"id": n, "unsubscribe": {"channel": "a"}} for n in range(3, 8)))
        assert peer.paused
        gate.open()
        assert not peer.paused
        assert len(peer.heard()) == 6

    def test_no_command_starts_while_the_client_has_long_replies_to_take(self, server):
        peer = server.client()
        peer.is_drained, peer.is_congested = False, True
        assert peer.say(*({"id": n, "unsubscribe": {"channel": "a"}} for n in range(2, 12))) == []
        assert peer.say({"id": 12, "unsubscribe": {"channel": "a"}}) == []
        peer.drain()
        assert [reply["id"] for reply in peer.heard()] == list(range(2, 13))
        assert peer.session.queue is None

    def test_thousands_of_immediate_commands_do_not_deepen_the_stack(self):
        peer = Server(allow_anonymous_connect_without_token=True, commands_per_second=0).client()
        assert len(peer.say(*({"id": n, "unsubscribe": {"channel": "a"}} for n in range(2, 5002)))) == 5000


def test_an_immediate_reply_waits_for_earlier_replies(server: Server) -> None:
    gate = Gate()

    async def slow(client: Any, data: Any) -> Any:
        return await gate

    def fails(client: Any, data: Any) -> Any:
        raise ClientError(400, "not that")

    server.app.procedures = {
        "slow": slow,
        "quick": ImmediateHandler(lambda client, data: [data]),
        "no": ImmediateHandler(fails),
    }
    peer = server.client("ada")
    assert peer.say({"id": 2, "rpc": {"method": "quick", "data": 1}}) == [{"id": 2, "rpc": {"data": [1]}}]
    assert peer.say({"id": 3, "rpc": {"method": "slow"}}, {"id": 4, "rpc": {"method": "quick", "data": 2}}) == []
    assert peer.say({"id": 5, "rpc": {"method": "no"}}) == []
    gate.open("done")
    third, fourth, fifth = peer.heard()
    assert (third, fourth) == ({"id": 3, "rpc": {"data": "done"}}, {"id": 4, "rpc": {"data": [2]}})
    assert fifth == {"id": 5, "error": {"code": 400, "message": "not that"}}
