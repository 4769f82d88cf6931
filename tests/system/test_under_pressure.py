"""A worker whose loop is blocked, as clients see it: what can be refused is, and what is kept is served."""

from __future__ import annotations

import threading
from http.client import HTTPConnection

from tests.system.serving import ServerStarter, wait_until

HANDSHAKE = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
}


def test_a_blocked_worker_refuses_and_serves_stale_until_it_is_calm(start_server: ServerStarter) -> None:
    server = start_server(workers={"count": 1}, app={"module": "pressed:app"})
    connections = [HTTPConnection("127.0.0.1", server.port, timeout=20) for _ in range(4)]
    blocking, plain, kept, opening = connections

    def ask(connection: HTTPConnection, path: str) -> tuple[int, bytes]:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()

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
