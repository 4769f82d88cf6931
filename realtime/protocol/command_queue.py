"""Commands of one session that wait for earlier ones: their order, their concurrency, and when to stop reading.

Commands start in order of arrival, one at a time. Where `client.concurrency` allows several at a time, connect still
runs alone, and the commands of one channel keep their order. None starts while the client has long replies to take.
While more than `client.command_queue` commands wait, the socket is not read. The commands of a long message are decoded
one by one, as the queue has room and the loop has time.

A session has no queue until a command has to wait, and drops the queue when it is empty: most sessions have none most
of the time, and an empty deque is not small.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator
from typing import Protocol

from realtime.errors import BAD_PROTOCOL
from realtime.protocol.context import SessionServices, SessionSettings
from realtime.protocol.encodings import TooManyFields
from realtime.protocol.messages import Command, ProtocolError
from realtime.protocol.session_state import ACCEPTING, OPENED, Departure, SessionState
from realtime.pubsub.time_slices import TimeSlicer

# Commands of one session started before other work gets a turn: half a millisecond's worth of simple ones.
COMMANDS_AT_ONCE = 32

# Bytes of a message from which on it is decoded one command at a step, and not at once.
LONG_MESSAGE = 2048

# Takes the place of an unreadable message behind the commands before it. An id without a request is invalid.
_UNREADABLE = Command(id=1)


class CommandRunner(Protocol):
    """The session, as its queue sees it.

    running: number of commands that wait for the engine or a handler. busy_channels: their channels, where several may
    run. queue: this queue, None for an empty one. departure: set while no command may start, as the session is about to
    move to another worker.
    """

    settings: SessionSettings
    services: SessionServices
    state: SessionState
    running: int
    queue: CommandQueue | None
    departure: Departure | None

    @property
    def busy_channels(self) -> Collection[str]: ...

    @property
    def is_congested(self) -> bool:
        """Whether no command may start: the client has to take its replies first."""

    def wait_until_drained(self) -> None:
        """Call `queue.start_ready` when the client has taken its replies."""

    def take_pong(self, command: Command) -> bool:
        """Take a command if it is an expected pong, which never waits."""

    def settle(self) -> None:
        """Note that no command is being started, during a departure."""

    def start(self, command: Command) -> None:
        """Start one command. Raises ProtocolError for an invalid one."""

    def disconnect(self, code: int, reason: str, *, detail: str = "") -> None: ...

    def abort(self) -> None: ...

    def describe(self) -> dict[str, object]: ...

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


class CommandQueue:
    """See the module.

    commands: the decoded ones. undecoded: the rest of long messages, and the messages behind them. is_starting:
    commands are being started, now or in the next turns of the loop. is_paused: the socket is not read.
    """

    __slots__ = ("_session", "commands", "is_paused", "is_starting", "undecoded")

    def __init__(self, session: CommandRunner) -> None:
        self._session = session
        self.commands: deque[Command] = deque()
        self.undecoded: deque[Iterator[Command]] = deque()
        self.is_starting = self.is_paused = False

    def append(self, commands: Iterator[Command], size: int) -> None:
        """Append the commands of a message of `size` bytes."""
        self.undecoded.append(commands)
        if size <= LONG_MESSAGE and len(self.undecoded) == 1:
            while self.undecoded:
                self._decode_one()

    def _decode_one(self) -> None:
        """Decode the next command."""
        try:
            command = next(self.undecoded[0], None)
        except ProtocolError as error:
            if isinstance(error, TooManyFields):
                self._session.services.client_log.refuse("command_fields", self._session.describe)
            # The commands before it are still carried out.
            command = _UNREADABLE
            self.undecoded.popleft()
        if command is None:
            self.undecoded.popleft()
        elif not self._session.take_pong(command):
            self.commands.append(command)

    def take_all(self) -> Iterator[Command]:
        """Remove and yield all commands, also those of undecoded messages."""
        while self.commands or self.undecoded:
            if self.commands:
                yield self.commands.popleft()
            else:
                self._decode_one()

    def clear(self) -> None:
        """Drop all commands."""
        self.commands.clear()
        self.undecoded.clear()

    def start_ready(self) -> None:
        """Start all commands that may start now; a long run of them is divided over several turns of the loop."""
        if self._session.departure is not None:
            self._session.settle()
            return
        self.is_starting = True
        slices = self._slices
        is_long = bool(self.undecoded)
        if is_long and not slices.has_time:
            slices.add(self._start_others())
            return
        while self._start_some():
            slices.start_slice()
            if not slices.has_time:
                slices.add(self._start_others())
                return
        if is_long:
            slices.start_slice()
        self._all_started()

    @property
    def _slices(self) -> TimeSlicer:
        """The slices for this client: until it is connected, it shares a small one with all other strangers."""
        services = self._session.services
        if self._session.state is OPENED and services.strangers is not None:
            return services.strangers
        return services.slices

    def _start_others(self) -> Iterator[None]:
        slices = self._slices
        try:
            while self._start_some():
                yield
                if self._slices is not slices:
                    self._slices.add(self._start_others())
                    return
            self._all_started()
        except Exception as error:
            self._session.services.report_error(error)
            self._session.abort()

    def _start_some(self) -> bool:
        """Decode one command, or start up to COMMANDS_AT_ONCE. Returns whether another might start."""
        session, commands = self._session, self.commands
        if session.departure is not None:
            return False
        if session.is_congested:
            session.wait_until_drained()
            return False
        if self._has_to_decode():
            self._decode_one()
            number = 1
        else:
            number = COMMANDS_AT_ONCE
        for _ in range(number):
            if not commands or session.state not in ACCEPTING:
                break
            command = self._pop_independent() if session.running else commands.popleft()
            if command is None:
                return self._has_to_decode()
            try:
                session.start(command)
            except ProtocolError as error:
                session.disconnect(*BAD_PROTOCOL, detail=str(error))
        return session.state in ACCEPTING and bool(commands or self.undecoded)

    def _has_to_decode(self) -> bool:
        limit = self._session.settings.client.command_queue if self._session.running else 1
        return bool(self.undecoded) and len(self.commands) < limit

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
        if self._session.departure is not None:
            self._session.settle()
            return
        if not (self.commands or self.undecoded):
            self._session.queue = None
        limit = self._session.settings.client.command_queue // 2
        if self.is_paused and not self.undecoded and len(self.commands) <= limit:
            self.is_paused = False
            self._session.resume_reading()

    def limit(self) -> None:
        """Stop reading the socket while too many commands wait."""
        waiting = len(self.commands) > self._session.settings.client.command_queue or self.undecoded
        if waiting and not self.is_paused:
            self.is_paused = True
            self._session.pause_reading()


def channel_of(command: Command) -> str | None:
    """Return the channel that a command names, "" for none; None for an invalid command."""
    try:
        _, request = command.request()
    except ProtocolError:
        return None
    return getattr(request, "channel", "")
