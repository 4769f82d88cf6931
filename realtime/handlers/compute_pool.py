"""Processes for the handlers that keep a core busy: a pool of them, a bounded queue before it, and replacement.

    Call -> Processes.call(handler, args) -> Line: a process that is free, or wait -> Process.ask -> Reply

A process runs one call at a time and has a stream of its own, so whatever becomes of it is one call's affair: when it
dies, answers with what is no reply, or is still at work when its caller gives up, that call has failed and nothing
else. It is killed with all that it has started, and replaced. What its handler publishes and asks meanwhile comes over
that stream too, and is done here. All on the loop, without threads: the kernel tells of a process's end through a
descriptor (pidfd_open(2)).

Each is a fresh interpreter (`realtime.handlers.compute_process`), not a fork of this process, which has threads and a
loop. They start with the worker, not with the first call: that costs the worker less than a millisecond each, but
0.15 s and the import of the application pass until one is ready.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

from twisted.internet.defer import Deferred
from twisted.logger import Logger

from realtime.app import Handler, Server
from realtime.config.settings import AppSettings, WorkersSettings
from realtime.errors import ClientError, Disconnect, HandlerTimeout, PoolFull
from realtime.handlers.compute_messages import (
    HEAD,
    MAX_REPLY,
    CallDisconnected,
    CallFailed,
    CallRefused,
    CallReturned,
    ComputeCall,
    ProcessReady,
    ServerCall,
    ServerError,
    ServerResult,
    packed,
)
from realtime.handlers.coroutines import start_future
from realtime.handlers.threads import BoundedSemaphore
from realtime.metrics import Metrics

# Seconds before a process that never became ready is replaced; doubles up to the second number.
RETRY_AFTER = (0.5, 30.0)
# Seconds that idle processes have to end by themselves, with what user code has registered with atexit.
FAREWELL = 1.0
# Seconds between the end of a process's stream and its own.
EXIT = 0.2
_STOPPING = "the worker ends"

_log = Logger()


class HandlerFailed(Exception):
    """A handler failed in its process, or the process did. place: file and line, ("", 0) if nobody knows."""

    def __init__(self, message: str, place: tuple[str, int] = ("", 0)) -> None:
        super().__init__(message)
        self.place = place


class ComputePool:
    """The processes of the handlers. Loop thread only."""

    def __init__(self, reactor: Any, workers: WorkersSettings, app: AppSettings, metrics: Metrics) -> None:
        """reactor: IReactorTime, on the asyncio loop. app: what they import."""
        self._reactor = reactor
        self._size = workers.processes or _share(workers.count)
        self._app = app
        self._metrics = metrics
        self._line = Line(workers.process_queue)
        self._server: Server | None = None
        self._alive: set[Process] = set()
        self._busy = 0
        self._failures = 0
        self._stopping = False
        self._ended: Deferred[None] = Deferred()

    @property
    def waiting(self) -> int:
        """Calls that wait for a process."""
        return self._line.waiting

    @property
    def pids(self) -> list[int]:
        """Of the processes that there are."""
        return [process.pid for process in self._alive]

    def bind(self, server: Server) -> None:
        """Connect the App's own methods, as handlers in the processes call them."""
        self._server = server

    def start(self) -> None:
        """Start the processes; calls may be made at once, and wait until the first one is ready. Main thread only."""
        gauge, counter = self._metrics.gauge, self._metrics.counter
        gauge("realtime_handler_processes_busy", "Handler processes at work.", lambda: self._busy)
        gauge("realtime_handler_processes_waiting", "Calls that wait for a process.", lambda: self.waiting)
        self._replaced = counter(
            "realtime_handler_process_replacements", "Handler processes that ended before their time."
        )
        for _ in range(self._size):
            self._launch()

    async def stop(self, grace: float) -> None:
        """End the processes, at once those that are at work; done when the kernel has none of them left.

        grace: seconds, for the idle ones to end by themselves.
        """
        self._stopping = True
        for process in self._alive:
            process.dismiss()
        if not self._alive:
            return
        last_word = self._reactor.callLater(min(grace, FAREWELL), self._kill)
        await self._ended
        if last_word.active():
            last_word.cancel()

    async def call(self, handler: Handler, args: tuple[Any, ...], also: BoundedSemaphore | None = None) -> Any:
        """Have `handler` called with `args` in a process; its answer, or what it raised of ClientError and Disconnect.

        Cancelling this kills the process. also: a gate that the caller has entered, left when the call has ended.
        Raises PoolFull at once when too many wait, HandlerTimeout when the worker ends before, and HandlerFailed for a
        mistake of the handler, with its traceback, and for a process that came to an end.
        """
        try:
            question = packed(ComputeCall(handler.name, args))
            process = await self._line.take()
            self._busy += 1
            try:
                reply = await process.ask(question)
            except asyncio.CancelledError:
                process.kill("its caller gave up")
                raise
            finally:
                self._busy -= 1
        finally:
            if also is not None:
                also.leave()
        self._line.offer(process)
        return _outcome(reply)

    def _kill(self) -> None:
        for process in self._alive:
            process.kill(_STOPPING)

    def _launch(self) -> None:
        if self._stopping:
            return
        try:
            self._alive.add(Process(self._app, self._speak, self._is_ready, self._has_ended))
        except OSError as error:  # out of descriptors, memory or processes
            _log.error("no process for handlers can be started: {error}", error=error)
            self._launch_later()

    async def _speak(self, asked: ServerCall) -> bytes:
        """What a handler asks of the server; the message with the answer."""
        try:
            if self._server is None:
                raise RuntimeError("the server does not run")
            return packed(ServerResult(await getattr(self._server, asked.method)(*asked.args, **asked.options)))
        except Exception as error:
            try:
                return packed(ServerError(error))
            except Exception:  # it can't be pickled
                return packed(ServerError(RuntimeError(repr(error))))

    def _is_ready(self, process: Process) -> None:
        self._failures = 0
        self._line.offer(process)

    def _has_ended(self, process: Process, why: str) -> None:
        self._alive.discard(process)
        self._line.withdraw(process)
        if self._stopping:
            if not self._alive:
                self._ended.callback(None)
            return
        self._replaced.value += 1
        _log.warn("handler process {pid} has ended and is replaced: {why}", pid=process.pid, why=why)
        if process.was_ready:
            self._launch()
        else:
            self._launch_later()

    def _launch_later(self) -> None:
        self._reactor.callLater(min(RETRY_AFTER[0] * 2**self._failures, RETRY_AFTER[1]), self._launch)
        self._failures = min(self._failures + 1, 16)


