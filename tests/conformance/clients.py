"""The clients of a conversation: each is one connection, over one of the transports, and the events that came on it.

Events are lists: ["message", reply or push], ["open", subprotocol], ["status", status, headers] of a stream, ["closed",
code, reason] of a WebSocket, ["end"] of a stream, ["emulation", status], ["refused", status], ["ended before"], and
others for bytes that can't be read.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from abc import ABC, abstractmethod
from typing import Any
from urllib.parse import urlencode

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException

from tests.conformance.corpus import Event, Step
from tests.conformance.memory import Memory
from tests.conformance.messages import read_message, read_varint, sized, without_bytes, write_message
from tests.conformance.responses import NETWORK_ERRORS, Response

TRANSPORTS = ("websocket", "http_stream", "sse", "uni_websocket", "uni_sse", "uni_http_stream")
ENCODED = "_protobuf"  # the end of a transport's name whose messages are Protobuf

OPEN_LIMIT = 30.0  # seconds
CLOSE_LIMIT = 2.0
EMULATION_LIMIT = 10.0
TOO_DEEP = 100  # arrays in arrays: Python's reader of JSON may give up, and the text is of no interest


class Client(ABC):
    """The part of a client that all transports share: commands become bytes, and bytes become messages."""

    def __init__(self, memory: Memory, port: int, step: Step) -> None:
        transport = step["transport"]
        self.name: str = step["open"]
        self.events: list[Event] = []
        self._memory = memory
        self._port = port
        self._step = step
        self._protobuf = transport.endswith(ENCODED)
        self._transport = transport.removesuffix(ENCODED)
        self._unidirectional = transport.startswith("uni_")
        self._path: str = step.get("path") or f"/connection/{self._transport}"
        self._headers: dict[str, str] = memory.fill(step.get("headers") or {})
        self._ended = False
        self._closed_here = False
        self._reading: asyncio.Task[None] | None = None
        self._pongs: set[asyncio.Task[None]] = set()

    @abstractmethod
    async def open(self) -> None:
        """Connect, and read from then on."""

    @abstractmethod
    async def _transmit(self, data: bytes, frame: str | None) -> Any:
        """Bring bytes to the server. Returns the status if that took a request of its own, or None."""

    @abstractmethod
    async def _read(self) -> None:
        """Read to the end of the connection."""

    @abstractmethod
    async def _disconnect(self) -> None: ...

    async def send(self, commands: Any, frame: str | None = None) -> None:
        """Send commands in one message. frame: "binary" or "text" if it is not the transport's own."""
        if self._ended:
            self._encoded(commands)
            self._event("ended before")
        elif (status := await self._transmit(self._encoded(commands), frame)) is not None:
            self._event("emulation", status)

    async def close(self) -> None:
        self._closed_here = self._ended = True
        await self._disconnect()
        tasks = [task for task in (self._reading, *self._pongs) if task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _event(self, *event: Any) -> None:
        if not self._closed_here:
            self.events.append(list(event))
            self._memory.changed.set()

    def _end(self, *event: Any) -> None:
        self._ended = True
        self._event(*event)

    def _start_reading(self) -> None:
        self._reading = asyncio.create_task(self._read_all())

    async def _read_all(self) -> None:
        try:
            await self._read()
        except Exception as error:  # a mistake of the player must not look like silence
            self._end("reading failed", repr(error))

    # Commands to bytes

    def _encoded(self, commands: Any) -> bytes:
        """The bytes of a list of commands, or of a text or bytes that are sent as they are."""
        filled = self._memory.fill(commands)
        if isinstance(filled, bytes):
            return filled
        if isinstance(filled, str):
            return filled.encode("utf-8", "surrogatepass")
        if self._unidirectional:
            return json.dumps(filled).encode()
        for command in filled:
            self._memory.ask(self.name, command)
        if self._protobuf:
            return b"".join(sized(write_message("Command", command)) for command in filled)
        lines = (json.dumps(command, separators=(",", ":")) for command in filled)
        return "\n".join(lines).encode("utf-8", "surrogatepass")

    # Bytes to messages

    def _read_json(self, line: str) -> None:
        if line.count("[[") >= TOO_DEEP:
            self._message({"$deep": len(line)})
            return
        try:
            message = json.loads(line)
        except ValueError:
            self._event("not JSON", line)
        else:
            self._message(message)

    def _read_protobuf(self, data: bytes) -> bytes:
        """Read the messages in `data`, each behind its length; return the incomplete rest."""
        while data:
            try:
                size, start = read_varint(data, 0)
            except IndexError:
                break
            if start + size > len(data):
                break
            try:
                message = read_message("Reply", data[start : start + size])
            except (IndexError, ValueError, AttributeError) as error:
                self._event("not Protobuf", repr(error), data.hex())
            else:
                self._message(message)
            data = data[start + size :]
        return data

    def _message(self, message: Any) -> None:
        if message == {}:
            self._answer_ping()
            return
        if isinstance(message, dict):
            self._memory.learn(self.name, message, self._unidirectional)
        self._event("message", without_bytes(message))

    def _answer_ping(self) -> None:
        if self._step.get("answer_pings", True) and not self._unidirectional and not self._ended:
            pong = asyncio.create_task(self._pong())
            self._pongs.add(pong)
            pong.add_done_callback(self._pongs.discard)

    async def _pong(self) -> None:
        await self._transmit(self._encoded([{}]), None)


class WebSocketClient(Client):
    """Over a WebSocket. Each frame may hold several messages."""

    _websocket: ClientConnection | None = None

    async def open(self) -> None:
        query = {
            name: value if isinstance(value, str) else json.dumps(self._memory.fill(value))
            for name, value in (self._step.get("query") or {}).items()
        }
        address = f"ws://127.0.0.1:{self._port}{self._path}" + (f"?{urlencode(query)}" if query else "")
        own = ["centrifuge-protobuf"] if self._protobuf else None
        try:
            self._websocket = await connect(
                address,
                subprotocols=self._step.get("subprotocols", own),
                additional_headers=self._headers,
                user_agent_header=None,
                compression=None,
                ping_interval=None,
                max_size=None,
                proxy=None,
                open_timeout=OPEN_LIMIT,
            )
        except InvalidStatus as error:
            self._end("refused", error.response.status_code)
        except (*NETWORK_ERRORS, WebSocketException) as error:
            self._end("refused", type(error).__name__)
        else:
            self._event("open", self._websocket.subprotocol)
            self._start_reading()

    async def _transmit(self, data: bytes, frame: str | None) -> None:
        assert self._websocket
        binary = frame == "binary" if frame else self._protobuf
        with contextlib.suppress(ConnectionClosed, UnicodeError):
            await self._websocket.send(data if binary else data.decode("utf-8", "surrogatepass"))

    async def _read(self) -> None:
        assert self._websocket
        with contextlib.suppress(ConnectionClosed):
            async for frame in self._websocket:
                self._read_frame(frame)
        self._end("closed", self._websocket.close_code, self._websocket.close_reason)

    def _read_frame(self, frame: str | bytes) -> None:
        if isinstance(frame, str) is self._protobuf:
            self._event("frame of the wrong type", frame if isinstance(frame, str) else frame.hex())
        elif isinstance(frame, str):
            for line in frame.split("\n"):
                self._read_json(line)
        elif rest := self._read_protobuf(frame):
            self._event("incomplete message", rest.hex())

    async def _disconnect(self) -> None:
        if self._websocket:
            with contextlib.suppress(*NETWORK_ERRORS, WebSocketException):
                await asyncio.wait_for(self._websocket.close(), CLOSE_LIMIT)


class StreamClient(Client):
    """Over the response to an HTTP request. Later commands go in requests to /emulation."""

    _stream: Response

    async def open(self) -> None:
        own_method = "GET" if self._transport.endswith("sse") else "POST"
        method, path, headers = self._step.get("method") or own_method, self._path, dict(self._headers)
        first = self._step.get("first")
        carried = None if first is None else self._encoded(first)
        body = None
        if method == "GET":
            if carried is not None:
                path += "?" + urlencode({"cf_connect": carried.decode("utf-8", "surrogateescape")})
        else:
            body = carried or b""
            headers.setdefault("Content-Type", f"application/{'octet-stream' if self._protobuf else 'json'}")
        self._stream = Response(self._port, method, path, headers, body)
        try:
            await self._stream.start()
        except NETWORK_ERRORS as error:
            self._end("refused", type(error).__name__)
        else:
            self._event("status", self._stream.status, self._stream.compared_headers())
            self._start_reading()

    async def _transmit(self, data: bytes, frame: str | None) -> Any:
        session, node = self._memory.sessions.get(self.name, ("none", "none"))
        if self._protobuf:
            kind = "application/octet-stream"
            body = write_message("EmulationRequest", {"node": node or "", "session": session or "", "data": data})
        else:
            kind = "application/json"
            text = data.decode("utf-8", "surrogatepass")
            body = json.dumps({"session": session, "node": node, "data": text}).encode()
        try:
            response = await Response(self._port, "POST", "/emulation", {"Content-Type": kind}, body).start()
            await response.body(EMULATION_LIMIT)
        except NETWORK_ERRORS as error:
            return type(error).__name__
        return response.status

    async def _read(self) -> None:
        rest = b""
        try:
            if self._stream.status == 200:
                async for chunk in self._stream.chunks():
                    rest = self._read_chunk(rest + chunk)
            else:
                await self._stream.body(EMULATION_LIMIT)
            if rest.strip():
                self._event("incomplete message", rest.decode("latin1"))
        except (asyncio.IncompleteReadError, ConnectionError):
            self._event("cut")
        self._end("end")

    def _read_chunk(self, data: bytes) -> bytes:
        """Read the messages in the bytes of a stream; return the incomplete rest."""
        if self._protobuf:
            return self._read_protobuf(data)
        if self._transport.endswith("sse"):
            *events, rest = data.removeprefix(b"\r\n").removeprefix(b"\n").split(b"\n\n")
            for line in (line for event in events for line in event.split(b"\n")):
                if line.startswith(b"data:"):
                    self._read_json(line.removeprefix(b"data:").decode("utf-8", "replace"))
                elif line:
                    self._event("line", line.decode("latin1"))
            return rest
        *lines, rest = data.split(b"\n")
        for line in filter(bytes.strip, lines):
            self._read_json(line.decode("utf-8", "replace"))
        return rest

    async def _disconnect(self) -> None:
        self._stream.close()


def client_of(memory: Memory, port: int, step: Step) -> Client:
    """The client that a step opens."""
    kind = WebSocketClient if step["transport"].removesuffix(ENCODED).endswith("websocket") else StreamClient
    return kind(memory, port, step)
