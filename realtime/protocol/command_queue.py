"""Commands of one session that wait for earlier ones: their order, their concurrency, and when to stop reading.

Commands start in order of arrival, one at a time. Where `client.concurrency` allows several at a time, connect still
runs alone, and the commands of one channel keep their order. While more than `client.command_queue` commands wait, the
socket is not read.

A session has no queue until a command has to wait, and drops the queue when it is empty: most sessions have none most
of the time, and an empty deque is not small.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator
from typing import Protocol

from realtime.errors import BAD_PROTOCOL
from realtime.protocol.context import SessionServices, SessionSettings
from realtime.protocol.messages import Command, ProtocolError
from realtime.protocol.session_state import ACCEPTING, OPENED, SessionState

# Commands of one session started before other work gets a turn: half a millisecond's worth of simple ones.
COMMANDS_AT_ONCE = 32


class CommandRunner(Protocol):
    """The session, as its queue sees it.

    running: number of commands that wait for the engine or a handler. busy_channels: their channels, where several may
    run. queue: this queue, None for an empty one.
    """

    settings: SessionSettings
    services: SessionServices
    state: SessionState
    running: int
    queue: CommandQueue | None

    @property
    def busy_channels(self) -> Collection[str]: ...

    def start(self, command: Command) -> None:
        """Start one command. Raises ProtocolError for an invalid one."""

    def disconnect(self, code: int, reason: str) -> None: ...

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


class CommandQueue:
    """See the module.

    commands: the waiting ones. is_starting: commands are being started, now or in the next turns of the loop.
    is_paused: the socket is not read.
    """

    __slots__ = ("_session", "commands", "is_paused", "is_starting")

    def __init__(self, session: CommandRunner) -> None:
        self._session = session
        self.commands: deque[Command] = deque()
        self.is_starting = self.is_paused = False

    def start_ready(self) -> None:
        """Start all commands that may start now; a long run of them is divided over several turns of the loop."""
        self.is_starting = True
        slices = self._session.services.slices
        while self._start_some():
            slices.start_slice()
            if not slices.has_time:
                slices.add(self._start_others())
                return
        self._all_started()

    def _start_others(self) -> Iterator[None]:
        while self._start_some():
            yield
        self._all_started()

    def _start_some(self) -> bool:
        """Start up to COMMANDS_AT_ONCE commands. Returns whether another might start."""
        session, commands = self._session, self.commands
        for _ in range(COMMANDS_AT_ONCE):
            if not commands or session.state not in ACCEPTING:
                return False
            command = self._pop_independent() if session.running else commands.popleft()
            if command is None:
                return False
            try:
                session.start(command)
            except ProtocolError:
                session.disconnect(*BAD_PROTOCOL)
        return bool(commands)

    def _pop_independent(self) -> Command | None:
        """Remove and return the first command that may run beside the running ones; None if there is none."""
        session, commands, settings = self._session, self.commands, self._session.settings.client
        if session.running >= settings.concurrency or session.state is OPENED:
            return None
        for index in range(min(len(commands), settings.command_queue)):
            command = commands[index]
            channel = channel_of(command)
            if channel is None:
                return None  # an invalid command, which ends the session, stays behind the commands before it
            if channel not in session.busy_channels:
                del commands[index]
                return command
        return None

    def _all_started(self) -> None:
        self.is_starting = False
        if not self.commands:
            self._session.queue = None
        if self.is_paused and len(self.commands) <= self._session.settings.client.command_queue // 2:
            self.is_paused = False
            self._session.resume_reading()

    def limit(self) -> None:
        """Stop reading the socket while too many commands wait."""
        if len(self.commands) > self._session.settings.client.command_queue and not self.is_paused:
            self.is_paused = True
            self._session.pause_reading()


def channel_of(command: Command) -> str | None:
    """Return the channel that a command names, "" for none; None for an invalid command."""
    try:
        _, request = command.request()
    except ProtocolError:
        return None
    return getattr(request, "channel", "")