class Line:
    """Processes that are free, or callers that wait for one in order of arrival."""

    def __init__(self, queue: int) -> None:
        """queue: callers that may wait."""
        self._queue = queue
        self._free: deque[Process] = deque()
        self._turns: dict[asyncio.Future[Process], None] = {}

    @property
    def waiting(self) -> int:
        """How many wait now."""
        return len(self._turns)

    def offer(self, process: Process) -> None:
        """Give it to whoever waits longest, or keep it; unless it has died."""
        if not process.alive:
            return
        for turn in self._turns:
            if not turn.done():
                turn.set_result(process)
                return
        self._free.append(process)

    def withdraw(self, process: Process) -> None:
        """It is no more to be had."""
        with contextlib.suppress(ValueError):
            self._free.remove(process)

    async def take(self) -> Process:
        """One that is free, for this caller alone; raises PoolFull at once when too many wait."""
        if self._free:
            return self._free.popleft()
        if len(self._turns) >= self._queue:
            raise PoolFull("every process is at work, and every place in the queue is taken")
        turn: asyncio.Future[Process] = asyncio.get_running_loop().create_future()
        self._turns[turn] = None
        try:
            return await turn
        except BaseException:
            if turn.done() and not turn.cancelled():
                self.offer(turn.result())  # the turn came in the moment of giving up
            raise
        finally:
            self._turns.pop(turn, None)


