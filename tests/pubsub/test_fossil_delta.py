"""Deltas: their format, their length, and that deltas between texts are text."""

from __future__ import annotations

import random
import re

import msgspec
import pytest
from centrifuge.fossil import apply_delta
from hypothesis import given
from hypothesis import strategies as st

from realtime.pubsub import fossil_delta
from realtime.pubsub.fossil_delta import delta

COMMAND = re.compile(rb"([0-9A-Za-z_~]+)([@:;])")
DIGITS = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ_abcdefghijklmnopqrstuvwxyz~"


def number(digits: bytes) -> int:
    value = 0
    for digit in digits:
        value = value * 64 + DIGITS.index(digit)
    return value


def applied(base: bytes, patch: bytes) -> bytes:
    """Return the target, decoded by the description of the format alone. `literals` checks each literal."""
    length, _, rest = patch.partition(b"\n")
    target, at = b"", 0
    while command := COMMAND.match(rest, at):
        count, at = number(command[1]), command.end()
        if command[2] == b"@":
            comma = rest.index(b",", at)
            offset = number(rest[at:comma])
            assert offset + count <= len(base)
            target += base[offset : offset + count]
            at = comma + 1
        elif command[2] == b":":
            target += rest[at : at + count]
            at += count
        else:
            words = target + bytes(-len(target) % 4)
            total = sum(int.from_bytes(words[i : i + 4], "big") for i in range(0, len(words), 4))
            assert (count, at, number(length)) == (total % 2**32, len(rest), len(target))
            return target
    raise AssertionError("no end")


def both_decoders_agree(base: bytes, target: bytes) -> bytes:
    patch = delta(base, target)
    assert applied(base, patch) == target
    assert apply_delta(base, patch) == target
    return patch


@pytest.mark.parametrize(
    ("base", "target", "expected"),
    [
        (b"", b"hi", b"2\n2:hi1dQG00;"),
        (b'{"n":1,"t":"hello world, hello again"}', b'{"n":2,"t":"hello world, hello again"}', None),
        (b'{"a":"%b"}' % (b"x" * 100), b'{"a":"%by"}' % (b"x" * 100), b"1i\n1f@0,1:y2@1f,3r29sx;"),
        (b"", b"", b"0\n0;"),
        (b"abc", b"", b"0\n0;"),
        (b"abcde", b"abcde", b"5\n5@0,36ObD_;"),
    ],
)
def test_the_format(base: bytes, target: bytes, expected: bytes | None) -> None:
    patch = both_decoders_agree(base, target)
    if expected is not None:
        assert patch == expected


def test_a_small_change_makes_a_small_delta() -> None:
    base = msgspec.json.encode({"n": 1, "rows": [{"id": n, "name": f"row {n}"} for n in range(1000)]})
    target = msgspec.json.encode({"n": 2, "rows": [{"id": n, "name": f"row {n}"} for n in range(1000)]})
    assert len(both_decoders_agree(base, target)) < 30


def test_scattered_changes_and_moved_pieces() -> None:
    rows = [msgspec.json.encode({"id": n, "name": f"row {n}", "price": n * 7919 % 1000}) for n in range(200)]
    changed = list(rows)
    for n in (3, 50, 120, 180):
        changed[n] = b'{"new":true}'
    changed[10:20], changed[90:100] = rows[90:100], rows[10:20]
    base, target = b",".join(rows), b",".join(changed)
    assert len(both_decoders_agree(base, target)) < 250


def test_a_repeated_row_is_copied() -> None:
    rows = [{"identifier": n, "description": "nothing to say", "available": True} for n in range(10)]
    patch = both_decoders_agree(msgspec.json.encode(rows[:9]), msgspec.json.encode(rows))
    assert len(patch) < 50


@given(st.binary(max_size=200), st.binary(max_size=200))
def test_any_two_byte_strings(base: bytes, target: bytes) -> None:
    both_decoders_agree(base, target)


# Few characters of one to four bytes, which share their first and last bytes, so that many match in part.
TEXTS = st.text(alphabet="ab\u00e9\u00e8\u0129\u20ac\u20ad\U0001f600\U0001f640", max_size=120)


@given(TEXTS, TEXTS)
def test_a_delta_between_texts_is_text(base: str, target: str) -> None:
    both_decoders_agree(base.encode(), target.encode()).decode()


@given(st.lists(TEXTS, max_size=8), st.randoms(use_true_random=False))
def test_a_delta_between_texts_of_the_same_pieces_is_text(pieces: list[str], chance: random.Random) -> None:
    base = "".join(piece * 3 for piece in pieces)
    chance.shuffle(pieces)
    both_decoders_agree(base.encode(), "".join(piece * 3 for piece in pieces).encode()).decode()


@pytest.mark.parametrize("size", [10_000, 300_000])
def test_large_texts_without_common_pieces(size: int) -> None:
    chance = random.Random(7)
    base, target = chance.randbytes(size), chance.randbytes(size)
    assert len(both_decoders_agree(base, target)) < size + 20


@pytest.mark.parametrize(("limit", "value"), [("_PROBES", 50), ("_BLOCKS", 1)])
def test_the_cost_of_a_delta_is_limited(limit: str, value: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(7)
    base, between = chance.randbytes(2000), chance.randbytes(100)
    target = between + base[500:1500] + between
    assert len(both_decoders_agree(base, target)) < 250
    monkeypatch.setattr(fossil_delta, limit, value)
    assert len(both_decoders_agree(base, target)) > 1000


def test_a_repetitive_text() -> None:
    base = b"ab" * 5000
    assert len(both_decoders_agree(base, b"x" + b"ab" * 4000 + b"y" + b"ba" * 4000 + b"z")) < 60
