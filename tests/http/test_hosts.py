"""The server's own names, against DNS rebinding."""

from __future__ import annotations

import pytest

from realtime.http.hosts import HostNames
from realtime.http.request import RequestHead


@pytest.mark.parametrize(
    ("host", "with_origin", "without"),
    [
        *((name, True, True) for name in ("localhost", "LOCALHOST:80", "a.localhost", "chat.example", "chat.example.")),
        *((name, True, True) for name in ("127.0.0.1", "192.0.2.1:80", "[::1]", "[2001:db8::1]:8000")),
        *((name, False, False) for name in ("evil.example", "chat.example.evil.example", "127.0.0.1.evil.example")),
        *((name, False, True) for name in ("intranet", "intranet:8000")),
    ],
)
def test_own_names(host: str, with_origin: bool, without: bool) -> None:
    names = HostNames(["Chat.example"])
    origin = ("origin", f"http://{host}")
    assert names.accept(RequestHead("GET", "/", "1.1", (("host", host), origin), 0)) is with_origin
    assert names.accept(RequestHead("GET", "/", "1.1", (("host", host),), 0)) is without
