"""A server whose log is not read: a pipe without a reader stops neither its workers, its broker nor its supervisor."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path
from urllib.request import urlopen

from tests.system.serving import BASE, CHECKOUT, SERVING, STOP_LIMIT, TWISTD, merged, toml, wait_until

PIPE_BYTES = 65536  # the kernel's default


def test_the_server_works_and_stops_while_its_log_is_not_read(tmp_path: Path) -> None:
    config = tmp_path / "realtime.toml"
    # Each process logs more than the pipe holds.
    sections = merged(BASE, {"log": {"level": "info"}, "app": {"module": "talkative:app"}})
    config.write_text("".join(f"{key} = {toml(value)}\n" for key, value in sections.items()))
    command = [str(TWISTD), "--nodaemon", "--pidfile=", "realtime", "--config", str(config)]
    process = subprocess.Popen(
        command, cwd=CHECKOUT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdout is not None
    try:
        os.set_blocking(process.stdout.fileno(), False)
        read = bytearray()

        def find(pattern: str | re.Pattern[str]) -> re.Match[str] | None:
            read.extend(process.stdout.read() or b"")  # type: ignore[union-attr]
            return re.search(pattern, read.decode())

        client, operators = wait_until(lambda: find(SERVING), "ports").groups()
        wait_until(lambda: find("ready: 2 workers"), "readiness")

        def get(port: str, path: str) -> str:
            with urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as response:
                return str(response.read().decode())

        def dropped() -> bool:
            for _ in range(5):
                get(client, f"/talk?bytes={PIPE_BYTES}")
            found = re.findall(r"^realtime_log_lines_dropped_total\{.*\} (\S+)$", get(operators, "/metrics"), re.M)
            return any(float(value) > 0 for value in found)

        wait_until(dropped, "dropped lines")
        pid = int(get(client, "/pid"))
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: get(operators, "/health").count('"ready"') >= 3, "replacement")
        assert get(client, "/pid")
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        assert process.wait(STOP_LIMIT) == 0
        assert time.monotonic() - began < STOP_LIMIT
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
