"""Two servers that share one Redis: to clients and the API they are one."""

from __future__ import annotations

import http.client
import json
import os
import signal
from contextlib import ExitStack, suppress
from typing import Any

import jwt
from cent import (
    ChannelsRequest,
    Client,
    DisconnectRequest,
    InfoRequest,
    PresenceRequest,
    PresenceStatsRequest,
    RefreshRequest,
    SubscribeRequest,
    UnsubscribeRequest,
)
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from tests.redis.deployments import RedisProcess
from tests.system.serving import Server, ServerStarter, wait_until

ROOM = "stream:room"


class Peer:
    """A client, connected to one node and subscribed to ROOM. id: of the client."""

    def __init__(self, stack: ExitStack, node: Server, user: str) -> None:
        self.socket: ClientConnection = stack.enter_context(connect(node.endpoint))
        token = jwt.encode({"sub": user}, "secret", "HS256")
        self.send({"id": 1, "connect": {"token": token}}, {"id": 2, "subscribe": {"channel": ROOM}})
        self.id = self.expect(lambda message: message.get("connect"))["client"]
        self.expect(lambda message: message.get("id") == 2)

    def send(self, *commands: Any) -> None:
        self.socket.send("\n".join(map(json.dumps, commands)))

    def expect(self, wanted: Any) -> Any:
        """Return the first true result of `wanted` for a message; drop the messages before."""
        while True:
            for line in str(self.socket.recv(timeout=30)).splitlines():
                if found := wanted(json.loads(line)):
                    return found

    def push(self, kind: str) -> Any:
        return self.expect(lambda message: message.get("push", {}).get(kind))


def start_nodes(start_server: ServerStarter, redis: RedisProcess, **sections: Any) -> list[Server]:
    engine = {"type": "redis", "redis": {"address": [redis.address], "presence_ttl": "4s"}}
    nodes = [start_server(engine=engine, workers={"count": 1}, **sections) for _ in range(2)]
    wait_until(lambda: all(len(api(node).info(InfoRequest()).nodes) == 2 for node in nodes), "nodes")
    return nodes


def api(node: Server) -> Client:
    return Client(f"{node.http}/api", "test-key")


def test_clients_and_calls_at_any_node_see_one_server(start_server: ServerStarter, redis_server: RedisProcess) -> None:
    limits = {"user_connection_limit": 2}
    here, there = start_nodes(start_server, redis_server, client=limits, http_stream={"enabled": True})
    with ExitStack() as stack:
        ann, bob = Peer(stack, here, "ann"), Peer(stack, there, "bob")
        assert ann.push("join")["info"]["client"] in (ann.id, bob.id)
        for node in (here, there):
            present = api(node).presence(PresenceRequest(channel=ROOM)).presence
            assert {client: info.user for client, info in present.items()} == {ann.id: "ann", bob.id: "bob"}
            assert api(node).presence_stats(PresenceStatsRequest(channel=ROOM)).num_users == 2
            assert api(node).channels(ChannelsRequest()).channels[ROOM].num_clients == 2
        listed = api(here).info(InfoRequest()).nodes
        assert len({node.uid for node in listed}) == 2
        wait_until(lambda: [node.num_clients for node in api(here).info(InfoRequest()).nodes] == [1, 1], "counts")

        # The limit of a user's connections.
        second = Peer(stack, there, "ann")
        refused: ClientConnection = stack.enter_context(connect(here.endpoint))
        refused.send(json.dumps({"id": 1, "connect": {"token": jwt.encode({"sub": "ann"}, "secret", "HS256")}}))
        assert close_code(refused) == 3000

        # Orders.
        api(here).subscribe(SubscribeRequest(user="bob", channel="more"))
        assert bob.expect(lambda message: message.get("push", {}).get("subscribe") is not None and message)
        api(here).unsubscribe(UnsubscribeRequest(user="bob", channel="more"))
        assert bob.push("unsubscribe")["code"] == 2000
        api(here).refresh(RefreshRequest(user="bob", expire_at=2_000_000_000))
        assert bob.push("refresh")["expires"]
        api(here).disconnect(DisconnectRequest(user="ann", whitelist=[ann.id]))
        assert close_code(second.socket) == 3503
        assert ann.push("leave")["info"]["client"] == second.id

        commands_at_the_other_node(here, there)


def close_code(socket: ClientConnection) -> int:
    """Read to the end of a connection, and return its code."""
    with suppress(ConnectionClosed):
        while True:
            socket.recv(timeout=30)
    assert socket.protocol.close_rcvd is not None
    return socket.protocol.close_rcvd.code


def commands_at_the_other_node(here: Server, there: Server) -> None:
    """Open a stream at one node, and post its commands to the other."""
    stream = http.client.HTTPConnection("127.0.0.1", int(here.http.rpartition(":")[2]), timeout=30)
    stream.request("POST", "/connection/http_stream", json.dumps({"id": 1, "connect": {}}))
    lines = stream.getresponse()
    connected = json.loads(lines.readline())["connect"]

    def post(node: str, command: Any) -> int:
        posting = http.client.HTTPConnection("127.0.0.1", int(there.http.rpartition(":")[2]), timeout=30)
        body = {"session": connected["session"], "node": node, "data": json.dumps(command)}
        posting.request("POST", "/emulation", json.dumps(body), {"Content-Type": "application/json"})
        status = posting.getresponse().status
        posting.close()
        return status

    assert post(connected["node"], {"id": 2, "presence_stats": {"channel": ROOM}}) == 204
    assert json.loads(lines.readline())["id"] == 2
    assert post("00000000-0000-0000-0000-000000000000", {"id": 3, "ping": {}}) == 404
    stream.close()


def test_a_node_that_is_stopped_or_killed(start_server: ServerStarter, redis_server: RedisProcess) -> None:
    here, there = start_nodes(start_server, redis_server)
    with ExitStack() as stack:
        ann, bob = Peer(stack, here, "ann"), Peer(stack, there, "bob")
        (worker,) = there.workers()
        os.kill(worker, signal.SIGSTOP)
        # It is found out before the worker counts as stuck and is replaced.
        found = api(here).channels(ChannelsRequest())
        assert found.channels[ROOM].num_clients == 1
        assert found.model_extra["silent_workers"] == 1  # type: ignore[index]
        there.kill()
        start_server.started.remove(there)
        assert ann.push("leave")["info"]["client"] == bob.id
        assert set(api(here).presence(PresenceRequest(channel=ROOM)).presence) == {ann.id}
        wait_until(lambda: len(api(here).info(InfoRequest()).nodes) == 1, "the end of the node")
