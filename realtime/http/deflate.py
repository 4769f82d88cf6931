"""Message compression with permessage-deflate (RFC 7692) that needs no memory for idle connections.

Each message is compressed independently, in both directions: the server announces that it keeps no context, and asks
the client to keep none. A broadcast is therefore compressed once for all its receivers, the length of one client's
message reveals nothing about another's, and a connection holds no compressor or decompressor between messages.

Incoming messages are inflated in steps, so a decompression bomb costs no more than a message of the allowed size.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable

from msgspec import Struct

from realtime.errors import RealtimeError
from realtime.http.frames import mark_compressed

EXTENSION = "permessage-deflate"

# Window of outgoing messages: base-2 logarithm of the bytes to which a message may refer back. JSON repeats itself
# within a few lines: messages of 128 bytes to 64 KB get no shorter with the largest window of 32 KB than with 4 KB.
WINDOW = 12
# zlib's memLevel, 1 to 9; this window makes no use of more.
_MEMORY_LEVEL = 5

_MAX_OFFERS = 8  # further offers are ignored
# RFC 6455 section 9.1: a value is a token or a quoted token.
_PARAMETER = re.compile(r'([a-z_]+)(?:=("?)([0-9]+)\2)?')
_BITS = {str(bits): bits for bits in range(8, 16)}

# An empty block: removed from the end of each compressed message, appended again before inflating (7.2.1, 7.2.2).
_TAIL = b"\x00\x00\xff\xff"
# An empty final block: the decompressor reports the end of the stream only if all earlier blocks were complete.
_FINAL_BLOCK = b"\x03\x00"
# Follows a final block written by the peer itself (section 7.2.3.4).
_AFTER_FINAL_BLOCK = b"\x00"


class CorruptMessage(RealtimeError):
    """A peer sent an incomplete message, or one that cannot be inflated."""


class MessageTooBig(RealtimeError):
    """A peer sent a message whose inflated size exceeds the limit."""


class Agreement(Struct, frozen=True):
    """Negotiated parameters. response: value of the response's header. window: of outgoing messages, at most WINDOW."""

    response: str
    window: int


def negotiate(offers: str) -> Agreement | None:
    """Accept the first supported offer; return None if there is none. offers: the value of Sec-WebSocket-Extensions.

    A malformed offer is skipped like an unknown one: the connection stays uncompressed.
    """
    for offer in offers.split(",", _MAX_OFFERS)[:_MAX_OFFERS]:
        agreement = _accept(offer)
        if agreement is not None:
            return agreement
    return None


def _accept(offer: str) -> Agreement | None:
    name, *parameters = (part.strip(" \t") for part in offer.split(";"))
    if name != EXTENSION:
        return None
    given: dict[str, str | None] = {}
    for parameter in parameters:
        match = _PARAMETER.fullmatch(parameter)
        if match is None or match[1] in given:
            return None
        given[match[1]] = match[3]
    for flag in ("server_no_context_takeover", "client_no_context_takeover"):
        if given.pop(flag, None) is not None:
            return None
    # The client's window is of no concern: incoming messages are inflated with the largest.
    if (given.pop("client_max_window_bits", None) or "15") not in _BITS:
        return None
    response = f"{EXTENSION}; server_no_context_takeover; client_no_context_takeover"
    if not given:
        return Agreement(response, WINDOW)
    bits = _BITS.get(given.pop("server_max_window_bits", None) or "", 0)
    if given or bits <= 8:  # zlib does not support a raw window of 8
        return None
    window = min(bits, WINDOW)
    return Agreement(f"{response}; server_max_window_bits={window}", window)


def deflate(data: bytes, window: int, level: int) -> bytes:
    """Compress `data` into the payload of a compressed message. level: 1 (fastest) to 9 (smallest)."""
    deflater = zlib.compressobj(level, zlib.DEFLATED, -window, _MEMORY_LEVEL)
    deflated = deflater.compress(data) + deflater.flush(zlib.Z_SYNC_FLUSH)
    return deflated.removesuffix(_TAIL)


class CompressedFrames:
    """Builder of compressed frames for one window; it leaves a payload uncompressed if compression saves nothing."""

    __slots__ = ("_level", "_min_size", "_plain", "_window")

    def __init__(self, plain: Callable[[bytes], bytes], window: int, level: int, min_size: int) -> None:
        """plain: builds an uncompressed frame. min_size: shorter payloads, in bytes, are not compressed."""
        self._plain = plain
        self._window = window
        self._level = level
        self._min_size = min_size

    def __call__(self, payload: bytes) -> bytes:
        if len(payload) >= self._min_size:
            deflated = deflate(payload, self._window, self._level)
            if len(deflated) < len(payload):
                return mark_compressed(self._plain(deflated))
        return self._plain(payload)


class Inflater:
    """Incremental decompressor for one incoming message."""

    __slots__ = ("_after_final", "_remaining", "_zlib")

    def __init__(self, limit: int) -> None:
        """limit: largest allowed size of the inflated message, in bytes."""
        self._zlib = zlib.decompressobj(-15)
        self._remaining = limit
        self._after_final = b""  # bytes after a final block

    def feed(self, data: bytes) -> bytes:
        """Inflate the next part of the message. Raises CorruptMessage or MessageTooBig; do not use it afterwards."""
        if self._zlib.eof:
            inflated, self._after_final = b"", self._after_final + data
        else:
            # At most one byte above the limit is inflated, even if `data` expands to gigabytes.
            inflated = self._inflate(data, self._remaining + 1)
            self._remaining -= len(inflated)
            self._after_final = self._zlib.unused_data
        if self._remaining < 0:
            raise MessageTooBig("inflates to more than the limit")
        if self._after_final not in (b"", _AFTER_FINAL_BLOCK):
            raise CorruptMessage("continues after its final block")
        return inflated

    def finish(self) -> None:
        """Check that the message was complete, as far as deflate shows it. Raises CorruptMessage."""
        if not self._zlib.eof and (
            self._inflate(_TAIL + _FINAL_BLOCK, 1) or not self._zlib.eof or self._zlib.unused_data
        ):
            raise CorruptMessage("is incomplete")

    def _inflate(self, data: bytes, max_length: int) -> bytes:
        try:
            return self._zlib.decompress(data, max_length)
        except zlib.error as error:
            raise CorruptMessage(str(error)) from None
