"""A server that root starts: it opens its ports, and serves as the user that twistd is given."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from tests.system.serving import ServerStarter

NOBODY = 65534


def can_run_as_nobody() -> bool:
    if os.geteuid() != 0:
        return False
    try:
        done = subprocess.run([sys.executable, "-c", "import realtime"], user=NOBODY, group=NOBODY, extra_groups=[])
    except OSError:
        return False
    return done.returncode == 0


@pytest.mark.skipif(not can_run_as_nobody(), reason="needs root, and an interpreter that other users may run")
def test_every_process_has_given_up_root_before_it_serves(start_server: ServerStarter) -> None:
    server = start_server(twistd=("--uid", str(NOBODY), "--gid", str(NOBODY)))
    with urllib.request.urlopen(f"{server.http}/pid", timeout=20) as response:
        assert response.status == 200
    family = server.family()
    assert len(family) == 4
    for process in family:
        fields = dict(
            line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines() if ":" in line
        )
        assert fields["Uid"].split() == fields["Gid"].split() == [str(NOBODY)] * 4
        assert "0" not in fields["Groups"].split()
    assert "run as root" not in server.log
    server.stop()
