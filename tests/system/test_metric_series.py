"""The series of a real server's /metrics do not depend on what clients send."""

from __future__ import annotations

import json
import socket
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import jwt
from websockets.sync.client import connect

from tests.system.serving import Server, ServerStarter

ROUNDS = 100
REQUESTS = 10_000


def series(server: Server) -> set[str]:
    """All series but those of loops, which begin with the first late turn."""
    lines = server.operate("/metrics")[1].splitlines()
    return {line.rpartition(" ")[0] for line in lines if not line.startswith(("#", "realtime_loop_"))}


def take_part(server: Server, name: str) -> None:
    """Send this name wherever a client or a program names something."""
    token = jwt.encode({"sub": name}, "secret", algorithm="HS256")
    headers = {"User-Agent": name, f"X-{name}": name}
    with connect(server.endpoint, additional_headers=headers, origin=f"http://{name}.example") as client:  # type: ignore[arg-type]
        commands = [
            {"id": 1, "connect": {"token": token, "name": name, "version": name}},
            {"id": 2, "subscribe": {"channel": name}},
            {"id": 3, "rpc": {"method": name}},
        ]
        client.send("\n".join(map(json.dumps, commands)))
        replies = 0
        while replies < len(commands):
            replies += client.recv(timeout=20).count('"id":')  # type: ignore[arg-type]
    for body in ({"method": name, "params": {}}, {"method": "publish", "params": {"channel": name, "data": name}}):
        request = Request(f"{server.http}/api", json.dumps(body).encode(), {"X-API-Key": "test-key"})
        try:
            urlopen(request, timeout=20).close()
        except HTTPError as error:
            error.close()


def request_unknown(server: Server, number: int) -> None:
    """Request `number` unknown paths, in one connection."""
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.settimeout(60)
        for start in range(0, number, 100):
            paths = range(start, min(start + 100, number))
            client.sendall(b"".join(b"GET /p%d?q=%d HTTP/1.1\r\nHost: h%d\r\n\r\n" % (n, n, n) for n in paths))
            answered = 0
            while answered < len(paths):
                data = client.recv(65536)
                assert data, "the server has closed the connection"
                answered += data.count(b"HTTP/1.1 404")


def test_names_paths_and_headers_of_clients_make_no_series(start_server: ServerStarter) -> None:
    server = start_server(workers={"count": 1})
    take_part(server, "first")
    request_unknown(server, 1)
    before = series(server)
    for number in range(ROUNDS):
        take_part(server, f"name{number}")
    request_unknown(server, REQUESTS)
    assert series(server) == before
