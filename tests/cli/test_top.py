"""`realtime top`: the screen of a snapshot, and that no name in it controls the terminal."""

from __future__ import annotations

from typing import Any

import pytest

from realtime.cli.top import Line, Unreachable, fetch, render

WORKER = {
    "slot": 0, "state": "ready", "condition": "healthy", "crash_loop": False, "peak_lag": 0.0012, "utilization": 0.25,
    "connections": 1200, "rss": 87_700_000, "restarts": 2, "queued_bytes": 0, "weight": 16, "accept_queue": 3,
    "handler": None, "rates": {"received": 12.0, "sent": 340.0, "connects": 1.5},
}  # fmt: skip
BROKER = {**WORKER, "slot": -1, "connections": 0, "weight": None, "accept_queue": None, "rates": None}
INCIDENT = {"at": 0.0, "duration": 2.5, "slot": 1, "lasts": False, "place": "/srv/chat.py:7", "handler": "rpc report"}


def snapshot(workers: int = 2, incidents: int = 1, **changes: Any) -> dict[str, Any]:
    return {
        "at": 0.0,
        "port": 8000,
        "stopping": False,
        "problems": [],
        "handler_errors": {"count": 0, "last_minute": 0, "handler": None, "exception": None, "at": None},
        "broker": BROKER,
        "workers": [{**WORKER, "slot": number} for number in range(workers)],
        "loop": [
            {"kind": "handler", "account": "rpc report", "share": 0.42, "most": 0.8, "slot": 1},
            {"kind": "timers", "account": "timers", "share": 0.0021, "most": 0.003, "slot": 0},
            *(
                {"kind": "fanout", "account": f"fan-out {n}", "share": 0.001, "most": 0.002, "slot": 0}
                for n in range(8)
            ),
        ],
        "places": [{"place": "/srv/chat.py:7", "handler": "rpc report", "count": 4, "seconds": 9.5, "relieved": 9.4}],
        "incidents": [INCIDENT] * incidents,
        **changes,
    }


def text(lines: list[Line]) -> str:
    return "\n".join("".join(piece for piece, _ in line) for line in lines)


def test_every_figure_is_drawn() -> None:
    shown = text(render(snapshot(), 120, 24))
    assert "all processes are healthy" in shown
    assert "2400 connections, 24 messages/s in, 680 out, 3.0 connects/s" in shown
    (row,) = (line for line in shown.splitlines() if line.startswith("1 "))
    assert row.split() == ["1", "healthy", "1.2ms", "25%", "1200", "12", "340", "87.7MB", "2", "0B", "16", "3", "1.5"]
    assert "     42%    80% of 1  rpc report" in shown
    assert "    0.2%   0.3% of 0  timers" in shown
    assert "   9.50s     9.40s       4  /srv/chat.py:7  rpc report" in shown
    assert "2.50s  1       /srv/chat.py:7  rpc report" in shown


@pytest.mark.parametrize(("width", "height"), [(80, 24), (40, 10), (200, 60), (20, 3), (1, 1)])
@pytest.mark.parametrize("workers", [1, 8, 64])
def test_it_fits_the_terminal(width: int, height: int, workers: int) -> None:
    places = [
        {
            "place": "/srv/" + "long/" * 50 + "chat.py:7",
            "handler": "rpc " + "x" * 60,
            "count": 4,
            "seconds": 9.5,
            "relieved": 9.4,
        }
    ]
    lines = render(snapshot(workers, 40, places=places), width, height, trouble="cannot connect " * 10)
    assert len(lines) <= height
    assert max(sum(len(piece) for piece, _ in line) for line in lines) <= width


def test_80_by_24_has_room_for_every_section() -> None:
    shown = text(render(snapshot(16, 30), 80, 24))
    for words in (
        "CONDITION",
        "LAG",
        "RESTARTS",
        "... and",
        "rpc report",
        "BLOCKED",
        "RELIEF",
        "INCIDENT",
        "/srv/chat.py:7",
    ):
        assert words in shown


def test_an_unhealthy_worker_is_named_and_never_left_out() -> None:
    unhealthy = snapshot(64)
    unhealthy["workers"][63] |= {"condition": "pressed", "peak_lag": 3.0}
    shown = text(render(unhealthy, 80, 24))
    assert "\n63       pressed" in shown


def test_the_worst_problem_is_first_and_further_ones_follow() -> None:
    problems = [
        {"text": "the broker is not turning its loop for 4 s: stopped or blocked", "tone": "bad"},
        {"text": "errors of handlers in the last minute: 3; the latest: KeyError in rpc \x1b[2J", "tone": "warn"},
    ]
    errors = {"count": 7, "last_minute": 3, "handler": "rpc f", "exception": "KeyError", "at": 0.0}
    lines = render(snapshot(problems=problems, handler_errors=errors), 120, 24)
    shown = text(lines).splitlines()
    assert "the broker is not turning its loop for 4 s" in shown[0]
    assert shown[1].startswith("errors of handlers") and shown[1].isprintable()
    assert shown[2].endswith("7 errors of handlers")


def test_the_broker_has_a_row() -> None:
    down = {**BROKER, "state": "waiting", "condition": "absent", "rss": None, "utilization": None, "connections": None}
    (row,) = (line for line in text(render(snapshot(broker=down), 120, 24)).splitlines() if line.startswith("broker"))
    assert row.split()[:2] == ["broker", "waiting"]


def test_a_missing_process_has_no_figures() -> None:
    missing = snapshot(1)
    gone = dict.fromkeys(("utilization", "connections", "rss", "queued_bytes", "handler", "rates"))
    missing["workers"][0] |= {**gone, "condition": "absent", "state": "waiting", "peak_lag": 0.0, "crash_loop": True}
    assert "crashing" in text(render(missing, 80, 24))


def test_one_worker_has_no_column_for_the_highest_share() -> None:
    shown = text(render(snapshot(1), 120, 40))
    assert "\n    LOOP  WORK\n     42%  rpc report" in shown


def test_empty_sections_are_left_out() -> None:
    shown = text(render(snapshot(loop=[], places=[], incidents=0), 120, 40))
    assert shown.splitlines()[-1].startswith("broker ")


def test_names_do_not_control_the_terminal() -> None:
    evil = "rpc \x1b]0;owned\x07\x1b[2J\r\n\u202e"
    shown = snapshot(1, incidents=0)
    shown["workers"][0]["handler"] = evil
    shown["loop"][0]["account"] = evil
    shown["places"][0] |= {"handler": evil, "place": f"/srv/{evil}.py:1"}
    shown["incidents"] = [{**INCIDENT, "handler": evil, "place": evil}]
    for line in render(shown, 400, 40):
        assert all(piece.isprintable() for piece, _ in line)


@pytest.mark.parametrize(
    "url", ["nonsense", "http://127.0.0.1:1", "http://[", "file:///etc/passwd", "ftp://127.0.0.1:1"]
)
def test_an_unreachable_server_is_one_line(url: str) -> None:
    with pytest.raises(Unreachable) as caught:
        fetch(url)
    assert str(caught.value).startswith(f"{url}: ")
    assert "\n" not in str(caught.value)


def test_a_place_without_a_handler_is_drawn_alone() -> None:
    places = [{"place": "/srv/chat.py:7", "handler": None, "count": 4, "seconds": 9.5, "relieved": 9.4}]
    shown = text(render(snapshot(places=places, incidents=0), 120, 40))
    assert shown.endswith("   9.50s     9.40s       4  /srv/chat.py:7")
