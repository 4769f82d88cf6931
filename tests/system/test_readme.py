"""The README's examples, word for word, as a newcomer would put them together."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from cent import Client, PublishRequest

from tests.system.serving import CHECKOUT, ServerStarter, run_node

ANY_PORTS = {"REALTIME_HTTP_SERVER_PORT": "0", "REALTIME_HTTP_SERVER_INTERNAL_PORT": "0"}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (CHECKOUT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.node
def test_the_first_application_serves_the_front_end_and_other_programs(
    start_server: ServerStarter, tmp_path: Path
) -> None:
    application, backend = blocks("python")
    (tmp_path / "app.py").write_text(application)
    (tmp_path / "realtime.toml").write_text(blocks("toml")[0])
    server = start_server(
        config=tmp_path / "realtime.toml", environment=ANY_PORTS | {"REALTIME_HTTP_API_KEY": "of this test"}
    )

    publish = backend.replace("http://localhost:8000", server.http)
    exec(publish, {"Client": Client, "PublishRequest": PublishRequest, "api_key": "of this test"})
    (page,) = re.findall(r"<script>(.*?)</script>", blocks("html")[0], re.DOTALL)
    said = run_node(
        "readme.mjs", page.replace("ws://localhost:8000/connection/websocket", server.endpoint), server.http
    )

    assert said == [[42], [2, {"text": "live"}]]
