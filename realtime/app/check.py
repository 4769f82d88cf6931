"""Import the configured application in a process of its own, and print its problems and warnings.

    python -P -m realtime.app.check < settings

The settings come as bytes of `realtime.config.settings.dump`. The exit status is 0 with one line for each warning on
standard output, or 78 with one for each problem, or 75 with the line of a problem that may pass. What the application
prints goes to standard error.
"""

from __future__ import annotations

import os
import sys

from realtime.app.blocking_calls import find_blocking_calls
from realtime.app.loader import load
from realtime.config import settings
from realtime.errors import ApplicationFailed, SettingsError


def main() -> int:
    """Import the application and return the exit status."""
    configured = settings.load(sys.stdin.buffer.read())
    problems = sys.stdout
    sys.stdout = sys.stderr
    try:
        app = load(configured.app)
    except SettingsError as error:
        print(*error.problems, sep="\n", file=problems, flush=True)
        return os.EX_CONFIG
    except ApplicationFailed as error:
        print(error, file=problems, flush=True)
        return os.EX_TEMPFAIL
    for line in find_blocking_calls(app):
        print(line, file=problems)
    return 0


if __name__ == "__main__":
    sys.exit(main())
