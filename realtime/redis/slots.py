"""Which of several servers has a key: the slots of a Cluster, and the shards of several addresses. No I/O."""

from __future__ import annotations

from binascii import crc_hqx

SLOTS = 16384

_FNV_OFFSET, _FNV_PRIME, _UINT64 = 14695981039346656037, 1099511628211, 2**64 - 1


def slot_of(key: bytes) -> int:
    """Return the slot of a key: of its hash tag, the text between the first { and the first } after it, if not empty.

    Source: the Redis Cluster specification, "Key distribution model" and "Hash tags".
    """
    start = key.find(b"{")
    if start >= 0:
        end = key.find(b"}", start + 1)
        if end > start + 1:
            key = key[start + 1 : end]
    return crc_hqx(key, 0) % SLOTS


def shard_of(key: bytes, count: int) -> int:
    """Return the shard of a key, from 0 to count - 1. Another shard takes over only its share of the keys.

    Source: Lamping and Veach, "A Fast, Minimal Memory, Consistent Hash Algorithm", 2014; seeded by FNV-1a, 64 bits.
    Centrifugo distributes channels over its shards in the same way.
    """
    state = _FNV_OFFSET
    for byte in key:
        state = ((state ^ byte) * _FNV_PRIME) & _UINT64
    shard, following = -1, 0
    while following < count:
        shard = following
        state = (state * 2862933555777941757 + 1) & _UINT64
        following = int((shard + 1) * (2**31 / ((state >> 33) + 1)))
    return shard
