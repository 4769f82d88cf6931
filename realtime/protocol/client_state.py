"""The application's own state of a client (`Client.state`), on its way to another process with a hand-over.

It travels as a pickle, so that it may hold objects of the application's classes. The bytes come from another process
of this server, over a stream that no client reaches.
"""

from __future__ import annotations

import pickle
from typing import Any

from realtime.errors import RealtimeError


class StateError(RealtimeError):
    """The state of a client can't move."""


def dump(state: dict[Any, Any]) -> bytes | None:
    """Return the state as bytes; None for an empty one. Raises StateError."""
    if not state:
        return None
    try:
        return pickle.dumps(state)
    except Exception as error:  # of the classes of the application
        raise StateError(f"client.state can't be pickled: {type(error).__name__}: {error}") from error


def load(data: bytes | None) -> dict[Any, Any]:
    """Return the state that `dump` returned. Raises StateError: the application here may be another version."""
    if data is None:
        return {}
    try:
        state: dict[Any, Any] = pickle.loads(data)
    except Exception as error:
        raise StateError(f"client.state can't be restored: {type(error).__name__}: {error}") from error
    return state
