"""Roles: work that one worker does for all. A worker holds a role for a while, and renews it before that ends.

The *holder* is known by an address that no other worker ever has. Each change of the holder begins a *term*; the
numbers of terms only grow. Without I/O, and by one clock, which holder and broker share (CLOCK_MONOTONIC): the holder
counts its time from the moment before it asks, so it stops before another one may begin.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from realtime.pubsub.broker_state import StatePart
from realtime.pubsub.engine import HoldRole, ResignRole, Term


class RoleState(StatePart, tag=51, frozen=True, gc=False):
    """The latest term of a role. ends: its time; -infinity after a resignation."""

    name: str
    holder: str
    number: int
    ends: float


class Roles:
    """The roles by name. Names come from the code of the server, so they are few and kept for good."""

    def __init__(self) -> None:
        self._roles: dict[str, RoleState] = {}
        self._lost_at = -math.inf

    def note_loss(self, now: float) -> None:
        """An earlier broker had roles that are unknown here: their holders may go on until their time ends."""
        self._lost_at = now

    def hold(self, now: float, request: HoldRole) -> Term:
        """See `HoldRole`."""
        role, number = self._roles.get(request.name), request.term
        if role is None:
            if not number and now < self._lost_at + request.seconds:
                return Term(0, self._lost_at + request.seconds - now)
            number = number or 1
        elif role.holder == request.holder:
            number = role.number
        elif role.ends > now:
            return Term(0, role.ends - now)
        else:
            number = role.number + 1
        self._roles[request.name] = RoleState(request.name, request.holder, number, now + request.seconds)
        return Term(number, request.seconds)

    def resign(self, request: ResignRole) -> bool:
        """End the term of a holder. Returns whether it was the holder."""
        role = self._roles.get(request.name)
        if role is None or role.holder != request.holder:
            return False
        self._roles[request.name] = RoleState(role.name, role.holder, role.number, -math.inf)
        return True

    def export(self) -> Iterator[RoleState]:
        """Yield the state in parts."""
        yield from self._roles.values()

    def import_part(self, part: RoleState) -> None:
        """Add a role of another broker."""
        self._roles[part.name] = part
