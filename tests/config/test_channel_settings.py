"""The tables of channels: names of namespaces, and history options."""

from __future__ import annotations

import pytest

from realtime.config.channel_settings import ChannelOptions, history_options
from realtime.types import HistoryOptions
from tests.config.parsing import problem

REFUSED = [
    ("[[channel.namespaces]]\nname = 'x'", 2, "expected a name of two or more of"),
    ("[[channel.namespaces]]\nname = 'a b'", 2, 'such as "chat", got "a b"'),
    ('[[channel.namespaces]]\nname = "chat\\n"', 2, "channel.namespaces[0].name"),
]


@pytest.mark.parametrize(("text", "line", "message"), REFUSED, ids=[message[:40] for _, _, message in REFUSED])
def test_a_wrong_name_of_a_namespace_is_refused_with_its_line(text: str, line: int, message: str) -> None:
    found = problem(text)
    assert found.startswith(f"realtime.toml:{line}: ")
    assert message in found


def test_a_channel_without_a_lifetime_for_its_numbering_has_the_default() -> None:
    options = ChannelOptions(history_size=5, history_ttl=60.0)
    assert history_options(options, 600.0) == HistoryOptions(5, 60.0, 600.0)
    options = ChannelOptions(history_size=5, history_ttl=60.0, history_meta_ttl=90.0)
    assert history_options(options, 600.0) == HistoryOptions(5, 60.0, 90.0)
