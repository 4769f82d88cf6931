"""Relief: a second thread of a worker, which serves while a handler blocks the loop.

It sleeps until a turn of the loop has taken `loop.relief_after`. If application code runs then, and so has released the
server lock, it does the server's own work in slices of a millisecond: it reads and writes the server's descriptors,
makes the server's calls and timers, and runs the periodic tasks of the heartbeat. It runs no application code: handlers
on the loop, tasks and callbacks of the application wait for the loop's own thread. When the step ends, that thread gets
the lock within a slice, and ends the relief.

The connection that the loop's thread is serving is held: relief does not read it. Other code may be in the midst of a
loop over connections or calls; such loops take one item at a time from a common queue, so that relief can go on.

Relief hides nothing: only the loop's own thread writes the heartbeat and ends its turn.
"""

from __future__ import annotations

import asyncio
import contextvars
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

from twisted.logger import Logger

from realtime.metrics import NONE, Metrics, Sample
from realtime.process import log
from realtime.process.heartbeat import HandlerMarker, MeasuredSelector
from realtime.process.periodic import PeriodicTasks
from realtime.process.reactor import ServerReactor
from realtime.process.server_lock import ServerLock
from realtime.supervision.loop_time import LoopWork
from realtime.supervision.vitals import VitalsPage

RELIEFS, RELIEF_SECONDS = "realtime_reliefs", "realtime_relief_seconds"
"""The counters of reliefs and of their time, by the handler that blocked the loop."""

# Seconds for which the relief thread keeps the lock.
SLICE = 0.001
# Seconds after which a thread that computes has to let the others run, while relief serves; Python's default is 5 ms.
_SWITCH_INTERVAL = 0.0001
# Seconds between two looks whether the loop's thread has got the lock.
_YIELD = 0.0002
# Seconds for which the relief thread waits for the lock.
_PATIENCE = 0.005
# Seconds between two looks at a long turn in which the server's own code runs.
_LOOK_AGAIN = 0.005
# Seconds for which relief waits for an event at most.
_LONGEST_WAIT = 0.05

_log = Logger(observer=log.observer)


