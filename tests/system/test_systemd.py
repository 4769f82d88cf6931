"""The systemd unit, judged by systemd's own tools, and the server's side of the notification protocol."""

from __future__ import annotations

import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from realtime.config.settings import ShutdownSettings
from tests.system.serving import CHECKOUT, Server, wait_until
from tests.system.test_processes import StandIns, settings

UNIT = CHECKOUT / "scripts" / "systemd" / "realtime.service"
MAX_EXPOSURE = 1.5
# prctl(2), since Linux 6.3: no mapping may become executable that was or is writable.
PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN = 65, 1

systemd = pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not here")


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, timeout=60)


@systemd
def test_the_unit_is_valid(tmp_path: Path) -> None:
    # The paths of the installed server are stood in for, since verify wants them to exist.
    unit = re.sub(r"/opt/realtime/venv/bin/\w+", sys.executable, UNIT.read_text())
    copy = tmp_path / UNIT.name
    copy.write_text(unit.replace("/opt/realtime/app", str(tmp_path)))
    verified = analyze("verify", str(copy))
    assert (verified.returncode, verified.stdout, verified.stderr) == (0, "", "")


@systemd
def test_the_unit_exposes_little() -> None:
    judged = analyze("security", "--offline=true", str(UNIT))
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", judged.stdout)
    assert found, judged.stdout + judged.stderr
    assert float(found[1]) <= MAX_EXPOSURE


def test_the_unit_reloads_the_configuration_that_it_starts_with() -> None:
    found = re.findall(r"^Exec(?:Start|Reload)=.* --config (\S+)$", UNIT.read_text(), re.MULTILINE)
    assert found == ["/etc/realtime/realtime.toml"] * 2


def test_the_unit_waits_longer_than_the_default_stop_takes() -> None:
    found = re.search(r"^TimeoutStopSec=(\d+)$", UNIT.read_text(), re.MULTILINE)
    assert found
    assert int(found[1]) > ShutdownSettings().timeout


class Manager:
    """A service manager's end of the notification socket."""

    def __init__(self, address: str) -> None:
        self.messages: list[str] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(address.replace("@", "\0", 1) if address.startswith("@") else address)
        self._socket.setblocking(False)

    def heard(self) -> list[str]:
        """Everything so far."""
        while True:
            try:
                self.messages.append(self._socket.recv(4096).decode())
            except BlockingIOError:
                return self.messages

    def count(self, message: str) -> int:
        return self.heard().count(message)

    def is_silent(self, seconds: float) -> bool:
        """Whether nothing comes for so long."""
        return not select.select([self._socket], [], [], seconds)[0]

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def address(tmp_path: Path) -> str:
    return str(tmp_path / "notify")


@pytest.fixture
def manager(address: str) -> Iterator[Manager]:
    manager = Manager(address)
    yield manager
    manager.close()


