"""Deltas: encodes a publication as its difference from the previous one (client protocol, delta compression).

The format is that of the Fossil SCM: commands copy from the base or insert literal bytes, and numbers are in base 64.

    delta  :=  <length of the target> LF { <count> "@" <offset in the base> "," | <count> ":" <bytes> } <checksum> ";"
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterator

# Bytes of the shortest match that is searched for between the common prefix and the common suffix.
_BLOCK = 16
# Limits of the cost: indexed blocks of the base, and lookups of the target that find nothing.
_BLOCKS = 2048
_PROBES = 2048

_DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ_abcdefghijklmnopqrstuvwxyz~"

# A piece of the target that the base has too: its start and end in the target, and its start in the base.
_Match = tuple[int, int, int]


def delta(base: bytes, target: bytes) -> bytes:
    """Return the delta that turns `base` into `target`; longer than `target` if the two have little in common.

    The time is linear in the lengths. A delta between UTF-8 texts is UTF-8 itself.
    """
    out = [_number(len(target)), b"\n"]
    at = 0
    for start, end, source in _matches(base, target):
        # A literal must not start or end inside a character, so a copy must not either.
        lead, tail = _to_character(target, start), _back_to_character(target, end)
        if tail - lead < 1:
            continue
        if at < lead:
            out += _number(lead - at), b":", target[at:lead]
        out += _number(tail - lead), b"@", _number(source + lead - start), b","
        at = tail
    if at < len(target):
        out += _number(len(target) - at), b":", target[at:]
    out += _number(_checksum(target)), b";"
    return b"".join(out)


def _matches(base: bytes, target: bytes) -> Iterator[_Match]:
    """Yield matches in the order of the target, without overlaps."""
    prefix = _common_prefix(base, 0, target, 0, min(len(base), len(target)))
    if prefix:
        yield 0, prefix, 0
    suffix = _common_suffix(base, len(base), target, len(target), min(len(base), len(target)) - prefix)
    end = len(target) - suffix
    if end - prefix >= _BLOCK and len(base) >= _BLOCK:
        yield from _inner_matches(base, target, prefix, end)
    if suffix:
        yield end, len(target), len(base) - suffix


def _inner_matches(base: bytes, target: bytes, at: int, end: int) -> Iterator[_Match]:
    """Yield matches within target[at:end]: blocks of the base, extended in both directions."""
    size = max(_BLOCK, len(base) // _BLOCKS)
    # Backwards, so that the first of equal blocks stays: it can be extended the furthest.
    places = {base[i : i + size]: i for i in range(len(base) // size * size - size, -1, -size)}
    probes = _PROBES
    done = at
    while at + size <= end and probes:
        place = places.get(target[at : at + size])
        if place is None:
            at += 1
            probes -= 1
            continue
        back = _common_suffix(base, place, target, at, min(place, at - done))
        ahead = _common_prefix(base, place, target, at, min(len(base) - place, end - at))
        yield at - back, at + ahead, place - back
        done = at = at + ahead


def _common_prefix(a: bytes, i: int, b: bytes, j: int, limit: int) -> int:
    """Return the number of equal bytes from a[i] and b[j] on, up to `limit`.

    The steps double, so that memory is compared at the speed of C, and at most a few times as much as the result.
    """
    same, step = 0, _BLOCK
    while same < limit and step:
        step = min(step, limit - same)
        if a[i + same : i + same + step] == b[j + same : j + same + step]:
            same += step
            step *= 2
        else:
            limit = same + step - 1
            step //= 2
    return same


def _common_suffix(a: bytes, i: int, b: bytes, j: int, limit: int) -> int:
    """Return the number of equal bytes before a[i] and b[j], up to `limit`."""
    same, step = 0, _BLOCK
    while same < limit and step:
        step = min(step, limit - same)
        if a[i - same - step : i - same] == b[j - same - step : j - same]:
            same += step
            step *= 2
        else:
            limit = same + step - 1
            step //= 2
    return same


def _to_character(text: bytes, at: int) -> int:
    """Return the first character boundary of a UTF-8 text from `at` on, at most three bytes away (RFC 3629)."""
    last = min(at + 3, len(text))
    while at < last and text[at] & 0xC0 == 0x80:
        at += 1
    return at


def _back_to_character(text: bytes, at: int) -> int:
    """Return the last character boundary of a UTF-8 text up to `at`."""
    first = max(at - 3, 0)
    while first < at < len(text) and text[at] & 0xC0 == 0x80:
        at -= 1
    return at


def _number(value: int) -> bytes:
    digits = _DIGITS[value & 63]
    while value := value >> 6:
        digits = _DIGITS[value & 63] + digits
    return digits.encode()


def _checksum(data: bytes) -> int:
    """Return the sum of the big-endian 32-bit words modulo 2**32. Zero bytes pad the last word."""
    words = array("I", data + bytes(-len(data) % 4))
    if sys.byteorder == "little":
        words.byteswap()
    return sum(words) & 0xFFFFFFFF
