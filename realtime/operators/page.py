"""The files of the live page, and the policy under which a browser shows it.

Names on the page come from applications and their clients. The page shows them as text; should that ever fail, the
policy lets the browser run only the page's own script and fetch only from this port.
"""

from __future__ import annotations

from importlib.resources import files

_FOLDER = files("realtime").joinpath("web")
_NAMES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/live.js": ("live.js", "text/javascript; charset=utf-8"),
    "/live.css": ("live.css", "text/css; charset=utf-8"),
}

HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


def load() -> dict[bytes, tuple[str, bytes]]:
    """Content type and content by path. Raises OSError when the installation lacks a file."""
    return {path.encode(): (kind, _FOLDER.joinpath(name).read_bytes()) for path, (name, kind) in _NAMES.items()}
