"""Embedded JSON text: the one strict entrance for it.

Applications embed JSON text in the protocol (`data`, `conn_info`, `chan_info`). The server passes it on byte for byte
and decodes it only for handlers.
"""

from __future__ import annotations

import base64
import json
import re
from typing import Any

import msgspec
from msgspec import UNSET, Raw, UnsetType

from realtime.errors import BAD_REQUEST, ClientError

MAX_DEPTH = 128
"""Levels of nested lists and objects in one text."""

BINARY = b"\0"
"""The first byte of embedded bytes that are not JSON text, which never starts with it; see `text_or_bytes`."""

_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"')
# An escape that may be half a surrogate pair.
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_LINE_ENDS = b"\r\n"
# As numbers: `number in bytes` is several times as fast as a search for a bytes object of one byte.
_LF, _CR, _LIST, _OBJECT, _ESCAPE = b"\n\r[{\\"


def payload(text: Raw | UnsetType) -> bytes:
    """Return the bytes of an embedded JSON value on one line, safe to store and pass on; b"" if it is absent.

    `text` is valid JSON by the decoder's check. Raises ClientError 107 for nesting deeper than MAX_DEPTH, since other
    readers may recurse, and for half a surrogate pair, which is not Unicode text (RFC 8259 section 8.2).
    """
    if text is UNSET:
        return b""
    data = bytes(text)
    if _LF in data or _CR in data:
        data = one_line(data)
    # A search for one byte is cheap and settles nearly every case; only suspicious text gets the thorough checks.
    if data.count(_LIST) + data.count(_OBJECT) > MAX_DEPTH and _is_deep(data):
        raise ClientError(*BAD_REQUEST)
    if _ESCAPE in data and _SURROGATE.search(data) and not _is_unicode(data):
        raise ClientError(*BAD_REQUEST)
    return data


def one_line(text: bytes) -> bytes:
    """Return JSON text without raw line ends. Encoded text has none, except for the text of a `msgspec.Raw`."""
    return text.translate(None, _LINE_ENDS) if _LF in text or _CR in text else text


def decode_base64(text: str) -> bytes:
    """Decode base64 of the standard alphabet, with or without line ends (RFC 2045 section 6.8). Raises ValueError."""
    return base64.b64decode(text.replace("\r", "").replace("\n", ""), validate=True)


def text_or_bytes(data: bytes) -> bytes:
    """Return JSON text on one line if `is_json`, any other bytes behind BINARY; b"" for none."""
    if is_json(data):
        return one_line(data)
    return BINARY + data if data else b""


def is_json(data: bytes) -> bool:
    """Return whether JSON clients can receive arbitrary bytes: JSON text that `payload` would accept, or nothing.

    Line ends alone count as nothing: the JSON encoding removes them.
    """
    if not data.strip(_LINE_ENDS):
        return True
    try:
        data.decode()
        payload(_decode_raw(data))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ClientError):
        return False
    return True


def value(data: bytes) -> Any:
    """Decode a `payload`; None for b"". Raises ClientError 107 for a number beyond every Python type."""
    if not data:
        return None
    try:
        return msgspec.json.decode(data)
    except (msgspec.MsgspecError, RecursionError):
        raise ClientError(*BAD_REQUEST) from None


def value_or_bytes(content: bytes) -> Any:
    """Decode a result of `text_or_bytes`: as `value`, and the bytes behind BINARY as they are."""
    return content.removeprefix(BINARY) if content.startswith(BINARY) else value(content)


_decode_raw = msgspec.json.Decoder(Raw).decode


def _is_deep(data: bytes) -> bool:
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
    # Only the strings matter here. Numbers may be longer than Python converts.
    try:
        " ".join(json.loads(b"[%b]" % b",".join(_STRING.findall(data)))).encode()
    except ValueError:
        return False
    return True
