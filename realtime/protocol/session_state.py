"""The states of a session.

    OPENED ──connect──▶ CONNECTED ──▶ CLOSED
       └───refused────▶ REFUSED ───────▲

Any state may end in CLOSED. A refused session is closed by its client, or after `session_timers.REFUSED_DELAY`.
"""

from __future__ import annotations

import enum


class SessionState(enum.Enum):
    OPENED = enum.auto()
    REFUSED = enum.auto()
    CONNECTED = enum.auto()
    CLOSED = enum.auto()


# Module constants for the receive path: looking up a member of an Enum takes six times as long.
OPENED, CONNECTED = ACCEPTING = (SessionState.OPENED, SessionState.CONNECTED)
"""The states in which a session accepts commands."""
