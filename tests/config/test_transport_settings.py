"""The settings of the transports."""

from __future__ import annotations

import pytest

from realtime.config.settings import Settings
from tests.config.parsing import parse_file

KEYS = {
    "websocket.batch_size_limit": 2_000_000,
    "websocket.control_frames_per_second": 50,
    "uni_websocket.message_size_limit": 1000,
    "emulation.max_held_bytes": 0,
    "emulation.max_queued_bytes": 1_000_000,
}


@pytest.mark.parametrize("key", KEYS)
def test_a_limit_of_a_transport_is_read(key: str) -> None:
    table, _, name = key.partition(".")
    assert getattr(getattr(parse_file(f"{key} = {KEYS[key]}"), table), name) == KEYS[key]


def test_a_batch_may_hold_the_subscriptions_of_a_client_with_the_longest_tokens() -> None:
    tree = Settings()
    longest = tree.client.channel_limit * tree.client.token.max_length
    assert longest < tree.websocket.batch_size_limit
    assert longest < tree.emulation.max_request_body_size < tree.emulation.max_queued_bytes
