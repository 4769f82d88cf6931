"""A process with sockets of its own that forks: what its forks keep, and when they end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

from tests.system.serving import wait_until

PROGRAM = """
import json, os, signal, socket, sys, threading, time
from realtime.process.forks import release_in_forks

listening = socket.create_server(("127.0.0.1", 0))
client = socket.create_connection(listening.getsockname())
accepted, _ = listening.accept()
ours, theirs = socket.socketpair()
application, _ = os.pipe()
signal.signal(signal.SIGTERM, lambda *_: None)
signal.set_wakeup_fd(ours.fileno(), warn_on_full_buffer=False) if ours.setblocking(False) is None else None
forgotten = []
release_in_forks(lambda: [ours.fileno()], {listening.getsockname()[1]}, lambda: forgotten.append(True))


def is_null(fd):
    return os.path.samestat(os.fstat(fd), os.stat(os.devnull))


def fork(depth):
    pid = os.fork()
    if pid:
        return pid
    if depth:
        # What the application puts in the place of a released descriptor is its own.
        os.dup2(application, ours.fileno())
        fork(depth - 1)
    else:
        found = {
            "listening": is_null(listening.fileno()), "accepted": is_null(accepted.fileno()),
            "client": is_null(client.fileno()), "ours": is_null(ours.fileno()), "theirs": is_null(theirs.fileno()),
            "application": is_null(application), "wakeup": signal.set_wakeup_fd(-1),
            "default": signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, "forgotten": forgotten, "pid": os.getpid(),
        }
        os.write(1, (json.dumps(found) + "\\n").encode())  # one write: two forks print at once
    time.sleep(600)


for depth in (0, 1):
    thread = threading.Thread(target=fork, args=(depth,))
    thread.start()
    thread.join()
print(json.dumps({"parent": is_null(listening.fileno())}), flush=True)
sys.stdin.read()
"""


def test_forks_release_the_servers_descriptors_and_signals_and_die_with_their_parent(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        lines: list[dict[str, Any]] = [json.loads(process.stdout.readline()) for _ in range(3)]
        (parent,) = [line for line in lines if "parent" in line]
        assert parent == {"parent": False}
        fork, nested = sorted((line for line in lines if "pid" in line), key=lambda line: not line["ours"])
        released = {"listening": True, "accepted": True, "client": False, "theirs": False, "application": False}
        for found in (fork, nested):
            assert found | released == found
            assert (found["default"], found["wakeup"], found["forgotten"]) == (True, -1, [True])
        assert fork["ours"] and not nested["ours"]
        # The threads that forked them have ended, and they live on.
        assert psutil.pid_exists(fork["pid"]) and psutil.pid_exists(nested["pid"])
        os.kill(process.pid, signal.SIGKILL)
        wait_until(lambda: not any(map(_runs, (fork["pid"], nested["pid"]))), "end of the forks")


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
