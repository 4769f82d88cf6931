"""Commands to the running server: POST requests whose answers tell of the progress as it happens.

A page of another origin can't send them: a browser asks the server before it sends a request with the header HEADER,
and the server does not agree. The answer is a stream of lines in JSON: `{"line": …}` for each line of progress, and at
the end `{"failure": …}`, with an empty text after success. An empty line now and then shows that the server is alive.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import msgspec
from twisted.internet.defer import Deferred
from twisted.internet.task import LoopingCall
from twisted.web.http import FORBIDDEN, NOT_ALLOWED, OK

from realtime.operators.site import OperatorRequest

HEADER = "X-Realtime-Command"
"""The header that a command needs, with any value."""

_ALIVE_INTERVAL = 5.0

Tell = Callable[[str], None]
CarryOut = Callable[[OperatorRequest, Tell], "Deferred[str]"]
"""Begins a command: called with the request and with a function for lines of progress. The Deferred fires with the
reason of a failure, in one line, or with ""."""


class Commands:
    """The commands of the operators' port, by path."""

    def __init__(self, reactor: Any, commands: Mapping[bytes, CarryOut]) -> None:
        self._reactor = reactor
        self._commands = commands

    @property
    def paths(self) -> Collection[bytes]:
        """The paths of all commands."""
        return self._commands.keys()

    def carry_out(self, request: OperatorRequest) -> None:
        """Carry out the command of a request, and answer as it goes on."""
        if request.method != b"POST":
            request.setHeader("allow", "POST")
            request.reply(NOT_ALLOWED, "text/plain", f"only POST; use realtime {request.path[1:].decode()}\n")
        elif request.getHeader(HEADER) is None:
            request.reply(FORBIDDEN, "text/plain", f"refused: a command needs the header {HEADER}\n")
        else:
            answer = _Answer(request, self._reactor)
            self._commands[request.path](request, answer.tell).addCallback(answer.finish)


class _Answer:
    """The stream of one answer. The command goes on if its client leaves."""

    def __init__(self, request: OperatorRequest, reactor: Any) -> None:
        self._request = request
        self._open = True
        request.notifyFinish().addBoth(self._close)
        request.begin_reply(OK, "application/x-ndjson")
        self._alive = LoopingCall(self._write, b"\n")
        self._alive.clock = reactor
        self._alive.start(_ALIVE_INTERVAL, now=False)

    def tell(self, line: str) -> None:
        self._write(msgspec.json.encode({"line": line}) + b"\n")

    def finish(self, failure: str) -> None:
        self._write(msgspec.json.encode({"failure": failure}) + b"\n")
        if self._open:
            self._request.finish_and_close()
        self._close()

    def _write(self, data: bytes) -> None:
        if self._open:
            self._request.write(data)

    def _close(self, _: object = None) -> None:
        self._open = False
        if self._alive.running:
            self._alive.stop()
