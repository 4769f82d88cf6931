"""Stacks as faulthandler writes them, and the frames to blame."""

from __future__ import annotations

import faulthandler
import tempfile
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realtime.supervision.stacks import CodeOrigin, Stack, StackFrame, parse

BLOCKED = """\
Stack (most recent call first):
  File "/usr/lib/python3.11/re/__init__.py", line 166 in match
  File "/srv/chat/rooms.py", line 42 in clean
  File "/srv/chat/chat.py", line 17 in report
  File "/srv/venv/lib/python3.11/site-packages/realtime/handlers/dispatch.py", line 290 in _on_loop
  File "/usr/lib/python3.11/asyncio/events.py", line 84 in _run
  File "<frozen runpy>", line 88 in _run_code
"""
THREADS = """\
Thread 0x00007f9a802756c0 (most recent call first):
  File "/srv/chat/chat.py", line 9 in work
  File "/usr/lib/python3.11/threading.py", line 982 in run

Current thread 0x00007f9a80533b80 (most recent call first):
  File "/usr/lib/python3.11/selectors.py", line 468 in select
  File "/srv/venv/lib/python3.11/site-packages/realtime/process/heartbeat.py", line 70 in select
"""
ORIGIN = CodeOrigin(["/srv/chat"], ["/usr/lib/python3.11", "/srv/venv/lib/python3.11/site-packages"])


def stack(*frames: tuple[str, int, str]) -> Stack:
    return Stack(True, tuple(StackFrame(*frame) for frame in frames))


def test_parse_the_stack_of_the_loop() -> None:
    [found] = parse(BLOCKED)
    assert found.is_main
    assert not found.is_waiting
    assert len(found.frames) == 6
    assert found.frames[1] == StackFrame("/srv/chat/rooms.py", 42, "clean")
    assert found.frames[1].place == "/srv/chat/rooms.py:42"


def test_parse_the_stacks_of_all_threads() -> None:
    thread, loop = parse(THREADS)
    assert (thread.is_main, loop.is_main) == (False, True)
    assert thread.frames[0] == StackFrame("/srv/chat/chat.py", 9, "work")
    assert loop.is_waiting


def test_real_output_of_faulthandler_is_parsed() -> None:
    release = threading.Event()
    thread = threading.Thread(target=release.wait, name="waiting one")
    thread.start()
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        faulthandler.dump_traceback(file, all_threads=False)
        file.seek(0)
        stacks = parse(file.read())
    release.set()
    thread.join()
    assert [stack.is_main for stack in stacks].count(True) == 2
    own = stacks[-1].frames[0]
    assert (own.file, own.function) == (__file__, "test_real_output_of_faulthandler_is_parsed")


def test_a_frame_without_a_line_number() -> None:
    [found] = parse('Stack (most recent call first):\n  File "???", line ??? in ???\n')
    assert found.frames == (StackFrame("???", 0, "???"),)


@given(st.text())
def test_any_text_is_parsed_without_an_error(text: str) -> None:
    parse(text)


@given(st.integers(0, len(THREADS)))
def test_a_truncated_dump_is_parsed_as_far_as_it_goes(length: int) -> None:
    assert len(parse(THREADS[:length])) <= 2


def test_the_innermost_frame_of_the_application_is_blamed() -> None:
    [found] = parse(BLOCKED)
    assert ORIGIN.frame_to_blame(found) == StackFrame("/srv/chat/rooms.py", 42, "clean")


def test_without_application_code_the_innermost_frame_outside_the_reactor_is_blamed() -> None:
    library = "/srv/venv/lib/python3.11/site-packages/realtime/pubsub/hub.py"
    reactor = "/usr/lib/python3.11/asyncio/events.py"
    assert ORIGIN.frame_to_blame(stack((library, 70, "fan_out"), (reactor, 84, "_run"))) == StackFrame(
        library, 70, "fan_out"
    )
    assert ORIGIN.frame_to_blame(stack((reactor, 84, "_run"))) is None
    assert ORIGIN.frame_to_blame(stack()) is None


@pytest.mark.parametrize(
    ("file", "own"),
    [
        ("/srv/chat/chat.py", True),
        ("/srv/chatter.py", True),  # in no known folder
        ("/usr/lib/python3.11/json/decoder.py", False),
        ("/srv/chat/venv/lib/python3.11/site-packages/httpx/_client.py", False),
        ("/opt/site-packages/shop/models.py", True),
        ("/opt/site-packages/shopping.py", False),
        ("<frozen importlib._bootstrap>", False),
        ("<string>", False),
    ],
)
def test_the_longest_folder_decides(file: str, own: bool) -> None:
    origin = CodeOrigin(
        ["/srv/chat", "/opt/site-packages/shop"],
        ["/usr/lib/python3.11", "/srv/chat/venv/lib/python3.11/site-packages", "/opt/site-packages"],
    )
    assert origin.is_application_code(file) is own
