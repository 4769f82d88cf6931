"""Wire formats: an encoding in the framing of a transport.

A push to many clients is encoded once for each of their wire formats, as complete bytes, ready for the socket.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from realtime.http.body import chunk, event, event_chunk, line, line_chunk
from realtime.http.frames import binary_frame, text_frame
from realtime.protocol import messages
from realtime.protocol.encodings import Encoding
from realtime.protocol.json_encoding import JSON_ENCODING, JSON_PUSHES
from realtime.protocol.protobuf import PROTOBUF
from realtime.types import ClientInfo, Publication


class WireFormat:
    """One wire format, see `realtime.pubsub.subscriber.FrameEncoder`. Compared by identity: only the instances below
    are used.

    frame: puts a transport's framing around one payload of the encoding.
    """

    __slots__ = ("encoding", "frame")

    def __init__(self, encoding: Encoding, frame: Callable[[bytes], bytes]) -> None:
        self.encoding = encoding
        self.frame = frame

    def publication(self, channel: str, publication: Publication, epoch: str) -> bytes:
        """Encode a publication for its subscribers. Raises Disconnect 3506, see `Encoding.make_pub`.

        The first publication of a stream carries the epoch.
        """
        encoding = self.encoding
        pub = encoding.make_pub(publication, epoch if publication.offset == 1 else "")
        return self.frame(encoding.encode_push(channel, "pub", pub))

    def full_publication(self, channel: str, publication: Publication, epoch: str) -> bytes:
        """Encode a publication in full for subscribers with deltas. Raises as `publication`."""
        pub = self.encoding.make_full_pub(publication, epoch if publication.offset == 1 else "")
        return self._push(channel, "pub", pub)

    def delta_publication(self, channel: str, publication: Publication, delta: bytes, epoch: str) -> bytes | None:
        """Encode a publication as a delta; None if the encoding can't carry it."""
        pub = self.encoding.make_delta_pub(publication, delta, epoch if publication.offset == 1 else "")
        return self._push(channel, "pub", pub) if pub is not None else None

    def join(self, channel: str, info: ClientInfo) -> bytes:
        """Encode the join of a client."""
        return self._push(channel, "join", messages.JoinPush(self.encoding.make_info(info)))

    def leave(self, channel: str, info: ClientInfo) -> bytes:
        """Encode the leave of a client."""
        return self._push(channel, "leave", messages.JoinPush(self.encoding.make_info(info)))

    def _push(self, channel: str, name: str, body: Any) -> bytes:
        return self.frame(self.encoding.encode_push(channel, name, body))


JSON_TEXT = WireFormat(JSON_ENCODING, text_frame)
JSON_PUSHES_TEXT = WireFormat(JSON_PUSHES, text_frame)
PROTOBUF_BINARY = WireFormat(PROTOBUF, binary_frame)
JSON_EVENTS = WireFormat(JSON_ENCODING, event_chunk)
JSON_LINES = WireFormat(JSON_ENCODING, line_chunk)
PROTOBUF_CHUNKS = WireFormat(PROTOBUF, chunk)
JSON_PUSHES_EVENTS = WireFormat(JSON_PUSHES, event_chunk)
JSON_PUSHES_LINES = WireFormat(JSON_PUSHES, line_chunk)


def _whole(payload: bytes) -> bytes:
    return payload


# HTTP/1.0 has no chunks (RFC 9112 section 6.1): there a response ends with its connection.
UNCHUNKED = {
    JSON_EVENTS: WireFormat(JSON_ENCODING, event),
    JSON_LINES: WireFormat(JSON_ENCODING, line),
    PROTOBUF_CHUNKS: WireFormat(PROTOBUF, _whole),
    JSON_PUSHES_EVENTS: WireFormat(JSON_PUSHES, event),
    JSON_PUSHES_LINES: WireFormat(JSON_PUSHES, line),
}
