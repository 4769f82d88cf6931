"""Who blocks a loop: the stack that `faulthandler` wrote in the blocked process -> the line to blame. Without I/O.

faulthandler writes, from C and without the interpreter's lock:

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
# What turns a loop, as parts of paths; the innermost frame beyond these is at least what the loop was doing.
_WAITING = ("/selectors.py", "/realtime/process/selector.py", "/realtime/process/heartbeat.py")
_REACTOR = (*_WAITING, "/realtime/process/reactor.py", "/asyncio/", "/twisted/internet/", "<frozen runpy>")


class StackFrame(Struct, frozen=True):
    """One frame of a stack. line: 0 when unknown."""

    file: str
    line: int
    function: str

    @property
    def place(self) -> str:
        """As the log and the metrics name it."""
        return f"{self.file}:{self.line}"


class Stack(Struct, frozen=True):
    """One thread's stack, innermost frame first. main: of the thread that runs the loop."""

    main: bool
    frames: tuple[StackFrame, ...]

    @property
    def waiting(self) -> bool:
        """Whether it is that of a loop that waits in its selector: for events, or for the interpreter's lock."""
        return bool(self.frames) and any(part in self.frames[0].file for part in _WAITING)


def parse(text: str) -> list[Stack]:
    """The stacks in what faulthandler wrote. What is none of it is passed over."""
    heads = list(_HEAD.finditer(text))
    ends = [head.start() for head in heads[1:]] + [len(text)]
    return [
        Stack(head[1] != "Thread", tuple(_frames(text[head.end() : end])))
        for head, end in zip(heads, ends, strict=False)  # without a head there is nothing to end
    ]


def _frames(text: str) -> Iterator[StackFrame]:
    for file, line, function in _FRAME.findall(text):
        yield StackFrame(file, int(line) if line.isdigit() else 0, function)


class CodeOrigin:
    """Tells the user's own code from the rest by where its file is. The longest folder that holds a file decides."""

    def __init__(self, own: Iterable[str], foreign: Iterable[str]) -> None:
        """own: folders, or files, of the application. foreign: of everything else; what is in neither is own."""
        kinds = {**dict.fromkeys(foreign, False), **dict.fromkeys(own, True)}
        folders = sorted(filter(None, kinds), key=len, reverse=True)
        self._kinds = [(folder.rstrip("/"), kinds[folder]) for folder in folders]

    def is_own(self, file: str) -> bool:
        """Whether `file`, an absolute path, is the user's own."""
        if file.startswith("<"):
            return False
        for folder, own in self._kinds:
            if file == folder or file.startswith(folder + "/"):
                return own
        return True

    def culprit(self, stack: Stack) -> StackFrame | None:
        """The frame to blame: the innermost one of the user's own code; else the innermost one that is not the
        reactor's. None when there is neither."""
        own = (frame for frame in stack.frames if self.is_own(frame.file))
        return next(own, None) or next(_beyond_the_reactor(stack.frames), None)


def _beyond_the_reactor(frames: Sequence[StackFrame]) -> Iterator[StackFrame]:
    return (frame for frame in frames if not any(part in frame.file for part in _REACTOR))
