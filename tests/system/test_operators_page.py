"""The operators' page as an operator sees it: headless Chromium, a real server, an application with hostile names."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.system.serving import CHECKOUT, HERE, ServerStarter, run_node

pytestmark = [pytest.mark.browser, pytest.mark.node]

ARTIFACTS = CHECKOUT / "tests" / "artifacts"
MARKUP = "<script>owned=1</script><img src=x onerror=owned=1>"


def test_workers_incidents_and_stacks_show_and_no_name_is_executed(start_server: ServerStarter) -> None:
    server = start_server(app={"module": "hostile:app", "path": str(HERE / "apps")})
    ARTIFACTS.mkdir(exist_ok=True)
    route = MARKUP.replace(" ", "")
    page = f"http://localhost:{server.operator_port}/"
    server.expect_traceback()
    broker = server.broker()
    seen = run_node("operators.mjs", page, server.port, f"/{route}", "/fail", broker, str(ARTIFACTS))

    assert seen["trouble"] == []
    assert len(seen["conditions"]) == 2
    assert {int(text.split()[1]) for text in seen["running"]} == set(server.workers())
    assert int(seen["broker"][0].split()[1]) == broker
    assert seen["problem"].endswith(f"; the latest: {MARKUP} in http GET /fail")
    assert seen["stopped"] == {"card": "pressed", "tone": "bad"}
    assert seen["incident"]["place"] == f"/srv/{MARKUP}.py:5 in block"
    assert route in seen["incident"]["handler"]
    assert f"/srv/{MARKUP}.py:5 in block" in seen["incident"]["stack"].splitlines()
    assert f"http GET /{route}" in seen["table"]
    assert f"http GET /{route}" in seen["busy"]
    assert any(f"http GET /{route} " in strip for strip in seen["strips"])
    assert seen["elements"] == [1, 0, False]
    assert seen["cursor"].startswith("M")
    for name, look in seen["looks"].items():
        assert look["faint"] == [], f"{name}: contrast below WCAG AA"
        assert look["overflow"] <= 0, f"{name} scrolls sideways"
        assert look["dark"] == name.endswith("dark")
        picture = Path(ARTIFACTS / f"operators-{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG") and len(picture) > 10_000, f"{name} looks empty"
