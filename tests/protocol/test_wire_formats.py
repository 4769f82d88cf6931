"""Wire formats: payloads in the framing of each transport."""

from __future__ import annotations

import pytest

from realtime.errors import Disconnect
from realtime.http.frames import text_frame
from realtime.protocol import wire_formats
from realtime.protocol.json_encoding import JSON_ENCODING
from realtime.protocol.wire_formats import JSON_EVENTS, JSON_LINES, JSON_PUSHES_TEXT, JSON_TEXT, WireFormat
from realtime.types import ClientInfo, Publication

BARE = WireFormat(JSON_ENCODING, lambda payload: payload)
FORMATS = [each for each in vars(wire_formats).values() if isinstance(each, WireFormat)]


def test_a_payload_is_framed_as_the_transport_needs() -> None:
    publication = Publication(b"1")
    assert JSON_TEXT.publication("a", publication, "") == text_frame(b'{"push":{"channel":"a","pub":{"data":1}}}')
    assert JSON_PUSHES_TEXT.publication("a", publication, "") == text_frame(b'{"channel":"a","pub":{"data":1}}')
    push = b'{"push":{"channel":"a","pub":{"data":1}}}'
    assert b"\r\ndata: " + push + b"\n\n\r\n" in JSON_EVENTS.publication("a", publication, "")
    assert b"\r\n" + push + b"\n\r\n" in JSON_LINES.publication("a", publication, "")


@pytest.mark.parametrize("form", FORMATS)
def test_only_the_first_publication_of_a_stream_carries_its_epoch(form: WireFormat) -> None:
    for encode in (form.publication, form.full_publication):
        assert [b"e9e9" in encode("a", Publication(b"1", offset), "e9e9") for offset in (0, 1, 2)] == [
            False,
            True,
            False,
        ]
    assert b"e9e9" in (form.delta_publication("a", Publication(b"1", 1), b"delta", "e9e9") or b"")


@pytest.mark.parametrize("form", FORMATS)
def test_joins_and_leaves_name_the_client(form: WireFormat) -> None:
    info = ClientInfo("ann", "c1")
    for push in (form.join("news", info), form.leave("news", info)):
        assert all(text in push for text in (b"news", b"ann", b"c1"))


def test_with_deltas_the_data_is_a_string_in_json() -> None:
    publication = Publication(b'{"n":1}', 2)
    assert BARE.full_publication("a", publication, "") == (
        b'{"push":{"channel":"a","pub":{"data":"{\\"n\\":1}","offset":2}}}'
    )
    assert BARE.delta_publication("a", publication, b"1\n1:a", "") == (
        b'{"push":{"channel":"a","pub":{"data":"1\\n1:a","offset":2,"delta":true}}}'
    )


def test_json_carries_no_binary_data_and_no_binary_delta() -> None:
    assert BARE.delta_publication("a", Publication(b"1", 2), b"\xff", "") is None
    with pytest.raises(Disconnect):
        BARE.publication("a", Publication(b"\xff", binary=True), "")
