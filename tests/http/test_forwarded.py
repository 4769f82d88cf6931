"""The client's address behind trusted and untrusted proxies."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realtime.http.forwarded import TrustedProxies

TRUSTED = ("10.0.0.0/8", "192.0.2.7", "2001:db8::/32")


@pytest.mark.parametrize(
    ("peer", "forwarded", "client"),
    [
        # The header of an untrusted peer is ignored.
        ("203.0.113.5", ["1.1.1.1"], "203.0.113.5"),
        ("203.0.113.5", ["10.0.0.1"], "203.0.113.5"),
        ("203.0.113.5", [], "203.0.113.5"),
        # The header of a trusted proxy is used.
        ("10.0.0.1", ["1.1.1.1"], "1.1.1.1"),
        ("192.0.2.7", [" 1.1.1.1 "], "1.1.1.1"),
        ("192.0.2.8", ["1.1.1.1"], "192.0.2.8"),
        ("2001:db8::1", ["2606:4700::1"], "2606:4700::1"),
        ("::ffff:10.0.0.1", ["1.1.1.1"], "1.1.1.1"),
        # Addresses that the client itself has put before are ignored.
        ("10.0.0.1", ["9.9.9.9, 1.1.1.1"], "1.1.1.1"),
        ("10.0.0.1", ["9.9.9.9", "1.1.1.1"], "1.1.1.1"),
        ("10.0.0.1", ["10.9.9.9, 1.1.1.1"], "1.1.1.1"),
        # Several proxies.
        ("10.0.0.1", ["9.9.9.9, 1.1.1.1, 10.0.0.3, 192.0.2.7"], "1.1.1.1"),
        ("10.0.0.1", ["10.0.0.2, 10.0.0.3"], "10.0.0.2"),
        # With a port.
        ("10.0.0.1", ["1.1.1.1:4711"], "1.1.1.1"),
        ("10.0.0.1", ["[2606:4700::1]:4711"], "2606:4700::1"),
        # An invalid address ends the search: no trusted proxy writes one.
        ("10.0.0.1", ["1.1.1.1, unknown"], "10.0.0.1"),
        ("10.0.0.1", ["1.1.1.1, unknown, 10.0.0.2"], "10.0.0.2"),
        ("10.0.0.1", [""], "10.0.0.1"),
        ("10.0.0.1", ["1.1.1.1,"], "10.0.0.1"),
        ("10.0.0.1", ["1.1.1.256"], "10.0.0.1"),
        ("not an address", ["1.1.1.1"], "not an address"),
    ],
)
def test_the_rightmost_address_that_is_not_a_trusted_proxy(peer: str, forwarded: list[str], client: str) -> None:
    assert TrustedProxies(TRUSTED).client_address(peer, forwarded) == client


def test_no_proxy_is_trusted_by_default() -> None:
    assert TrustedProxies(()).client_address("10.0.0.1", ["1.1.1.1"]) == "10.0.0.1"


@given(st.lists(st.text(max_size=40), max_size=5))
def test_any_header_yields_an_address(forwarded: list[str]) -> None:
    assert TrustedProxies(TRUSTED).client_address("10.0.0.1", forwarded)


def test_an_ipv4_peer_of_a_dual_stack_socket() -> None:
    # Faults 12.5.
    assert TrustedProxies(()).client_address("::ffff:192.0.2.1", []) == "192.0.2.1"
    assert TrustedProxies(()).client_address("2001:db8::1", []) == "2001:db8::1"
