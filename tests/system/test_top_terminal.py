"""`realtime top` against a real server: one table, and live in a terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tests.system.serving import Server, wait_until

TOP = [sys.executable, "-m", "realtime", "top", "--url"]


def once(url: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*TOP, url, "--once"], capture_output=True, text=True, timeout=30)


class Terminal:
    """A pseudo-terminal that runs a program. written: all output of the program so far."""

    def __init__(self, command: list[str]) -> None:
        self._fd, theirs = pty.openpty()
        self.resize(24, 80)
        self.before = termios.tcgetattr(theirs)
        self.theirs = theirs
        # The kernel sends SIGWINCH only to the session whose terminal this is.
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, preexec_fn=_take_terminal
        )
        self.written = ""

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self._fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def press(self, keys: bytes) -> None:
        os.write(self._fd, keys)

    def wait(self, condition: Callable[[str], bool], what: str) -> None:
        """Read until the output fulfils `condition`. what: the expected output, for the error message."""
        deadline = time.monotonic() + 20
        while not condition(self.written):
            assert time.monotonic() < deadline, f"no {what}: {self.written!r}"
            if select.select([self._fd], [], [], 0.1)[0]:
                self.written += os.read(self._fd, 65536).decode()

    def exit_status(self) -> int:
        """Read until the program has ended: it waits while the terminal takes no output."""
        self.wait(lambda _: self.process.poll() is not None, "end of the program")
        return self.process.wait()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.theirs)
        os.close(self._fd)


def _take_terminal() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell ignores it in background jobs, and so would the program
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@contextmanager
def running(server: Server) -> Iterator[Terminal]:
    terminal = Terminal([*TOP, f"http://127.0.0.1:{server.operator_port}"])
    try:
        yield terminal
    finally:
        terminal.close()


def test_one_table(server: Server) -> None:
    url = f"http://127.0.0.1:{server.operator_port}/"
    healthy = "all processes are healthy"
    shown = wait_until(lambda: found.stdout if healthy in (found := once(url)).stdout else "", "figures", 20.0)
    lines = shown.splitlines()
    table = lines[lines.index("") + 2 :]
    assert [line.split()[:2] for line in table[:3]] == [["0", "healthy"], ["1", "healthy"], ["broker", "healthy"]]
    assert f"port {server.port}" in lines[0]
    assert "\x1b" not in shown


def test_an_unreachable_server_is_one_line(server: Server) -> None:
    for url in ("http://127.0.0.1:1", server.http):
        done = once(url)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
        assert done.stderr.startswith(f"{url}: ")


def test_live_in_a_terminal_through_a_change_of_size_until_q(server: Server) -> None:
    with running(server) as terminal:
        terminal.wait(lambda text: "q quits" in text and "RESTARTS" in text, "first screen")
        assert "WEIGHT" not in terminal.written, "80 columns have no room for it"
        terminal.wait(lambda text: text.count("q quits") >= 2, "second screen")
        terminal.resize(40, 120)
        terminal.wait(lambda text: "WEIGHT" in text, "wider screen")
        terminal.press(b"q")
        assert terminal.exit_status() == 0
        terminal.wait(lambda text: text.endswith("\x1b[?1049l"), "return to the normal screen")
        assert termios.tcgetattr(terminal.theirs) == terminal.before


def test_ctrl_c_leaves_the_terminal_as_it_was(server: Server) -> None:
    with running(server) as terminal:
        terminal.wait(lambda text: "q quits" in text, "first screen")
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.exit_status() == 0
        assert termios.tcgetattr(terminal.theirs) == terminal.before


def test_it_outlives_its_server(server: Server) -> None:
    with running(server) as terminal:
        terminal.wait(lambda text: "q quits" in text, "first screen")
        server.stop()
        terminal.wait(lambda text: "cannot connect" in text, "report of the failure")
        terminal.press(b"q")
        assert terminal.exit_status() == 0
