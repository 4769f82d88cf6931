"""HTTP requests whose responses are read as they come, on a connection of their own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

NETWORK_ERRORS = (OSError, asyncio.IncompleteReadError)

HEAD_LIMIT = 30.0  # seconds until a response begins
LINE_LIMIT = 1 << 22

# The headers that clients and proxies read. Clients of the same origin read only two of the access-control headers.
COMPARED = (
    "access-control", "cache-control", "location", "sec-websocket", "upgrade", "retry-after", "x-accel", "www-",
)  # fmt: skip
WITHOUT_ORIGIN = ("access-control-max-age", "access-control-allow-methods")
STREAM_TYPES = (["application/octet-stream"], ["text/plain; charset=utf-8"])


class Response:
    """The response to a request. No body is sent if `body` is None."""

    def __init__(self, port: int, method: str, path: str, headers: dict[str, str], body: bytes | None = None) -> None:
        self.status = 0
        self.headers: dict[str, list[str]] = {}
        self._port = port
        lines = {"Host": "127.0.0.1", **headers}
        if body is not None:
            lines.setdefault("Content-Length", str(len(body)))
        head = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in lines.items()), "", ""]
        self._request = "\r\n".join(head).encode() + (body or b"")
        self._has_origin = any(name.lower() == "origin" and value for name, value in headers.items())
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter | None = None

    async def start(self) -> Response:
        """Send the request and read the response's head. One of NETWORK_ERRORS: there is none."""
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port, limit=LINE_LIMIT)
        self._writer.write(self._request)
        head = await asyncio.wait_for(self._reader.readuntil(b"\r\n\r\n"), HEAD_LIMIT)
        status, *lines = head.decode("latin1").split("\r\n")
        self.status = int(status.split()[1])
        for line in filter(None, lines):
            name, _, value = line.partition(":")
            self.headers.setdefault(name.lower(), []).append(value.strip())
        return self

    def compared_headers(self) -> dict[str, list[str]]:
        """The headers that count."""
        if self.status == 403:
            return {}
        return {
            name: ["<stream>"] if name == "content-type" and values in STREAM_TYPES else values
            for name, values in self.headers.items()
            if self._is_compared(name)
        }

    def _is_compared(self, name: str) -> bool:
        if name == "content-type":
            return self.status == 200
        if name.startswith("access-control") and not self._has_origin:
            return name in WITHOUT_ORIGIN
        return name.startswith(COMPARED)

    async def chunks(self) -> AsyncIterator[bytes]:
        """The parts of the body, as they come."""
        if self.headers.get("transfer-encoding") == ["chunked"]:
            while size := int((await self._reader.readline()).strip() or b"0", 16):
                yield await self._reader.readexactly(size)
                await self._reader.readline()
        elif "content-length" in self.headers:
            if size := int(self.headers["content-length"][0]):
                yield await self._reader.readexactly(size)
        elif self.status not in (204, 304):
            while data := await self._reader.read(65536):
                yield data

    async def body(self, limit: float) -> bytes:
        """The whole body, or its part that came within `limit` seconds. Ends the connection."""
        data = bytearray()

        async def read() -> None:
            async for chunk in self.chunks():
                data.extend(chunk)

        try:
            await asyncio.wait_for(read(), limit)
        except (TimeoutError, asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.close()
        return bytes(data)

    def close(self) -> None:
        if self._writer:
            self._writer.close()
