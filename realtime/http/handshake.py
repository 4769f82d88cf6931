"""Server side of the WebSocket opening handshake (RFC 6455 section 4.2): checks of a request head, and the response.

A browser lets pages of every site open a WebSocket, and sends the user's cookies with the handshake. The origin policy
here rejects pages of other sites, by the `Origin` of the handshake.
"""

from __future__ import annotations

import fnmatch
import re
from binascii import b2a_base64
from collections.abc import Callable, Collection, Iterable, Mapping
from hashlib import sha1
from http import HTTPStatus
from urllib.parse import parse_qsl

from msgspec import Struct

from realtime.http.hosts import HostNames
from realtime.http.request import Refusal, RequestHead

# Encoding of each known subprotocol.
SUBPROTOCOLS = {"centrifuge-json": "json", "centrifuge-protobuf": "protobuf"}
# Query parameters that select an encoding without a subprotocol (client protocol, section 2.3).
_ENCODING_PARAMETERS = ("format", "cf_protocol")

_SWITCHING = (
    b"HTTP/1.1 101 Switching Protocols\r\nServer: realtime\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Accept: %b\r\n"
)
# Values of Connection in nearly all handshakes; Firefox sends the second one.
_CONNECTION = ("Upgrade", "keep-alive, Upgrade")
_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # section 1.3

_MAX_SUBPROTOCOLS = 16  # further names are ignored
_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
# 16 bytes in base64: the last digit before the padding carries only two bits (RFC 4648 section 3.5).
_KEY = re.compile(r"[A-Za-z0-9+/]{21}[AQgw]==")
_ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://([^/\\@?#,\s]*)")
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}


class OpeningRequest(Struct, frozen=True):
    """The client's opening request: a WebSocket handshake, or the request of a stream. Header names: lower case."""

    headers: dict[str, str]
    query: dict[str, str]
    path: str
    remote_address: str


def check_handshake(head: RequestHead, origin_allowed: Callable[[RequestHead], bool]) -> Refusal | None:
    """Check a request to the WebSocket path; return None for a valid opening handshake of an allowed origin."""
    fields = dict(head.fields)
    is_plain = len(fields) == len(head.fields) and (
        (head.method, head.version, head.body) == ("GET", "1.1", 0)
        and fields.get("upgrade") == "websocket"
        and fields.get("connection") in _CONNECTION
        and fields.get("sec-websocket-version") == "13"
        and _KEY.fullmatch(fields.get("sec-websocket-key", "")) is not None
        and "sec-websocket-protocol" not in fields
    )
    refusal = None if is_plain else _check_head(head)
    if refusal is None and not origin_allowed(head):
        return Refusal(HTTPStatus.FORBIDDEN, "this origin is not allowed", "origin")
    return refusal


def _check_head(head: RequestHead) -> Refusal | None:
    """Check everything but the origin."""
    if head.method != "GET":
        allow = (("Allow", "GET"),)
        return Refusal(HTTPStatus.METHOD_NOT_ALLOWED, "a WebSocket is opened by GET", "handshake", allow)
    if head.version != "1.1":
        return Refusal(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, "a WebSocket needs HTTP/1.1", "handshake")
    if head.body:
        return _bad("a WebSocket handshake has no body")
    if "websocket" not in _list_header(head, "upgrade"):
        return _upgrade_required("this is a WebSocket endpoint")
    if "upgrade" not in _list_header(head, "connection"):
        return _bad("Connection: Upgrade is missing")
    if head.get_all("sec-websocket-version") != ["13"]:
        return _upgrade_required("only WebSocket version 13 is spoken here")
    keys = head.get_all("sec-websocket-key")
    if len(keys) != 1 or _KEY.fullmatch(keys[0]) is None:
        return _bad("exactly one valid Sec-WebSocket-Key is needed")
    if not all(map(_TOKEN.fullmatch, _list_header(head, "sec-websocket-protocol"))):
        return _bad("malformed Sec-WebSocket-Protocol")
    return None


def select_subprotocol(head: RequestHead, encodings: Collection[str]) -> str | None:
    """Select the first offered subprotocol whose encoding is among `encodings`; None if there is none."""
    offered = _list_header(head, "sec-websocket-protocol")[:_MAX_SUBPROTOCOLS]
    return next((name for name in offered if SUBPROTOCOLS.get(name) in encodings), None)


