"""Address of a client behind trusted proxies.

Each proxy appends the address of its own peer to `X-Forwarded-For`; everything further left may be forged. The header
is therefore read from the right, and only as far as trusted proxies have written it.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address

# Some proxies append the port: 192.0.2.1:4711, [2001:db8::1]:4711.
_WITH_PORT = re.compile(r"\[([0-9A-Fa-f:.]+)\](?::\d+)?|([0-9.]+):\d+")


class TrustedProxies:
    """A set of trusted proxies."""

    def __init__(self, networks: Iterable[str]) -> None:
        """networks: addresses or networks in CIDR notation, such as "10.0.0.0/8"."""
        self._networks = [ipaddress.ip_network(network, strict=False) for network in networks]

    def client_address(self, peer: str, forwarded: Iterable[str]) -> str:
        """Return the rightmost address that is not a trusted proxy's; the leftmost if all are trusted.

        peer: the address of the connection. forwarded: the values of X-Forwarded-For, in order. An invalid address ends
        the search, because no trusted proxy writes one.
        """
        if not self._networks:
            # A dual-stack socket reports an IPv4 peer as an IPv4-mapped IPv6 address.
            return peer.removeprefix("::ffff:") if "." in peer else peer
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
    # A dual-stack socket reports an IPv4 peer as an IPv4-mapped IPv6 address.
    return (isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped) or address
