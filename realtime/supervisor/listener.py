"""The shared port: one SO_REUSEPORT listening socket for each worker slot.

The supervisor opens them and keeps its own copy of each for as long as it lives, so what the kernel has queued for a
slot survives the slot's worker. A worker *adopts* its copy (`realtime.worker.listening`). Nobody ever calls shutdown()
on one: it would end the queue for every holder (adopting sees to it: Twisted shuts down only what it has opened
itself).

SO_REUSEPORT also lets a second server of the same user bind the same port, and take half of the clients. A lock says
no: a UNIX socket in the abstract namespace, named after address and port. It ends with its holder, and lives in the
same network namespace as the port. The workers of a supervisor that was killed hold the port for seconds, but no
lock, so a new supervisor can bind at once.
"""

from __future__ import annotations

import errno
import socket
import struct

from realtime.errors import RealtimeError

# linux/tcp.h, struct tcp_info: of a listening socket, tcpi_unacked and tcpi_sacked are the connections that wait to be
# accepted, and how many may (net/ipv4/tcp.c, tcp_get_info).
_TCP_INFO_QUEUE = struct.Struct("=24xII")


class CannotListen(RealtimeError):
    """An endpoint can't be opened: one line that names the key and the remedy."""


class SharedPort:
    """One address and port with a listening socket for each slot.

    sockets: the supervisor's own copies, in the order in which the kernel counts them. has_other_listeners: others were listening
    here before, workers of a supervisor that was killed; then that order is unknown, and changes as they leave.
    """

    def __init__(self, address: str, port: int, backlog: int, slots: int) -> None:
        """Bind and listen. address: "" for all of IPv4, "::" for all of both. port: 0 for any that is free.

        Raises CannotListen.
        """
        self.sockets: list[socket.socket] = []
        self._lock: socket.socket | None = None
        try:
            family, host = _resolve(address, port)
            self.has_other_listeners = _is_taken(family, host, port)
            for _ in range(slots):
                self.sockets.append(_open(family, host, self.port if self.sockets else port))
            self._lock = _lock(host, self.port)
            # Only now: until all are bound and the port is ours, no client is queued.
            for opened in self.sockets:
                opened.listen(backlog)
        except OSError as error:
            self.close()
            raise CannotListen(explain(error, "http_server.address", address, "http_server.port", port)) from error
        except CannotListen:
            self.close()
            raise

    @property
    def port(self) -> int:
        """The port that is bound, also where 0 was asked for."""
        return int(self.sockets[0].getsockname()[1])

    @property
    def address(self) -> str:
        """The address that is bound."""
        return str(self.sockets[0].getsockname()[0])

    def close(self) -> None:
        """Close our copies. What is queued at a slot that no worker holds is reset by the kernel."""
        for opened in self.sockets:
            opened.close()
        if self._lock is not None:
            self._lock.close()


def explain(error: OSError, address_key: str, address: str, port_key: str, port: int) -> str:
    """One line about an endpoint that can't be opened: key, value, what is wrong and what to do about it."""
    key, value, what = {
        errno.EADDRINUSE: (
            port_key,
            str(port),
            "another program uses this port; stop it, or choose another port",
        ),
        errno.EACCES: (
            port_key,
            str(port),
            "this user may not bind this port; choose one from 1024 on, or give the process CAP_NET_BIND_SERVICE",
        ),
        errno.EADDRNOTAVAIL: (
            address_key,
            repr(address),
            'this machine does not have this address; choose one of its own, or "" for all',
        ),
        errno.EAFNOSUPPORT: (
            address_key,
            repr(address),
            'this machine has no IPv6; choose an IPv4 address, or "" for all of them',
        ),
    }.get(error.errno or 0, (address_key, f"{address!r}, {port_key} = {port}", error.strerror or str(error)))
    return f"{key} = {value}: {what}"


def _resolve(address: str, port: int) -> tuple[socket.AddressFamily, str]:
    """Family and numeric form of an address. A name is looked up, which may block: at start only."""
    try:
        found = socket.getaddrinfo(address or "0.0.0.0", port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        what = 'not an IP address and not a known name; choose an address of this machine, or "" for all'
        raise CannotListen(f"http_server.address = {address!r}: {what}") from error
    family, _, _, _, place = found[0]
    return family, str(place[0])


def accept_queue(listening: socket.socket) -> tuple[int, int]:
    """Connections that wait to be accepted at a listening socket, and how many may. 12 microseconds. Raises OSError."""
    info = listening.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_QUEUE.size)
    depth, limit = _TCP_INFO_QUEUE.unpack(info)
    return depth, limit


def _is_taken(family: socket.AddressFamily, host: str, port: int) -> bool:
    """Whether somebody listens there already: without SO_REUSEPORT the kernel then refuses to bind."""
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error.errno == errno.EADDRINUSE
        return False


def _open(family: socket.AddressFamily, host: str, port: int) -> socket.socket:
    opened = socket.socket(family, socket.SOCK_STREAM)
    try:
        opened.setblocking(False)
        # REUSEADDR: bind while connections of a predecessor linger in TIME_WAIT.
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if host == "::" else 1)
        opened.bind((host, port))
    except BaseException:
        opened.close()
        raise
    return opened


def _lock(host: str, port: int) -> socket.socket:
    """Hold what only one supervisor can hold for this endpoint. Raises OSError EADDRINUSE when another has it."""
    lock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        lock.bind(f"\0realtime-port-{host}-{port}")
    except BaseException:
        lock.close()
        raise
    return lock
