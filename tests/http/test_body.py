"""Encoded chunks and parsed bodies: the result is the same in any segmentation, and the limit holds."""

from __future__ import annotations

import itertools

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from realtime.http.body import LAST_CHUNK, BodyParser, chunk, event_chunk, line_chunk
from realtime.http.request import CHUNKED, Refusal
from realtime.protocol.json_encoding import JSON_ENCODING
from realtime.protocol.wire_formats import (
    JSON_EVENTS,
    JSON_LINES,
    JSON_PUSHES_EVENTS,
    JSON_PUSHES_LINES,
    PROTOBUF_CHUNKS,
)
from realtime.types import Publication

LIMIT = 1000
CHUNKED_BODIES = {
    "one chunk": (b"3\r\nabc\r\n0\r\n\r\n", b"abc"),
    "no content": (b"0\r\n\r\n", b""),
    "leading zeros": (b"0003\r\nabc\r\n000\r\n\r\n", b"abc"),
    "either case": (b"a\r\n0123456789\r\nA\r\n0123456789\r\n0\r\n\r\n", b"01234567890123456789"),
    "extensions": (b'3;a=b;c="d e"\r\nabc\r\n0 ;x\r\n\r\n', b"abc"),
    "trailers": (b"3\r\nabc\r\n0\r\nX-Sum: 1\r\nY:\r\n\r\n", b"abc"),
    "content that looks like framing": (b"5\r\n0\r\n\r\n\r\n0\r\n\r\n", b"0\r\n\r\n"),
    "more data after it": (b"1\r\na\r\n0\r\n\r\nGET / HTTP/1.1\r\n", b"a"),
}
REFUSED = {
    "no size": (b"\r\nabc\r\n", 400),
    "not a number": (b"xyz\r\nabc\r\n", 400),
    "a sign": (b"+3\r\nabc\r\n", 400),
    "a prefix": (b"0x3\r\nabc\r\n", 400),
    "an underscore": (b"1_0\r\nabc\r\n", 400),
    "nine digits": (b"000000003\r\nabc\r\n", 400),
    "a space before": (b" 3\r\nabc\r\n", 400),
    "a bare line feed": (b"3\nabc\n0\n\n" + b"x" * 2000, 400),
    "control bytes in an extension": (b"3;a=\x00\r\nabc\r\n", 400),
    "a chunk that is too long": (b"3\r\nabcd\r\n0\r\n\r\n", 400),
    "an endless extension": (b"3;" + b"a" * 2000, 400),
    "a long extension": (b"3;" + b"a" * 2000 + b"\r\n", 400),
    "a bad trailer": (b"0\r\nno colon\r\n\r\n", 400),
    "an endless trailer": (b"0\r\nx: " + b"a" * 2000, 400),
    "many trailers": (b"0\r\n" + b"x: y\r\n" * 101 + b"\r\n", 400),
    "a chunk over the limit": (b"3e9\r\n", 413),
    "many chunks over the limit": (b"1\r\na\r\n" * 1001, 413),
}


def fed(size: int, data: bytes, cuts: list[int]) -> bytes | Refusal | None:
    body = BodyParser(size, LIMIT)
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    for start, end in itertools.pairwise(edges):
        result = body.feed(data[start:end])
        if result is not None:
            return result
    return None


@given(st.sampled_from(sorted(CHUNKED_BODIES)), st.lists(st.integers(0, 100), max_size=8))
def test_a_chunked_body_is_parsed_in_any_segmentation(name: str, cuts: list[int]) -> None:
    data, body = CHUNKED_BODIES[name]
    assert fed(CHUNKED, data, cuts) == body


@given(st.sampled_from(sorted(REFUSED)), st.lists(st.integers(0, 5000), max_size=8))
def test_a_bad_body_is_refused_in_any_segmentation(name: str, cuts: list[int]) -> None:
    data, status = REFUSED[name]
    result = fed(CHUNKED, data, cuts)
    assert isinstance(result, Refusal)
    assert result.status == status


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_body_is_refused(name: str) -> None:
    data, status = REFUSED[name]
    result = BodyParser(CHUNKED, LIMIT).feed(data)
    assert isinstance(result, Refusal)
    assert (result.status, result.kind) == (status, {400: "body_syntax", 413: "body_too_large"}[status])


@pytest.mark.parametrize("name", ["one chunk", "extensions", "trailers"])
def test_an_incomplete_body_has_no_result(name: str) -> None:
    data, _ = CHUNKED_BODIES[name]
    for end in range(len(data)):
        assert BodyParser(CHUNKED, LIMIT).feed(data[:end]) is None


@given(st.binary(max_size=200), st.lists(st.integers(0, 200), max_size=8))
def test_a_body_of_known_length(data: bytes, cuts: list[int]) -> None:
    assert fed(len(data), data + b"more", cuts) == data


def test_a_body_of_known_length_over_the_limit() -> None:
    result = BodyParser(LIMIT + 1, LIMIT).feed(b"x")
    assert isinstance(result, Refusal)
    assert (result.status, result.kind) == (413, "body_too_large")


@given(st.binary(max_size=500))
def test_arbitrary_bytes_do_not_raise(data: bytes) -> None:
    result = BodyParser(CHUNKED, LIMIT).feed(data)
    assert result is None or isinstance(result, bytes | Refusal)


def test_a_body_with_too_many_tiny_chunks_is_refused() -> None:
    tiny = b"1\r\na\r\n"
    body = BodyParser(CHUNKED, 1_000_000)
    assert body.feed(tiny * 500) is None
    assert body.feed(chunk(b"a" * 64_000)) is None
    assert body.feed(tiny * 1000) is None  # allowed by the size of the content
    result = body.feed(tiny * 1000)
    assert isinstance(result, Refusal)
    assert (result.status, result.kind) == (400, "body_syntax")


@given(st.lists(st.binary(min_size=1, max_size=100), max_size=10))
def test_encoded_chunks_parse_to_the_same_content(parts: list[bytes]) -> None:
    assert fed(CHUNKED, b"".join(map(chunk, parts)) + LAST_CHUNK, []) == b"".join(parts)


def test_the_framings() -> None:
    assert chunk(b"x" * 26) == b"1a\r\n" + b"x" * 26 + b"\r\n"
    assert event_chunk(b"{}") == b"a\r\ndata: {}\n\n\r\n"
    assert line_chunk(b"{}") == b"3\r\n{}\n\r\n"


def test_wire_formats_use_the_framings() -> None:
    publication = Publication(b'{"n":1}', 7)
    pub = b'{"channel":"c","pub":{"data":{"n":1},"offset":7}}'
    assert JSON_EVENTS.publication("c", publication, "") == event_chunk(b'{"push":%b}' % pub)
    assert JSON_LINES.publication("c", publication, "") == line_chunk(b'{"push":%b}' % pub)
    assert JSON_PUSHES_EVENTS.publication("c", publication, "") == event_chunk(pub)
    assert JSON_PUSHES_LINES.publication("c", publication, "") == line_chunk(pub)
    whole = fed(CHUNKED, PROTOBUF_CHUNKS.publication("c", publication, "") + LAST_CHUNK, [])
    # Reply {push: {channel: "c", pub: {data: ..., offset: 7}}}, behind its length.
    pub_field = b"\x22\x0b\x22\x07" + b'{"n":1}' + b"\x30\x07"
    assert whole == b"\x12\x22\x10\x12\x01c" + pub_field
    assert msgspec.json.decode(JSON_ENCODING.ping) == {}
