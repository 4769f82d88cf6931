"""Compressed messages: permessage-deflate, RFC 7692, with no memory for a connection that is idle.

Every message is compressed by itself, in both directions: we announce that we keep no context, and ask the client to
keep none. So a broadcast is compressed once for all who get it, nothing of one client's messages shows in the length
of another's, and a connection holds neither compressor nor decompressor between messages.

What comes in is inflated step by step, so that a small message that stands for a huge one costs no more than what is
allowed.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable

from msgspec import Struct

from realtime.errors import RealtimeError
from realtime.http.frames import compressed

EXTENSION = "permessage-deflate"

# Base-2 logarithm of the bytes that a compressed message of ours may refer back to. JSON repeats itself within a few
# lines: with the 32 KB that are possible, messages of 128 bytes to 64 KB get no shorter than with these 4.
WINDOW = 12
# Of 1 to 9, how much memory is spent on a block; this window fills no more.
_MEMORY = 5

_MAX_OFFERS = 8  # offers read; more are ignored
# RFC 6455 section 9.1: a value is a token, or a token in quotes.
_PARAMETER = re.compile(r'([a-z_]+)(?:=("?)([0-9]+)\2)?')
_BITS = {str(bits): bits for bits in range(8, 16)}

# What each message is cut by, and is given back before it is inflated (sections 7.2.1 and 7.2.2): an empty block.
_TAIL = b"\x00\x00\xff\xff"
# An empty last block, so that the decompressor tells whether all that came before it was whole.
_LAST = b"\x03\x00"
# Follows a last block that the peer wrote of its own accord (section 7.2.3.4).
_AFTER_LAST = b"\x00"


class CorruptMessage(RealtimeError):
    """A peer sent what can't be inflated, or what is not whole."""


class MessageTooBig(RealtimeError):
    """A peer sent a message that grows past the limit."""


class Agreement(Struct, frozen=True):
    """What the two sides agreed on. response: for the header of the answer. window: see WINDOW; ours is no larger."""

    response: str
    window: int


def agree(offers: str) -> Agreement | None:
    """The first offer that we can keep to, None when there is none. offers: the value of Sec-WebSocket-Extensions.

    An offer that is malformed is passed over like one that we don't know: the client goes on uncompressed.
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
    # How far back the client would refer does not matter to us: there is room for the most.
    if (given.pop("client_max_window_bits", None) or "15") not in _BITS:
        return None
    response = f"{EXTENSION}; server_no_context_takeover; client_no_context_takeover"
    if not given:
        return Agreement(response, WINDOW)
    bits = _BITS.get(given.pop("server_max_window_bits", None) or "", 0)
    if given or bits <= 8:  # zlib can't keep to 8
        return None
    window = min(bits, WINDOW)
    return Agreement(f"{response}; server_max_window_bits={window}", window)


def deflate(data: bytes, window: int, level: int) -> bytes:
    """`data` as the payload of a compressed message. level: from 1, the fastest, to 9, the smallest."""
    deflater = zlib.compressobj(level, zlib.DEFLATED, -window, _MEMORY)
    whole = deflater.compress(data) + deflater.flush(zlib.Z_SYNC_FLUSH)
    return whole.removesuffix(_TAIL)


class CompressedFrames:
    """Frames for clients that agreed on a window; plain ones where compression would save nothing."""

    __slots__ = ("_level", "_min_size", "_plain", "_window")

    def __init__(self, plain: Callable[[bytes], bytes], window: int, level: int, min_size: int) -> None:
        """plain: makes an uncompressed frame. min_size: payloads of fewer bytes stay as they are."""
        self._plain = plain
        self._window = window
        self._level = level
        self._min_size = min_size

    def __call__(self, payload: bytes) -> bytes:
        if len(payload) >= self._min_size:
            deflated = deflate(payload, self._window, self._level)
            if len(deflated) < len(payload):
                return compressed(self._plain(deflated))
        return self._plain(payload)


class Inflater:
    """One compressed message on its way in, piece by piece."""

    __slots__ = ("_after", "_room", "_zlib")

    def __init__(self, limit: int) -> None:
        """limit: most bytes that the message may have when it is inflated."""
        self._zlib = zlib.decompressobj(-15)
        self._room = limit
        self._after = b""  # what came after a last block

    def feed(self, data: bytes) -> bytes:
        """The next part of the message. Raises CorruptMessage, MessageTooBig: then it is of no further use."""
        if self._zlib.eof:
            inflated, self._after = b"", self._after + data
        else:
            # Never more than one byte too many, whatever `data` stands for.
            inflated = self._inflate(data, self._room + 1)
            self._room -= len(inflated)
            self._after = self._zlib.unused_data
        if self._room < 0:
            raise MessageTooBig("grows past the limit")
        if self._after not in (b"", _AFTER_LAST):
            raise CorruptMessage("goes on after its end")
        return inflated

    def finish(self) -> None:
        """The message is at its end. Raises CorruptMessage when it is not whole, as far as that can be told."""
        if not self._zlib.eof and (self._inflate(_TAIL + _LAST, 1) or not self._zlib.eof or self._zlib.unused_data):
            raise CorruptMessage("ends too early")

    def _inflate(self, data: bytes, most: int) -> bytes:
        try:
            return self._zlib.decompress(data, most)
        except zlib.error as error:
            raise CorruptMessage(str(error)) from None
