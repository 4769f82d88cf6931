"""Scripts that Redis runs: atomic, with one round trip each."""

from __future__ import annotations

from hashlib import sha1


class Script:
    """A script in Lua. sha: the name under which Redis keeps it, see EVALSHA. source: its text.

    Declare all keys of a call as KEYS: in a cluster they have to lie in one slot.
    """

    __slots__ = ("sha", "source")

    def __init__(self, source: str) -> None:
        self.source = source.encode()
        self.sha = sha1(self.source, usedforsecurity=False).hexdigest().encode()
