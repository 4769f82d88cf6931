"""Check that the configured application can be imported, in a process of its own, where it runs as in a worker."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import NamedTuple

from realtime.config import settings as configuration
from realtime.config.settings import Settings


class LoadProblem(NamedTuple):
    """What keeps the application from loading, in one line. may_pass: whether a later attempt may succeed."""

    line: str
    may_pass: bool = False


class Check(NamedTuple):
    """What the check of an application has found. warnings: of an application that loads, each in one line."""

    problems: list[LoadProblem]
    warnings: list[str]


def check(settings: Settings) -> Check:
    """Import the application, and return its problems and warnings; none without an application.

    A missing module or a syntax error stays; an exception, such as that a database is not up yet, may pass. Takes as
    long as the import, at most `workers.start_timeout`.
    """
    if not settings.app.module:
        return Check([], [])
    key, timeout = f'app.module = "{settings.app.module}"', settings.workers.start_timeout
    command = [sys.executable, "-P", "-m", "realtime.app.check"]
    try:
        done = subprocess.run(
            command, input=configuration.dump(settings), stdout=subprocess.PIPE, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        line = f"{key}: the import takes more than {timeout:g} s (workers.start_timeout); find the line that hangs"
        return Check([LoadProblem(line, may_pass=True)], [])
    except OSError as error:
        line = f"{key}: no process can be started to check it: {error.strerror}"
        return Check([LoadProblem(line, may_pass=True)], [])
    lines = done.stdout.decode("utf-8", "replace").splitlines()
    if done.returncode == 0:
        return Check([], lines)
    lines = lines or [f"{key}: the import ended the process with status {done.returncode}"]
    return Check([LoadProblem(line, may_pass=done.returncode != os.EX_CONFIG) for line in lines], [])
