"""The notification protocol of sd_notify(3), as the service manager receives it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from realtime.supervisor.systemd import SystemdNotifier

PID = 1234


class ServiceManager:
    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        self.socket.setblocking(False)
        self.environ = {"NOTIFY_SOCKET": str(path)}

    def received(self) -> list[str]:
        messages = []
        while True:
            try:
                messages.append(self.socket.recv(4096).decode())
            except BlockingIOError:
                return messages


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[ServiceManager]:
    manager = ServiceManager(tmp_path / "notify")
    yield manager
    manager.socket.close()


def test_each_state_is_one_datagram(manager: ServiceManager) -> None:
    notifier = SystemdNotifier(manager.environ, PID)
    notifier.ready()
    notifier.status("two\nlines")
    notifier.reloading(12.3456789)
    notifier.stopping()
    states = ["READY=1", "STATUS=two lines", "RELOADING=1\nMONOTONIC_USEC=12345679", "STOPPING=1"]
    assert manager.received() == states


def test_the_watchdog_is_fed_at_half_its_interval(manager: ServiceManager) -> None:
    notifier = SystemdNotifier({**manager.environ, "WATCHDOG_USEC": "10000000", "WATCHDOG_PID": str(PID)}, PID)
    assert notifier.watchdog == 10.0
    for tenth in range(121):
        notifier.feed_watchdog(tenth / 10)
    assert manager.received() == ["WATCHDOG=1"] * 3  # at 0, 5 and 10 seconds


def test_the_watchdog_waits_longer_for_a_while(manager: ServiceManager) -> None:
    SystemdNotifier(manager.environ, PID).stretch_watchdog(60.0)
    assert manager.received() == [], "there is no watchdog"
    notifier = SystemdNotifier({**manager.environ, "WATCHDOG_USEC": "10000000"}, PID)
    notifier.stretch_watchdog(60.0)
    notifier.stretch_watchdog()
    assert manager.received() == ["WATCHDOG_USEC=60000000\nWATCHDOG=1", "WATCHDOG_USEC=10000000\nWATCHDOG=1"]


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"WATCHDOG_USEC": ""},
        {"WATCHDOG_USEC": "-1"},
        {"WATCHDOG_USEC": "ten"},
        {"WATCHDOG_USEC": "0"},
        {"WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "1"},
    ],
)
def test_without_a_watchdog_for_this_process_nothing_is_sent(manager: ServiceManager, environ: dict[str, str]) -> None:
    notifier = SystemdNotifier({**manager.environ, **environ}, PID)
    assert notifier.watchdog == 0
    notifier.feed_watchdog(0.0)
    assert manager.received() == []


@pytest.mark.parametrize(
    "address", ["", "relative/path", "vsock:2:1", "/nowhere/at/all", "/" + "x" * 200, "@no-such-name"]
)
def test_an_unreachable_service_manager_is_no_error(address: str) -> None:
    notifier = SystemdNotifier({"NOTIFY_SOCKET": address}, PID)
    notifier.ready()
    notifier.ready()


def test_a_full_socket_does_not_block(manager: ServiceManager) -> None:
    notifier = SystemdNotifier(manager.environ, PID)
    for _ in range(2000):
        notifier.status("x" * 1000)
    assert manager.received()
