"""WebSocket frames (RFC 6455 section 5.2): builders for the server's frames, and the boundaries of a client's frames.

A server frame is final, unmasked and ready for the socket. It is built once and shared by all its receivers.
"""

from __future__ import annotations

import struct

_TEXT = 0x81  # FIN and opcode
_BINARY = 0x82
_CLOSE = 0x88
_PING = 0x89
_PONG = 0x8A
_COMPRESSED = 0x40  # the bit RSV1

# Headers with a length of 7, 16 and 64 bits.
_SHORT, _MEDIUM, _LONG = (struct.Struct(f"!BB{length}").pack for length in ("", "H", "Q"))

MAX_CLOSE_REASON = 123  # bytes: a control frame carries at most 125, two of them for the code (section 5.5)


def text_frame(payload: bytes) -> bytes:
    """Build a frame with a complete text message. payload: UTF-8, not checked here."""
    length = len(payload)
    if length < 126:  # as `_frame`, without a further call for each small reply
        return _SHORT(_TEXT, length) + payload
    if length < 65536:
        return _MEDIUM(_TEXT, 126, length) + payload
    return _frame(_TEXT, payload)


def binary_frame(payload: bytes) -> bytes:
    """Build a frame with a complete binary message."""
    return _frame(_BINARY, payload)


def mark_compressed(frame: bytes) -> bytes:
    """Return the frame with RSV1 set, which declares its payload compressed (RFC 7692 section 6)."""
    return bytes((frame[0] | _COMPRESSED,)) + frame[1:]


def ping_frame() -> bytes:
    """Build a ping without payload."""
    return _frame(_PING, b"")


def pong_frame(payload: bytes) -> bytes:
    """Build the reply to a ping. payload: that of the ping, at most 125 bytes."""
    return _frame(_PONG, payload)


def close_frame(code: int, reason: str) -> bytes:
    """Build a close frame. reason: truncated to 123 bytes of UTF-8, at a character boundary."""
    text = reason.encode()
    if len(text) > MAX_CLOSE_REASON:
        text = text[:MAX_CLOSE_REASON].decode(errors="ignore").encode()
    return _frame(_CLOSE, code.to_bytes(2, "big") + text)


def masked_frame(first_byte: int, mask: bytes, payload: bytes, length: int) -> bytes:
    """Build a client's frame, or its beginning: `payload` is masked already, and may be shorter than `length`."""
    if length < 126:
        return _SHORT(first_byte, 0x80 | length) + mask + payload
    if length < 65536:
        return _MEDIUM(first_byte, 0x80 | 126, length) + mask + payload
    return _LONG(first_byte, 0x80 | 127, length) + mask + payload


def frame_bounds(data: bytes, start: int) -> tuple[int, int] | None:
    """Return (payload start, frame end) of the frame that begins at `start`; None while its header is incomplete.

    The frame may end behind `data`. The header is not validated. A mask is the four bytes before the payload.
    """
    if len(data) < start + 2:
        return None
    second = data[start + 1]
    length = second & 0x7F
    payload = start + 6 if second & 0x80 else start + 2
    if length == 126:
        payload += 2
        length = int.from_bytes(data[start + 2 : start + 4], "big")
    elif length == 127:
        payload += 8
        length = int.from_bytes(data[start + 2 : start + 10], "big")
    return (payload, payload + length) if payload <= len(data) else None


def whole_message(data: bytes, first_byte: int, limit: int) -> int:
    """Return the payload's offset if `data` is exactly one client frame with one complete message; 0 for anything else.

    first_byte: FIN, no reserved bit, and the opcode of the message. limit: largest payload in bytes. A client's frame
    is masked, and its length is in the shortest form.

    It is called for each segment that a client sends, so it compares the header's bytes in place, without slices. A
    frame with a 64-bit length gives 0: Autobahn parses it, and its time does not matter for 64 KB.
    """
    size = len(data)
    if size < 6 or data[0] != first_byte or data[1] < 0x80:
        return 0
    length = data[1] & 0x7F
    if length < 126:
        payload = 6
    elif length == 126 and (length := data[2] << 8 | data[3]) > 125:
        payload = 8
    else:
        return 0
    return payload if payload + length == size and length <= limit else 0


def _frame(first_byte: int, payload: bytes) -> bytes:
    length = len(payload)
    if length < 126:
        return _SHORT(first_byte, length) + payload
    if length < 65536:
        return _MEDIUM(first_byte, 126, length) + payload
    return _LONG(first_byte, 127, length) + payload
