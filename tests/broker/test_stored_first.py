"""Frames wait until the file has the changes that they tell of, in one order, also over the end of a stream."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

from twisted.internet import reactor
from twisted.internet.error import ConnectionDone
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure

from realtime.broker.stored_first import StoredFirstLink, UnstoredFrames
from realtime.process.link import PEER_ENDED
from realtime.pubsub.broker_messages import pack


class Changes:
    """Changes on their way to a file."""

    def __init__(self) -> None:
        self.position = self.stored = 0
        self.on_stored: Callable[[int], None] = print

    @property
    def is_behind(self) -> bool:
        return self.position > self.stored

    def store(self, position: int) -> None:
        self.stored = position
        self.on_stored(position)


def connected(unstored: UnstoredFrames, ends: list[str]) -> tuple[StoredFirstLink, Any]:
    def on_end(link: object, reason: str) -> None:
        ends.append(reason)

    def at_once(call: Callable[[], None]) -> None:
        call()

    link = StoredFirstLink(reactor, at_once, 1000, print, on_end, keeps=True, unstored=unstored)
    transport: Any = StringTransport()
    with socket.socket(socket.AF_UNIX) as transport.socket:  # which is asked for the size of its buffer
        link.makeConnection(transport)
    return link, transport


def test_all_frames_behind_an_unstored_change_wait_for_it() -> None:
    changes = Changes()
    unstored = UnstoredFrames(changes)
    (one, to_one), (two, to_two) = connected(unstored, []), connected(unstored, [])
    one.send(pack("before"))
    changes.position = 1
    one.send(pack("answer"))
    two.send(pack("delivery"))
    changes.position = 2
    one.send(pack("next"))
    assert (to_one.value(), to_two.value()) == (pack("before"), b"")
    changes.store(1)
    assert (to_one.value(), to_two.value()) == (pack("before") + pack("answer"), pack("delivery"))
    changes.store(2)
    two.send(pack("last"))
    assert to_one.value() == pack("before") + pack("answer") + pack("next")
    assert to_two.value() == pack("delivery") + pack("last")


def test_waiting_frames_of_an_ended_stream_go_on_over_the_next_one() -> None:
    changes, ends = Changes(), []
    unstored = UnstoredFrames(changes)
    link, transport = connected(unstored, ends)
    changes.position = 1
    link.send(pack("answer"))
    link.connectionLost(Failure(ConnectionDone()))
    assert ends == [PEER_ENDED]
    following, to_following = connected(unstored, [])
    rest = link.take_rest(0)
    assert rest == [pack("answer")]
    following.continue_with(rest)
    assert to_following.value() == b""
    changes.store(1)
    assert (transport.value(), to_following.value()) == (b"", pack("answer"))
