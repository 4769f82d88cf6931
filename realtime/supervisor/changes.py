"""Changes of the running server at its operators' request: reloads, other numbers of workers, and upgrades.

A reload begins with a trial of the new configuration and application; then all workers are replaced. An upgrade begins
in one program and ends in the next, see `realtime.supervisor.upgrade`. One change runs at a time. Requests to reload
that come meanwhile share the next reload, since a present one may have read the configuration before it was last
changed.
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

_STOPPING = "the server is stopping"
_RELOAD = "reload"
_UPGRADE = "upgrade"

_log = Logger(observer=log.observer)


class Changes:
    """Carries out the requests to reload, to scale and to upgrade.

    notifier: of the service manager.
    """

    def __init__(self, trial: Trial, begin: Callable[[Settings], None], running: Callable[[], Settings]) -> None:
        """begin: replaces the workers; `ended` is called at the end. running: returns the settings in force."""
        self.notifier = SystemdNotifier({})
        self._stopping = False
        self._trial = trial
        self._begin = begin
        self._running = running
        self._present: list[tuple[Tell, Deferred[str]]] = []
        self._next: list[tuple[Tell, Deferred[str]]] = []
        self._began_at = 0.0
        self._name = ""  # of the present change
        self._upgraded = "no upgrade is under way"  # the outcome of the latest one

    def scale(self, tell: Tell, begin: Callable[[], None]) -> Deferred[str]:
        """Change the number of workers now. begin: begins it; `ended` is called at the end. See `Supervisor.scale`."""
        return self._carry_out("change of the number of workers", tell, begin)

    def upgrade(self, tell: Tell, begin: Callable[[], None]) -> Deferred[str]:
        """Upgrade now. begin: begins it; `ended` is called at the end. See `Supervisor.upgrade`."""
        return self._carry_out(_UPGRADE, tell, begin)

    def continue_upgrade(self, begin: Callable[[], None]) -> None:
        """Go on with an upgrade that another program has begun, before any other change."""
        self._carry_out(_UPGRADE, lambda line: None, begin)

    def join_upgrade(self, tell: Tell) -> Deferred[str]:
        """Follow the upgrade that is under way. Without one, the result is the outcome of the latest one."""
        ended: Deferred[str] = Deferred()
        if self._present and self._name == _UPGRADE:
            self._present.append((tell, ended))
        else:
            ended.callback(self._upgraded)
        return ended

    def _carry_out(self, name: str, tell: Tell, begin: Callable[[], None]) -> Deferred[str]:
        ended: Deferred[str] = Deferred()
        if self._stopping:
            ended.callback(_STOPPING)
        elif self._present:
            ended.callback(f"{_one(self._name)} is under way; try again when it has ended")
        else:
            self._present, self._name = [(tell, ended)], name
            self._began_at = time.monotonic()
            if name == _UPGRADE:
                self.notifier.reloading(self._began_at)
            begin()
        return ended

    def request(self, tell: Tell) -> Deferred[str]:
        """Reload now, or after the present reload. See `Supervisor.reload`."""
        ended: Deferred[str] = Deferred()
        if self._stopping:
            ended.callback(_STOPPING)
        elif self._present:
            self._next.append((tell, ended))
            tell(f"{_one(self._name)} is under way; the reload follows")
        else:
            self._start([(tell, ended)])
        return ended

    def tell(self, line: str) -> None:
        """Pass a line of the log on to the requests of the present change."""
        for tell, _ in self._present:
            tell(line)

    def stop(self) -> None:
        """The server stops: all requests fail."""
        self._stopping = True
        requests, self._present, self._next = [*self._present, *self._next], [], []
        for _, ended in requests:
            ended.callback(_STOPPING)

    def _start(self, requests: list[tuple[Tell, Deferred[str]]]) -> None:
        self._present, self._name = requests, _RELOAD
        self._began_at = time.monotonic()
        self.notifier.reloading(self._began_at)
        self._trial.run(self._running().workers.start_timeout).addCallback(self._tried)

    def _tried(self, result: TrialResult) -> None:
        if self._stopping:
            return
        if result.settings is None:
            self.ended("; ".join(result.problems))
        else:
            self.tell("the configuration and the application are good; replacing the workers, one after the other")
            settings, fixed = keep_fixed(self._running(), result.settings)
            for line in (*fixed, *result.warnings):
                _log.warn("{line}", line=line)
                self.tell(line)
            self._begin(settings)

    def ended(self, failure: str) -> None:
        """The present change has ended. failure: why, in one line; "" after success."""
        if self._stopping:
            return
        requests, self._present = self._present, []
        if failure:
            _log.error("the {change} failed: {failure}", change=self._name, failure=failure)
        else:
            seconds = time.monotonic() - self._began_at
            _log.info("the {change} took {seconds:.1f} s", change=self._name, seconds=seconds)
        if self._name in (_RELOAD, _UPGRADE):
            self.notifier.ready()
        if self._name == _UPGRADE:
            self._upgraded = failure
        following, self._next = self._next, []
        if following:
            self._start(following)
        for _, ended in requests:
            ended.callback(failure)


def _one(name: str) -> str:
    return f"{'an' if name == _UPGRADE else 'a'} {name}"
