"""Fossil deltas, read."""

from __future__ import annotations

import struct

DIGITS = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ_abcdefghijklmnopqrstuvwxyz~"


class _Reader:
    """The numbers, signs and texts of a delta, one after the other."""

    def __init__(self, delta: bytes) -> None:
        self._delta = delta
        self._at = 0

    def number(self) -> int:
        value = 0
        while self._at < len(self._delta) and (digit := DIGITS.find(self._delta[self._at])) >= 0:
            value = value * 64 + digit
            self._at += 1
        return value

    def text(self, size: int) -> bytes:
        self._at += size
        return self._delta[self._at - size : self._at]


def apply_delta(base: bytes, delta: bytes) -> bytes:
    """The text that a delta makes of `base`. ValueError: the delta is damaged or does not fit."""
    reader = _Reader(delta)
    out = b""
    size = reader.number()
    if reader.text(1) != b"\n":
        raise ValueError("the delta has no length")
    while True:
        count, command = reader.number(), reader.text(1)
        if command == b"@":
            start = reader.number()
            if reader.text(1) != b"," or start + count > len(base):
                raise ValueError("the delta copies bytes that its base does not have")
            out += base[start : start + count]
        elif command == b":":
            out += reader.text(count)
        elif command == b";":
            if len(out) != size or checksum(out) != count:
                raise ValueError("the delta's length or checksum is wrong")
            return out
        else:
            raise ValueError("the delta has an unknown command")


def checksum(text: bytes) -> int:
    """The sum of the text's 32-bit words, big-endian, zeros behind its end."""
    padded = text + bytes(-len(text) % 4)
    return sum(struct.unpack(f">{len(padded) // 4}I", padded)) % 2**32
