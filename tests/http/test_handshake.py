"""The opening handshake: accepted and refused requests, origins, and the response."""

from __future__ import annotations

import time

import pytest

from realtime.http.handshake import (
    check_handshake,
    handshake_response,
    make_opening_request,
    origin_fault,
    origin_policy,
    requested_encoding,
    select_subprotocol,
)
from realtime.http.request import Refusal, RequestHead, RequestParser

KEY = "dGhlIHNhbXBsZSBub25jZQ=="
GOOD = {
    "Host": "example.com:8000",
    "Upgrade": "websocket",
    "Connection": "Upgrade",
    "Sec-WebSocket-Key": KEY,
    "Sec-WebSocket-Version": "13",
}
Fields = list[tuple[str, str]]


def head_of(fields: Fields, first: str = "GET /ws HTTP/1.1") -> RequestHead:
    lines = [first, *(f"{name}: {value}" for name, value in fields), "", ""]
    head = RequestParser(100_000, 1000).feed("\r\n".join(lines).encode("latin-1"))
    assert isinstance(head, RequestHead), head
    return head


def handshake(*more: tuple[str, str], without: str = "", **changed: str) -> RequestHead:
    renamed = {name.replace("_", "-"): value for name, value in changed.items()}
    fields = [(name, renamed.get(name, value)) for name, value in GOOD.items() if name != without]
    return head_of([*fields, *more])


def status(head: RequestHead, origins: tuple[str, ...] = ()) -> int:
    refusal = check_handshake(head, origin_policy(origins))
    return 0 if refusal is None else refusal.status


def test_a_good_handshake_passes() -> None:
    assert status(handshake()) == 0
    assert status(handshake(Upgrade="h2c, WebSocket", Connection="keep-alive, UPGRADE")) == 0


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (handshake(Sec_WebSocket_Version="8"), 426),
        (handshake(Sec_WebSocket_Version="12"), 426),
        (handshake(Sec_WebSocket_Version="+13"), 426),
        (handshake(Sec_WebSocket_Version="1_3"), 426),
        (handshake(Sec_WebSocket_Version="13, 8"), 426),
        (handshake(("Sec-WebSocket-Version", "13")), 426),
        (handshake(without="Sec-WebSocket-Version"), 426),
        (handshake(without="Upgrade"), 426),
        (handshake(Upgrade="h2c"), 426),
        (handshake(Upgrade="websockets"), 426),
        (handshake(without="Connection"), 400),
        (handshake(Connection="keep-alive"), 400),
        (handshake(without="Sec-WebSocket-Key"), 400),
        (handshake(("Sec-WebSocket-Key", KEY)), 400),
        (handshake(Sec_WebSocket_Key=""), 400),
        (handshake(Sec_WebSocket_Key="c2hvcnQ="), 400),
        (handshake(Sec_WebSocket_Key=KEY[:-2] + "AA"), 400),
        (handshake(Sec_WebSocket_Key="A" * 22 + "=="), 0),
        (handshake(Sec_WebSocket_Key="A" * 21 + "B=="), 400),  # 130 bits
        (handshake(Sec_WebSocket_Key="A" * 20 + "-Q=="), 400),
        (handshake(Sec_WebSocket_Key="A" * 42 + "=="), 400),
        (handshake(("Content-Length", "5")), 400),
        (handshake(("Content-Length", "0")), 0),
        (handshake(("Transfer-Encoding", "chunked")), 400),
        (handshake(("Sec-WebSocket-Protocol", "a b")), 400),
        (handshake(("Sec-WebSocket-Protocol", "\xe4")), 400),
        (handshake(("Sec-WebSocket-Protocol", "a,,b")), 400),
        (handshake(("Sec-WebSocket-Protocol", "a, b")), 0),
        (handshake(("Sec-WebSocket-Extensions", "permessage-deflate; client_max_window_bits=abc, x;;=")), 0),
        (head_of(list(GOOD.items()), "POST /ws HTTP/1.1"), 405),
        (head_of(list(GOOD.items()), "HEAD /ws HTTP/1.1"), 405),
        (head_of(list(GOOD.items()), "get /ws HTTP/1.1"), 405),
        (head_of(list(GOOD.items()), "GET /ws HTTP/1.0"), 505),
        (head_of([("Host", "h")]), 426),
    ],
)
def test_the_status_of_a_refused_handshake(head: RequestHead, expected: int) -> None:
    assert status(head) == expected


