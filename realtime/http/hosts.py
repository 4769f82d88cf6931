"""The server's own names, for requests of web pages where nothing but the address authenticates.

By DNS rebinding a page of http://evil.example makes its name point at this server. Its requests are then of the same
origin, `Host: evil.example` and `Origin: http://evil.example`. Only the name itself tells: it is none of the server's.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from functools import lru_cache

from realtime.http.request import RequestHead


class HostNames:
    """A set of names of this server. IP addresses and localhost are always among them: no page can rebind these."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = {name.lower() for name in names} | {"localhost"}

    def accept(self, head: RequestHead) -> bool:
        """Return whether the request names this server.

        Without an Origin header, a name without a dot passes too: it is a name of a private network or of a test.
        """
        host = head.get("host").lower()
        name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
        name = name.removesuffix(".")
        if name in self._names or name.endswith(".localhost") or _is_address(name):
            return True
        return "." not in name and not head.get("origin")


@lru_cache(maxsize=256)
def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
