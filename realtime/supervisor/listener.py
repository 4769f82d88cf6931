"""The shared port: one SO_REUSEPORT listening socket for each worker slot.

The supervisor opens the sockets and keeps its own copy of each until it exits, so the connections that the kernel has
queued for a slot survive the slot's worker. A worker *adopts* its copy (`realtime.worker.listening`). No process may
call shutdown() on such a socket, because that ends the queue for every holder. Adopting ensures it: Twisted shuts down
only sockets that it has opened itself.

SO_REUSEPORT also lets a second server of the same user bind the same port and take half of the clients. A lock prevents
that: a UNIX socket in the abstract namespace, named after address and port. It ends with its holder, and exists in the
same network namespace as the port. The workers of a killed supervisor hold the port for seconds, but not the lock, so a
new supervisor can bind at once.

Any local user can bind that name. So the lock counts only while another process has the port: the kernel shares the
port among processes of one user alone, and a holder of the lock without the port is no server.
"""

from __future__ import annotations

import errno
import socket
import struct

from twisted.logger import Logger

from realtime.errors import RealtimeError
from realtime.process import log
from realtime.supervisor.inheritance import InheritedPort

# linux/tcp.h, struct tcp_info: of a listening socket, tcpi_unacked is the length of its accept queue, and tcpi_sacked
# the limit of that queue (net/ipv4/tcp.c, tcp_get_info).
_TCP_INFO_QUEUE = struct.Struct("=24xII")

_log = Logger(observer=log.observer)


class CannotListen(RealtimeError):
    """A port can't be opened. The message is one line that names the configuration key and the remedy."""


class SharedPort:
    """One address and port with a listening socket for each slot.

    sockets: the supervisor's own copies, in the order in which the kernel numbers them. has_other_listeners: whether
    other processes listened on the port before, the workers of a killed supervisor. In that case the kernel's order is
    unknown, and changes as they exit.
    """

    def __init__(
        self, address: str, port: int, backlog: int, slots: int, inherited: InheritedPort | None = None
    ) -> None:
        """Bind and listen. address: "" or "::" for all addresses, IPv6 included if the machine has it. port: 0 for any.

        inherited: sockets that listen already, in place of others. Raises CannotListen.
        """
        self.sockets: list[socket.socket] = []
        self._lock: socket.socket | None = None
        self._backlog = backlog
        if inherited is not None:
            self._inherit(inherited)
            return
        try:
            family, host = self._family, self._host = _resolve(address, port)
            self.has_other_listeners = _is_taken(family, host, port)
            self._bind(family, host, port, slots)
            self._take_lock(family, host, slots)
            # Listen only after all sockets are bound and the lock is held: before that no client may be queued.
            for listening in self.sockets:
                listening.listen(backlog)
        except OSError as error:
            self.close()
            raise CannotListen(explain(error, "http_server.address", address, "http_server.port", port)) from error
        except CannotListen:
            self.close()
            raise

    def _inherit(self, inherited: InheritedPort) -> None:
        self.sockets = [socket.socket(fileno=fd) for fd in inherited.sockets]
        self._lock = socket.socket(fileno=inherited.lock) if inherited.lock >= 0 else None
        self.has_other_listeners = inherited.has_other_listeners
        self._family, self._host = self.sockets[0].family, self.address

    def inheritance(self) -> InheritedPort:
        """Return what another program needs to go on with the port."""
        lock = self._lock.fileno() if self._lock is not None else -1
        return InheritedPort([listening.fileno() for listening in self.sockets], lock, self.has_other_listeners)

    def _bind(self, family: socket.AddressFamily, host: str, port: int, slots: int) -> None:
        for _ in range(slots):
            self.sockets.append(_open(family, host, self.port if self.sockets else port))

    def _take_lock(self, family: socket.AddressFamily, host: str, slots: int) -> None:
        """Take the lock, or do without it while no other process has the port. Raises OSError EADDRINUSE."""
        port = self.port
        try:
            self._lock = _lock(host, port)
        except OSError:
            # Our own sockets would hide that of another server that starts at this moment.
            self._close_sockets()
            self.sockets.clear()
            if _is_taken(family, host, port):
                raise
            self._bind(family, host, port, slots)
            _log.warn(
                "a program holds the lock of port {port}, but not the port: this server can't keep a second server of "
                "this user from sharing the port; find the program with `ss -xlp` or in /proc/net/unix",
                port=port,
            )

    def add(self) -> None:
        """Open a socket for another slot: the last one in the kernel's order. Raises OSError."""
        added = _open(self._family, self._host, self.port)
        try:
            added.listen(self._backlog)
        except OSError:
            added.close()
            raise
        self.sockets.append(added)

    def remove_last(self) -> None:
        """Close our copy of the last slot's socket. The kernel resets the connections in its queue."""
        self.sockets.pop().close()

    @property
    def port(self) -> int:
        """The bound port, also after a request for port 0."""
        return int(self.sockets[0].getsockname()[1])

    @property
    def address(self) -> str:
        """The bound address."""
        return str(self.sockets[0].getsockname()[0])

    def close(self) -> None:
        """Close our copies. The kernel resets the connections queued at a slot without a worker."""
        self._close_sockets()
        if self._lock is not None:
            self._lock.close()

    def _close_sockets(self) -> None:
        for listening in self.sockets:
            listening.close()


def explain(error: OSError, address_key: str, address: str, port_key: str, port: int) -> str:
    """Explain in one line why an endpoint can't be opened: key, value, problem and remedy."""
    key, value, problem = {
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
            'this machine does not have this address; choose one of its addresses, or "" for all',
        ),
        errno.EAFNOSUPPORT: (
            address_key,
            repr(address),
            'this machine has no IPv6; choose an IPv4 address, or "" for all of them',
        ),
    }.get(error.errno or 0, (address_key, f"{address!r}, {port_key} = {port}", error.strerror or str(error)))
    return f"{key} = {value}: {problem}"


def _resolve(address: str, port: int) -> tuple[socket.AddressFamily, str]:
    """Return the family and the numeric form of an address. May block to look up a name, so use it at start only."""
    if not address:
        address = "::" if socket.has_dualstack_ipv6() else "0.0.0.0"
    try:
        found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        problem = 'neither an IP address nor a known name; choose an address of this machine, or "" for all'
        raise CannotListen(f"http_server.address = {address!r}: {problem}") from error
    family, _, _, _, endpoint = found[0]
    return family, str(endpoint[0])


def accept_queue(listening: socket.socket) -> tuple[int, int]:
    """Return the length and the limit of a socket's accept queue. Takes 12 microseconds. Raises OSError."""
    info = listening.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_QUEUE.size)
    depth, limit = _TCP_INFO_QUEUE.unpack(info)
    return depth, limit


def _is_taken(family: socket.AddressFamily, host: str, port: int) -> bool:
    """Return whether another process listens there: the kernel then refuses to bind without SO_REUSEPORT."""
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
        # SO_REUSEADDR allows to bind while connections of a predecessor are in TIME_WAIT.
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        # Accepted connections inherit it: no reply waits until the client has acknowledged the one before.
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if family == socket.AF_INET6:
            opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if host == "::" else 1)
        opened.bind((host, port))
    except BaseException:
        opened.close()
        raise
    return opened


def _lock(host: str, port: int) -> socket.socket:
    """Take the lock of this endpoint, for one supervisor only. Raises OSError EADDRINUSE while another holds it."""
    lock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        lock.bind(f"\0realtime-port-{host}-{port}")
    except BaseException:
        lock.close()
        raise
    return lock
