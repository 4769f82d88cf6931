"""Forms: what a handler gets of a body, and the reasons for which a body is refused."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
import pytest
import requests

from realtime.app.forms import File, Form, parse_form
from realtime.errors import ClientError

URLENCODED = "application/x-www-form-urlencoded"
MULTIPART = "multipart/form-data; boundary=edge"


def part(disposition: bytes, content: bytes, headers: bytes = b"") -> bytes:
    return b"--edge\r\nContent-Disposition: %b\r\n%b\r\n%b\r\n" % (disposition, headers, content)


END = b"--edge--\r\n"


def test_a_urlencoded_form() -> None:
    form = parse_form(f"{URLENCODED}; charset=UTF-8", b"a=1&b=gr%C3%BCn+1&a=2&empty=", 4)
    assert form.all_fields == [("a", "1"), ("b", "gr\u00fcn 1"), ("a", "2"), ("empty", "")]
    assert (form.fields, form.files) == ({"a": "2", "b": "gr\u00fcn 1", "empty": ""}, {})
    assert parse_form(URLENCODED, b"", 1) == Form([])


def test_a_form_with_files_as_an_ordinary_client_sends_it() -> None:
    content = bytes(range(256)) * 300 + b"\r\n--"
    request = requests.Request(
        "POST",
        "http://x/",
        data=[("title", "gr\u00fcn"), ("tag", "a"), ("tag", "b")],
        files=[("page", ("a.bin", content, "image/png")), ("empty", ("b", b"", "text/plain"))],
    ).prepare()
    assert isinstance(request.body, bytes)
    form = parse_form(request.headers["Content-Type"], request.body, 5)
    assert form.all_fields == [("title", "gr\u00fcn"), ("tag", "a"), ("tag", "b")]
    assert form.files == {"page": File("a.bin", "image/png", content), "empty": File("b", "text/plain", b"")}


def test_names_of_parts_are_utf_8() -> None:
    disposition = 'form-data; name="gr\u00fcn"; filename="../\u20ac.txt"'.encode()
    assert parse_form(MULTIPART, part(disposition, b"x") + END, 1).files == {
        "gr\u00fcn": File("../\u20ac.txt", "", b"x")
    }


NAMED = part(b'form-data; name="a"', b"1")


@pytest.mark.parametrize(
    ("content_type", "body", "reason"),
    [
        ("", b"a=1", "no form"),
        ("application/json", b"{}", "no form"),
        ("multipart/form-data", NAMED + END, "no form"),
        (URLENCODED, b"a=1&b=2&c=3", "malformed: Max number of fields exceeded"),
        (URLENCODED, b"a=%ff", "not UTF-8"),
        (URLENCODED, b"a=\xff", "not UTF-8"),
        (MULTIPART, NAMED * 3 + END, "malformed: it has too many fields"),
        (MULTIPART, NAMED, "malformed: it has no end"),
        (MULTIPART, b"", "malformed: it has no end"),
        (MULTIPART, b"junk", "malformed"),
        (MULTIPART, part(b"form-data", b"1") + END, "malformed: a part has no name"),
        (MULTIPART, part(b'attachment; name="a"', b"1") + END, "malformed: a part has no name"),
        (MULTIPART, part(b'form-data; name="a"', b"\xff") + END, "not UTF-8"),
        (MULTIPART, part(b'form-data; name="a"', b"", b"X: y\r\n" * 100) + END, "malformed: Maximum header count"),
        (MULTIPART, part(b'form-data; name="a"', b"", b"X: %b\r\n" % (b"y" * 9999)) + END, "malformed: Maximum header"),
        (f"multipart/form-data; boundary={'x' * 300}", NAMED + END, "malformed: Boundary length"),
    ],
)
def test_a_body_that_is_refused(content_type: str, body: bytes, reason: str) -> None:
    with pytest.raises(ClientError, match=reason) as caught:
        parse_form(content_type, body, 2)
    assert caught.value.code == 400


class Order(msgspec.Struct):
    article: str
    number: Annotated[int, msgspec.Meta(ge=1)] = 1
    gift: bool = False


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"article=pen&number=3&gift=true", Order("pen", 3, True)),
        (b"article=7", Order("7")),
        (b"article=pen&number=x", "Expected `int`, got `str` - at `$.number`"),
        (b"number=3", "Object missing required field `article`"),
    ],
)
def test_fields_become_an_object(body: bytes, expected: Any) -> None:
    form = parse_form(URLENCODED, body, 10)
    if isinstance(expected, Order):
        assert form.convert(Order) == expected
    else:
        with pytest.raises(ClientError) as caught:
            form.convert(Order)
        assert (caught.value.code, caught.value.message) == (400, expected)
