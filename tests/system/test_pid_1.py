"""The server as PID 1, as in a container without an init process: it reaps the orphans of its workers, and stops."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import urllib.request
from pathlib import Path

import psutil
import pytest

from tests.system.serving import HERE, ServerStarter, wait_until

NAMESPACE = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")


def may_unshare() -> bool:
    return (
        shutil.which("unshare") is not None
        and subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode == 0
    )


@pytest.mark.skipif(not may_unshare(), reason="no permission to make a namespace of processes (unshare --pid)")
def test_as_pid_1_the_server_reaps_orphans_and_stops_in_order(start_server: ServerStarter) -> None:
    server = start_server(prefix=NAMESPACE, app={"module": "orphans:app", "path": str(HERE / "apps")})
    (first,) = psutil.Process(server.pid).children()
    assert Path(f"/proc/{first.pid}/status").read_text().split("NSpid:")[1].split()[1] == "1"
    with urllib.request.urlopen(f"{server.http}/orphan", timeout=20) as response:
        assert response.status == 204
    worker = next(process for process in first.children() if process.children())
    (orphan,) = worker.children()
    os.kill(worker.pid, signal.SIGKILL)
    wait_until(lambda: orphan.ppid() == first.pid, "PID 1 as its parent")
    orphan.kill()
    wait_until(lambda: not psutil.pid_exists(orphan.pid), "end of the orphan in the table of processes")
    wait_until(lambda: server.operate("/ready")[0] == 200, "a new worker")
    first.send_signal(signal.SIGTERM)
    assert server.process.wait(20) == 0
