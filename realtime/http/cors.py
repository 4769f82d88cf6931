"""Headers of the CORS protocol (Fetch standard), which let pages of other origins read a response.

The caller has checked the origin (`realtime.http.handshake.origin_policy`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from realtime.http.request import RequestHead

Headers = tuple[tuple[str, str], ...]

# Seconds for which a browser may cache the result of a preflight request.
MAX_AGE = 300
# A list of header names, as sent by browsers in Access-Control-Request-Headers.
_NAMES = re.compile(r"[-!#$%&'*+.^_`|~0-9A-Za-z, ]+")


def response_headers(head: RequestHead) -> Headers:
    """Return the CORS headers for the response to a request of an allowed origin; none without an Origin header."""
    origins = head.get_all("origin")
    if not origins:
        return ()
    return (
        ("Access-Control-Allow-Origin", origins[0]),
        ("Access-Control-Allow-Credentials", "true"),
        ("Vary", "Origin"),
    )


def preflight_headers(head: RequestHead, methods: Iterable[str]) -> Headers:
    """Return the headers for the response to a preflight request. methods: allowed ones besides OPTIONS."""
    headers = response_headers(head)
    requested = head.get_all("access-control-request-headers")
    if headers and requested and _NAMES.fullmatch(requested[0]):
        headers = (*headers, ("Access-Control-Allow-Headers", requested[0]))
    return (
        *headers,
        ("Access-Control-Allow-Methods", ", ".join((*methods, "OPTIONS"))),
        ("Access-Control-Max-Age", str(MAX_AGE)),
    )
