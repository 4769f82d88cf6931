"""Complete responses as bytes."""

from __future__ import annotations

import email.utils
import time

import pytest

from realtime.http import response
from realtime.http.response import date_line, encode_head, encode_response


def parts(data: bytes) -> tuple[bytes, dict[str, str], bytes]:
    head, _, body = data.partition(b"\r\n\r\n")
    line, *lines = head.split(b"\r\n")
    fields = [field.decode("latin-1").partition(": ") for field in lines]
    assert len({name.lower() for name, _, _ in fields}) == len(fields)
    return line, {name.lower(): value for name, _, value in fields}, body


def test_a_response() -> None:
    line, headers, body = parts(encode_response(200, "text/plain", (("X-A", "b"),), b"hello"))
    assert (line, body) == (b"HTTP/1.1 200 OK", b"hello")
    date = headers.pop("date")
    assert abs(email.utils.parsedate_to_datetime(date).timestamp() - time.time()) < 3
    assert headers == {
        "server": "realtime",
        "x-content-type-options": "nosniff",
        "content-type": "text/plain",
        "content-length": "5",
        "x-a": "b",
    }


def test_the_end_of_the_connection_is_announced() -> None:
    assert parts(encode_response(200, "", (), b"", close=True))[1]["connection"] == "close"
    assert "connection" not in parts(encode_response(200, "", (), b""))[1]


def test_the_response_to_head_has_the_length_alone() -> None:
    _, headers, body = parts(encode_response(200, "text/plain", (), b"hello", without_body=True))
    assert (headers["content-length"], body) == ("5", b"")


@pytest.mark.parametrize("status", [204, 304])
def test_some_statuses_have_no_body(status: int) -> None:
    _, headers, body = parts(encode_response(status, "", (), b"ignored"))
    assert "content-length" not in headers
    assert body == b""


def test_own_headers_are_replaced_and_framing_is_not() -> None:
    further = (
        ("server", "mine"),
        ("content-type", "a/b"),
        ("Content-Length", "99"),
        ("Connection", "x"),
        ("Date", "y"),
    )
    _, headers, _ = parts(encode_response(200, "text/plain", further, b"hello"))
    assert (headers["server"], headers["content-type"], headers["content-length"]) == ("mine", "a/b", "5")
    assert "connection" not in headers
    assert headers["date"] != "y"


def test_no_header_of_the_application_makes_a_second_line() -> None:
    data = encode_response(200, "", (("X-A", "b\r\nSet-Cookie: c\0"),), b"")
    assert b"X-A: b Set-Cookie: c \r\n" in data
    with pytest.raises(ValueError, match="not the name"):
        encode_response(200, "", (("X-A: b\r\nSet-Cookie", "c"),), b"")


def test_an_unknown_status() -> None:
    assert encode_response(299, "", (), b"").startswith(b"HTTP/1.1 299 \r\n")


def test_the_date_is_formatted_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1_000_000_000.2
    monkeypatch.setattr(response.time, "time", lambda: now)
    first = date_line()
    assert first == b"Date: Sun, 09 Sep 2001 01:46:40 GMT\r\n"
    now += 0.7
    assert date_line() is first
    now += 0.2
    assert date_line() == b"Date: Sun, 09 Sep 2001 01:46:41 GMT\r\n"


def test_a_head_with_its_own_framing() -> None:
    line, headers, body = parts(encode_head(206, [("content-length", "3")], close=True))
    assert (line, body) == (b"HTTP/1.1 206 Partial Content", b"")
    assert headers["content-length"] == "3"
    assert headers["connection"] == "close"
