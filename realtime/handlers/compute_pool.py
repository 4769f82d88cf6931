"""A pool of processes for handlers that keep a core busy, with a bounded queue before it.

    HandlerCall -> ComputePool.call(handler, args) -> IdleProcesses.take -> ComputeProcess.call -> Reply

A process runs one call at a time and has a stream of its own, so that its faults concern one call alone: when the
process dies, or writes anything but a reply, or is still at work when its caller stops waiting, that call has failed
and no other. The process is killed with all that it has started, and replaced. The calls of the App's methods that its
handler makes meanwhile arrive over the same stream, and are carried out here. All of this happens without threads: the
kernel reports the end of a process through a descriptor (pidfd_open(2)). While application code blocks the loop, the
relief thread goes on with it; only a new process waits for the loop's own thread, whose signals it inherits.

Each process is a fresh interpreter (`realtime.handlers.compute_process`) and not a fork of this one, which has threads
and a loop. The pool starts with the worker and not with the first call. A start costs the worker less than a
millisecond, but the process is ready only after 0.15 s and the import of the application.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.protocol import Protocol, connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure

from realtime import cache
from realtime.app import Handler, Server
from realtime.config.settings import AppSettings, LogSettings, WorkersSettings
from realtime.errors import ClientError, Disconnect, HandlerTimeout, PoolFull
from realtime.handlers.compute_messages import (
    HEAD,
    INVALIDATE,
    MAX_REPLY,
    SERVER_METHODS,
    CallDisconnected,
    CallFailed,
    CallRefused,
    CallReturned,
    FromProcess,
    ProcessReady,
    ProcessSettings,
    Reply,
    ServerCall,
    call_of,
    options_of,
    pack,
    pack_error,
    pack_result,
    result_of,
)
from realtime.handlers.coroutines import CoroutineDriver, drive
from realtime.handlers.threads import BoundedSemaphore
from realtime.metrics import Metrics
from realtime.process.link import adopt
from realtime.process.server_lock import ServerLock

# Seconds until a process that never became ready is replaced; the delay doubles from the first to the second number.
RETRY_AFTER = (0.5, 30.0)
# Seconds that idle processes have to end by themselves, with the functions that user code has registered with atexit.
EXIT_GRACE = 1.0
# Seconds that a process has to end after it has closed its stream.
CLOSED_GRACE = 0.2
_STOPPING = "the worker ends"

_log = Logger()


class HandlerFailed(Exception):
    """A handler raised an exception in its process, or the process ended.

    place: the file and line of the exception, ("", 0) if unknown. kind: its type.
    """

    def __init__(self, message: str, place: tuple[str, int] = ("", 0), kind: str = "HandlerFailed") -> None:
        super().__init__(message)
        self.place = place
        self.kind = kind


class ComputePool:
    """The handler processes of one worker. For the holder of the server lock."""

    def __init__(
        self,
        reactor: Any,
        workers: WorkersSettings,
        app: AppSettings,
        metrics: Metrics,
        log: LogSettings | None = None,
        worker: str = "worker",
        lock: ServerLock | None = None,
    ) -> None:
        """reactor: IReactorTime and IReactorFDSet. app: the application that the processes import.

        log, worker: see `ProcessSettings`. lock: see `realtime.process.server_lock`.
        """
        self._reactor = reactor
        self._lock = lock or ServerLock()
        self._size = workers.processes or _default_size(workers.count)
        self._settings = ProcessSettings(app, log or LogSettings(), worker)
        self._metrics = metrics
        self._idle = IdleProcesses(workers.process_queue)
        self._server: Server | None = None
        self._alive: set[ComputeProcess] = set()
        self._busy = 0
        self._failed_starts = 0
        self._stopping = False
        self._all_ended: Deferred[None] = Deferred()

    @property
    def waiting(self) -> int:
        """The number of calls that wait for a process."""
        return self._idle.waiting

    @property
    def pids(self) -> list[int]:
        """The ids of the living processes."""
        return [process.pid for process in self._alive]

    def bind(self, server: Server) -> None:
        """Carry out the calls of the App's own methods that handlers in the processes make."""
        self._server = server

    def start(self) -> None:
        """Start the processes; calls made before the first is ready wait for it. Main thread only."""
        gauge, counter = self._metrics.gauge, self._metrics.counter
        gauge("realtime_handler_processes_busy", "Handler processes at work.", lambda: self._busy)
        gauge("realtime_handler_processes_waiting", "Calls that wait for a process.", lambda: self.waiting)
        self._replaced = counter(
            "realtime_handler_process_replacements",
            "Handler processes that ended before their time.",
        )
        self._not_started = counter(
            "realtime_handler_process_failed_starts", "Handler processes that ended before they were ready."
        )
        for _ in range(self._size):
            self._launch()

    async def stop(self, grace: float) -> None:
        """End the processes, busy ones at once, and return when the kernel has none of them left.

        grace: seconds for the idle ones to end by themselves.
        """
        self._stopping = True
        for process in self._alive:
            process.shut_down()
        if not self._alive:
            return
        kill_timer = self._reactor.callLater(min(grace, EXIT_GRACE), self._kill_all)
        await self._all_ended
        if kill_timer.active():
            kill_timer.cancel()

    async def call(self, handler: Handler, args: tuple[Any, ...], held: BoundedSemaphore | None = None) -> Any:
        """Call `handler` in a process and return its result; raises the handler's ClientError or Disconnect.

        Cancelling the call kills the process. held: a semaphore that the caller has acquired; it is released when the
        call has ended. Raises PoolFull at once when the queue is full, HandlerTimeout when the worker ends first, and
        HandlerFailed for any other exception of the handler, with its traceback, and for a process that ended.
        """
        try:
            message = pack(call_of(handler.name, args))
            process = await self._idle.take()
            self._busy += 1
            try:
                reply = await process.call(message)
            except (CancelledError, asyncio.CancelledError):
                process.kill("its caller gave up")
                raise
            finally:
                self._busy -= 1
        finally:
            if held is not None:
                held.release()
        self._idle.offer(process)
        return _result(reply)

    def _kill_all(self) -> None:
        for process in self._alive:
            process.kill(_STOPPING)

    def _launch(self) -> None:
        if self._stopping:
            return
        try:
            process = ComputeProcess(self._reactor, self._settings, self._call_server, self._is_ready, self._has_ended)
            self._alive.add(process)
        except OSError as error:  # out of descriptors, memory or processes
            _log.error("can't start a handler process, trying again later: {error}", error=error)
            self._launch_later()

    async def _call_server(self, call: ServerCall) -> bytes:
        """Carry out a handler's call of a method of the server, and return the message with its outcome."""
        try:
            if self._server is None:
                raise RuntimeError("the server does not run")
            if call.method == INVALIDATE:
                if self._lock.is_relieving:  # application code may be using the caches
                    await self._lock.back_on_loop()
                await cache.HOST.invalidate(msgspec.convert(call.args[0], cache.Invalidation))
                return pack_result(None)
            if call.method not in SERVER_METHODS:
                raise TypeError(f"the server has no method {call.method!r}")
            return pack_result(await getattr(self._server, call.method)(*call.args, **options_of(call)))
        except Exception as error:
            return pack_error(error)

    def _is_ready(self, process: ComputeProcess) -> None:
        self._failed_starts = 0
        self._idle.offer(process)

    def _has_ended(self, process: ComputeProcess, reason: str) -> None:
        self._alive.discard(process)
        self._idle.withdraw(process)
        if self._stopping:
            if not self._alive:
                self._all_ended.callback(None)
            return
        self._replaced.value += 1
        _log.warn("handler process {pid} has ended and is replaced: {reason}", pid=process.pid, reason=reason)
        if process.was_ready:
            self._lock.call_on_loop(self._launch)
        else:
            self._launch_later()

    def _launch_later(self) -> None:
        self._not_started.value += 1
        delay = min(RETRY_AFTER[0] * 2**self._failed_starts, RETRY_AFTER[1])
        self._reactor.callLater(delay, self._lock.call_on_loop, self._launch)
        self._failed_starts = min(self._failed_starts + 1, 16)


