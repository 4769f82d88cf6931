"""A short soak with few clients; `scripts/soak` runs longer ones."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from tests.system.serving import CHECKOUT

LIMIT = 540.0
KINDS = [
    "kill a worker",
    "stop a worker",
    "drain a worker",
    "reload",
    "kill the broker",
    "stop the broker",
    "kill the supervisor",
    "stop all processes",
    "cut a link to the broker",
    "block a loop",
    "take a worker's descriptors",
    "leave the output unread",
    "cut all clients",
    "read nothing",
]


@pytest.mark.timeout(600)
def test_every_publication_is_accounted_for_under_faults_and_bad_input() -> None:
    options = [f"--faults={len(KINDS)}", *(f"--only={kind}" for kind in KINDS)]
    said = run_soak("--seed=11", "--seconds=40", "--clients=80", "--bad-inputs=20", *options, limit=LIMIT)

    account = read_account(said)
    assert account["delivered"] > 500
    assert account["recovered"] > 0 and account["told lost"] > 0
    assert account["silently lost"] == account["repeated"] == account["reordered"] == account["broken rule"] == 0
    assert f"faults carried out: {len(KINDS)}" in said


def run_soak(*options: str, limit: float) -> str:
    """Run a soak, which must pass within `limit` seconds; return its output."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.soak", *options],
        cwd=CHECKOUT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        said, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # it ends its server
        said, _ = process.communicate(timeout=30)
        raise AssertionError(said) from None
    finally:
        process.kill()
    assert process.returncode == 0, said
    return said


def read_account(said: str) -> dict[str, int]:
    """Return the numbers of the account at the end of the output, by name."""
    return {name: int(number.replace(",", "")) for number, _, name in map(_columns, said.splitlines()) if number}


def _columns(line: str) -> tuple[str, str, str]:
    number, gap, name = line.strip().partition("  ")
    return (number, gap, name) if number.replace(",", "").isdigit() else ("", "", "")