def requested_encoding(subprotocol: str | None, query: Mapping[str, str]) -> str:
    """Return the encoding that a client requests: "json", unless its subprotocol or its query says "protobuf"."""
    encoding = SUBPROTOCOLS.get(subprotocol or "")
    if encoding == "protobuf" or any(query.get(name) == "protobuf" for name in _ENCODING_PARAMETERS):
        return "protobuf"
    return "json"


def make_opening_request(head: RequestHead, remote_address: str) -> OpeningRequest:
    """Build the session's view of an accepted request; of a repeated query parameter the last value counts."""
    path, mark, query = head.target.partition("?")
    parameters = dict(parse_qsl(query, keep_blank_values=True, errors="replace")) if mark else {}
    return OpeningRequest(head.headers, parameters, path, remote_address)


def handshake_response(head: RequestHead, subprotocol: str | None, extensions: str = "") -> bytes:
    """Build the response to an accepted handshake (section 4.2.2).

    subprotocol, extensions: the negotiated ones; None and "" for none.
    """
    digest = sha1(head.get("sec-websocket-key").encode() + _GUID).digest()
    response = _SWITCHING % b2a_base64(digest, newline=False)
    if subprotocol is not None:
        response += f"Sec-WebSocket-Protocol: {subprotocol}\r\n".encode()
    if extensions:
        response += f"Sec-WebSocket-Extensions: {extensions}\r\n".encode()
    return response + b"\r\n"


def origin_policy(patterns: Iterable[str], own_names: HostNames | None = None) -> Callable[[RequestHead], bool]:
    """Build a predicate for the requests that may open a connection, by their Origin header.

    patterns: shell globs for the lower-case origin, such as "https://*.example.com". Without patterns, only the
    request's own host is allowed (same origin). "*" allows every origin except "null", which sandboxed pages and pages
    with a hidden origin send. A request without an Origin is not from a browser and always allowed.
    own_names: names that same-origin requests must use; None for any name.
    """
    globs = [pattern.lower() for pattern in patterns]
    matches = [re.compile(fnmatch.translate(glob)).match for glob in globs]
    allows_any = "*" in globs

    def is_allowed(head: RequestHead) -> bool:
        origins = head.get_all("origin")
        if own_names is not None and not globs and not own_names.accept(head):
            return False
        if not origins:
            return True
        origin = origins[0].lower()
        if len(origins) > 1 or origin == "null":
            return False
        if allows_any:
            return True
        if not globs:
            return _is_same_origin(origin, head)
        return _ORIGIN.fullmatch(origin) is not None and any(match(origin) for match in matches)

    return is_allowed


def origin_fault(head: RequestHead) -> str:
    """Return the kind of a refusal by an `origin_policy`: "null_origin", "host" or "origin"."""
    origin = head.get("origin").lower()
    if origin == "null":
        return "null_origin"
    return "host" if not origin or _is_same_origin(origin, head) else "origin"


def _is_same_origin(origin: str, head: RequestHead) -> bool:
    parts = _ORIGIN.fullmatch(origin)
    if parts is None:
        return False
    scheme, authority = parts.groups()
    return scheme in _DEFAULT_PORTS and _is_same_host(authority, head.get("host").lower(), scheme)


def _is_same_host(authority: str, host: str, scheme: str) -> bool:
    """Compare host and port. scheme: that of the page, because a proxy may have terminated TLS."""
    default = _DEFAULT_PORTS[scheme]
    return authority.removesuffix(default) == host.removesuffix(default)


def _list_header(head: RequestHead, name: str) -> list[str]:
    """Return the comma-separated items of all lines of a header; in lower case, except for names of subprotocols."""
    values = ",".join(head.get_all(name))
    if not values:
        return []
    items = [item.strip(" \t") for item in values.split(",")]
    return items if name == "sec-websocket-protocol" else [item.lower() for item in items]


def _bad(reason: str) -> Refusal:
    return Refusal(HTTPStatus.BAD_REQUEST, reason, "handshake")


def _upgrade_required(reason: str) -> Refusal:
    headers = (("Upgrade", "websocket"), ("Sec-WebSocket-Version", "13"))
    return Refusal(HTTPStatus.UPGRADE_REQUIRED, reason, "handshake", headers)
