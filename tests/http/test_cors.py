"""Which headers let a page read a response."""

from __future__ import annotations

import pytest

from realtime.http.cors import preflight, sharing
from realtime.http.request import RequestHead

PAGE = ("origin", "https://app.example")


def head(*fields: tuple[str, str]) -> RequestHead:
    return RequestHead("OPTIONS", "/emulation", "1.1", (("host", "h"), *fields), 0)


def test_a_request_of_no_page_is_not_shared() -> None:
    assert sharing(head()) == ()


def test_the_page_of_an_origin_may_read_the_response_with_its_cookies() -> None:
    assert dict(sharing(head(PAGE))) == {
        "Access-Control-Allow-Origin": "https://app.example",
        "Access-Control-Allow-Credentials": "true",
        "Vary": "Origin",
    }


def test_the_headers_that_a_page_wants_to_send_are_allowed() -> None:
    answer = dict(preflight(head(PAGE, ("access-control-request-headers", "content-type, x-mine")), ("GET", "POST")))
    assert answer["Access-Control-Allow-Headers"] == "content-type, x-mine"
    assert answer["Access-Control-Allow-Methods"] == "GET, POST, OPTIONS"
    assert answer["Access-Control-Max-Age"] == "300"
    assert answer["Access-Control-Allow-Origin"] == "https://app.example"


@pytest.mark.parametrize("wanted", ["", "a; b", "a\tb", "é", '"a"'])
def test_what_is_no_list_of_names_is_not_sent_back(wanted: str) -> None:
    answer = dict(preflight(head(PAGE, ("access-control-request-headers", wanted)), ("POST",)))
    assert "Access-Control-Allow-Headers" not in answer


def test_nothing_is_echoed_without_an_origin() -> None:
    answer = dict(preflight(head(("access-control-request-headers", "x")), ("POST",)))
    assert set(answer) == {"Access-Control-Allow-Methods", "Access-Control-Max-Age"}