class Relief:
    """The relief thread of one process. at_begin: called when a relief begins, to queue work that was under way."""

    def __init__(
        self,
        lock: ServerLock,
        after: float,
        selector: MeasuredSelector,
        reactor: ServerReactor,
        marker: HandlerMarker,
        tasks: PeriodicTasks,
        page: VitalsPage,
        metrics: Metrics,
    ) -> None:
        """after: seconds of a turn before relief begins. tasks: the heartbeat's."""
        self.at_begin: list[Callable[[], None]] = []
        self._lock = lock
        self._after = int(after * 1e9)
        self._selector = selector
        self._reactor = reactor
        self._marker = marker
        self._tasks = tasks
        self._page = page
        self._records: dict[str, list[int]] = {}  # by handler: times, and nanoseconds
        metrics.sources.append(self._samples)
        self._account = selector.accounts.open(LoopWork.PROTOCOL)
        self._awake = threading.Event()
        self._is_stopped = False
        self._thread: threading.Thread | None = None
        self._began = 0  # nanoseconds
        self._handler = ""
        self._switch_interval = sys.getswitchinterval()
        self._slice_end = 0

    def start(self) -> None:
        """Start the thread. To be called in the loop's."""
        loop, context = asyncio.get_running_loop(), contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._run, loop), name="relief", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread soon. Idempotent."""
        self._is_stopped = True
        self._awake.set()

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        # Signals are for the loop's thread: its stack is wanted, and its handlers run there.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        # Code of the server finds the loop, to queue calls for its thread.
        asyncio._set_running_loop(loop)
        try:
            while not self._is_stopped:
                since = self._watch()
                if since and not self._is_stopped:
                    self._relieve(since)
        except Exception:
            _log.failure("the relief thread raised and ends; a handler that blocks now holds up all clients")

    # Watching

    def _watch(self) -> int:
        """Sleep until a turn has taken too long; return its beginning. 0: look again."""
        lock, page = self._lock, self._page
        calls = page.calls
        since = page.busy_since()
        age = time.monotonic_ns() - since if since else 0
        if age >= self._after and self._marker.running is not None:
            return since
        self._awake.clear()
        self._awake.wait(max(self._after - age, _LOOK_AGAIN * 1e9) / 1e9)
        if page.calls == calls and self._marker.running is None:
            # No handler has run meanwhile: the next one wakes this thread, so that an idle process is left alone.
            self._awake.clear()
            lock.on_step = self._wake
            if page.calls == calls and self._marker.running is None and not self._is_stopped:
                self._awake.wait()
            lock.on_step = None
        return 0

    def _wake(self) -> None:
        self._lock.on_step = None
        self._awake.set()

    # Serving

    def _relieve(self, since: int) -> None:
        """Serve until the step has ended that blocks the loop, in the turn that began at `since`."""
        lock = self._lock
        if not self._take():
            return
        if self._page.busy_since() != since or not lock.is_released:
            lock.release()
            return
        try:
            self._begin()
        except Exception:
            self._end()
            lock.release()
            raise
        while True:
            wait = self._serve()
            lock.release()
            while lock.is_wanted:
                time.sleep(_YIELD)
            if wait > 0:
                self._selector.wait(wait)
            while not self._take():
                if lock.on_step_end is None:
                    return
            if lock.on_step_end is None or self._is_stopped:
                self._end()
                lock.release()
                return

    def _take(self) -> bool:
        """Take the lock within _PATIENCE; return whether that was possible."""
        lock = self._lock
        lock.is_asked = True
        taken = lock.acquire(True, _PATIENCE)
        lock.is_asked = False
        return taken

    def _begin(self) -> None:
        self._began = time.monotonic_ns()
        names = self._marker.running
        self._handler = names[0].decode("utf-8", "replace") if names else NONE
        self._page.note_relief(self._began)
        self._switch_interval = sys.getswitchinterval()
        sys.setswitchinterval(_SWITCH_INTERVAL)
        self._lock.on_step_end = self._end
        fd = self._selector.hold()
        if fd >= 0:
            self._reactor.hold(fd)
        for function in self.at_begin:
            self._selector.call_after_reading(function)

    def _end(self) -> None:
        """End the relief, in the thread that holds the lock. Idempotent."""
        if self._lock.on_step_end is None:
            return
        self._lock.on_step_end = None
        self._selector.unhold()
        self._reactor.unhold()
        sys.setswitchinterval(self._switch_interval)
        record = self._records.setdefault(self._handler, [0, 0])
        record[0] += 1
        record[1] += time.monotonic_ns() - self._began

    def _samples(self) -> Iterator[Sample]:
        for handler, (times, spent) in list(self._records.items()):
            labels = [("handler", handler)]
            yield Sample(RELIEFS, "counter", "Times that relief served while a handler blocked.", labels, times)
            help = "Time for which relief served while a handler blocked."
            yield Sample(RELIEF_SECONDS, "counter", help, labels, spent / 1e9)

    def _serve(self) -> float:
        """Serve for one slice. Returns the seconds to wait for an event then."""
        lock, selector = self._lock, self._selector
        lock.is_relieving = True
        resume = selector.accounts.interrupt(self._account)
        self._slice_end = time.monotonic_ns() + int(SLICE * 1e9)
        selector.turns += 1
        try:
            number = selector.queued_calls
            selector.serve(selector.poll(0), self._goes_on)
            selector.run_calls(number)
            self._tasks.run_due(time.monotonic())
            selector.run_calls(0)
            if selector.queued_calls:
                return 0.0
            due = min(selector.timers.next_due, self._tasks.next_due())
            return min(max(due - time.monotonic(), 0.0), _LONGEST_WAIT)
        except BaseException:  # the lock must be given back in any case
            _log.failure("relief raised while it served; it goes on")
            return _LONGEST_WAIT
        finally:
            selector.accounts.resume(resume)
            lock.is_relieving = False

    def _goes_on(self) -> bool:
        return not self._lock.is_wanted and time.monotonic_ns() < self._slice_end
