"""The notification protocol of sd_notify(3), as its other end hears it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from realtime.supervisor.systemd import SystemdNotifier

PID = 1234


class Ear:
    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        self.socket.setblocking(False)
        self.environ = {"NOTIFY_SOCKET": str(path)}

    def heard(self) -> list[str]:
        messages = []
        while True:
            try:
                messages.append(self.socket.recv(4096).decode())
            except BlockingIOError:
                return messages


@pytest.fixture
def ear(tmp_path: Path) -> Iterator[Ear]:
    ear = Ear(tmp_path / "notify")
    yield ear
    ear.socket.close()


def test_states_are_lines_of_their_own(ear: Ear) -> None:
    notifier = SystemdNotifier(ear.environ, PID)
    notifier.ready()
    notifier.status("two\nlines")
    notifier.stopping()
    assert ear.heard() == ["READY=1", "STATUS=two lines", "STOPPING=1"]


def test_the_watchdog_is_fed_at_half_its_interval(ear: Ear) -> None:
    notifier = SystemdNotifier({**ear.environ, "WATCHDOG_USEC": "10000000", "WATCHDOG_PID": str(PID)}, PID)
    assert notifier.watchdog == 10.0
    for tenth in range(121):
        notifier.feed_watchdog(tenth / 10)
    assert ear.heard() == ["WATCHDOG=1"] * 3  # at 0, 5 and 10 seconds


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
def test_nobody_watches_this_process(ear: Ear, environ: dict[str, str]) -> None:
    notifier = SystemdNotifier({**ear.environ, **environ}, PID)
    assert notifier.watchdog == 0
    notifier.feed_watchdog(0.0)
    assert ear.heard() == []


@pytest.mark.parametrize("address", ["", "relative/path", "vsock:2:1", "/nowhere/at/all", "/" + "x" * 200, "@nobody"])
def test_a_missing_manager_is_no_error(address: str) -> None:
    notifier = SystemdNotifier({"NOTIFY_SOCKET": address}, PID)
    notifier.ready()
    notifier.ready()


def test_a_full_socket_does_not_block(ear: Ear) -> None:
    notifier = SystemdNotifier(ear.environ, PID)
    for _ in range(2000):
        notifier.status("x" * 1000)
    assert ear.heard()