def test_a_refusal_names_the_supported_version() -> None:
    refusal = check_handshake(handshake(Sec_WebSocket_Version="8"), origin_policy(()))
    assert isinstance(refusal, Refusal)
    assert ("Sec-WebSocket-Version", "13") in refusal.headers


def chosen(*offers: str, encodings: tuple[str, ...] = ("json", "protobuf")) -> str | None:
    return select_subprotocol(handshake(*(("Sec-WebSocket-Protocol", offer) for offer in offers)), encodings)


def test_subprotocols() -> None:
    assert chosen() is None
    assert chosen("centrifuge-json") == "centrifuge-json"
    assert chosen("other,\tcentrifuge-json") == "centrifuge-json"
    assert chosen("other", "centrifuge-json") == "centrifuge-json"
    assert chosen("Centrifuge-JSON") is None  # RFC 6455 section 4.2.2: compared as sent
    assert chosen("centrifuge-protobuf") == "centrifuge-protobuf"
    assert chosen("centrifuge-protobuf, centrifuge-json") == "centrifuge-protobuf"
    assert chosen("centrifuge-json, centrifuge-protobuf") == "centrifuge-json"
    assert chosen("centrifuge-protobuf, centrifuge-json", encodings=("json",)) == "centrifuge-json"
    assert chosen("centrifuge-protobuf", encodings=("json",)) is None
    assert chosen(",".join(f"p{n}" for n in range(15)) + ",centrifuge-json") == "centrifuge-json"
    assert chosen(",".join(f"p{n}" for n in range(16)) + ",centrifuge-json") is None


@pytest.mark.parametrize(
    ("offer", "expected"),
    [
        ("centrifuge-json" + " " * 8000, 0),
        (" " * 8000 + ", centrifuge-json", 400),  # an empty item
        ("a" + " " * 8000 + "b", 400),
        (", ".join(f"p{n}" for n in range(1000)), 0),
        (",".join(["centrifuge-json"] * 490), 0),
        ("," * 8000, 400),
        ("x" * 8000, 0),
        ("x" * 8000 + "\x80", 400),
        *((f"a{chr(code)}b", 400) for code in (*range(0xA0, 0x100), *map(ord, '"()/:;<=>?@[\\]{}'))),
    ],
)
def test_odd_subprotocols_are_checked_quickly(offer: str, expected: int) -> None:
    head = handshake(("Sec-WebSocket-Protocol", offer))
    began = time.process_time()
    assert status(head) == expected
    select_subprotocol(head, ("json",))
    assert time.process_time() - began < 0.1


@pytest.mark.parametrize(
    ("name", "query", "expected"),
    [
        (None, {}, "json"),
        ("centrifuge-json", {}, "json"),
        ("centrifuge-protobuf", {}, "protobuf"),
        (None, {"format": "protobuf"}, "protobuf"),
        (None, {"cf_protocol": "protobuf"}, "protobuf"),
        (None, {"format": "json", "cf_protocol": "protobuf"}, "protobuf"),
        ("centrifuge-protobuf", {"format": "json"}, "protobuf"),
        (None, {"format": "Protobuf"}, "json"),
        (None, {"protocol": "protobuf"}, "json"),
        (None, {"format": ""}, "json"),
    ],
)
def test_the_requested_encoding(name: str | None, query: dict[str, str], expected: str) -> None:
    assert requested_encoding(name, query) == expected


def test_the_opening_request_has_decoded_query_and_joined_headers() -> None:
    head = head_of([*GOOD.items(), ("Cookie", "a=1"), ("Cookie", "b=2")], "GET /ws?a=1&b=%C3%A4&a=2&c HTTP/1.1")
    request = make_opening_request(head, "192.0.2.1")
    assert request.query == {"a": "2", "b": "ä", "c": ""}
    assert request.headers["cookie"] == "a=1; b=2"
    assert (request.path, request.remote_address) == ("/ws", "192.0.2.1")


SETTINGS: dict[str, tuple[str, ...]] = {
    "same": (),
    "any": ("*",),
    "one": ("https://good.example",),
    "sub": ("https://*.good.example", "https://good.example"),
    "port": ("http://localhost:3000",),
    "app": ("HTTPS://Upper.Example", "capacitor://localhost", "file://"),
}

