"""Check that the configured application can be imported, in a process of its own, where it runs as in a worker."""

from __future__ import annotations

import subprocess
import sys

from realtime.config import settings as configuration
from realtime.config.settings import Settings


def find_problems(settings: Settings) -> list[str]:
    """Return one line for each problem that keeps the application from loading; none without an application.

    Takes as long as the import, at most `workers.start_timeout`.
    """
    if not settings.app.module:
        return []
    key, timeout = f'app.module = "{settings.app.module}"', settings.workers.start_timeout
    command = [sys.executable, "-P", "-m", "realtime.app.check"]
    try:
        done = subprocess.run(
            command, input=configuration.dump(settings), stdout=subprocess.PIPE, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        return [f"{key}: the import takes more than {timeout:g} s (workers.start_timeout); find the line that hangs"]
    except OSError as error:
        return [f"{key}: no process can be started to check it: {error.strerror}"]
    if done.returncode == 0:
        return []
    return done.stdout.decode("utf-8", "replace").splitlines() or [
        f"{key}: the import ended the process with status {done.returncode}"
    ]
