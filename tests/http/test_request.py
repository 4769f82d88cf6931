"""The parser for request heads: accepted heads, and the status of refused ones, in any segmentation."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realtime.http.request import (
    CHUNKED,
    MAX_LINE,
    MAX_PARAMETERS,
    Refusal,
    RequestHead,
    RequestParser,
    parse_whole_head,
)

MAX_BYTES = 16384
MAX_HEADERS = 100


def parse(data: bytes, max_bytes: int = MAX_BYTES) -> RequestHead | Refusal | None:
    return RequestParser(max_bytes, MAX_HEADERS).feed(data)


def request(*lines: bytes, first: bytes = b"GET / HTTP/1.1", host: bytes | None = b"h") -> bytes:
    hosts = [] if host is None else [b"Host: " + host]
    return b"\r\n".join([first, *hosts, *lines, b"", b""])


def status(data: bytes, max_bytes: int = MAX_BYTES) -> int | None:
    """Return the status of the refusal, 0 for an accepted head, None for an incomplete one."""
    verdict = parse(data, max_bytes)
    if verdict is None:
        return None
    return verdict.status if isinstance(verdict, Refusal) else 0


def accepted(data: bytes) -> RequestHead:
    verdict = parse(data)
    assert isinstance(verdict, RequestHead), verdict
    return verdict


def test_a_browser_request() -> None:
    head = accepted(
        request(
            b"User-Agent:  x y\t",
            b"Cookie: a=1",
            b"ACCEPT: */*",
            b"Cookie: b=2",
            b"accept:text/html",
            b"Empty:",
            first=b"GET /a/b%20c?x=1&y=2?z HTTP/1.1",
        )
    )
    assert (head.method, head.version, head.body) == ("GET", "1.1", 0)
    assert (head.path, head.query) == ("/a/b%20c", "x=1&y=2?z")
    assert head.headers == {
        "host": "h",
        "user-agent": "x y",
        "cookie": "a=1; b=2",
        "accept": "*/*, text/html",
        "empty": "",
    }


def test_data_after_the_head_is_kept_as_trailing_data() -> None:
    parser = RequestParser(MAX_BYTES, MAX_HEADERS)
    assert parser.feed(request()[:-1]) is None
    assert isinstance(parser.feed(b"\n\x81\x80rest"), RequestHead)
    assert parser.trailing_data == b"\x81\x80rest"


FIELD_BYTES = set(range(0x20, 0x7F)) | {0x09} | set(range(0x80, 0x100)) - {0x85}
TOKEN_BYTES = set(b"!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")


@pytest.mark.parametrize("byte", range(256))
def test_each_byte_in_a_header_value(byte: int) -> None:
    expected = 0 if byte in FIELD_BYTES else 400
    assert status(request(b"X: a" + bytes([byte]) + b"b")) == expected


@pytest.mark.parametrize("byte", range(256))
def test_each_byte_in_a_header_name(byte: int) -> None:
    # A colon ends the name, and the rest is the value.
    expected = 0 if byte in TOKEN_BYTES or byte == ord(":") else 400
    assert status(request(b"X" + bytes([byte]) + b"y: a")) == expected


@pytest.mark.parametrize("byte", range(256))
def test_each_byte_before_the_colon(byte: int) -> None:
    expected = 0 if byte in TOKEN_BYTES or byte == ord(":") else 400
    assert status(request(b"X" + bytes([byte]) + b": a")) == expected


@pytest.mark.parametrize("byte", range(256))
def test_each_byte_in_the_target(byte: int) -> None:
    expected = 0 if 0x21 <= byte <= 0x7E and byte != ord("#") else 400
    assert status(request(first=b"GET /a" + bytes([byte]) + b"b HTTP/1.1")) == expected


@pytest.mark.parametrize("byte", range(256))
def test_each_byte_in_the_method(byte: int) -> None:
    expected = 0 if byte in TOKEN_BYTES else 400
    assert status(request(first=b"G" + bytes([byte]) + b"T / HTTP/1.1")) == expected


@pytest.mark.parametrize("byte", sorted(set(range(256)) - TOKEN_BYTES))
def test_data_other_than_http_is_refused_at_its_first_byte(byte: int) -> None:
    assert status(bytes([byte])) == 400


@pytest.mark.parametrize(
    "line",
    [
        b"nocolon",
        b": empty name",
        b"X : y",
        b"X\t: y",
        b" folded",
        b"\tfolded",
        b" X: y",
        b"X: a\x00",
        b"X",
        b"\x85: x",
    ],
)
def test_malformed_header_lines(line: bytes) -> None:
    assert status(request(line)) == 400
    assert status(request(b"A: 1", line, b"B: 2")) == 400


@pytest.mark.parametrize(
    ("first", "expected"),
    [
        (b"GET / HTTP/1.1", 0),
        (b"GET / HTTP/1.0", 0),
        (b"PURGE / HTTP/1.1", 0),
        (b"GET / HTTP/0.9", 505),
        (b"GET / HTTP/2.0", 505),
        (b"GET / HTTP/1.2", 505),
        (b"PRI * HTTP/2.0", 505),
        (b"GET /", 400),
        (b"GET", 400),
        (b"GET  / HTTP/1.1", 400),
        (b"GET / HTTP/1.1 ", 400),
        (b"GET / HTTP/1.1 x", 400),
        (b" GET / HTTP/1.1", 400),
        (b"GET\t/\tHTTP/1.1", 400),
        (b"GET / http/1.1", 400),
        (b"GET / HTTP/1.10", 400),
        (b"GET / HTTP/11", 400),
        (b"GET / HTTP/\xb9.1", 400),
        (b"GET /a b HTTP/1.1", 400),
        (b"GET a HTTP/1.1", 400),
        (b"GET http://h/ HTTP/1.1", 0),
        (b"OPTIONS * HTTP/1.1", 400),
        (b"CONNECT h:80 HTTP/1.1", 400),
        (b"GET /#f HTTP/1.1", 400),
    ],
)
def test_request_lines(first: bytes, expected: int) -> None:
    assert status(request(first=first)) == expected


@pytest.mark.parametrize("path", [b"//x", b"/../x", b"/%2e%2e/x", b"/%00", b"/a/./b", b"/?redirect=//x"])
def test_a_path_is_kept_as_it_was_sent(path: bytes) -> None:
    assert accepted(request(first=b"GET " + path + b" HTTP/1.1")).target == path.decode()


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        (b"example.com", 0),
        (b"example.com:8000", 0),
        (b"127.0.0.1:80", 0),
        (b"[::1]:8000", 0),
        (b"[::1]", 0),
        (None, 400),
        (b"", 400),
        (b":80", 400),
        (b"a b", 400),
        (b"a,b", 0),  # a reg-name may hold a comma; here it is an unknown host
        (b"a/b", 400),
        (b"a@b", 400),
        (b"a:b", 400),
        (b"a:1:2", 400),
        (b"a:123456", 400),
        (b"[::1", 400),
        (b"::1", 400),
        (b"\xe4.example", 400),
        (b"<script>", 400),
    ],
)
def test_the_host(host: bytes | None, expected: int) -> None:
    assert status(request(host=host)) == expected


def test_a_second_host_is_refused_even_if_it_is_the_same() -> None:
    assert status(request(b"Host: h")) == 400
    assert status(request(b"host: other")) == 400


def test_http_1_0_needs_no_host() -> None:
    assert status(request(first=b"GET / HTTP/1.0", host=None)) == 0


FRAMINGS: list[tuple[list[bytes], int]] = [
    ([b"Content-Length: 0"], 0),
    ([b"Content-Length: 5"], 5),
    ([b"Content-Length:5 "], 5),
    ([b"content-LENGTH: 005"], 5),
    ([b"Transfer-Encoding: chunked"], CHUNKED),
    ([b"Transfer-Encoding: CHUNKED"], CHUNKED),
]

SMUGGLING: list[list[bytes]] = [
    [b"Content-Length: " + value]
    for value in (
        *(b"", b"+5", b"-1", b"-0", b"1_0", b"0x5", b"5.0", b"5e0", b"5 5", b"5,5", b"5, 5", b"5;", b"\xb2", b"5\x0b"),
        *(b"\xa05", b"five", b"1" * 16, b"1" * 5000, b"5\x00", b"'5'"),
    )
]
SMUGGLING += [
    [b"Transfer-Encoding: " + value]
    for value in (
        *(b"", b"xchunked", b"chunkedx", b"chunked, chunked", b"gzip, chunked", b"chunked, gzip", b"identity"),
        *(b"chunked;q=1", b"x", b"gzip", b"\x0bchunked", b"chunked\x0b", b"chunked\xa0", b"'chunked'", b"chunked,"),
        *(b",chunked", b"identity, chunked", b"chu nked"),
    )
]
SMUGGLING += [
    [b"Content-Length: 5", b"Content-Length: 5"],
    [b"Content-Length: 5", b"Content-Length: 6"],
    [b"Content-Length: 5", b"content-length: 0"],
    [b"Content-Length: 5", b"Transfer-Encoding: chunked"],
    [b"Transfer-Encoding: chunked", b"Content-Length: 5"],
    [b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked"],
    [b"Transfer-Encoding: chunked", b"Transfer-Encoding: identity"],
    [b"Transfer-Encoding: identity", b"Content-Length: 5"],
    [b"Content-Length : 5"],
    [b"Content-Length\t: 5"],
    [b"Content-Length\x00: 5"],
    [b" Content-Length: 5"],
    [b"Content-Length:\r\n 5"],
    [b"Transfer-Encoding : chunked"],
    [b"Transfer-Encoding\x0b: chunked"],
    [b"Transfer-Encoding:\r\n chunked"],
    [b"X: y\nTransfer-Encoding: chunked"],
    [b"X: y\rTransfer-Encoding: chunked"],
    [b"X: y\r\r\nTransfer-Encoding: chunked"],
    [b"X: y\n\nGET /smuggled HTTP/1.1"],
    [b"\x0bContent-Length: 5"],
    [b"Content\xadLength: 5", b"\x80: 1"],
]


@pytest.mark.parametrize(("lines", "body"), FRAMINGS)
def test_the_length_of_the_body(lines: list[bytes], body: int) -> None:
    assert accepted(request(*lines, first=b"POST / HTTP/1.1")).body == body


@pytest.mark.parametrize("lines", SMUGGLING)
def test_a_message_with_ambiguous_framing_is_refused(lines: list[bytes]) -> None:
    assert status(request(*lines, first=b"POST / HTTP/1.1")) == 400


def test_http_1_0_has_no_chunked_body() -> None:
    assert status(request(b"Transfer-Encoding: chunked", first=b"POST / HTTP/1.0")) == 400


def test_the_limits() -> None:
    assert status(request(*[b"A: b"] * (MAX_HEADERS - 1))) == 0
    assert status(request(*[b"A: b"] * MAX_HEADERS)) == 431
    assert status(request(b"A: " + b"x" * (MAX_LINE - 3))) == 0
    assert status(request(b"A: " + b"x" * (MAX_LINE - 2))) == 431
    longest = b"GET /" + b"x" * (MAX_LINE - 14) + b" HTTP/1.1"
    assert status(request(first=longest)) == 0
    assert status(request(first=longest.replace(b"/x", b"/xx"))) == 414
    assert status(b"A: " + b"x" * MAX_LINE) == 414  # no end of line
    head = request(b"A: " + b"x" * 8000, b"B: " + b"y" * 8000)
    assert status(head, len(head)) == 0
    assert status(head, len(head) - 1) == 431


def test_the_query_has_a_limit_of_parameters() -> None:
    query = b"&".join([b"a=1"] * MAX_PARAMETERS)
    assert status(request(first=b"GET /?" + query + b" HTTP/1.1")) == 0
    longer = request(first=b"GET /?" + query + b"& HTTP/1.1")
    assert status(longer) == 400
    assert isinstance(RequestParser(MAX_BYTES, MAX_HEADERS, MAX_PARAMETERS + 1).feed(longer), RequestHead)


def test_an_endless_head_is_refused_at_the_limit_and_not_buffered() -> None:
    parser = RequestParser(MAX_BYTES, MAX_HEADERS)
    verdict = parser.feed(b"GET / HTTP/1.1\r\n")
    fed = 16
    while verdict is None:
        verdict = parser.feed(b"X: " + b"y" * 1000 + b"\r\n")
        fed += 1005
        assert fed <= MAX_BYTES + 1005
    assert isinstance(verdict, Refusal)
    assert verdict.status == 431


def test_a_head_of_bare_line_feeds_is_refused_without_waiting_for_more() -> None:
    assert status(b"GET / HTTP/1.1\n") == 400
    assert status(b"GET / HTTP/1.1\r\nHost: h\n") == 400


def test_no_reason_repeats_input_of_the_peer() -> None:
    marked = b"MARK"
    for data in (
        request(b"MARK\x00: MARK"),
        request(first=b"MARK MARK HTTP/1.1"),
        request(host=b"MARK MARK"),
        request(b"Content-Length: MARK"),
        request(b"X: " + marked * 5000),
    ):
        verdict = parse(data)
        assert isinstance(verdict, Refusal)
        assert verdict.reason
        assert "MARK" not in verdict.reason


LINES = st.sampled_from(
    [
        b"Host: h\r\n",
        b"A: b\r\n",
        b"A: b\n",
        b"bad\r\n",
        b"\x00\r\n",
        b"Content-Length: 3\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"L: " + b"x" * 60 + b"\r\n",
        b"M: " + b"x" * (MAX_LINE - 3) + b"\r\n",
        b"N: " + b"x" * (MAX_LINE - 2) + b"\r\n",
        b"\r\n",
        b"\r",
        b"\n",
    ]
)
FIRST_LINES = st.sampled_from(
    [b"GET / HTTP/1.1\r\n", b"GET / HTTP/3.0\r\n", b"G", b"\x16\x03\x01", b"\r\n", b"x" * (MAX_LINE + 3), b""]
)


@given(
    first=FIRST_LINES,
    lines=st.lists(LINES, max_size=6),
    tail=st.binary(max_size=20),
    cuts=st.lists(st.integers(0, 20000), max_size=12),
    limit=st.sampled_from([60, 200, MAX_LINE, MAX_LINE + 2, MAX_LINE + 18, MAX_BYTES]),
)
def test_the_result_does_not_depend_on_the_segmentation(
    first: bytes, lines: list[bytes], tail: bytes, cuts: list[int], limit: int
) -> None:
    data = first + b"".join(lines) + tail
    whole = RequestParser(limit, 4)
    expected = whole.feed(data)

    cut = RequestParser(limit, 4)
    edges = [0, *sorted(min(edge, len(data)) for edge in cuts), len(data)]
    verdict: RequestHead | Refusal | None = None
    fed = 0
    for start, end in itertools.pairwise(edges):
        verdict = cut.feed(data[start:end])
        fed = end
        if verdict is not None:
            break
    assert verdict == expected
    if isinstance(verdict, RequestHead):
        assert cut.trailing_data + data[fed:] == whole.trailing_data


@given(st.binary(max_size=300))
def test_arbitrary_bytes_do_not_raise(data: bytes) -> None:
    parse(data)
    parse(b"GET / HTTP/1.1\r\nHost: h\r\n" + data + b"\r\n\r\n")


def test_byte_by_byte_is_linear() -> None:
    parser = RequestParser(MAX_BYTES, MAX_HEADERS)
    data = request(*[b"A: " + b"x" * 8000], b"B: " + b"y" * 8000)
    verdicts = [parser.feed(data[i : i + 1]) for i in range(len(data))]
    assert verdicts[:-1] == [None] * (len(data) - 1)
    assert isinstance(verdicts[-1], RequestHead)


@given(
    first=st.one_of(FIRST_LINES, st.just(b"POST /?a&b HTTP/1.0\r\n"), st.just(b"GET http://h/ HTTP/1.1\r\n")),
    lines=st.lists(LINES, max_size=6),
    tail=st.binary(max_size=20),
    before=st.binary(max_size=5),
    limit=st.sampled_from([60, 200, MAX_LINE, MAX_BYTES]),
)
def test_the_short_path_agrees_with_the_parser(
    first: bytes, lines: list[bytes], tail: bytes, before: bytes, limit: int
) -> None:
    data = first + b"".join(lines) + tail
    found = parse_whole_head(before + data, len(before), limit, 4)
    if found is not None:
        parser = RequestParser(limit, 4)
        assert parser.feed(data) == found[0]
        assert (before + data)[found[1] :] == parser.trailing_data


@pytest.mark.parametrize("lines", [lines for lines, _ in FRAMINGS])
def test_the_short_path_takes_valid_framings(lines: list[bytes]) -> None:
    data = request(*lines, first=b"POST /x HTTP/1.1")
    assert parse_whole_head(data, 0, MAX_BYTES, MAX_HEADERS) == (accepted(data), len(data))


def test_a_head_that_came_before_is_judged_by_the_limits_of_now() -> None:
    data = request(b"Accept: a", b"Accept: b")
    for _ in range(2):
        assert parse_whole_head(data, 0, MAX_BYTES, MAX_HEADERS) == (accepted(data), len(data))
        assert parse_whole_head(data, 0, MAX_BYTES, 2) is None
        assert parse_whole_head(data, 0, len(data) - 1, MAX_HEADERS) is None
    head, _ = parse_whole_head(data, 0, MAX_BYTES, MAX_HEADERS) or pytest.fail()
    head.headers.clear()
    assert head.headers["accept"] == "a, b"


@pytest.mark.parametrize("lines", SMUGGLING)
def test_the_short_path_takes_no_ambiguous_framing(lines: list[bytes]) -> None:
    found = parse_whole_head(request(*lines, first=b"POST / HTTP/1.1"), 0, MAX_BYTES, MAX_HEADERS)
    assert found is None


@pytest.mark.parametrize(
    ("target", "expected", "host"),
    [
        (b"http://h/a?b", "/a?b", "h"),
        (b"HTTP://H:80/", "/", "H:80"),
        (b"https://other", "/", "other"),
        (b"http://other?q", "/?q", "other"),
        (b"http://[::1]:8000/a", "/a", "[::1]:8000"),
    ],
)
def test_a_target_in_absolute_form_names_the_host(target: bytes, expected: str, host: str) -> None:
    head = accepted(request(b"A: b", first=b"GET " + target + b" HTTP/1.1"))
    assert (head.target, head.get_all("host"), head.get("a")) == (expected, [host], "b")


@pytest.mark.parametrize(
    "target", [b"http:///a", b"http://u@h/", b"ftp://h/", b"http://h/#a", b"http://a b/", b"//h/#"]
)
def test_a_faulty_target_in_absolute_form_is_refused(target: bytes) -> None:
    assert status(request(first=b"GET " + target + b" HTTP/1.1")) == 400


def test_the_limit_of_a_line_follows_the_limit_of_the_head() -> None:
    assert status(request(b"A: " + b"x" * 60_000), 65536) == 0
    assert status(b"GET /" + b"x" * 60_000 + b" HTTP/1.1\r\nHost: h\r\n\r\n", 65536) == 0
    assert status(request(b"A: " + b"x" * 70_000), 65536) == 431
