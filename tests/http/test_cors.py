"""CORS headers of responses and preflight responses."""

from __future__ import annotations

import pytest

from realtime.http.cors import preflight_headers, response_headers
from realtime.http.request import RequestHead

PAGE = ("origin", "https://app.example")


def head(*fields: tuple[str, str]) -> RequestHead:
    return RequestHead("OPTIONS", "/emulation", "1.1", (("host", "h"), *fields), 0)


def test_a_request_without_origin_gets_no_cors_headers() -> None:
    assert response_headers(head()) == ()


def test_a_request_with_origin_gets_cors_headers_with_credentials() -> None:
    assert dict(response_headers(head(PAGE))) == {
        "Access-Control-Allow-Origin": "https://app.example",
        "Access-Control-Allow-Credentials": "true",
        "Vary": "Origin",
    }


def test_preflight_allows_the_requested_headers() -> None:
    headers = dict(
        preflight_headers(head(PAGE, ("access-control-request-headers", "content-type, x-mine")), ("GET", "POST"))
    )
    assert headers["Access-Control-Allow-Headers"] == "content-type, x-mine"
    assert headers["Access-Control-Allow-Methods"] == "GET, POST, OPTIONS"
    assert headers["Access-Control-Max-Age"] == "300"
    assert headers["Access-Control-Allow-Origin"] == "https://app.example"


@pytest.mark.parametrize("requested", ["", "a; b", "a\tb", "é", '"a"'])
def test_preflight_ignores_malformed_requested_headers(requested: str) -> None:
    headers = dict(preflight_headers(head(PAGE, ("access-control-request-headers", requested)), ("POST",)))
    assert "Access-Control-Allow-Headers" not in headers


def test_preflight_echoes_nothing_without_an_origin() -> None:
    headers = dict(preflight_headers(head(("access-control-request-headers", "x")), ("POST",)))
    assert set(headers) == {"Access-Control-Allow-Methods", "Access-Control-Max-Age"}
