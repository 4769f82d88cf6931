"""The shared port: one accept queue per slot that survives its worker, and errors that name the remedy."""

from __future__ import annotations

import errno
import os
import select
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from twisted.logger import capturedLogs, formatEvent

from realtime.supervisor.listener import CannotListen, SharedPort, explain


@pytest.fixture
def shared() -> Iterator[SharedPort]:
    port = SharedPort("127.0.0.1", 0, 128, 3)
    yield port
    port.close()


def connect(port: int, host: str = "127.0.0.1") -> socket.socket:
    return socket.create_connection((host, port), timeout=5)


def accept_any(sockets: list[socket.socket]) -> int:
    """Accept all connections queued at `sockets`, and return their number."""
    count = 0
    for listening in sockets:
        while True:
            try:
                listening.accept()[0].close()
                count += 1
            except BlockingIOError:
                break
    return count


def test_all_slots_share_one_port(shared: SharedPort) -> None:
    assert {listening.getsockname()[1] for listening in shared.sockets} == {shared.port}
    with ExitStack() as clients:
        for _ in range(60):
            clients.enter_context(connect(shared.port))
        queues = [accept_any([listening]) for listening in shared.sockets]
    assert sum(queues) == 60
    assert all(queues), "the kernel spreads clients over all queues"


def test_no_reply_to_a_client_waits_for_its_acknowledgements(shared: SharedPort) -> None:
    with connect(shared.port):
        (queue,) = select.select(shared.sockets, (), (), 60)[0]
        accepted, _ = queue.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_the_backlog_reaches_the_kernel() -> None:
    port = SharedPort("127.0.0.1", 0, 37, 1)
    # tcpi_sacked of a listening socket is the limit of its accept queue (Linux, net/ipv4/tcp.c, tcp_get_info).
    info = port.sockets[0].getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    assert int.from_bytes(info[28:32], sys.byteorder) == 37
    port.close()


@pytest.mark.parametrize(
    ("address", "hosts"), [("", ["127.0.0.1", "::1"]), ("::", ["127.0.0.1", "::1"]), ("::1", ["::1"])]
)
def test_an_address_selects_the_ip_versions(address: str, hosts: list[str]) -> None:
    try:
        port = SharedPort(address, 0, 16, 1)
    except CannotListen as error:
        if "has no IPv6" in str(error) or "does not have this address" in str(error):
            pytest.skip("no IPv6 here")
        raise
    for host in hosts:
        connect(port.port, host).close()
    assert accept_any(port.sockets) == len(hosts)
    port.close()


def test_a_name_is_looked_up() -> None:
    port = SharedPort("localhost", 0, 16, 1)
    assert port.address in ("127.0.0.1", "::1")
    port.close()


def test_a_dead_workers_queue_outlives_it(shared: SharedPort) -> None:
    fds = [listening.fileno() for listening in shared.sockets]
    worker = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"], pass_fds=fds)
    with ExitStack() as clients:
        for _ in range(20):
            clients.enter_context(connect(shared.port))
        worker.kill()
        worker.wait()
        assert accept_any(shared.sockets) == 20


# Errors.


def refusal(address: str, port: int) -> str:
    with pytest.raises(CannotListen) as caught:
        SharedPort(address, port, 16, 2)
    return str(caught.value)


def test_a_port_of_another_program_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert refusal("127.0.0.1", port) == (
            f"http_server.port = {port}: another program uses this port; stop it, or choose another port"
        )


def test_a_port_of_another_realtime_server_is_refused(shared: SharedPort) -> None:
    assert "another program uses this port" in refusal("127.0.0.1", shared.port)
    port = shared.port
    shared.close()
    SharedPort("127.0.0.1", port, 16, 2).close()


def test_a_lock_without_the_port_stops_no_server(shared: SharedPort) -> None:
    """Any local user can bind the name of the lock."""
    port = shared.port
    shared.close()
    with capturedLogs() as lines, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as squatter:
        squatter.bind(f"\0realtime-port-127.0.0.1-{port}")
        first = SharedPort("127.0.0.1", port, 16, 2)
        assert (first.port, len(first.sockets)) == (port, 2)
        connect(port).close()
        assert accept_any(first.sockets) == 1
        assert "another program uses this port" in refusal("127.0.0.1", port), "the port itself still counts"
        first.close()
    assert ["holds the lock" in str(formatEvent(line)) for line in lines] == [True]


def test_a_refused_server_takes_no_client_of_the_first(shared: SharedPort) -> None:
    for _ in range(5):
        refusal("127.0.0.1", shared.port)
    with ExitStack() as clients:
        for _ in range(30):
            clients.enter_context(connect(shared.port))
        assert accept_any(shared.sockets) == 30


def test_an_address_of_another_machine_is_refused() -> None:
    assert refusal("192.0.2.1", 0) == (
        "http_server.address = '192.0.2.1': this machine does not have this address; "
        'choose one of its addresses, or "" for all'
    )


@pytest.mark.parametrize("address", ["no.such.name.invalid", "256.1.1.1", "a..b", "\0"])
def test_an_unknown_name_is_refused(address: str) -> None:
    line = refusal(address, 0)
    assert line.startswith(f"http_server.address = {address!r}: ")
    assert "\n" not in line


@pytest.mark.parametrize(
    ("number", "line"),
    [
        (
            errno.EACCES,
            "http_server.port = 80: this user may not bind this port; "
            "choose one from 1024 on, or give the process CAP_NET_BIND_SERVICE",
        ),
        (
            errno.EAFNOSUPPORT,
            "http_server.address = '::': this machine has no IPv6; choose an IPv4 address, or \"\" for all of them",
        ),
        (errno.EMFILE, "http_server.address = '::', http_server.port = 80: Too many open files"),
    ],
)
def test_every_line_names_the_key_and_the_remedy(number: int, line: str) -> None:
    error = OSError(number, os.strerror(number))
    assert explain(error, "http_server.address", "::", "http_server.port", 80) == line
