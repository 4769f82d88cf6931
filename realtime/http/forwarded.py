"""The address of a client that may be behind proxies.

A proxy appends to `X-Forwarded-For` the address that it was reached from; whoever came before it may have written
anything. So the header is read from the right, and only for as long as a proxy that we trust has written it.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address

# Some proxies append the port, too: 192.0.2.1:4711, [2001:db8::1]:4711.
_WITH_PORT = re.compile(r"\[([0-9A-Fa-f:.]+)\](?::\d+)?|([0-9.]+):\d+")


class TrustedProxies:
    """The proxies that are trusted."""

    def __init__(self, networks: Iterable[str]) -> None:
        """networks: addresses or networks, "10.0.0.0/8"."""
        self._networks = [ipaddress.ip_network(network, strict=False) for network in networks]

    def client(self, peer: str, forwarded: Iterable[str]) -> str:
        """The rightmost address that is not a trusted proxy's; the leftmost when all are.

        peer: the address of the connection. forwarded: the values of X-Forwarded-For, in order. What is no address
        ends the search: nobody we trust can have passed it on.
        """
        if not self._networks:
            return peer
        nearest = _parse(peer)
        if nearest is None:
            return peer
        hops = [item.strip() for value in forwarded for item in value.split(",")]
        while hops and self._trusts(nearest):
            address = _parse(hops.pop())
            if address is None:
                break
            nearest = address
        return str(nearest)

    def _trusts(self, address: _Address) -> bool:
        return any(address in network for network in self._networks)


def _parse(text: str) -> _Address | None:
    match = _WITH_PORT.fullmatch(text)
    try:
        address = ipaddress.ip_address((match[1] or match[2]) if match else text)
    except ValueError:
        return None
    # How a socket for both families shows a peer of the older one.
    return (isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped) or address
