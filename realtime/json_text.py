"""Embedded JSON text: the one strict entrance for it. It is passed on byte for byte, and decoded only for handlers."""

from __future__ import annotations

import json
import re
from typing import Any

import msgspec
from msgspec import UNSET, Raw, UnsetType

from realtime.errors import BAD_REQUEST, ClientError

MAX_DEPTH = 128
"""Levels of nested lists and objects in one text."""

_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"')
# The escape of half a surrogate pair.
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_LINE_ENDS = b"\r\n"
# As numbers: bytes are searched for one several times as fast as for a text of one.
_LF, _CR, _LIST, _OBJECT, _ESCAPE = b"\n\r[{\\"


def payload(text: Raw | UnsetType) -> bytes:
    """The bytes of an embedded JSON value, fit to be stored and passed on; b"" when it is absent.

    The decoder has checked that `text` is JSON. Raises ClientError 107 where that is not enough: deeper than
    MAX_DEPTH (a reader elsewhere may recurse), or with half a surrogate pair, which is no Unicode text (RFC 8259 8.2).
    """
    if text is UNSET:
        return b""
    data = bytes(text)
    if _LF in data or _CR in data:
        data = one_line(data)
    # To look for a byte is cheap and settles nearly every case; only what is suspicious is looked at closely.
    if (_LIST in data or _OBJECT in data) and _is_deep(data):
        raise ClientError(*BAD_REQUEST)
    if _ESCAPE in data and _SURROGATE.search(data) and not _is_unicode(data):
        raise ClientError(*BAD_REQUEST)
    return data


def one_line(text: bytes) -> bytes:
    """JSON text without raw line ends. What the application encodes has none, but for the text in its `msgspec.Raw`."""
    return text.translate(None, _LINE_ENDS) if _LF in text or _CR in text else text


def is_json(data: bytes) -> bool:
    """Whether bytes of any kind are JSON text that could as well have come through `payload`, but for its line ends."""
    try:
        data.decode()
        payload(_decode_raw(data))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ClientError):
        return False
    return True


def value(data: bytes) -> Any:
    """The decoded form of a `payload`, None for b"". Raises ClientError 107 for a number that no Python type holds."""
    if not data:
        return None
    try:
        return msgspec.json.decode(data)
    except (msgspec.MsgspecError, RecursionError):
        raise ClientError(*BAD_REQUEST) from None


_decode_raw = msgspec.json.Decoder(Raw).decode


def _is_deep(data: bytes) -> bool:
    if data.count(_LIST) + data.count(_OBJECT) <= MAX_DEPTH:
        return False
    depth = 0
    for byte in _STRING.sub(b"", data):
        if byte in b"[{":
            depth += 1
            if depth > MAX_DEPTH:
                return True
        elif byte in b"]}":
            depth -= 1
    return False


def _is_unicode(data: bytes) -> bool:
    # Only the strings matter here; numbers may be longer than Python cares to convert.
    try:
        " ".join(json.loads(b"[%b]" % b",".join(_STRING.findall(data)))).encode()
    except ValueError:
        return False
    return True
