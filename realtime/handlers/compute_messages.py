"""What a worker and the processes of its handlers say to one another: pickles, each after its length.

The length has 4 bytes, big-endian. Both ends run the same code as the same user.

    worker                                  process
    AppSettings                  ------->
                                 <-------   Ready, or Failed
    Question                     ------->
    Answered or Raised           <------>   Asked, any number of times, one after another
                                 <-------   Returned, Refused, Disconnected or Failed
"""

from __future__ import annotations

import pickle
import struct
from dataclasses import dataclass
from typing import Any

# Bytes of one thing that a process says, pickled. A handler that answers with more is a Failed.
MAX_REPLY = 1_048_576
HEAD = struct.Struct("!I")


@dataclass(frozen=True, slots=True)
class ComputeCall:
    """Call the handler of this name."""

    handler: str
    args: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class ProcessReady:
    """The application is loaded. pid: of this process."""

    pid: int


@dataclass(frozen=True, slots=True)
class CallReturned:
    """The handler's answer, as `realtime.handlers.results` makes it."""

    answer: Any


@dataclass(frozen=True, slots=True)
class CallRefused:
    """The handler raised ClientError."""

    code: int
    message: str
    temporary: bool


@dataclass(frozen=True, slots=True)
class CallDisconnected:
    """The handler raised Disconnect."""

    code: int
    reason: str


@dataclass(frozen=True, slots=True)
class CallFailed:
    """The handler made a mistake, or the application could not be loaded. place: file and line. text: a traceback."""

    place: tuple[str, int]
    text: str


@dataclass(frozen=True, slots=True)
class ServerCall:
    """The handler calls a method of its App. method: of `realtime.app.Server`, with its arguments."""

    method: str
    args: tuple[Any, ...]
    options: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ServerResult:
    """What that method returned."""

    result: Any


@dataclass(frozen=True, slots=True)
class ServerError:
    """What that method raised."""

    error: Exception


Reply = ProcessReady | CallReturned | CallRefused | CallDisconnected | CallFailed


def packed(message: object) -> bytes:
    """A message with its length. Raises whatever pickle does for what it can't carry."""
    content = pickle.dumps(message)
    return HEAD.pack(len(content)) + content