class Process(asyncio.Protocol):
    """One process, from its start until the kernel has told its end."""

    def __init__(
        self,
        app: AppSettings,
        speak: Callable[[ServerCall], Coroutine[Any, Any, bytes]],
        ready: Callable[[Process], None],
        ended: Callable[[Process, str], None],
    ) -> None:
        """Start it; raises OSError.

        speak: answers what its handlers ask of the server. ready: it can be asked. ended: called once, with the reason,
        when it is no more.
        """
        self.alive = True
        self.was_ready = False
        self._speak = speak
        self._ready = ready
        self._ended = ended
        self._loop = asyncio.get_running_loop()
        self._why = ""
        self._received = bytearray()
        self._reply: asyncio.Future[Any] | None = None
        self._asked: asyncio.Future[bytes] | None = None  # what its handler waits for
        self._transport: asyncio.WriteTransport | None = None
        ours, theirs = socket.socketpair()
        with theirs, contextlib.ExitStack() as undo:
            undo.callback(ours.close)
            self._process = _start(theirs.fileno())
            self.pid = self._process.pid
            undo.callback(self.kill, "")
            self._pidfd = os.pidfd_open(self.pid)
            undo.pop_all()
        self._loop.add_reader(self._pidfd, self._reap)
        self._connecting = self._loop.create_task(self._connect(ours, packed(app)))

    async def ask(self, question: bytes) -> Any:
        """Its reply; one question at a time. Raises HandlerFailed when it ends before, HandlerTimeout by `dismiss`."""
        if not self.alive or self._transport is None:
            raise HandlerFailed(self._said())
        self._reply = self._loop.create_future()
        self._transport.write(question)
        try:
            return await self._reply
        finally:
            self._reply = None

    def dismiss(self) -> None:
        """Have it end by itself, if it is idle."""
        if self._reply is not None or self._transport is None:
            self.kill(_STOPPING)
        else:
            self._why = _STOPPING
            self._transport.close()

    def kill(self, why: str) -> None:
        """End it, with all that it has started, whatever it is doing. Harmless when it has ended."""
        self.alive = False
        self._why = self._why or why
        self._kill_group()
        if self._asked is not None:
            self._asked.cancel()

    def _kill_group(self) -> None:
        if self._process.returncode is None:  # else its number may be another's by now
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    # The stream.

    async def _connect(self, ours: socket.socket, first: bytes) -> None:
        ours.setblocking(False)
        await self._loop.create_connection(lambda: self, sock=ours)
        assert self._transport is not None
        self._transport.write(first)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        if len(self._received) < HEAD.size:
            return
        (size,) = HEAD.unpack_from(self._received)
        end = HEAD.size + size
        if end > MAX_REPLY or len(self._received) > end:
            self.kill("it wrote what is no reply")
        elif len(self._received) == end:
            content, self._received = bytes(self._received[HEAD.size :]), bytearray()
            self._take(content)

    def connection_lost(self, error: Exception | None) -> None:
        self.alive = False
        if not self._why:  # as a rule it is about to exit, and its status says more
            self._loop.call_later(EXIT, self.kill, "it closed its stream")

    def _take(self, content: bytes) -> None:
        try:
            message = pickle.loads(content)
        except Exception:  # anything may come of bytes that are no pickle
            message = None
        waits = self._reply is not None and not self._reply.done()
        if isinstance(message, CallReturned | CallRefused | CallDisconnected | CallFailed) and waits:
            assert self._reply is not None
            self._reply.set_result(message)
        elif isinstance(message, ServerCall) and waits and not self._asked:
            self._asked = start_future(self._speak(message))
            self._asked.add_done_callback(self._tell)
        elif isinstance(message, ProcessReady) and not self.was_ready:
            self.was_ready = True
            self._ready(self)
        elif isinstance(message, CallFailed):
            self.kill(message.text)
        else:
            self.kill("it wrote what is no reply")

    def _tell(self, answer: asyncio.Future[bytes]) -> None:
        self._asked = None
        if not answer.cancelled() and self._transport is not None:
            self._transport.write(answer.result())

    # The end.

    def _reap(self) -> None:
        self._kill_group()  # what it has started may be there still
        status = self._process.wait()
        self.alive = False
        self._why = self._why or _ending(status)
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._connecting.cancel()
        if self._asked is not None:
            self._asked.cancel()
        if self._transport is not None:
            self._transport.abort()
        if self._reply is not None and not self._reply.done():
            # At the end of a drain it is not the handler's mistake, but that its time is over.
            error = HandlerTimeout if self._why == _STOPPING else HandlerFailed
            self._reply.set_exception(error(self._said()))
        self._ended(self, self._why)

    def _said(self) -> str:
        return f"the handler's process {self.pid} has ended: {self._why}"


def _share(workers: int) -> int:
    """A worker's share of the cores that this server may use, at least one."""
    cores = len(os.sched_getaffinity(0))
    return max(1, cores // (workers or cores))


def _start(link: int) -> subprocess.Popen[bytes]:
    # A group of its own: what user code starts is killed with it, and Ctrl-C in a terminal is not for it.
    return subprocess.Popen(
        [sys.executable, "-m", "realtime.handlers.compute_process", str(link)],
        stdin=subprocess.DEVNULL,
        pass_fds=[link],
        process_group=0,
    )


def _ending(status: int) -> str:
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


def _outcome(reply: CallReturned | CallRefused | CallDisconnected | CallFailed) -> Any:
    match reply:
        case CallReturned():
            return reply.answer
        case CallRefused():
            raise ClientError(reply.code, reply.message, reply.temporary)
        case CallDisconnected():
            raise Disconnect(reply.code, reply.reason)
    raise HandlerFailed(reply.text, reply.place)
