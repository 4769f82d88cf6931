"""The stack that `faulthandler` wrote in a blocked process -> the line that blocks its loop. Without I/O.

faulthandler writes from C, without the interpreter's lock:

    Stack (most recent call first):                    or, of all threads:  Thread 0x00007f… (most recent call first):
      File "/app/chat.py", line 42 in render                                  File …
      File "/app/chat.py", line 17 in report                                (blank)
      …                                                                     Current thread 0x00007f… (most recent …):
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from msgspec import Struct

_HEAD = re.compile(r"^(Stack|Current thread|Thread)\b.*\(most recent call first\):$", re.MULTILINE)
_FRAME = re.compile(r'^  File "(.*)", line (\d+|\?\?\?) in (.*)$', re.MULTILINE)
# Parts of the paths of the loop's own machinery. The innermost frame outside of it at least shows the loop's work.
_WAITING = ("/selectors.py", "/realtime/process/selector.py", "/realtime/process/heartbeat.py")
_REACTOR = (*_WAITING, "/realtime/process/reactor.py", "/asyncio/", "/twisted/internet/", "<frozen runpy>")


class StackFrame(Struct, frozen=True):
    """One frame of a stack. line: 0 when unknown."""

    file: str
    line: int
    function: str

    @property
    def place(self) -> str:
        """The frame's name in the log and in the metrics."""
        return f"{self.file}:{self.line}"


class Stack(Struct, frozen=True):
    """One thread's stack, innermost frame first. is_main: whether the thread runs the loop."""

    is_main: bool
    frames: tuple[StackFrame, ...]

    @property
    def is_waiting(self) -> bool:
        """Whether the loop waits in its selector, for events or for the interpreter's lock."""
        return bool(self.frames) and any(part in self.frames[0].file for part in _WAITING)


def parse(text: str) -> list[Stack]:
    """Parse the output of faulthandler into stacks. Other text in it is skipped."""
    heads = list(_HEAD.finditer(text))
    ends = [head.start() for head in heads[1:]] + [len(text)]
    return [
        Stack(head[1] != "Thread", tuple(_frames(text[head.end() : end])))
        for head, end in zip(heads, ends, strict=False)  # without heads, `ends` still has the end of the text
    ]


def _frames(text: str) -> Iterator[StackFrame]:
    for file, line, function in _FRAME.findall(text):
        yield StackFrame(file, int(line) if line.isdigit() else 0, function)


class CodeOrigin:
    """Tells the application's code from other code by the file's path. The longest known folder of a file decides."""

    def __init__(self, application: Iterable[str], foreign: Iterable[str]) -> None:
        """application: folders or files of the application. foreign: folders of everything else. A file in neither
        counts as the application's."""
        kinds = {**dict.fromkeys(foreign, False), **dict.fromkeys(application, True)}
        folders = sorted(filter(None, kinds), key=len, reverse=True)
        self._kinds = [(folder.rstrip("/"), kinds[folder]) for folder in folders]

    def is_application_code(self, file: str) -> bool:
        """Return whether `file`, an absolute path, belongs to the application."""
        if file.startswith("<"):
            return False
        for folder, is_application in self._kinds:
            if file == folder or file.startswith(folder + "/"):
                return is_application
        return True

    def frame_to_blame(self, stack: Stack) -> StackFrame | None:
        """Return the innermost frame of the application's code, or else the innermost frame outside the reactor.

        None without either.
        """
        application = (frame for frame in stack.frames if self.is_application_code(frame.file))
        return next(application, None) or next(_outside_the_reactor(stack.frames), None)


def _outside_the_reactor(frames: Sequence[StackFrame]) -> Iterator[StackFrame]:
    return (frame for frame in frames if not any(part in frame.file for part in _REACTOR))
