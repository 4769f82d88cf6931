"""What lets the pages of other origins read our responses: the headers of the Fetch standard's CORS protocol.

Which origins that is, is judged before (`realtime.http.handshake.origin_policy`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from realtime.http.request import RequestHead

Headers = tuple[tuple[str, str], ...]

# Seconds for which a browser need not ask again.
MAX_AGE = 300
# Names of headers, as a browser lists them.
_NAMES = re.compile(r"[-!#$%&'*+.^_`|~0-9A-Za-z, ]+")


def sharing(head: RequestHead) -> Headers:
    """For the response to a request of an allowed origin; nothing when a page had no part in it."""
    origins = head.all("origin")
    if not origins:
        return ()
    return (
        ("Access-Control-Allow-Origin", origins[0]),
        ("Access-Control-Allow-Credentials", "true"),
        ("Vary", "Origin"),
    )


def preflight(head: RequestHead, methods: Iterable[str]) -> Headers:
    """For the answer to what a browser asks before the page's own request."""
    headers = sharing(head)
    wanted = head.all("access-control-request-headers")
    if headers and wanted and _NAMES.fullmatch(wanted[0]):
        headers = (*headers, ("Access-Control-Allow-Headers", wanted[0]))
    return (
        *headers,
        ("Access-Control-Allow-Methods", ", ".join((*methods, "OPTIONS"))),
        ("Access-Control-Max-Age", str(MAX_AGE)),
    )
