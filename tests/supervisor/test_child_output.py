"""Lines of the children's output in our log."""

from __future__ import annotations

from twisted.logger import LogLevel, capturedLogs, formatEventAsClassicLogText

from realtime.supervisor.child_output import ChildOutput


def test_a_line_of_a_childs_log_keeps_its_process_logger_and_level() -> None:
    with capturedLogs() as events:
        ChildOutput().feed(b"2026-11-30T03:12:45+0000 [worker 0 shop.orders#warn] {no} items\n")
    (event,) = events
    assert str(formatEventAsClassicLogText(event)).endswith(" [worker 0 shop.orders#warn] {no} items\n")
    assert event["log_level"] is LogLevel.warn


def test_a_long_line_is_logged_in_parts() -> None:
    output = ChildOutput()
    with capturedLogs() as events:
        for _ in range(5):
            output.feed(b"x" * 10_000)
        output.feed(b"\n")
    lines = [event["line"] for event in events]
    assert "".join(lines) == "x" * 50_000
    assert max(map(len, lines)) <= 20_000
