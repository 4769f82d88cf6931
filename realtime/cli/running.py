"""The running server, as the `realtime` command reaches it: its operators' port on this machine."""

from __future__ import annotations

import argparse
import http.client
import json
import os
import sys
import urllib.error
import urllib.request
from typing import Any

from realtime.config.sources import read
from realtime.config.values import escape_unprintable

# Seconds for an answer to begin, and between two parts of it: the server shows every few that it is alive.
_LIMIT = 30.0
# The header of commands: `realtime.operators.commands.HEADER`, which this package must not load.
_HEADER = "X-Realtime-Command"


class Unanswered(Exception):
    """The server did not answer as it should. The message is one readable line."""


def url(arguments: argparse.Namespace, path: str) -> str:
    """Return the URL of a path at the operators' port. arguments: with `config` and `port`, 0 for the configured one.

    Raises SettingsError.
    """
    server = read(arguments.config, {}, os.environ).http_server
    host = f"[{server.internal_address}]" if ":" in server.internal_address else server.internal_address
    return f"http://{host}:{arguments.port or server.internal_port}{path}"


def send(url: str, method: str = "GET") -> Any:
    """Send a request and return the response, a context manager. Raises Unanswered."""
    # A proxy of the environment can't reach this machine's loopback address.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(url, method=method, headers={_HEADER: "1"} if method == "POST" else {})
    try:
        return opener.open(request, timeout=_LIMIT)
    except urllib.error.HTTPError as error:
        raise Unanswered(f"{url}: {error.read().decode('utf-8', 'replace').strip()}") from None
    except (OSError, http.client.HTTPException) as error:
        raise Unanswered(f"{url}: no answer: {error}; is the server running?") from None


def command(url: str, join: str = "") -> int:
    """Send a command, print its progress and its outcome. Returns the exit status: 1 for a failure.

    join: the URL where a command goes on whose answer breaks off, because another program has taken the place of the
    server.
    """
    try:
        outcome = _follow(url, is_whole=not join)
        if outcome is None and join:
            outcome = _follow(join)
    except Unanswered as error:
        print(error, file=sys.stderr)
        return 1
    except (OSError, ValueError, http.client.HTTPException) as error:
        print(f"{url}: unreadable answer: {escape_unprintable(str(error))}", file=sys.stderr)
        return 1
    if outcome is None:
        outcome = "the server ended before the command was carried out"
    if outcome:
        print(f"failed: {escape_unprintable(outcome)}", file=sys.stderr)
        return 1
    print("done")
    return 0


def _follow(url: str, *, is_whole: bool = True) -> str | None:
    """Send a command, print its progress, and return its outcome; None if there is none.

    is_whole: whether an answer that breaks off is an error. Raises Unanswered, and what reading an answer raises.
    """
    outcome: str | None = None
    with send(url, "POST") as response:
        try:
            for line in response:
                part = json.loads(line) if line.strip() else {}
                if "line" in part:
                    print(escape_unprintable(part["line"]), flush=True)
                outcome = part.get("failure", outcome)
        except (OSError, http.client.HTTPException):
            if is_whole:
                raise
    return outcome
