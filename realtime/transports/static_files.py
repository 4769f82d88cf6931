"""Files of the application's static directories, served by twisted.web's `File`."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

from twisted.web.server import NOT_DONE_YET
from twisted.web.static import File, getTypeAndEncoding

from realtime.app import Static
from realtime.handlers.results import PreparedResponse
from realtime.transports.http_server import HTTPRequest

# The syntax that browsers use for the headers of partial and conditional requests. Headers with another syntax may be
# ignored (RFC 9110 sections 13.1.3 and 14.2). They are removed, because twisted.web would log their value, raise an
# exception, or send a thousand parts for one request.
_RANGE = re.compile(r"bytes=(?:([0-9]{1,15})-([0-9]{0,15})|-0*[1-9][0-9]{0,14})")
_HTTP_DATE = re.compile(r"[A-Z][a-z]{2}, [0-9]{2} [A-Z][a-z]{2} [0-9]{4} [0-9]{2}:[0-9]{2}:[0-9]{2} GMT")


def locate(static: Static, path: str) -> Path | None:
    """Return the file for a URL path below the prefix of `static`; None if there is none.

    No spelling of a path and no symbolic link leads outside the directory, and hidden files are never returned.
    """
    try:
        *folders, name = [unquote(part, errors="strict") for part in path.split("/")]
    except UnicodeDecodeError:
        return None
    parts = [*folders, name or "index.html"]
    if any(not part or part.startswith(".") or any(character in part for character in "/\\\0") for part in parts):
        return None
    try:
        file = static.directory.joinpath(*parts).resolve(strict=True)
    except OSError:
        return None
    return file if file.is_file() and file.is_relative_to(static.directory) else None


def serve_file(file: Path, request: HTTPRequest) -> None:
    """Send a file, or the requested range of it. The peer may cache it, but must revalidate it for each use."""
    headers = request.requestHeaders
    for name, is_common in (("Range", _is_range), ("If-Modified-Since", _is_http_date)):
        values = headers.getRawHeaders(name.encode(), [])
        if len(values) > 1 or not all(is_common(value.decode("latin-1")) for value in values):
            headers.removeHeader(name)
    resource = File(str(file))
    content_type, resource.encoding = getTypeAndEncoding(
        file.name, File.contentTypes, File.contentEncodings, "application/octet-stream"
    )
    resource.type = f"{content_type}; charset=utf-8" if content_type.startswith("text/") else content_type
    for name, value in PreparedResponse(200, headers=(("Cache-Control", "no-cache"),)).all_headers():
        if name != "Content-Length":
            request.setHeader(name, value)
    body = resource.render_GET(request)
    if body is not NOT_DONE_YET:
        request.write(body)
        request.finish()


def _is_range(text: str) -> bool:
    match = _RANGE.fullmatch(text)
    return match is not None and int(match[1] or 0) <= int(match[2] or 10**15)


def _is_http_date(text: str) -> bool:
    return _HTTP_DATE.fullmatch(text) is not None
