"""Count the system calls of a subject while a load generator runs: strace(1) attaches to all of its processes."""

from __future__ import annotations

import shutil
import signal
import subprocess
import tempfile
from typing import Any

from subjects import Generator, Subject


def count(subject: Subject, act: str, **asked: Any) -> dict[str, int]:
    """Return the number of each system call of the subject's processes in one run; {} if strace is missing.

    asked: see `load`. A traced process is several times as slow, so that the rate should be low.
    """
    if not shutil.which("strace"):
        return {}
    generator = Generator(subject, act, **asked)
    try:
        pids = [process.pid for process in subject.processes()]
        with tempfile.NamedTemporaryFile("r") as summary:
            command = ["strace", "-f", "-c", "-o", summary.name, *(f"--attach={pid}" for pid in pids)]
            tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
            assert tracer.stderr is not None
            attached = 0
            for line in tracer.stderr:
                attached += " attached" in line
                if attached == len(pids):
                    break
            else:
                return {}  # not allowed to trace
            generator.begin()
            generator.wait()
            tracer.send_signal(signal.SIGINT)
            tracer.communicate()
            return _parsed(summary.read())
    finally:
        generator.end()


def _parsed(summary: str) -> dict[str, int]:
    """Return the numbers in a summary, whose columns are: % time, seconds, usecs/call, calls, errors, syscall."""
    calls = {}
    for line in summary.splitlines():
        columns = line.split()
        if len(columns) >= 5 and columns[3].isdigit() and columns[-1] != "total":
            calls[columns[-1]] = int(columns[3])
    return calls
