"""Reloads: a trial of the new configuration and application, then the replacement of all workers.

One reload runs at a time. Requests that come meanwhile share the next one, since the present one may have read the
configuration before the latest change.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from twisted.internet.defer import Deferred
from twisted.logger import Logger

from realtime.config.reload import keep_fixed
from realtime.config.settings import Settings
from realtime.process import log
from realtime.supervisor.systemd import SystemdNotifier
from realtime.supervisor.trial import Trial, TrialResult

Tell = Callable[[str], None]
"""Called with a line of progress."""

_log = Logger(observer=log.observer)


class Reloads:
    """Carries out the requests to reload.

    notifier: of the service manager. stopping: set it when the server stops: requests fail from then on.
    """

    def __init__(self, trial: Trial, begin: Callable[[Settings], None], running: Callable[[], Settings]) -> None:
        """begin: replaces the workers; `ended` is called at the end. running: returns the settings in force."""
        self.notifier = SystemdNotifier({})
        self.stopping = False
        self._trial = trial
        self._begin = begin
        self._running = running
        self._present: list[tuple[Tell, Deferred[str]]] = []
        self._next: list[tuple[Tell, Deferred[str]]] = []
        self._began_at = 0.0

    def request(self, tell: Tell) -> Deferred[str]:
        """Reload now, or after the present reload. See `Supervisor.reload`."""
        ended: Deferred[str] = Deferred()
        if self.stopping:
            ended.callback("the server is stopping")
        elif self._present:
            self._next.append((tell, ended))
            tell("a reload is under way; another one follows")
        else:
            self._start([(tell, ended)])
        return ended

    def tell(self, line: str) -> None:
        """Pass a line of the log on to those who wait for the present reload."""
        for tell, _ in self._present:
            tell(line)

    def _start(self, requests: list[tuple[Tell, Deferred[str]]]) -> None:
        self._present = requests
        self._began_at = time.monotonic()
        self.notifier.reloading(self._began_at)
        self._trial.run(self._running().workers.start_timeout).addCallback(self._tried)

    def _tried(self, result: TrialResult) -> None:
        if self.stopping:
            self.ended("the server is stopping")
        elif result.settings is None:
            self.ended("; ".join(result.problems))
        else:
            settings, fixed = keep_fixed(self._running(), result.settings)
            for line in (*fixed, *result.warnings):
                _log.warn("{line}", line=line)
                self.tell(line)
            self._begin(settings)

    def ended(self, failure: str) -> None:
        """The present reload has ended. failure: why, in one line; "" after success."""
        requests, self._present = self._present, []
        if failure:
            _log.error("the reload failed: {failure}", failure=failure)
        else:
            _log.info("reloaded within {seconds:.1f} s", seconds=time.monotonic() - self._began_at)
        if not self.stopping:
            self.notifier.ready()
        following, self._next = self._next, []
        if following:
            self._start(following)
        for _, ended in requests:
            ended.callback(failure)
