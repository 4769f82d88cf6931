"""Wire forms: an encoding in the framing of a transport.

What goes to many clients is made once for each form among them; the bytes are complete, and ready for the socket.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from realtime.http.body import chunk, event_chunk, line_chunk
from realtime.http.frames import binary_frame, text_frame
from realtime.protocol import messages
from realtime.protocol.encodings import JSON_ENCODING, JSON_PUSHES, Encoding
from realtime.protocol.protobuf import PROTOBUF
from realtime.types import ClientInfo, Publication


class WireFormat:
    """One wire form; see `realtime.pubsub.subscriber.Form`. Forms are told apart by identity, so make each only once.

    frame: puts a transport's framing around one payload of the encoding.
    """

    __slots__ = ("encoding", "frame")

    def __init__(self, encoding: Encoding, frame: Callable[[bytes], bytes]) -> None:
        self.encoding = encoding
        self.frame = frame

    def publication(self, channel: str, publication: Publication, epoch: str) -> bytes:
        """A publication, on its way to every subscriber. Raises Disconnect 3506, see `Encoding.pub`.

        The first of a stream brings the epoch along.
        """
        pub = self.encoding.pub(publication, epoch if publication.offset == 1 else "")
        return self._push(channel, "pub", pub)

    def whole(self, channel: str, publication: Publication, epoch: str) -> bytes:
        """The same for subscribers that agreed on deltas. Raises as `publication`."""
        pub = self.encoding.whole(publication, epoch if publication.offset == 1 else "")
        return self._push(channel, "pub", pub)

    def patched(self, channel: str, publication: Publication, delta: bytes, epoch: str) -> bytes | None:
        """The same with a delta in place of the data; None when the encoding can't carry it."""
        pub = self.encoding.patch(publication, delta, epoch if publication.offset == 1 else "")
        return self._push(channel, "pub", pub) if pub is not None else None

    def join(self, channel: str, info: ClientInfo) -> bytes:
        """A client entered the channel."""
        return self._push(channel, "join", messages.JoinPush(messages.info(info)))

    def leave(self, channel: str, info: ClientInfo) -> bytes:
        """A client left the channel."""
        return self._push(channel, "leave", messages.JoinPush(messages.info(info)))

    def _push(self, channel: str, name: str, body: Any) -> bytes:
        return self.frame(self.encoding.push(channel, name, body))


JSON_TEXT = WireFormat(JSON_ENCODING, text_frame)
JSON_PUSHES_TEXT = WireFormat(JSON_PUSHES, text_frame)
PROTOBUF_BINARY = WireFormat(PROTOBUF, binary_frame)
JSON_EVENTS = WireFormat(JSON_ENCODING, event_chunk)
JSON_LINES = WireFormat(JSON_ENCODING, line_chunk)
PROTOBUF_CHUNKS = WireFormat(PROTOBUF, chunk)
JSON_PUSHES_EVENTS = WireFormat(JSON_PUSHES, event_chunk)
JSON_PUSHES_LINES = WireFormat(JSON_PUSHES, line_chunk)
