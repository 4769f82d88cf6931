"""One process in which handlers with run="process" run, for a worker that starts it.

    python -m realtime.handlers.compute_process FD

FD is a connected UNIX stream to the worker, see `realtime.handlers.compute_messages`. The first message from the
worker is its AppSettings: this process imports the application as the worker did, and says Ready. From then on it is
asked one thing at a time, and gives one Reply to each; before that the handler may call the App's methods, which go
over the same stream to the worker and back. It ends with the stream.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import select
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Sequence
from typing import Any

from realtime import app as application
from realtime.app import App, Handler
from realtime.errors import LIMIT_EXCEEDED, ClientError, Disconnect, EngineUnavailable, SettingsError
from realtime.handlers.compute_messages import (
    HEAD,
    MAX_REPLY,
    CallDisconnected,
    CallFailed,
    CallRefused,
    CallReturned,
    ProcessReady,
    ServerCall,
    ServerError,
    ServerResult,
    packed,
)
from realtime.handlers.results import maker, plain_result

_PR_SET_PDEATHSIG = 1
# Characters of a traceback that the worker is told, the last ones.
_MAX_TRACEBACK = 20_000


def main(argv: Sequence[str]) -> int:
    """Answer questions until the stream ends; returns the exit status."""
    link = socket.socket(fileno=int(argv[0]))
    link.set_inheritable(False)  # not for the processes that user code starts
    _settle_signals()
    if not _dies_with_the_worker(link):
        return 0
    try:
        return _serve(link)
    except ConnectionError:  # the worker has died in the middle of something
        return 0


def _serve(link: socket.socket) -> int:
    settings = _received(link)
    if settings is None:
        return 0
    try:
        app = application.load(settings)
    except SettingsError as error:
        link.sendall(packed(CallFailed(("", 0), str(error))))
        _received(link)  # the worker is to read this before it sees the end
        return os.EX_CONFIG
    handlers, voice = _handlers(app), Voice(link)
    app.bind(voice, voice.perform)
    link.sendall(packed(ProcessReady(os.getpid())))
    while (question := _received(link)) is not None:
        with voice:
            reply = _reply(handlers[question.handler], question.args)
        link.sendall(reply)
    return 0


class Voice:
    """The application's voice in this process, in place of the server: what it says goes to the worker and back.

    It has one while a handler is called, that is inside the `with` block of this; threads of the handler may use it
    too, and take turns. What a method of it returns is for `perform`.
    """

    def __init__(self, link: socket.socket) -> None:
        self._link = link
        self._turn = threading.Lock()
        self._heard = False

    def __getattr__(self, method: str) -> Any:
        return lambda *args, **options: ServerCall(method, args, options)

    def __enter__(self) -> None:
        self._heard = True

    def __exit__(self, *_: object) -> None:
        with self._turn:
            self._heard = False

    def perform(self, asked: Any) -> Any:
        """The result of what was asked. Raises what the method raises, and ClientError 106 for what is too long."""
        message = packed(asked)
        if len(message) > MAX_REPLY:
            raise ClientError(*LIMIT_EXCEEDED)
        with self._turn:
            if not self._heard:
                raise RuntimeError("a process can publish and ask while one of its handlers is called, and no longer")
            self._link.sendall(message)
            answer = _received(self._link)
        if isinstance(answer, ServerResult):
            return answer.result
        raise answer.error if isinstance(answer, ServerError) else EngineUnavailable("the worker is gone")


def _handlers(app: App) -> dict[str, Handler]:
    found = [handler for kind in application.ARGUMENTS for handler in app.handlers(kind).values()]
    return {handler.name: handler for handler in found if handler.run == "process"}


def _reply(handler: Handler, args: tuple[Any, ...]) -> bytes:
    """Call the handler; whatever it does short of ending the process, there is a reply."""
    try:
        reply = packed(CallReturned(maker(handler.kind)(plain_result(handler, args))))
    except ClientError as error:
        return packed(CallRefused(error.code, error.message, error.temporary))
    except Disconnect as error:
        return packed(CallDisconnected(error.code, error.reason))
    except BaseException as error:  # SystemExit and KeyboardInterrupt of a handler are its mistakes, too
        return packed(_failed(error))
    if len(reply) > MAX_REPLY:
        return packed(CallFailed((handler.place, 0), f"the answer has {len(reply)} bytes, more than {MAX_REPLY}"))
    return reply


def _failed(error: BaseException) -> CallFailed:
    innermost = traceback.extract_tb(error.__traceback__)[-1]
    text = "".join(traceback.format_exception(error))
    return CallFailed((innermost.filename, innermost.lineno or 0), text[-_MAX_TRACEBACK:])


def _received(link: socket.socket) -> Any:
    """The next message; None when the stream has ended."""
    head = _bytes(link, HEAD.size)
    content = head and _bytes(link, *HEAD.unpack(head))
    return pickle.loads(content) if content else None


def _bytes(link: socket.socket, size: int) -> bytes:
    content = bytearray()
    while len(content) < size:
        piece = link.recv(size - len(content))
        if not piece:
            return b""
        content += piece
    return bytes(content)


def _settle_signals() -> None:
    """Leave it to the worker when to end, whatever is sent to the whole group or unit.

    Handlers that do nothing, in place of SIG_IGN, so that processes that user code starts do not ignore them.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _nothing)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _nothing(number: int, frame: object) -> None: ...


def _dies_with_the_worker(link: socket.socket) -> bool:
    """Have the kernel kill this process when the worker dies (prctl(2), PR_SET_PDEATHSIG); False: it is dead already.

    The signal comes when the thread ends that started this process: that is the worker's main thread. A process that
    is blocked in C code or stopped ends all the same. Elsewhere than on Linux the end of the stream is the only sign.
    """
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    look = select.poll()
    look.register(link, select.POLLHUP)
    return not look.poll(0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
