"""Keys of Centrifugo files: refused by name, and none of them a key of ours."""

from __future__ import annotations

import pytest

from realtime.config import centrifugo_keys
from realtime.config.schema import format_path, keys_of, value_keys
from realtime.config.settings import Namespace, Settings
from tests.config.parsing import problem

REFUSED = [
    ("[admin]\nenabled = true", 1, "admin: a Centrifugo key that realtime does not support yet"),
    ("[grpc_api]\nenabled = true", 1, "grpc_api: a Centrifugo key that realtime does not support; remove it"),
    ("[client]\npresence_update_interval = '9s'", 2, "client.presence_update_interval: a Centrifugo key that realtime"),
    (
        "[channel.without_namespace]\nsubscription_type = 'map'",
        2,
        "a Centrifugo key that realtime does not support yet",
    ),
    ("[[channel.namespaces]]\nname = 'ab'\npublish_proxy_name = 'x'", 3, "a Centrifugo key that realtime does not"),
]


@pytest.mark.parametrize(("text", "line", "message"), REFUSED, ids=[message[:40] for _, _, message in REFUSED])
def test_a_key_of_centrifugo_is_refused_by_name_with_its_line(text: str, line: int, message: str) -> None:
    found = problem(text)
    assert found.startswith(f"realtime.toml:{line}: ")
    assert message in found


def test_a_key_of_no_table_of_centrifugo_has_no_explanation() -> None:
    assert centrifugo_keys.explain_key("client.pong_timeot") is None
    assert centrifugo_keys.explain_key("admin.enabled") is None


def test_no_key_of_ours_is_explained_as_centrifugos() -> None:
    ours = {format_path(path) for path, _ in value_keys(Settings)}
    ours |= {f"channel.namespaces[].{name}" for name in keys_of(Namespace)}
    sections = {part for key in ours for part in (key.rpartition(".")[0], key)}
    assert not sections & (centrifugo_keys.PLANNED | centrifugo_keys.UNSUPPORTED)
    assert not centrifugo_keys.PLANNED & centrifugo_keys.UNSUPPORTED
