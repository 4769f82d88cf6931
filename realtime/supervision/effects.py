"""The effects of the pool's events, which the supervisor carries out: `realtime.supervision.pool`."""

from __future__ import annotations

from msgspec import Struct


class SpawnProcess(Struct, frozen=True):
    """Start a process of the slot with the settings of a revision. On failure, call `process_exited`.

    predecessor: generation of the process that hands its state over to it before it is ready; 0 for none.
    """

    slot: int
    generation: int
    revision: int = 0
    predecessor: int = 0


class MoveConnections(Struct, frozen=True):
    """Move the connections of a process within `timeout` seconds, to the process that serves its slot now; from a
    slot that is being removed, to all others. Then call `handed_over`."""

    slot: int
    generation: int
    timeout: float


class DrainProcess(Struct, frozen=True):
    """Order the process to finish its work within `timeout` seconds and exit."""

    slot: int
    generation: int
    timeout: float


class SignalProcess(Struct, frozen=True):
    """Send the process a signal."""

    slot: int
    generation: int
    number: int


class DumpProcessStacks(Struct, frozen=True):
    """Log the stacks of all threads of the process. Its loop is blocked, and the pool kills it in a moment."""

    slot: int
    generation: int


class ConnectToBroker(Struct, frozen=True):
    """Give the worker and the broker a new stream to each other. On failure, call `broker_link_lost`."""

    slot: int
    generation: int


class UseRevision(Struct, frozen=True):
    """A process serves with the settings of this revision: they are the ones in force from now on."""

    revision: int


class ReloadEnded(Struct, frozen=True):
    """A reload has ended. failure: why, in one line; "" if every worker has been replaced."""

    failure: str = ""


class RemoveSlot(Struct, frozen=True):
    """The slot is empty, and no longer part of the pool."""

    slot: int


class ScaleEnded(Struct, frozen=True):
    """The pool has the wanted number of workers, or, after a failure, the number it had before. failure: why, in one
    line; "" for none."""

    failure: str = ""


class NotifySystemd(Struct, frozen=True):
    """Notify the service manager of a state: "ready" or "stopping". Each occurs once at most."""

    state: str


class LogLine(Struct, frozen=True):
    """Write a line to the log."""

    line: str
    is_error: bool = False


class HaltService(Struct, frozen=True):
    """Exit with `status`: no process is left. reason: one line, "" for status 0. The last effect of all."""

    status: int
    reason: str = ""


Effect = (
    SpawnProcess
    | MoveConnections
    | DrainProcess
    | SignalProcess
    | DumpProcessStacks
    | ConnectToBroker
    | UseRevision
    | ReloadEnded
    | RemoveSlot
    | ScaleEnded
    | NotifySystemd
    | LogLine
    | HaltService
)
