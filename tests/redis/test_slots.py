"""Slots and shards of keys."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realtime.redis.slots import SLOTS, shard_of, slot_of
from tests.redis.deployments import RedisStarter

KEYS = [
    "",
    "foo",
    "{user1000}.following",
    "foo{}{bar}",
    "foo{{bar}}zap",
    "foo{bar}{zap}",
    "x{é\x00}",
    "{",
    "}{",
    "a}b{c",
]


def test_the_slot_of_a_key_is_that_of_redis(redis_starter: RedisStarter) -> None:
    [node] = redis_starter.cluster(masters=1, replicas=0).servers
    assert [slot_of(key.encode()) for key in KEYS] == [node.command("CLUSTER", "KEYSLOT", key) for key in KEYS]


@given(st.binary(max_size=30), st.binary(min_size=1, max_size=30), st.binary())
def test_keys_with_one_hash_tag_share_a_slot(kind: bytes, channel: bytes, rest: bytes) -> None:
    kind, tag = kind.replace(b"{", b""), channel.replace(b"}", b"")
    assert slot_of(b"%b{%b}%b" % (kind, tag, rest)) == slot_of(b"{%b}" % tag) < SLOTS or not tag


@pytest.mark.parametrize("count", [1, 2, 5])
def test_shards_have_equal_shares(count: int) -> None:
    shares = Counter(shard_of(b"channel:%d" % number, count) for number in range(5_000))
    assert set(shares) == set(range(count))
    assert min(shares.values()) > 0.85 * 5_000 / count


@given(st.binary(max_size=30), st.integers(1, 50))
def test_a_further_shard_takes_keys_and_moves_no_others(key: bytes, count: int) -> None:
    assert shard_of(key, count + 1) in (shard_of(key, count), count)
