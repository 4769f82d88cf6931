"""Bodies of requests and of endless responses: the chunked coding of RFC 9112 section 7.1, in both directions.

What goes out is a chunk for each message, so that it is complete, can be shared by many responses, and passes at once.
"""

from __future__ import annotations

import re
from enum import Enum, auto
from http import HTTPStatus

from realtime.http.request import CHUNKED, Refusal

LAST_CHUNK = b"0\r\n\r\n"

_MAX_LINE = 1024  # bytes of the line before a chunk with its extensions, and of one trailer
_MAX_TRAILERS = 100
# Chunks that any body may have, and bytes on average that pay for more of them. Reading a chunk takes about 10 µs.
_FREE_CHUNKS = 1000
_WORTH = 64
# Eight digits are more than any limit allows. Extensions mean nothing to us.
_SIZE = re.compile(rb"([0-9A-Fa-f]{1,8})(?:[ \t]*;[\t -~\x80-\xff]*)?")
_TRAILER = re.compile(rb"[!-9;-~]+:[\t -~\x80-\xff]*")


def chunk(data: bytes) -> bytes:
    """One chunk. data: not empty, which would be the last one."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def event_chunk(payload: bytes) -> bytes:
    """One server-sent event, by the HTML standard's section on them. payload: without line ends."""
    return chunk(b"data: %b\n\n" % payload)


def line_chunk(payload: bytes) -> bytes:
    """One line. payload: without line ends."""
    return chunk(payload + b"\n")


def too_many(chunks: int, size: int) -> bool:
    """Whether `size` bytes of a body came in so many chunks that reading more of the kind would hold others up."""
    return chunks > _FREE_CHUNKS + size // _WORTH


class _Expected(Enum):
    SIZE = auto()
    END_OF_CHUNK = auto()
    TRAILER = auto()


class Body:
    """Reads the body of one request into memory. After a verdict it is used up."""

    __slots__ = ("_body", "_buffer", "_chunked", "_chunks", "_expected", "_left", "_limit", "_trailers")

    def __init__(self, size: int, limit: int) -> None:
        """size: as in `Head.body`. limit: most bytes that are taken."""
        self._limit = limit
        self._chunked = size == CHUNKED
        self._left = 0 if self._chunked else size  # bytes of this chunk, or of the whole body, that are still to come
        self._expected = _Expected.SIZE
        self._chunks = 0
        self._trailers = 0
        self._buffer = bytearray()  # what is not judged yet
        self._body = bytearray()

    def feed(self, data: bytes) -> bytes | Refusal | None:
        """Take the next bytes: the whole body, what is wrong with it, or None as long as it is not complete.

        What follows the body is dropped.
        """
        self._buffer += data
        if len(self._body) + self._left > self._limit:
            return _TOO_LARGE
        if not self._chunked:
            del self._buffer[: self._take(0)]
            return None if self._left else bytes(self._body)
        verdict: bytes | Refusal | None = None
        start = 0
        while verdict is None:
            start = self._take(start)
            end = self._buffer.find(b"\r\n", start)
            if self._left or (end < 0 and len(self._buffer) - start <= _MAX_LINE):
                break
            verdict = self._judge(bytes(self._buffer[start:end])) if 0 <= end <= start + _MAX_LINE else _MALFORMED
            start = end + 2
        del self._buffer[:start]
        return verdict

    def _take(self, start: int) -> int:
        """Keep what is content; returns where it ends."""
        end = min(start + self._left, len(self._buffer))
        self._body += self._buffer[start:end]
        self._left -= end - start
        return end

    def _judge(self, line: bytes) -> bytes | Refusal | None:
        match self._expected:
            case _Expected.SIZE:
                size = _SIZE.fullmatch(line)
                if size is None:
                    return _MALFORMED
                self._left = int(size[1], 16)
                self._expected = _Expected.END_OF_CHUNK if self._left else _Expected.TRAILER
                self._chunks += 1
                if too_many(self._chunks, len(self._body)):
                    return _MALFORMED
                return _TOO_LARGE if len(self._body) + self._left > self._limit else None
            case _Expected.END_OF_CHUNK:
                self._expected = _Expected.SIZE
                return _MALFORMED if line else None
        if not line:
            return bytes(self._body)
        self._trailers += 1
        return None if _TRAILER.fullmatch(line) and self._trailers <= _MAX_TRAILERS else _MALFORMED


_TOO_LARGE = Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "request body too large", "body_too_large")
_MALFORMED = Refusal(HTTPStatus.BAD_REQUEST, "malformed request body", "body_syntax")