class IdleProcesses:
    """The idle processes, or the callers that wait for one in order of arrival."""

    def __init__(self, queue: int) -> None:
        """queue: the most callers that may wait."""
        self._queue = queue
        self._idle: deque[ComputeProcess] = deque()
        self._waiters: dict[Deferred[ComputeProcess], None] = {}

    @property
    def waiting(self) -> int:
        """The number of callers that wait."""
        return len(self._waiters)

    def offer(self, process: ComputeProcess) -> None:
        """Give a process to the longest waiter, or keep it; a dead process is ignored."""
        if not process.alive:
            return
        if self._waiters:
            waiter = next(iter(self._waiters))
            del self._waiters[waiter]
            waiter.callback(process)
        else:
            self._idle.append(process)

    def withdraw(self, process: ComputeProcess) -> None:
        """Remove a process that has ended. Harmless if it is not here."""
        with contextlib.suppress(ValueError):
            self._idle.remove(process)

    async def take(self) -> ComputeProcess:
        """Return an idle process, for this caller alone. Raises PoolFull at once when the queue is full."""
        if self._idle:
            return self._idle.popleft()
        if len(self._waiters) >= self._queue:
            raise PoolFull("every process is at work, and every place in the queue is taken")
        waiter: Deferred[ComputeProcess] = Deferred()
        self._waiters[waiter] = None
        try:
            return await waiter
        except BaseException:
            if waiter not in self._waiters:
                self.offer(waiter.result)  # type: ignore[arg-type]  # assigned in the moment of cancellation
            raise
        finally:
            self._waiters.pop(waiter, None)


