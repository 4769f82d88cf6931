"""Upgrade of the whole server: another version of this package, or of Python, takes its place while the clients stay.

    1. Trials: the installed version reads the configuration, imports the application, and makes a supervisor from what
       this one would leave to it. Its processes must have the messages and the state of those that run. If one of these
       fails, one line says why, and nothing has changed.
    2. The supervisor executes the installed program in its own place (execve(2)), at a moment when no message is under
       way. The process stays the same, and with it its children, sockets and `realtime.supervisor.inheritance`.
    3. The new supervisor replaces the broker, which hands its state over, and then the workers, as in a reload.

Before the second step, each failure leaves everything as it was. In the third one, the broker or the worker that can't
be replaced goes on. The kernel starts the program or refuses at once; if the new supervisor ends, in whatever way, the
other processes end too, and the service manager starts the server again.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from msgspec import Struct
from twisted.internet.task import deferLater
from twisted.logger import Logger

from realtime._version import __version__
from realtime.config.reload import fixed_values
from realtime.config.settings import Settings
from realtime.errors import RealtimeError
from realtime.process import log, output
from realtime.supervision.pool import Pool
from realtime.supervisor.child_process import ChildProcess
from realtime.supervisor.inheritance import HELD_SIGNALS, Inheritance
from realtime.supervisor.listener import SharedPort
from realtime.supervisor.rescue import Rescue
from realtime.supervisor.systemd import SystemdNotifier
from realtime.supervisor.trial import ProgramResult, Trial
from realtime.supervisor.zygote import Zygote, ZygoteUnusable

QUIET_TIMEOUT = 10.0
"""Seconds within which no message must be under way, at one moment."""

START_TIMEOUT = 60.0
"""Seconds for the program to start, which takes one on an idle machine, before the watchdog ends the service."""

_QUIET_INTERVAL = 0.02

_log = Logger(observer=log.observer)


class CannotUpgrade(RealtimeError):
    """The server goes on as it is. The text is the reason, in one line."""


class Launch(Struct, frozen=True):
    """How to execute the installed program. command: with the program, and all arguments but the inheritance's.

    pidfile: the path of a file that the last program removes at its end, or "".
    """

    command: list[str]
    pidfile: str = ""


class Listening(Protocol):
    """A listening port."""

    def fileno(self) -> int: ...


class Estate(Struct, frozen=True):
    """The parts of a supervisor that another one goes on with. children: by generation. settings: in force."""

    pool: Pool
    children: Mapping[int, ChildProcess]
    port: SharedPort
    operators: Listening
    rescue: Rescue
    zygote: Zygote
    settings: Settings

    @property
    def obstacle(self) -> str:
        """Why no other supervisor can go on now, in one line; "" if one can."""
        if self.pool.stopping:
            return "the server is stopping"
        if self.pool.is_settled and len(self.port.sockets) == len(self.pool.workers):
            return ""
        return "not all processes are ready, or some are being replaced; try again when they are"

    @property
    def is_quiet(self) -> bool:
        """Whether no message of a process, and no connection of a client, is under way."""
        return self.rescue.is_idle and all(process.is_quiet for process in self.children.values())

    def inheritance(self, configured_count: int, pidfile: str, settings: bytes = b"") -> Inheritance:
        """Return it, while there is no `obstacle`. For the arguments see `Inheritance`."""
        records = [slot.record() for slot in self.pool.slots.values()]
        return Inheritance(
            version=__version__,
            formats=self.zygote.formats,
            processes=[self.children[record.generation].inheritance(record) for record in records],
            generation=self.pool.generation,
            port=self.port.inheritance(),
            operators=self.operators.fileno(),
            configured_count=configured_count,
            fixed=fixed_values(self.settings),
            pidfile=pidfile,
            settings=settings,
        )


class Upgrade:
    """One upgrade, up to the execution of the program."""

    def __init__(
        self,
        reactor: Any,
        estate: Estate,
        launch: Launch | None,
        configured_count: int,
        trial: Trial,
        notifier: SystemdNotifier,
    ) -> None:
        """launch: None for a server that can't be upgraded. configured_count: see `Inheritance`."""
        self._reactor = reactor
        self._estate = estate
        self._launch = launch
        self._configured_count = configured_count
        self._trial = trial
        self._notifier = notifier

    async def run(self, tell: Callable[[str], None]) -> None:
        """Upgrade: returns never, and raises CannotUpgrade if the server goes on as it is.

        tell: called with lines of progress.
        """
        if self._launch is None:
            raise CannotUpgrade("this server was not started by `twistd realtime`; restart it")
        timeout = self._estate.settings.workers.start_timeout
        self._check_obstacle()
        tell("trying out the installed version")
        _check(await self._trial.run_application(timeout))
        try:
            await self._estate.zygote.check()
        except (OSError, ZygoteUnusable) as error:
            raise CannotUpgrade(str(error)) from error
        self._check_obstacle()
        fd = self._estate.inheritance(self._configured_count, self._launch.pidfile).publish()
        try:
            result = await self._trial.run_program(self._launch.command, fd, timeout)
        finally:
            os.close(fd)
        for line in _check(result):
            tell(line)
        tell(f"version {result.version} takes the place of version {__version__}: supervisor, broker, workers")
        await self._wait_until_quiet()
        settings = bytes(result.settings)
        self._notifier.stretch_watchdog(START_TIMEOUT)  # the program does not feed it before it has started
        execute(self._launch, self._estate.inheritance(self._configured_count, self._launch.pidfile, settings))

    def _check_obstacle(self) -> None:
        if obstacle := self._estate.obstacle:
            raise CannotUpgrade(obstacle)

    async def _wait_until_quiet(self) -> None:
        deadline = self._reactor.seconds() + QUIET_TIMEOUT
        while self._reactor.seconds() < deadline:
            # Also before the first look: the lines of progress are on their way.
            await deferLater(self._reactor, _QUIET_INTERVAL)
            self._check_obstacle()
            # The next program does not know the processes of the trials, so it could not reap them.
            if self._estate.is_quiet and not self._trial.pids and len(self._estate.zygote.pids) <= 1:
                return
        raise CannotUpgrade(f"for {QUIET_TIMEOUT:g} s, messages between the processes were always under way; try again")


def _check(result: ProgramResult) -> list[str]:
    if result.problems:
        raise CannotUpgrade("; ".join(result.problems))
    return result.warnings


def execute(launch: Launch, inheritance: Inheritance, environ: Mapping[str, str] = os.environ) -> None:
    """Execute the program in place of this one. Returns never. Raises CannotUpgrade, and undoes everything then."""
    _log.info("executing the installed version in place of this one")
    output.drain()
    fd = inheritance.publish()
    descriptors = [fd, *inheritance.descriptors()]
    held = signal.pthread_sigmask(signal.SIG_BLOCK, HELD_SIGNALS)
    try:
        for descriptor in descriptors:
            os.set_inheritable(descriptor, True)
        os.execve(launch.command[0], [*launch.command, f"--resume={fd}"], environ)
    except OSError as error:
        for descriptor in descriptors:
            os.set_inheritable(descriptor, False)
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
        os.close(fd)
        raise CannotUpgrade(f"{launch.command[0]} can't be executed: {error.strerror}") from error
