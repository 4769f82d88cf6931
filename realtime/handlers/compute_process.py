"""One process that runs handlers with run="process", for the worker that started it.

    python -m realtime.handlers.compute_process FD

FD is a connected UNIX stream to the worker; `realtime.handlers.compute_messages` describes its messages. The first
message from the worker is ProcessSettings: this process imports the application as the worker did, and answers with
ProcessReady. From then on it carries out one ComputeCall at a time, and answers each with one reply; until the reply,
the handler may call the App's methods, which go over the same stream to the worker and back. The process ends when the
stream does.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import select
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Sequence
from typing import Any

import msgspec

from realtime import cache
from realtime.app import ARGUMENTS, App, Handler, load
from realtime.errors import (
    LIMIT_EXCEEDED,
    ApplicationFailed,
    ClientError,
    Disconnect,
    EngineUnavailable,
    SettingsError,
)
from realtime.handlers.compute_messages import (
    HEAD,
    INVALIDATE,
    MAX_REPLY,
    CallDisconnected,
    CallFailed,
    CallRefused,
    CallReturned,
    ComputeCall,
    ProcessReady,
    ProcessSettings,
    ServerCall,
    ServerError,
    ServerOutcome,
    arguments_of,
    pack,
    returned,
    unpack_error,
    unpack_result,
)
from realtime.handlers.error_answers import ErrorAnswer, with_answers
from realtime.handlers.results import call_plain_function, result_converter
from realtime.process import app_log, forks, output

_PR_SET_PDEATHSIG = 1
_IGNORED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# The most characters of a traceback that are sent to the worker; its end is kept.
_MAX_TRACEBACK = 20_000


def main(argv: Sequence[str]) -> int:
    """Carry out calls until the stream ends; return the exit status."""
    stream = socket.socket(fileno=int(argv[0]))
    stream.set_inheritable(False)  # the processes that user code starts must not hold it open
    _ignore_signals()
    server = ServerStub(stream)

    def forget() -> None:
        server.close_in_fork()
        output.forget_threads()

    forks.release_in_forks(lambda: [stream.fileno()], forget=forget, default_signals=_IGNORED_SIGNALS)
    if not _dies_with_the_worker(stream):
        return 0
    try:
        return _serve(stream, server)
    except ConnectionError:  # the worker has died during a message
        return 0


def _serve(stream: socket.socket, server: ServerStub) -> int:
    settings = _receive(stream, ProcessSettings)
    if settings is None:
        return 0
    output.install(settings.log.max_queued_bytes)
    app_log.begin(f"{settings.worker} process {os.getpid()}", settings.log, sys.stdout.write)
    try:
        app = load(settings.app)
    except (SettingsError, ApplicationFailed) as error:
        stream.sendall(pack(CallFailed(("", 0), str(error))))
        _read(stream, 1)  # wait, so that the worker reads the message before it sees the end of the process
        return os.EX_CONFIG
    handlers = _process_handlers(app)
    app.bind(server, server.perform)
    _share_caches(server)
    stream.sendall(pack(ProcessReady(os.getpid())))
    while (call := _receive(stream, ComputeCall)) is not None:
        with server:
            reply = _reply(handlers[call.handler], call)
        stream.sendall(reply)
    return 0


class ServerStub:
    """Stands in for the server in this process: sends each call of its methods to the worker, and returns the result.

    Calls are possible while a handler runs, that is inside the `with` block of this object. Threads of the handler may
    make them too, and take turns. A method returns a message, which `perform` sends.
    """

    def __init__(self, stream: socket.socket) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._is_open = False

    def __getattr__(self, method: str) -> Any:
        return lambda *args, **options: ServerCall(method, list(args), options)

    def __enter__(self) -> None:
        self._is_open = True

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._is_open = False

    def close_in_fork(self) -> None:
        """Refuse calls in a fork of this process, which does not have the stream."""
        self._lock = threading.Lock()
        self._is_open = False

    def perform(self, call: Any) -> Any:
        """Make a call and return its result.

        Raises the exception that the method raised in the worker, and ClientError 106 for a call that is too long.
        """
        message = pack(call)
        if len(message) > MAX_REPLY:
            raise ClientError(*LIMIT_EXCEEDED)
        with self._lock:
            if not self._is_open:
                raise RuntimeError("a process can call the App's methods while one of its handlers runs, and no longer")
            self._stream.sendall(message)
            outcome = _receive(self._stream, ServerOutcome)
        if outcome is None:
            raise EngineUnavailable("the worker is gone")
        if isinstance(outcome, ServerError):
            raise unpack_error(outcome)
        return unpack_result(call.method, outcome.result)


def _share_caches(server: ServerStub) -> None:
    """Send the invalidations of caches to the workers, which have the values."""

    async def broadcast(invalidation: cache.Invalidation) -> None:
        server.perform(ServerCall(INVALIDATE, [invalidation]))

    cache.HOST.perform, cache.HOST.broadcast = asyncio.run, broadcast


def _process_handlers(app: App) -> dict[str, Handler]:
    handlers = [handler for kind in ARGUMENTS for handler in app.handlers(kind).values()]
    answers = app.http.errors
    return {handler.name: with_answers(handler, answers) for handler in handlers if handler.run == "process"}


def _returned(handler: Handler, call: ComputeCall) -> CallReturned:
    convert = result_converter(handler.kind, handler.cache is not None)
    try:
        return returned(convert(call_plain_function(handler, handler.convert_data(arguments_of(call)))))
    except ErrorAnswer as answer:
        return returned(answer.response, answers_error=True)


def _reply(handler: Handler, call: ComputeCall) -> bytes:
    """Call the handler and return the packed reply; there is one unless the handler ends the process."""
    try:
        reply = pack(_returned(handler, call))
    except ClientError as error:
        return pack(CallRefused(error.code, error.message, error.temporary))
    except Disconnect as error:
        return pack(CallDisconnected(error.code, error.reason))
    except BaseException as error:  # also SystemExit and KeyboardInterrupt: the next call needs the process
        return pack(_failure(error))
    if len(reply) > MAX_REPLY:
        return pack(CallFailed((handler.place, 0), f"the result has {len(reply)} bytes, more than {MAX_REPLY}"))
    return reply


def _failure(error: BaseException) -> CallFailed:
    innermost = traceback.extract_tb(error.__traceback__)[-1]
    text = "".join(traceback.format_exception(error))
    place = innermost.filename, innermost.lineno or 0
    return CallFailed(place, text[-_MAX_TRACEBACK:], type(error).__name__)


def _receive(stream: socket.socket, type: Any) -> Any:
    """Return the next message, which is of this type; None when the stream has ended."""
    head = _read(stream, HEAD.size)
    content = head and _read(stream, *HEAD.unpack(head))
    return msgspec.msgpack.decode(content, type=type) if content else None


def _read(stream: socket.socket, size: int) -> bytes:
    content = bytearray()
    while len(content) < size:
        piece = stream.recv(size - len(content))
        if not piece:
            return b""
        content += piece
    return bytes(content)


def _ignore_signals() -> None:
    """Leave the end of this process to the worker, whichever signals are sent to the whole group or unit.

    Handlers that do nothing take the place of SIG_IGN, which the processes that user code starts would inherit.
    """
    for number in _IGNORED_SIGNALS:
        signal.signal(number, _do_nothing)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _do_nothing(number: int, frame: object) -> None: ...


def _dies_with_the_worker(stream: socket.socket) -> bool:
    """Have the kernel kill this process when the worker dies (prctl(2), PR_SET_PDEATHSIG).

    Returns False when the worker is dead already. The signal comes when the thread ends that started this process: the
    worker's main thread. It also ends a process that is blocked in C code, or stopped. On systems other than Linux the
    end of the stream is the only sign.
    """
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    poll = select.poll()
    poll.register(stream, select.POLLHUP)
    return not poll.poll(0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
