"""The soak's clients: what they hold against the server, and what against themselves."""

from __future__ import annotations

import socket
from types import SimpleNamespace
from typing import Any

from tests.soak.clients import Connection


def test_an_answer_that_has_arrived_is_not_missing() -> None:
    client: Any = SimpleNamespace(connection=None)
    connection = Connection(client)
    assert not connection.has_unread()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        transport: Any = SimpleNamespace(get_extra_info=lambda name: ours)
        connection.transport = transport
        assert not connection.has_unread()
        theirs.send(b"an answer")
        assert connection.has_unread()
    assert not connection.has_unread()
