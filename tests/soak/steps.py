"""Stops a worker of a soak at one step of a hand-over, so that a fault meets it there.

`watch` wraps the functions that a hand-over calls; the soak's application calls it in every worker. `Steps` belongs to
the soak: it names a step, and learns which process stopped there.
"""

from __future__ import annotations

import importlib
import inspect
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from functools import reduce
from pathlib import Path
from typing import Any

# The functions of a hand-over, by the end that calls them. A step is the moment before or after a call of one.
SOURCE = {
    "suspend": "realtime.protocol.handover suspend",
    "channels_of": "realtime.protocol.handover channels_of",
    "cut": "realtime.protocol.handover cut",
    "export": "realtime.protocol.handover export",
    "send": "realtime.worker.handover_source HandOverSource._send",
    "dispatch": "realtime.worker.handover_source HandOverSource._dispatch",
    "settle": "realtime.worker.handover_source HandOverSource._settle",
}
TARGET = {
    "expect": "realtime.protocol.handover expect",
    "arrived": "realtime.protocol.handover arrived",
    "claim": "realtime.worker.handover_target HandOverTarget._claim",
    "adopt": "realtime.worker.handover_target HandOverTarget._adopt",
    "answer": "realtime.worker.handover_target HandOverTarget._send",
    "finish": "realtime.protocol.handover finish",
}
# Functions called for each connection, and functions called for several messages of a batch.
EACH, SOME = ("suspend", "export", "adopt"), ("send", "answer")
STEPS = tuple(f"{when} {function}" for function in (*SOURCE, *TARGET) for when in ("before", "after"))

_ARMED, _STOPPED = "armed", "stopped"


class Steps:
    """The steps of the workers that have this folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def arm(self, step: str, times: int) -> None:
        """Stop the first worker that gets to this step for the `times`-th time in its life."""
        self.disarm()
        (self._folder / "next").write_text(f"{step} {times}")
        os.rename(self._folder / "next", self._folder / _ARMED)

    def disarm(self) -> None:
        for name in (_ARMED, _STOPPED):
            (self._folder / name).unlink(missing_ok=True)

    @property
    def stopped(self) -> int | None:
        """The process that has stopped at the step; None while none has."""
        with suppress(OSError, ValueError):
            return int((self._folder / _STOPPED).read_text())
        return None


def watch(folder: str) -> None:
    """Make this process stop at the steps that are armed in the folder."""
    for name, place in (SOURCE | TARGET).items():
        module, _, path = place.partition(" ")
        *owners, function = path.split(".")
        owner = reduce(getattr, owners, importlib.import_module(module))
        setattr(owner, function, _watched(Path(folder), name, getattr(owner, function)))


def _watched(folder: Path, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    reached = {when: _Reached(folder, f"{when} {name}") for when in ("before", "after")}
    if inspect.iscoroutinefunction(function):

        async def waiting(*arguments: Any, **named: Any) -> Any:
            reached["before"]()
            result = await function(*arguments, **named)
            reached["after"]()
            return result

        return waiting

    def called(*arguments: Any, **named: Any) -> Any:
        reached["before"]()
        result = function(*arguments, **named)
        reached["after"]()
        return result

    return called


class _Reached:
    def __init__(self, folder: Path, step: str) -> None:
        self._folder = folder
        self._step = step
        self._times = 0

    def __call__(self) -> None:
        """Stop here if this step is armed: the process that renames the file is the only one."""
        self._times += 1
        with suppress(OSError):
            step, _, times = (self._folder / _ARMED).read_text().rpartition(" ")
            if step == self._step and self._times >= int(times):
                mine = self._folder / f"{os.getpid()}"
                os.rename(self._folder / _ARMED, mine)
                mine.write_text(str(os.getpid()))
                os.rename(mine, self._folder / _STOPPED)
                os.kill(os.getpid(), signal.SIGSTOP)