# By origin: the settings that allow it.
ORIGINS: dict[str, set[str]] = {
    "http://example.com:8000": {"any", "same"},
    "https://example.com:8000": {"any", "same"},
    "HTTP://EXAMPLE.COM:8000": {"any", "same"},
    "http://example.com": {"any"},
    "http://example.com:80": {"any"},
    "http://example.com:8001": {"any"},
    "http://evil.example.com:8000": {"any"},
    "http://example.com:8000.evil.example": {"any"},
    "http://user@example.com:8000": {"any"},
    "ws://example.com:8000": {"any"},
    "https://good.example": {"any", "one", "sub"},
    "https://GOOD.example": {"any", "one", "sub"},
    "http://good.example": {"any"},
    "https://good.example:443": {"any"},
    "https://good.example:8443": {"any"},
    "https://good.example.evil.com": {"any"},
    "https://evilgood.example": {"any"},
    "https://good.example@evil.com": {"any"},
    "https://good.example/": {"any"},
    "https://good.example/x": {"any"},
    "https://good.example?x": {"any"},
    "https://good.example#x": {"any"},
    "https://good.example\\x": {"any"},
    "https://good.example https://evil.com": {"any"},
    "https://evil.com https://good.example": {"any"},
    "https://a.good.example": {"any", "sub"},
    "https://a.b.good.example": {"any", "sub"},
    "https://evil.com/.good.example": {"any"},
    "https://evil.com#.good.example": {"any"},
    "https://evil.com?.good.example": {"any"},
    "https://evil.com@a.good.example": {"any"},
    "https://evil.com, https://a.good.example": {"any"},
    "http://localhost:3000": {"any", "port"},
    "http://localhost:30000": {"any"},
    "http://localhost": {"any"},
    "https://upper.example": {"any", "app"},
    "capacitor://localhost": {"any", "app"},
    "file://": {"any", "app"},
    "null": set(),
    "NULL": set(),
    "": {"any"},
    "good.example": {"any"},
    "//good.example": {"any"},
    "javascript:alert(1)": {"any"},
    "https://": {"any"},
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("origin", ORIGINS)
def test_origins(origin: str, name: str) -> None:
    expected = 0 if name in ORIGINS[origin] else 403
    assert status(handshake(("Origin", origin)), SETTINGS[name]) == expected


@pytest.mark.parametrize("name", SETTINGS)
def test_a_missing_origin_is_allowed_and_two_are_refused(name: str) -> None:
    assert status(handshake(), SETTINGS[name]) == 0
    doubled = handshake(("Origin", "https://good.example"), ("Origin", "https://good.example"))
    assert status(doubled, SETTINGS[name]) == 403


def test_the_default_port_is_the_same_origin() -> None:
    for host, origin in (("a.example", "http://a.example:80"), ("a.example:443", "https://a.example")):
        assert status(handshake(("Origin", origin), Host=host)) == 0
    assert status(handshake(("Origin", "https://a.example"), Host="a.example:80")) == 403


def test_the_handshake_response() -> None:
    # Key and accept value are the example of RFC 6455 section 1.3.
    plain = handshake_response(handshake(), None).decode().split("\r\n")
    assert plain[0] == "HTTP/1.1 101 Switching Protocols"
    assert plain[-2:] == ["", ""]
    fields = {name.lower(): value for name, value in (line.split(": ") for line in plain[1:-2])}
    assert fields.pop("server") == "realtime"
    assert fields == {
        "upgrade": "websocket",
        "connection": "Upgrade",
        "sec-websocket-accept": "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=",
    }


def test_the_handshake_response_names_the_negotiated_subprotocol_and_extensions() -> None:
    response = handshake_response(handshake(), "centrifuge-json", "permessage-deflate; server_no_context_takeover")
    lines = response.decode().split("\r\n")
    assert "Sec-WebSocket-Protocol: centrifuge-json" in lines
    assert "Sec-WebSocket-Extensions: permessage-deflate; server_no_context_takeover" in lines


@pytest.mark.parametrize(
    ("headers", "fault"),
    [
        ((("host", "a.example"), ("origin", "http://b.example")), "origin"),
        ((("host", "a.example"), ("origin", "nonsense")), "origin"),
        ((("host", "evil.example"), ("origin", "http://evil.example")), "host"),
        ((("host", "evil.example"),), "host"),
        ((("host", "a.example"), ("origin", "null")), "null_origin"),
    ],
)
def test_a_refused_origin_has_a_cause(headers: tuple[tuple[str, str], ...], fault: str) -> None:
    assert origin_fault(RequestHead("GET", "/", "1.1", headers, 0)) == fault
