"""A worker whose loop is blocked, as clients see it: what can be refused is, and what is kept is served.

Relief would open the WebSockets meanwhile (tests/system/test_relief.py), so it is off where one is to be refused.
"""

from __future__ import annotations

import threading
from http.client import HTTPConnection
from pathlib import Path

from tests.system.serving import Server, ServerStarter, wait_until

HANDSHAKE = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
}


def test_a_blocked_worker_refuses_and_serves_stale_until_it_is_calm(start_server: ServerStarter) -> None:
    server = start_server(workers={"count": 1}, app={"module": "pressed:app"}, loop={"relief": False})
    connections = [HTTPConnection("127.0.0.1", server.port, timeout=20) for _ in range(4)]
    blocking, plain, kept, opening = connections

    assert ask(plain, "/plain") == (200, b"done")
    assert ask(kept, "/kept") == (200, b'{"call":1}')
    thread = threading.Thread(target=ask, args=(blocking, "/block?seconds=2"))
    thread.start()
    server.wait_for_log("/block has begun")

    # These wait in the kernel until the loop turns again, and are the first that it sees then.
    plain.request("GET", "/plain")
    kept.request("GET", "/kept")
    opening.request("GET", "/connection/websocket", headers=HANDSHAKE)
    refused = plain.getresponse()
    assert refused.status == 503
    assert 3 <= int(refused.headers["Retry-After"]) <= 10
    refused.read()
    assert kept.getresponse().read() == b'{"call":1}'
    not_opened = opening.getresponse()
    assert not_opened.status == 503
    assert not_opened.headers["Retry-After"]
    thread.join()

    wait_until(lambda: ask(plain, "/plain") == (200, b"done"), "calm")
    metrics = server.operate("/metrics")[1]
    assert 'realtime_shed_requests_total{kind="http",process="worker",reason="lag",worker="0"}' in metrics
    assert 'realtime_cache_events_total{cache="http GET /kept",outcome="stale",process="worker",worker="0"}' in metrics
    for connection in connections:
        connection.close()


def test_a_start_that_blocks_the_loop_refuses_no_client(start_server: ServerStarter, tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import time\nfrom realtime import App\napp = App()\n@app.on_start\nasync def start():\n    time.sleep(0.7)\n"
    )
    server = start_server(workers={"count": 1}, app={"module": "slow:app", "path": str(tmp_path)})
    connection = HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.request("GET", "/connection/websocket", headers=HANDSHAKE)
    assert connection.getresponse().status == 101
    connection.close()


def test_a_pressed_worker_opens_websockets_while_another_worker_accepts_clients(start_server: ServerStarter) -> None:
    server = start_server(workers={"count": 2}, app={"module": "pressed:app"}, loop={"stuck": "60s", "relief": False})
    blocking, opening, other = together = connections_to_two_workers(server)

    def opened_under_pressure(*blocked: HTTPConnection) -> int:
        """The status of a handshake that the first worker reads at the end of a block."""
        threads = [threading.Thread(target=ask, args=(one, "/block?seconds=2")) for one in blocked]
        for thread in threads:
            thread.start()
        wait_until(lambda: server.log.count("/block has begun") >= len(blocked), "block")
        server.lines.clear()
        opening.request("GET", "/connection/websocket", headers=HANDSHAKE)
        status = opening.getresponse().status
        for thread in threads:
            thread.join()
        return status

    assert opened_under_pressure(blocking, other) == 503
    for connection in together:
        connection.close()
    blocking, opening, other = together = connections_to_two_workers(server)
    assert opened_under_pressure(blocking) == 101
    for connection in together:
        connection.close()


def ask(connection: HTTPConnection, path: str) -> tuple[int, bytes]:
    connection.request("GET", path)
    answer = connection.getresponse()
    return answer.status, answer.read()


def connections_to_two_workers(server: Server) -> tuple[HTTPConnection, HTTPConnection, HTTPConnection]:
    """Two connections that one worker serves, and a third one that the other worker serves."""
    by_worker: dict[bytes, list[HTTPConnection]] = {}

    def are_found() -> bool:
        connection = HTTPConnection("127.0.0.1", server.port, timeout=20)
        by_worker.setdefault(ask(connection, "/pid")[1], []).append(connection)
        return len(by_worker) == 2 and any(len(found) > 1 for found in by_worker.values())

    wait_until(are_found, "connections to both workers")
    first, second = sorted(by_worker.values(), key=len, reverse=True)
    for unused in (*first[2:], *second[1:]):
        unused.close()
    return first[0], first[1], second[0]