def managed(address: str, stuck: float = 0.0) -> StandIns:
    return StandIns(settings(stuck=stuck), environment={"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "600000"})


def test_ready_comes_after_the_workers_and_a_reload_and_stopping_before_the_end(address: str, manager: Manager) -> None:
    server = managed(address)
    try:
        wait_until(lambda: manager.count("READY=1"), "READY=1")
        server.wait_ready()
        assert "ready: 2 workers" in server.log
        assert manager.count("STOPPING=1") == 0
        assert "STATUS=2 of 2 workers ready" in manager.heard()
        server.process.send_signal(signal.SIGHUP)  # this server has nothing to reload, so it is ready again at once
        wait_until(lambda: manager.count("READY=1") == 2, "READY=1 after the reload")
        (reloading,) = [message for message in manager.heard() if message.startswith("RELOADING=1\nMONOTONIC_USEC=")]
        assert manager.heard().index(reloading) > manager.heard().index("READY=1")
        assert 0 < int(reloading.partition("USEC=")[2]) / 1e6 <= time.monotonic()
        server.stop()
        assert manager.count("STOPPING=1") == 1
        assert manager.count("READY=1") == 2
    finally:
        server.kill()


@pytest.mark.parametrize("victim", ["worker 0", "broker"])
def test_the_watchdog_is_fed_only_while_every_loop_turns(address: str, manager: Manager, victim: str) -> None:
    server = managed(address)
    try:
        server.wait_ready()
        wait_until(lambda: manager.count("WATCHDOG=1") >= 2, "feeding")
        pid = server.pid_of(victim)
        os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: server.slot(victim)["beat_age"] > 0.7, "a late beat")
        fed = manager.count("WATCHDOG=1")
        wait_until(lambda: server.slot(victim)["beat_age"] > 2.0, "a later beat")
        assert manager.count("WATCHDOG=1") == fed
        os.kill(pid, signal.SIGCONT)
        wait_until(lambda: manager.count("WATCHDOG=1") > fed, "feeding again")
        server.stop()
    finally:
        server.kill()


def test_the_watchdog_starves_when_the_supervisor_stops(address: str, manager: Manager) -> None:
    server = managed(address)
    try:
        server.wait_ready()
        wait_until(lambda: manager.count("WATCHDOG=1") >= 2, "feeding")
        server.process.send_signal(signal.SIGSTOP)
        wait_until(lambda: is_stopped(server), "a stopped supervisor")
        fed = manager.count("WATCHDOG=1")
        assert manager.is_silent(1.2)
        server.process.send_signal(signal.SIGCONT)
        wait_until(lambda: manager.count("WATCHDOG=1") > fed, "feeding again")
        server.stop()
    finally:
        server.kill()


def is_stopped(server: Server) -> bool:
    return Path(f"/proc/{server.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T"


def test_children_do_not_inherit_the_manager(address: str, manager: Manager) -> None:
    server = managed(address)
    try:
        server.wait_ready()
        for process in server.family():
            if process.pid != server.pid:
                assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC"} & set(process.environ())
        server.stop()
    finally:
        server.kill()


MDWE = f"""
import ctypes, mmap, os, sys
if ctypes.CDLL(None).prctl({PR_SET_MDWE}, {PR_MDWE_REFUSE_EXEC_GAIN}, 0, 0, 0):
    sys.exit(77)  # an older kernel
try:
    mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    sys.exit("MDWE is not in force")
except PermissionError:
    pass
os.execv(sys.executable, [sys.executable, "-c", sys.argv[1]])
"""

# What the processes load, and what of it runs machine code of its own: cffi (Autobahn's, and that of TLS, which a key
# set is fetched by), ctypes (a child's last resort, in `child`), and OpenSSL.
LOADED = """
import cffi, ctypes, ssl
import autobahn.websocket, autobahn.twisted.websocket, jwt, msgspec, prometheus_client, psutil
from autobahn.nvx import Utf8Validator
import realtime.broker.process, realtime.supervisor.service, realtime.worker.process
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.ssl import optionsForClientTLS
from twisted.internet.testing import StringTransport
from twisted.protocols.tls import TLSMemoryBIOFactory
from realtime.process.child import _die_with_the_supervisor
_die_with_the_supervisor()
ssl.create_default_context()
assert Utf8Validator().validate("\\u00fc".encode())[0]
assert jwt.decode(jwt.encode({"a": 1}, "k" * 32, "HS256"), "k" * 32, ["HS256"]) == {"a": 1}
secured = TLSMemoryBIOFactory(optionsForClientTLS("id.example.com"), True, Factory.forProtocol(Protocol))
connection, hello = secured.buildProtocol(None), StringTransport()
connection.makeConnection(hello)
assert hello.value()
"""


def test_the_unit_takes_away_no_memory_that_something_needs() -> None:
    restricted = "MemoryDenyWriteExecute=yes" in UNIT.read_text()
    command = [sys.executable, "-c", *([MDWE] if restricted else []), LOADED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=CHECKOUT)
    if done.returncode == 77:
        pytest.skip("this kernel has no PR_SET_MDWE")
    assert done.returncode == 0, done.stderr


# What ProtectProc= and ProcSubset= of the unit come to. 77: this user may not.
HIDDEN = 'mount -t proc -o hidepid=invisible,subset=pid proc /proc || exit 77; test ! -e /proc/stat && exec "$@"'


def test_the_server_starts_where_the_rest_of_proc_is_hidden(tmp_path: Path) -> None:
    assert {"ProtectProc=invisible", "ProcSubset=pid"} <= set(UNIT.read_text().split())
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("unshare is not here")
    (tmp_path / "realtime.toml").write_text("[http_server]\nport = 0\ninternal_port = 0\n[workers]\ncount = 1")
    twistd = [sys.executable, "-c", "from twisted.scripts.twistd import run; run()", "-n", "--pidfile=", "realtime"]
    server = subprocess.Popen(
        [unshare, "--mount", "sh", "-c", HIDDEN, "sh", *twistd, "--config", "realtime.toml"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(CHECKOUT)},
    )
    try:
        assert server.stdout is not None
        said = []
        for line in server.stdout:
            said.append(line)
            if "ready: 1 workers" in line or "crash loop" in line:
                server.terminate()
        if server.wait(30) == 77 or any(line.startswith("unshare:") for line in said):
            pytest.skip("this user may not mount")
        assert server.returncode == 0
        assert any("ready: 1 workers" in line for line in said), "".join(said)
    finally:
        server.kill()
        server.communicate()
