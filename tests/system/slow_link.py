"""A slow link: a TCP relay on loopback that passes on a server's bytes at a fixed rate, and a client's at once.

Its sockets have small buffers, so that the server meets the slowness as on a real network: the kernel would otherwise
take megabytes at once on loopback.
"""

from __future__ import annotations

import socket
import threading
import time
from contextlib import ExitStack, closing, suppress
from types import TracebackType

BUFFER = 16 * 1024
PIECE = 2048


class SlowLink:
    """See the module. port: for clients. Use it as a context manager, which ends all connections and threads."""

    def __init__(self, server_port: int, rate: float) -> None:
        """rate: bytes per second."""
        self._server_port = server_port
        self._rate = rate
        self._threads: list[threading.Thread] = []
        self._sockets: list[socket.socket] = []
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)  # accepted sockets inherit it
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen()
        self.port: int = self._listener.getsockname()[1]

    def __enter__(self) -> SlowLink:
        self._start(self._accept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end(self._listener)
        for connection in list(self._sockets):
            self._end(connection)
        for thread in self._threads:
            thread.join()

    def _start(self, target: object, *arguments: socket.socket) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _end(self, connection: socket.socket) -> None:
        """Wake the threads that use it."""
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with closing(self._listener), suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.socket()
                server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
                server.connect(("127.0.0.1", self._server_port))
                self._sockets += [client, server]
                self._start(self._serve, client, server)

    def _serve(self, client: socket.socket, server: socket.socket) -> None:
        with ExitStack() as stack:
            stack.enter_context(closing(client))
            stack.enter_context(closing(server))
            up = threading.Thread(target=self._pass_on, args=(client, server), daemon=True)
            up.start()
            self._pass_on_slowly(server, client)
            up.join()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(PIECE):
                target.sendall(data)
        self._end(source)
        self._end(target)

    def _pass_on_slowly(self, source: socket.socket, target: socket.socket) -> None:
        due = time.monotonic()
        with suppress(OSError):
            while data := source.recv(PIECE):
                # A thread that the machine wakes late makes up for it, as the link would not have been late.
                due = max(due, time.monotonic() - 1.0) + len(data) / self._rate
                time.sleep(max(due - time.monotonic(), 0.0))
                target.sendall(data)
        self._end(source)
        self._end(target)
