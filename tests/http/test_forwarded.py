"""Who is believed about a client's address."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realtime.http.forwarded import TrustedProxies

TRUSTED = ("10.0.0.0/8", "192.0.2.7", "2001:db8::/32")


@pytest.mark.parametrize(
    ("peer", "forwarded", "client"),
    [
        # A stranger says what it likes.
        ("203.0.113.5", ["1.1.1.1"], "203.0.113.5"),
        ("203.0.113.5", ["10.0.0.1"], "203.0.113.5"),
        ("203.0.113.5", [], "203.0.113.5"),
        # A proxy is believed.
        ("10.0.0.1", ["1.1.1.1"], "1.1.1.1"),
        ("192.0.2.7", [" 1.1.1.1 "], "1.1.1.1"),
        ("192.0.2.8", ["1.1.1.1"], "192.0.2.8"),
        ("2001:db8::1", ["2606:4700::1"], "2606:4700::1"),
        ("::ffff:10.0.0.1", ["1.1.1.1"], "1.1.1.1"),
        # What the client has put before that is not.
        ("10.0.0.1", ["9.9.9.9, 1.1.1.1"], "1.1.1.1"),
        ("10.0.0.1", ["9.9.9.9", "1.1.1.1"], "1.1.1.1"),
        ("10.0.0.1", ["10.9.9.9, 1.1.1.1"], "1.1.1.1"),
        # Several proxies.
        ("10.0.0.1", ["9.9.9.9, 1.1.1.1, 10.0.0.3, 192.0.2.7"], "1.1.1.1"),
        ("10.0.0.1", ["10.0.0.2, 10.0.0.3"], "10.0.0.2"),
        # With a port.
        ("10.0.0.1", ["1.1.1.1:4711"], "1.1.1.1"),
        ("10.0.0.1", ["[2606:4700::1]:4711"], "2606:4700::1"),
        # No address: nobody we trust can have passed it on.
        ("10.0.0.1", ["1.1.1.1, unknown"], "10.0.0.1"),
        ("10.0.0.1", ["1.1.1.1, unknown, 10.0.0.2"], "10.0.0.2"),
        ("10.0.0.1", [""], "10.0.0.1"),
        ("10.0.0.1", ["1.1.1.1,"], "10.0.0.1"),
        ("10.0.0.1", ["1.1.1.256"], "10.0.0.1"),
        ("not an address", ["1.1.1.1"], "not an address"),
    ],
)
def test_the_rightmost_address_that_is_not_a_trusted_proxy(peer: str, forwarded: list[str], client: str) -> None:
    assert TrustedProxies(TRUSTED).client(peer, forwarded) == client


def test_nobody_is_trusted_by_default() -> None:
    assert TrustedProxies(()).client("10.0.0.1", ["1.1.1.1"]) == "10.0.0.1"


@given(st.lists(st.text(max_size=40), max_size=5))
def test_any_header_leads_to_an_address(forwarded: list[str]) -> None:
    assert TrustedProxies(TRUSTED).client("10.0.0.1", forwarded)
