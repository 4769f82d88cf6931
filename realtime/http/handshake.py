"""The opening handshake of RFC 6455 section 4.2: judged from a request head, and answered.

Browsers send the `Origin` of the page that opens a socket, and cookies with it, whatever site the page is from: the
origin policy here is what keeps other sites' pages out.
"""

from __future__ import annotations

import fnmatch
import re
from base64 import b64encode
from collections.abc import Callable, Collection, Iterable, Mapping
from hashlib import sha1
from http import HTTPStatus
from urllib.parse import parse_qsl

from msgspec import Struct

from realtime.http.request import Refusal, RequestHead

# Names of subprotocols, with the encoding that each stands for.
SUBPROTOCOLS = {"centrifuge-json": "json", "centrifuge-protobuf": "protobuf"}
# Query parameters that choose an encoding without a subprotocol (client protocol, section 2.3).
_ENCODING_PARAMETERS = ("format", "cf_protocol")

_SWITCHING = ("HTTP/1.1 101 Switching Protocols", "Server: realtime", "Upgrade: websocket", "Connection: Upgrade")
_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # section 1.3

_MAX_SUBPROTOCOLS = 16  # names read; more are ignored
_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
# 16 bytes in base64: of the last digit before the padding only two bits carry data (RFC 4648 section 3.5).
_KEY = re.compile(r"[A-Za-z0-9+/]{21}[AQgw]==")
_ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://([^/\\@?#,\s]*)")
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}


class OpeningRequest(Struct, frozen=True):
    """The opening handshake that brought the client here. Header names are in lower case."""

    headers: dict[str, str]
    query: dict[str, str]
    path: str
    remote_address: str


def judge_handshake(head: RequestHead, origin_allowed: Callable[[RequestHead], bool]) -> Refusal | None:
    """What is wrong with a request to the WebSocket path; None if it is an opening handshake that may go on."""
    if head.method != "GET":
        allow = (("Allow", "GET"),)
        return Refusal(HTTPStatus.METHOD_NOT_ALLOWED, "a WebSocket is opened by GET", "handshake", allow)
    if head.version != "1.1":
        return Refusal(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, "a WebSocket needs HTTP/1.1", "handshake")
    if head.body:
        return _bad("a WebSocket handshake has no body")
    if "websocket" not in _items(head, "upgrade"):
        return _upgrade_required("this is a WebSocket endpoint")
    if "upgrade" not in _items(head, "connection"):
        return _bad("Connection: Upgrade is missing")
    if head.all("sec-websocket-version") != ["13"]:
        return _upgrade_required("only WebSocket version 13 is spoken here")
    keys = head.all("sec-websocket-key")
    if len(keys) != 1 or _KEY.fullmatch(keys[0]) is None:
        return _bad("exactly one valid Sec-WebSocket-Key is needed")
    if not all(map(_TOKEN.fullmatch, _items(head, "sec-websocket-protocol"))):
        return _bad("malformed Sec-WebSocket-Protocol")
    if not origin_allowed(head):
        return Refusal(HTTPStatus.FORBIDDEN, "this origin is not allowed", "origin")
    return None


def subprotocol(head: RequestHead, encodings: Collection[str]) -> str | None:
    """The name to echo: the first offered that stands for one of `encodings`. None when there is none."""
    offered = _items(head, "sec-websocket-protocol")[:_MAX_SUBPROTOCOLS]
    return next((name for name in offered if SUBPROTOCOLS.get(name) in encodings), None)


def encoding(subprotocol: str | None, query: Mapping[str, str]) -> str:
    """The name of the encoding that a client chose: "json", unless its subprotocol or its query says "protobuf"."""
    chosen = SUBPROTOCOLS.get(subprotocol or "")
    if chosen == "protobuf" or any(query.get(name) == "protobuf" for name in _ENCODING_PARAMETERS):
        return "protobuf"
    return "json"


def opening_request(head: RequestHead, remote_address: str) -> OpeningRequest:
    """What the session gets to know of an accepted handshake: of each query parameter the last value, decoded."""
    query = dict(parse_qsl(head.query, keep_blank_values=True, errors="replace"))
    return OpeningRequest(head.headers, query, head.path, remote_address)


def opening_response(head: RequestHead, subprotocol: str | None, extensions: str = "") -> bytes:
    """The answer to an accepted handshake (section 4.2.2). subprotocol, extensions: agreed on, None and "" for none."""
    accept = b64encode(sha1(head.all("sec-websocket-key")[0].encode() + _GUID).digest()).decode()
    lines = [*_SWITCHING, f"Sec-WebSocket-Accept: {accept}"]
    if subprotocol is not None:
        lines.append(f"Sec-WebSocket-Protocol: {subprotocol}")
    if extensions:
        lines.append(f"Sec-WebSocket-Extensions: {extensions}")
    return "\r\n".join([*lines, "", ""]).encode()


def origin_policy(patterns: Iterable[str]) -> Callable[[RequestHead], bool]:
    """Which requests may open a connection, by their Origin.

    patterns: shell globs for the lower-case origin, "https://*.example.com"; without any only the origin that the
    request itself went to passes; "*" lets every origin pass but "null", which is what a page in a sandbox sends, or
    one that hides where it is from. A request without an Origin is not from a browser and always passes.
    """
    globs = [pattern.lower() for pattern in patterns]
    matches = [re.compile(fnmatch.translate(glob)).match for glob in globs]
    anyone = "*" in globs

    def allowed(head: RequestHead) -> bool:
        origins = head.all("origin")
        if not origins:
            return True
        origin = origins[0].lower()
        if len(origins) > 1 or origin == "null":
            return False
        if anyone:
            return True
        parts = _ORIGIN.fullmatch(origin)
        if parts is None:
            return False
        if not globs:
            scheme, authority = parts.groups()
            return scheme in _DEFAULT_PORTS and _same_host(authority, head.all("host")[0].lower(), scheme)
        return any(match(origin) for match in matches)

    return allowed


def _same_host(authority: str, host: str, scheme: str) -> bool:
    """Whether both name one host and port; the scheme is the page's, since a proxy may have taken the TLS off."""
    default = _DEFAULT_PORTS[scheme]
    return authority.removesuffix(default) == host.removesuffix(default)


def _items(head: RequestHead, name: str) -> list[str]:
    """The comma-separated items of a header, over all its lines; in lower case unless they are names of protocols."""
    values = ",".join(head.all(name))
    if not values:
        return []
    items = [item.strip(" \t") for item in values.split(",")]
    return items if name == "sec-websocket-protocol" else [item.lower() for item in items]


def _bad(reason: str) -> Refusal:
    return Refusal(HTTPStatus.BAD_REQUEST, reason, "handshake")


def _upgrade_required(reason: str) -> Refusal:
    headers = (("Upgrade", "websocket"), ("Sec-WebSocket-Version", "13"))
    return Refusal(HTTPStatus.UPGRADE_REQUIRED, reason, "handshake", headers)
