"""Tokens by a key set, from a real client to a real provider: good, bad, and while the provider is away."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from tests.system.serving import Server, ServerStarter

KEY = rsa.generate_private_key(65537, 2048)


class Provider(http.server.BaseHTTPRequestHandler):
    """Publishes KEY."""

    def do_GET(self) -> None:
        described = jwt.get_algorithm_by_name("RS256").to_jwk(KEY.public_key(), as_dict=True)
        body = json.dumps({"keys": [described | {"kid": "one", "use": "sig"}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None: ...


@pytest.fixture
def provider() -> Iterator[http.server.ThreadingHTTPServer]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Provider) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def token(key: Any = KEY, kid: str = "one", algorithm: str = "RS256", **claims: Any) -> str:
    return jwt.encode({"sub": "42", **claims}, key, algorithm, {"kid": kid})


def ask(client: Any, command: Any) -> Any:
    client.send(json.dumps(command))
    return json.loads(client.recv(20))


def answer(server: Server, text: str) -> Any:
    """What a connect command with this token gets: the reply, or the code of the close."""
    with connect(server.endpoint) as client:
        try:
            return ask(client, {"id": 1, "connect": {"token": text}})
        except ConnectionClosed as closed:
            return closed.rcvd.code


def metric(server: Server, line: str) -> float:
    return sum(float(each.split()[-1]) for each in server.operate("/metrics")[1].splitlines() if each.startswith(line))


AWAY = {"id": 1, "error": {"code": 100, "message": "internal server error", "temporary": True}}


def test_an_outage_of_the_provider_disconnects_nobody(
    start_server: ServerStarter, provider: http.server.ThreadingHTTPServer
) -> None:
    address = f"http://127.0.0.1:{provider.server_address[1]}/keys?password=hush-hush"
    table = {"hmac_secret_key": "", "jwks_public_endpoint": address, "jwks_allow_insecure": True}
    server = start_server(client={"token": table}, workers={"count": 1})
    good = token(subs={"news": {"data": {"since": 1}}})

    assert answer(server, good)["connect"]["subs"]["news"]["data"] == {"since": 1}
    assert answer(server, token(rsa.generate_private_key(65537, 2048))) == 3500
    assert answer(server, token("secret", algorithm="HS256")) == 3500
    assert answer(server, token(exp=1))["error"]["code"] == 109
    # There may be such a key by now: nobody has looked since.
    assert answer(server, token(kid="two")) == AWAY

    provider.shutdown()
    provider.server_close()
    with connect(server.endpoint) as client:
        ask(client, {"id": 1, "connect": {"token": token(exp=2**40)}})
        unjudged = {"code": 100, "message": "internal server error", "temporary": True}
        new = token(kid="two", exp=2**41)
        assert ask(client, {"id": 2, "refresh": {"token": new}}) == {"id": 2, "error": unjudged}
        new = token(kid="two", channel="$a")
        assert ask(client, {"id": 3, "subscribe": {"channel": "$a", "token": new}}) == {"id": 3, "error": unjudged}
        refreshed = ask(client, {"id": 4, "refresh": {"token": token(exp=2**41)}})["refresh"]
        assert (refreshed["expires"], refreshed["ttl"]) == (True, 2**31 - 1)

    started_late = start_server(client={"token": table}, workers={"count": 1})
    assert answer(started_late, good) == AWAY
    assert answer(started_late, good) == AWAY
    assert metric(started_late, 'realtime_key_set_fetches_total{outcome="failed"') == 1
    assert metric(started_late, 'realtime_insecure_settings{key="client.token.jwks_allow_insecure"') == 1

    for log in (server.log, started_late.log):
        assert "hush" not in log
        assert good.split(".")[2] not in log
    assert started_late.log.count("no key set from http://127.0.0.1/keys") == 1
    assert "client.token.jwks_allow_insecure: " in server.log
