"""Parser for request bodies, and the chunked coding of RFC 9112 section 7.1 in both directions.

A streaming response sends one chunk for each message: a chunk is complete in itself, many responses can share it, and
proxies pass it on at once.
"""

from __future__ import annotations

import re
from enum import Enum, auto
from http import HTTPStatus

from realtime.http.request import CHUNKED, Refusal

LAST_CHUNK = b"0\r\n\r\n"

_MAX_LINE = 1024  # bytes of a chunk's size line with its extensions, and of one trailer
_MAX_TRAILERS = 100
# A body may have 1000 chunks, and one more for each 64 bytes of content. Parsing a chunk takes about 10 µs.
_FREE_CHUNKS = 1000
_BYTES_PER_CHUNK = 64
# Eight digits are more than any size limit allows. Chunk extensions are ignored.
_SIZE = re.compile(rb"([0-9A-Fa-f]{1,8})(?:[ \t]*;[\t -~\x80-\xff]*)?")
_TRAILER = re.compile(rb"[!-9;-~]+:[\t -~\x80-\xff]*")


def chunk(data: bytes) -> bytes:
    """Encode one chunk. data: must not be empty, because an empty chunk ends the body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(payload: bytes) -> bytes:
    """Encode one server-sent event (HTML standard, section "Server-sent events"). payload: one line."""
    return b"data: %b\n\n" % payload


def line(payload: bytes) -> bytes:
    """Encode one line with its line feed. payload: without line ends."""
    return payload + b"\n"


def event_chunk(payload: bytes) -> bytes:
    """Encode one server-sent event as a chunk. payload: one line."""
    return chunk(b"data: %b\n\n" % payload)


def line_chunk(payload: bytes) -> bytes:
    """Encode one line, with its line feed, as a chunk. payload: without line ends."""
    return chunk(payload + b"\n")


def has_too_many_chunks(chunks: int, size: int) -> bool:
    """Return whether `chunks` is excessive for `size` bytes of content: parsing many tiny chunks blocks the loop."""
    return chunks > _FREE_CHUNKS + size // _BYTES_PER_CHUNK


class _Expected(Enum):
    SIZE = auto()
    END_OF_CHUNK = auto()
    TRAILER = auto()


class BodyParser:
    """Parser for the body of one request, which it collects in memory; discard it after its result."""

    __slots__ = ("_body", "_buffer", "_chunks", "_expected", "_is_chunked", "_limit", "_missing", "_trailers")

    def __init__(self, size: int, limit: int) -> None:
        """size: length in bytes or CHUNKED, as in `RequestHead.body`. limit: largest accepted length, in bytes."""
        self._limit = limit
        self._is_chunked = size == CHUNKED
        self._missing = 0 if self._is_chunked else size  # bytes missing of the current chunk, or of the plain body
        self._expected = _Expected.SIZE
        self._chunks = 0
        self._trailers = 0
        self._buffer = bytearray()  # unparsed bytes
        self._body = bytearray()

    @property
    def received(self) -> int:
        """Bytes that are kept of an incomplete body."""
        return len(self._body) + len(self._buffer)

    @property
    def missing(self) -> int:
        """Bytes missing of a body that is not chunked."""
        return self._missing

    def feed(self, data: bytes) -> bytes | Refusal | None:
        """Parse the next bytes; return the complete body, a refusal, or None while the body is incomplete.

        Bytes after the body are dropped.
        """
        self._buffer += data
        if len(self._body) + self._missing > self._limit:
            return _TOO_LARGE
        if not self._is_chunked:
            del self._buffer[: self._consume_content(0)]
            return None if self._missing else bytes(self._body)
        result: bytes | Refusal | None = None
        start = 0
        while result is None:
            start = self._consume_content(start)
            end = self._buffer.find(b"\r\n", start)
            if self._missing or (end < 0 and len(self._buffer) - start <= _MAX_LINE):
                break
            result = self._parse_line(bytes(self._buffer[start:end])) if 0 <= end <= start + _MAX_LINE else _MALFORMED
            start = end + 2
        del self._buffer[:start]
        return result

    def _consume_content(self, start: int) -> int:
        """Move content from the buffer, beginning at `start`, to the body; return the end of the moved range."""
        end = min(start + self._missing, len(self._buffer))
        self._body += self._buffer[start:end]
        self._missing -= end - start
        return end

    def _parse_line(self, line: bytes) -> bytes | Refusal | None:
        """Parse a size line, the empty end of a chunk, or a trailer, each without its CRLF."""
        match self._expected:
            case _Expected.SIZE:
                size = _SIZE.fullmatch(line)
                if size is None:
                    return _MALFORMED
                self._missing = int(size[1], 16)
                self._expected = _Expected.END_OF_CHUNK if self._missing else _Expected.TRAILER
                self._chunks += 1
                if has_too_many_chunks(self._chunks, len(self._body)):
                    return _MALFORMED
                return _TOO_LARGE if len(self._body) + self._missing > self._limit else None
            case _Expected.END_OF_CHUNK:
                self._expected = _Expected.SIZE
                return _MALFORMED if line else None
        if not line:
            return bytes(self._body)
        self._trailers += 1
        return None if _TRAILER.fullmatch(line) and self._trailers <= _MAX_TRAILERS else _MALFORMED


_TOO_LARGE = Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "request body too large", "body_too_large")
_MALFORMED = Refusal(HTTPStatus.BAD_REQUEST, "malformed request body", "body_syntax")
