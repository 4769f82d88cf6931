"""The names of keys: all keys of one channel lie in one slot."""

from __future__ import annotations

import pytest

from realtime.redis.keys import hash_tag, key
from realtime.redis.slots import slot_of


@pytest.mark.parametrize("channel", ["news", "", "}", "{}", "a{b}c", "$private:#42", "ключ}"])
def test_all_keys_of_a_channel_lie_in_one_slot(channel: str) -> None:
    keys = [key("realtime", kind, channel) for kind in ("meta", "history", "channel", "once")]
    assert {slot_of(each + b"more") for each in keys} == {slot_of(hash_tag(channel))}
    assert len(set(keys)) == 4


def test_channels_have_different_keys() -> None:
    assert key("realtime", "meta", "a") == b"realtime.meta.{.a}"
    assert key("other", "meta", "a") != key("realtime", "meta", "a") != key("realtime", "meta", "b")
