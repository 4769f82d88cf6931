"""Cookies: those that a request has, and those that a response sets."""

from __future__ import annotations

from typing import Any

import pytest

from realtime.app.cookies import Cookie, parse_cookies


@pytest.mark.parametrize(
    ("header", "cookies"),
    [
        ("", {}),
        ("a=1; b=2", {"a": "1", "b": "2"}),
        ('a="1";b= 2 ;c=', {"a": "1", "b": "2", "c": ""}),
        ("a=1=2; a=3", {"a": "1=2"}),
        # One that is broken takes no other one along.
        ("; b ; =x; a b=1; [x]=1; c=3", {"c": "3"}),
        ('a="; b={"x":1}', {"a": '"', "b": '{"x":1}'}),
        ("a=%20; $Version=1", {"a": "%20", "$Version": "1"}),
    ],
)
def test_cookies_of_a_request(header: str, cookies: dict[str, str]) -> None:
    assert parse_cookies(header) == cookies


@pytest.mark.parametrize(
    ("cookie", "value"),
    [
        (Cookie("id", "x"), "id=x; Path=/; HttpOnly; SameSite=Lax"),
        (Cookie("id", "", max_age=0), "id=; Path=/; Max-Age=0; HttpOnly; SameSite=Lax"),
        (
            Cookie("id", "x", 60, "/a", "example.com", True, False, "None"),
            "id=x; Path=/a; Domain=example.com; Max-Age=60; Secure; SameSite=None",
        ),
        (Cookie("__Host-id", "x", secure=True), "__Host-id=x; Path=/; Secure; HttpOnly; SameSite=Lax"),
    ],
)
def test_the_header_of_a_cookie(cookie: Cookie, value: str) -> None:
    assert cookie.header() == ("Set-Cookie", value)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"name": "a b"}, "no name of a cookie"),
        ({"name": ""}, "no name of a cookie"),
        ({"value": "a; Domain=evil.example"}, "encode it"),
        ({"value": "a\r\nX: y"}, "encode it"),
        ({"value": "gr\u00fcn"}, "encode it"),
        ({"path": "/; Secure"}, "the path"),
        ({"domain": "a\nb"}, "the domain"),
        ({"same_site": "none"}, "use"),
        ({"same_site": "None"}, "secure=True"),
        ({"name": "__Secure-id"}, "secure=True"),
        ({"name": "__Host-id", "secure": True, "path": "/a"}, "path other than"),
    ],
)
def test_a_cookie_that_a_browser_would_not_take_is_refused(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Cookie(**{"name": "id", "value": "x", **fields})
