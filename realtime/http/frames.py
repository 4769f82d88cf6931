"""Frames of RFC 6455 section 5.2: where a client's begin and end; a server's, ready for the socket, final and unmasked.

A frame is built once and shared by every connection that it goes to.
"""

from __future__ import annotations

import struct

_TEXT = 0x81  # FIN and the opcode
_BINARY = 0x82
_CLOSE = 0x88
_PING = 0x89
_PONG = 0x8A
_COMPRESSED = 0x40  # the bit RSV1

# Headers, by the number of bytes that the length takes.
_SHORT, _MEDIUM, _LONG = (struct.Struct(f"!BB{length}").pack for length in ("", "H", "Q"))

MAX_CLOSE_REASON = 123  # bytes: a control frame carries 125, two of which are the code (section 5.5)


def text_frame(payload: bytes) -> bytes:
    """One whole text message. payload: UTF-8; it is not checked."""
    return _frame(_TEXT, payload)


def binary_frame(payload: bytes) -> bytes:
    """One whole binary message."""
    return _frame(_BINARY, payload)


def compressed(frame: bytes) -> bytes:
    """The same frame, its payload declared to be compressed (RFC 7692 section 6)."""
    return bytes((frame[0] | _COMPRESSED,)) + frame[1:]


def ping_frame() -> bytes:
    """A ping without a payload."""
    return _frame(_PING, b"")


def pong_frame(payload: bytes) -> bytes:
    """The answer to a ping. payload: the ping's own, at most 125 bytes."""
    return _frame(_PONG, payload)


def close_frame(code: int, reason: str) -> bytes:
    """A close frame. reason: cut to 123 bytes of UTF-8, between characters."""
    text = reason.encode()
    if len(text) > MAX_CLOSE_REASON:
        text = text[:MAX_CLOSE_REASON].decode(errors="ignore").encode()
    return _frame(_CLOSE, code.to_bytes(2, "big") + text)


def frame_at(data: bytes, start: int) -> tuple[int, int] | None:
    """Where the payload of the frame at `start` begins, and where the frame ends, which may be past the end of `data`.

    None while its header is not whole. The header is not judged. A mask is the four bytes before the payload.
    """
    if len(data) < start + 2:
        return None
    second = data[start + 1]
    length = second & 0x7F
    body = start + 6 if second & 0x80 else start + 2
    if length == 126:
        body += 2
        length = int.from_bytes(data[start + 2 : start + 4], "big")
    elif length == 127:
        body += 8
        length = int.from_bytes(data[start + 2 : start + 10], "big")
    return (body, body + length) if body <= len(data) else None


def message_at(frame: bytes, first: int, limit: int) -> int:
    """Where the payload begins, if `frame` is one client's frame, whole, with just one message; 0 for anything else.

    first: its first byte, which tells what the message is. limit: bytes of the payload. A client's frames are masked,
    and their lengths are in the shortest form.
    """
    size = len(frame)
    if size < 6 or frame[0] != first or frame[1] < 0x80:
        return 0
    length = frame[1] & 0x7F
    if length < 126:
        body = 6
    elif length == 126 and (length := frame[2] << 8 | frame[3]) > 125:
        body = 8
    else:
        return 0  # longer ones are for those who have the time
    return body if body + length == size and length <= limit else 0


def _frame(first: int, payload: bytes) -> bytes:
    length = len(payload)
    if length < 126:
        return _SHORT(first, length) + payload
    if length < 65536:
        return _MEDIUM(first, 126, length) + payload
    return _LONG(first, 127, length) + payload
