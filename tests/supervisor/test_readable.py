"""A descriptor that the reactor watches."""

from __future__ import annotations

import os

from realtime.supervisor.readable import Readable
from tests.transports.stage import eventually


async def test_it_calls_while_its_descriptor_can_be_read_until_it_is_closed() -> None:
    from twisted.internet import reactor

    read_end, write_end = os.pipe()
    received = bytearray()

    def read() -> None:
        if data := os.read(read_end, 1):
            received.extend(data)
        else:
            readable.close()

    readable = Readable(reactor, read_end, read)
    os.write(write_end, b"two")
    await eventually(lambda: received == b"two")
    os.close(write_end)
    await eventually(lambda: readable.fileno() < 0)
    readable.close()  # a second time: no error