class _EndOfProcess:
    """The descriptor by which the kernel reports the end of a process, as a reader in a reactor."""

    def __init__(self, reactor: Any, pid: int, on_end: Callable[[], None]) -> None:
        """on_end: called once. Raises OSError."""
        self._reactor = reactor
        self._on_end = on_end
        self._fd = os.pidfd_open(pid)
        reactor.addReader(self)

    def fileno(self) -> int:
        return self._fd

    def logPrefix(self) -> str:
        return type(self).__name__

    def doRead(self) -> None:
        self._reactor.removeReader(self)
        os.close(self._fd)
        self._fd = -1
        self._on_end()

    def connectionLost(self, reason: Failure) -> None:
        """Never called: the descriptor is removed with its only event."""


class ComputeProcess(Protocol):
    """One process, from its start until the kernel has reported its end.

    alive: whether it may be called. was_ready: whether it has loaded the application.
    """

    def __init__(
        self,
        reactor: Any,
        settings: ProcessSettings,
        call_server: Callable[[ServerCall], Coroutine[Any, Any, bytes]],
        ready: Callable[[ComputeProcess], None],
        ended: Callable[[ComputeProcess, str], None],
    ) -> None:
        """Start the process. Raises OSError.

        call_server: carries out a server call of the handler, and returns the message with its outcome. ready: called
        once, when `call` may be used. ended: called once with the reason, when the process has ended.
        """
        self.alive = True
        self.was_ready = False
        self._call_server = call_server
        self._ready = ready
        self._ended = ended
        self._reactor = reactor
        self._reason = ""  # of its end, once that is certain
        self._received = bytearray()
        self._reply: Deferred[Reply] | None = None
        self._is_calling_server = False
        self._server_call: CoroutineDriver | None = None  # the one that its handler waits for
        ours, theirs = socket.socketpair()
        theirs.setblocking(True)  # whatever default timeout the application has set
        with theirs, contextlib.ExitStack() as undo:
            undo.callback(ours.close)
            self._process = _start_interpreter(theirs.fileno())
            self.pid = self._process.pid
            undo.callback(self.kill, "")
            _EndOfProcess(reactor, self.pid, self._reap)
            undo.pop_all()
        adopt(reactor, ours.detach(), self)
        self._transport.write(pack(settings))

    @property
    def _transport(self) -> Any:
        return self.transport

    async def call(self, message: bytes) -> Reply:
        """Send a packed ComputeCall and return the reply; one call at a time.

        Raises HandlerFailed when the process ends first, and HandlerTimeout after `shut_down`.
        """
        if not self.alive:
            raise HandlerFailed(self._end_message())
        self._reply = Deferred()
        self._transport.write(message)
        try:
            return await self._reply
        finally:
            self._reply = None

    def shut_down(self) -> None:
        """Let an idle process end by itself; kill a busy one."""
        if self._reply is not None:
            self.kill(_STOPPING)
        else:
            self._reason = _STOPPING
            self._transport.loseConnection()

    def kill(self, reason: str) -> None:
        """Kill the process, with all that it has started. Harmless when it has ended."""
        self.alive = False
        self._reason = self._reason or reason
        self._kill_group()
        if self._server_call is not None:
            self._server_call.cancel()

    def _kill_group(self) -> None:
        if self._process.returncode is None:  # else its number may be another process's by now
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    # The stream.

    def dataReceived(self, data: bytes) -> None:
        self._received += data
        if len(self._received) < HEAD.size:
            return
        (size,) = HEAD.unpack_from(self._received)
        end = HEAD.size + size
        if end > MAX_REPLY or len(self._received) > end:
            self.kill(_NO_REPLY)
        elif len(self._received) == end:
            content, self._received = bytes(self._received[HEAD.size :]), bytearray()
            self._take_message(content)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.alive = False
        if not self._reason:  # as a rule it is about to exit, and its exit status says more
            self._reactor.callLater(CLOSED_GRACE, self.kill, "it closed its stream")

    def _take_message(self, content: bytes) -> None:
        message: FromProcess | None
        try:
            message = _decode(content)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            message = None
        is_called = self._reply is not None and not self._reply.called
        if isinstance(message, CallReturned | CallRefused | CallDisconnected | CallFailed) and is_called:
            assert self._reply is not None
            self._reply.callback(message)
        elif isinstance(message, ServerCall) and is_called and not self._is_calling_server:
            self._is_calling_server = True
            driver = drive(self._call_server(message), self._send_server_outcome)
            self._server_call = driver if self._is_calling_server else None
        elif isinstance(message, ProcessReady) and not self.was_ready:
            self.was_ready = True
            self._ready(self)
        elif isinstance(message, CallFailed):
            self.kill(message.text)
        else:
            self.kill(_NO_REPLY)

    def _send_server_outcome(self, outcome: bytes, error: BaseException | None) -> None:
        """Send the message with the outcome of a server call. error: only if the call was cancelled."""
        self._is_calling_server, self._server_call = False, None
        if error is None:
            self._transport.write(outcome)

    # The end.

    def _reap(self) -> None:
        self._kill_group()  # the processes that it has started may still live
        status = self._process.wait()
        self.alive = False
        self._reason = self._reason or _describe_exit(status)
        if self._server_call is not None:
            self._server_call.cancel()
        self._transport.abortConnection()
        if self._reply is not None and not self._reply.called:
            # At the end of a drain the handler has run out of time, and made no error.
            error = HandlerTimeout if self._reason == _STOPPING else HandlerFailed
            self._reply.errback(error(self._end_message()))
        self._ended(self, self._reason)

    def _end_message(self) -> str:
        return f"the handler's process {self.pid} has ended: {self._reason}"


_NO_REPLY = "it wrote bytes that are no message"
_decode = msgspec.msgpack.Decoder(FromProcess).decode


def _default_size(workers: int) -> int:
    """Return a worker's share of the cores that this server may use, at least one. workers: 0 for one per core."""
    cores = len(os.sched_getaffinity(0))
    return max(1, cores // (workers or cores))


def _start_interpreter(stream: int) -> subprocess.Popen[bytes]:
    # In a process group of its own: the processes that user code starts are killed with it, and Ctrl-C in a terminal
    # does not reach it.
    # -P: see `realtime.supervisor.service`.
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "realtime.handlers.compute_process", str(stream)],
        stdin=subprocess.DEVNULL,
        pass_fds=[stream],
        process_group=0,
    )


def _describe_exit(status: int) -> str:
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


def _result(reply: Reply) -> Any:
    match reply:
        case CallReturned():
            return result_of(reply)
        case CallRefused():
            raise ClientError(reply.code, reply.message, reply.temporary)
        case CallDisconnected():
            raise Disconnect(reply.code, reply.reason)
    raise HandlerFailed(reply.text, reply.place, reply.kind)
