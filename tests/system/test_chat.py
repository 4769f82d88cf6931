"""The chat example as its users see it: headless Chromium, the page as it is served, two workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cent import Client, PublishRequest

from tests.system.serving import CHECKOUT, Server, ServerStarter, run_node

pytestmark = [pytest.mark.browser, pytest.mark.node]

ARTIFACTS = CHECKOUT / "tests" / "artifacts"


@pytest.fixture
def chat(start_server: ServerStarter) -> Server:
    return start_server(
        config=CHECKOUT / "examples" / "chat" / "realtime.toml",
        environment={"REALTIME_HTTP_SERVER_PORT": "0", "REALTIME_HTTP_SERVER_INTERNAL_PORT": "0"},
    )


def play(chat: Server, scenario: str) -> Any:
    """Run one scenario of js/chat.mjs. No script error, refused resource or policy violation may occur on the way."""
    ARTIFACTS.mkdir(exist_ok=True)
    seen = run_node("chat.mjs", f"{chat.http}/", scenario, str(ARTIFACTS))
    assert seen.pop("trouble") == []
    return seen


def test_a_message_crosses_from_a_tab_on_one_worker_to_a_tab_on_another(chat: Server) -> None:
    seen = play(chat, "tabs")

    said = ["Hello from one process", "And hello from another <b>one</b>"]
    assert seen["workers"][0] != seen["workers"][1]
    assert set(seen["workers"]) == set(chat.workers())
    assert seen["ada"] == said
    assert seen["grace"] == said
    assert sorted(seen["people"]) == ["AAda you", "GGrace"]
    assert seen["reloaded"] == said
    assert seen["mine"] == said[1:], "a reload must keep the person"
    assert seen["left"] == ["AAda you"]


def test_a_killed_worker_costs_no_message(chat: Server) -> None:
    seen = play(chat, "killing")

    expected = {"before", *(f"ada {n}" for n in range(1, 11)), *(f"grace {n}" for n in (3, 6, 9))}
    for tab in ("ada", "grace"):
        assert len(seen[tab]) == len(expected), f"lost or repeated: {seen[tab]}"
        assert set(seen[tab]) == expected
        assert [text for text in seen[tab] if text.startswith("ada")] == [f"ada {n}" for n in range(1, 11)]
    assert seen["ada"] == seen["grace"]


def test_what_could_not_be_sent_outlives_a_reload_and_is_sent_once(chat: Server) -> None:
    seen = play(chat, "unsent")

    assert seen == {
        "mine": ["kept for later"],
        "others": ["kept for later"],
        "unsent": 0,
    }


def test_history_reads_back_to_the_beginning_and_unread_messages_are_counted(chat: Server) -> None:
    api = Client(f"{chat.http}/api", "chat-example")
    for n in range(1, 131):
        api.publish(PublishRequest(channel="room:garden", data={"from": "Gardener", "text": f"message {n}"}))
    seen = play(chat, "history")

    messages = [f"message {n}" for n in range(1, 131)]
    assert seen["first"] == messages[-50:] or seen["first"] == messages[-100:]
    assert seen["all"] == messages
    assert seen["title"].startswith("(1) ")
    assert seen["titleAfter"] == "garden · Chat"


def test_the_page_is_readable_light_and_dark_on_desktop_and_phone(chat: Server) -> None:
    seen = play(chat, "looks")

    assert set(seen) == {"desktop-light", "desktop-dark", "phone-light", "phone-dark"}
    for name, look in seen.items():
        assert look["hidden"] == [], name
        assert look["faint"] == [], f"{name}: contrast below WCAG AA"
        assert look["overflow"] <= 0, f"{name} scrolls sideways"
        assert look["unlabelled"] == [], name
        assert look["dark"] == name.endswith("dark")
        assert look.get("panels", ["true", "true"]) == ["true", "true"]
        picture = Path(ARTIFACTS / f"chat-{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG") and len(picture) > 10_000, f"{name} looks empty"
