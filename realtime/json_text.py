"""Embedded JSON text: the one strict entrance for it.

Applications embed JSON text in the protocol (`data`, `conn_info`, `chan_info`). The server passes it on byte for byte
and decodes it only for handlers.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import msgspec
from msgspec import UNSET, Raw, UnsetType

from realtime.errors import BAD_REQUEST, ClientError

MAX_DEPTH = 128
"""Levels of nested lists and objects in one text."""

BINARY = b"\0"
"""The first byte of embedded bytes that are not JSON text, which never starts with it; see `text_or_bytes`."""

_STEP = 16384  # bytes checked in one step
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"')
_SEGMENT = re.compile(rb'(?:[^"]++|"(?:[^"\\]++|\\.)*+")*+')
# Text without half a surrogate pair.
_UNICODE = re.compile(
    rb"(?:[^\\]++|\\[^u]|\\u(?:[^dD]|[dD][0-7])|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F])*+", re.DOTALL
)
# An escape that may be half a surrogate pair.
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_LINE_ENDS = b"\r\n"
_CHANGE = {bracket: 1 if bracket in b"[{" else -1 for bracket in b"[]{}"}
_OTHER_BYTES = bytes(set(range(256)) - set(_CHANGE))
_NO_MARKS = bytes(set(_OTHER_BYTES) - set(b","))
# As numbers: `number in bytes` is several times as fast as a search for a bytes object of one byte.
_LF, _CR, _LIST, _OBJECT, _ESCAPE, _COMMA = b"\n\r[{\\,"


def payload(text: Raw | UnsetType) -> bytes:
    """Return the bytes of an embedded JSON value on one line, safe to store and pass on; b"" if it is absent.

    `text` is valid JSON by the decoder's check. Raises ClientError 107 for nesting deeper than MAX_DEPTH, since other
    readers may recurse, and for half a surrogate pair, which is not Unicode text (RFC 8259 section 8.2).
    """
    if text is UNSET:
        return b""
    data = bytes(text)
    if _LF in data or _CR in data:
        data = data.translate(None, _LINE_ENDS)
    # Ordinary text passes without a generator.
    if _ESCAPE in data or (len(data) > MAX_DEPTH and (_LIST in data or _OBJECT in data) and _may_be_deep(data)):
        for _ in check_steps(data):
            pass
    return data


def check_steps(data: bytes) -> Iterator[None]:
    """Check valid JSON text as `payload` does, in steps of about a millisecond. Raises ClientError 107."""
    # A search for one byte is cheap and settles nearly every case; only suspicious text gets the thorough checks.
    may_be_deep = (_LIST in data or _OBJECT in data) and _may_be_deep(data)
    may_have_half_pairs = _ESCAPE in data and _SURROGATE.search(data) is not None
    start = depth = 0
    while start < len(data) and (may_be_deep or may_have_half_pairs):
        # Whole strings, and anything between them. A string that is longer than a step is a step of its own.
        segment = _match(_SEGMENT, data, start, start + _STEP) or _match(_STRING, data, start, len(data))
        start += len(segment)
        if may_have_half_pairs and not _UNICODE.fullmatch(segment):
            raise ClientError(*BAD_REQUEST)
        if may_be_deep:
            brackets = _STRING.sub(b"", segment).translate(None, _OTHER_BYTES)
            levels = list(accumulate(map(_CHANGE.__getitem__, brackets), initial=depth))
            depth = levels[-1]
            if max(levels) > MAX_DEPTH:
                raise ClientError(*BAD_REQUEST)
        yield


def comma_steps(text: bytes) -> Iterator[int]:
    """Yield the number of commas between the items of a valid JSON list or object so far, in steps as `check_steps`."""
    start = depth = commas = 0
    while start < len(text):
        segment = _match(_SEGMENT, text, start, start + _STEP) or _match(_STRING, text, start, len(text))
        start += len(segment)
        for mark in _STRING.sub(b"", segment).translate(None, _NO_MARKS):
            if mark != _COMMA:
                depth += _CHANGE[mark]
            elif depth == 1:
                commas += 1
        yield commas


def _may_be_deep(data: bytes) -> bool:
    return data.count(_LIST) + data.count(_OBJECT) > MAX_DEPTH


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
    try:
        for _ in json_steps(data):
            pass
    except ClientError:
        return False
    return True


def json_steps(data: bytes) -> Iterator[None]:
    """Check arbitrary bytes as `is_json` does, in steps. Raises ClientError 107 if they are not JSON."""
    if not data.strip(_LINE_ENDS):
        return
    try:
        data.decode()
        text = bytes(_decode_raw(data))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise ClientError(*BAD_REQUEST) from None
    yield from check_steps(text)


def value(data: bytes) -> Any:
    """Decode a `payload`; None for b"". Raises ClientError 107 for a number beyond every Python type."""
    if not data:
        return None
    try:
        return _decode_value(data)
    except (msgspec.MsgspecError, RecursionError):
        raise ClientError(*BAD_REQUEST) from None


def value_or_bytes(content: bytes) -> Any:
    """Decode a result of `text_or_bytes`: as `value`, and the bytes behind BINARY as they are."""
    return content.removeprefix(BINARY) if content.startswith(BINARY) else value(content)


_decode_raw = msgspec.json.Decoder(Raw).decode
_decode_value = msgspec.json.Decoder().decode


def _match(pattern: re.Pattern[bytes], data: bytes, start: int, end: int) -> bytes:
    match = pattern.match(data, start, end)
    assert match is not None
    return match[0]
