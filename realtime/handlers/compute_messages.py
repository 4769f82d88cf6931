"""Messages between a worker and its compute processes: pickles, each preceded by its length.

The length has 4 bytes, big-endian. Both ends run the same code as the same user.

    worker                                  process
    ProcessSettings              ------->
                                 <-------   ProcessReady, or CallFailed
    ComputeCall                  ------->
    ServerResult or ServerError  <------>   ServerCall, any number of times, one after another
                                 <-------   CallReturned, CallRefused, CallDisconnected or CallFailed
"""

from __future__ import annotations

import pickle
import struct
from dataclasses import dataclass
from typing import Any

from realtime.config.settings import AppSettings, LogSettings

# The most bytes of one message from a process, with its length. A handler with a longer result ends as CallFailed.
MAX_REPLY = 1_048_576
HEAD = struct.Struct("!I")


@dataclass(frozen=True, slots=True)
class ProcessSettings:
    """The application to import, and the log. worker: name of the worker, for the log."""

    app: AppSettings
    log: LogSettings
    worker: str


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
    """The handler returned. result: its converted return value, see `realtime.handlers.results`."""

    result: Any


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
    """The handler raised another exception, or the application could not be loaded.

    place: file and line. text: a traceback, or the reason. kind: the exception's type.
    """

    place: tuple[str, int]
    text: str
    kind: str = "HandlerFailed"


INVALIDATE = "invalidate"
"""The method of a `ServerCall` that carries out a `realtime.cache.Invalidation`, its only argument."""


@dataclass(frozen=True, slots=True)
class ServerCall:
    """The handler calls a method of its App. method: of `realtime.app.Server`, with its arguments; or INVALIDATE."""

    method: str
    args: tuple[Any, ...]
    options: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ServerResult:
    """The method of the server returned."""

    result: Any


@dataclass(frozen=True, slots=True)
class ServerError:
    """The method of the server raised an exception."""

    error: Exception


Reply = CallReturned | CallRefused | CallDisconnected | CallFailed


def pack(message: object) -> bytes:
    """Encode a message with its length. Raises the exceptions of pickle for an object that it can't encode."""
    content = pickle.dumps(message)
    return HEAD.pack(len(content)) + content
