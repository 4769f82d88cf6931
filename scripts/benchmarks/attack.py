"""Attack a server with default limits, and measure the effect on other clients.

The benchmark measures round trips (an RPC echo over WebSocket) on existing connections, and new connections, each from
its SYN to the reply to its connect command: first without an attack, then during each attack. The attackers are a
process of their own, of a lower priority, and need no credentials. All processes share the machine, and an attack keeps
the workers busy: on few cores, the figures include waits for a core. Compare with the figures without attack.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import resource
import selectors
import socket
import time
import zlib
from contextlib import suppress
from dataclasses import dataclass

from blocked import PACE, Echoes, Measured, Newcomers, show
from crowd import HANDSHAKE, Clients, Peer, Sample
from served import HERE, Served
from tables import Verdict, print_verdicts

EXISTING = 20
# Seconds between two situations, in which the workers recover.
REST = 2.0
# Seconds after which an attacker's connection without an answer makes room for its next one.
IMPATIENCE = 2.0

CONFIG = """
[http_server]
address = "127.0.0.1"
port = 0
internal_port = 0
[workers]
count = 2
[websocket]
compression = {compression}
[app]
module = "blocked_app:app"
path = "{folder}"
"""
PROTOBUF_HANDSHAKE = HANDSHAKE.removesuffix(b"\r\n") + b"Sec-WebSocket-Protocol: centrifuge-protobuf\r\n\r\n"
COMPRESSED_HANDSHAKE = HANDSHAKE.removesuffix(b"\r\n") + b"Sec-WebSocket-Extensions: permessage-deflate\r\n\r\n"


def long_frame(payload: bytes, first_byte: int) -> bytes:
    """Build a client frame of up to 64 KiB. Its mask of zeros leaves the payload unchanged."""
    return bytes((first_byte, 0xFE)) + len(payload).to_bytes(2, "big") + bytes(4) + payload


def deflated(payload: bytes) -> bytes:
    deflater = zlib.compressobj(9, zlib.DEFLATED, -15)
    return (deflater.compress(payload) + deflater.flush(zlib.Z_SYNC_FLUSH)).removesuffix(b"\0\0\xff\xff")


@dataclass(frozen=True)
class Attack:
    """connections: open at the same time. opening: their handshake, or b"". payload: what each sends once."""

    name: str
    connections: int
    opening: bytes
    payload: bytes
    compression: bool = False


REQUEST = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
# A Protobuf command of 59,977 bytes: its length, an id, an unsubscribe, and unknown fields.
FIELDS = b"\xc9\xd4\x03" + b"\x08\x02\x32\x03\x0a\x01a" + b"\x80\x01\x01" * 19_990
ATTACKS = (
    Attack("64 KiB of pipelined requests", 60, b"", REQUEST * (65536 // len(REQUEST))),
    Attack(
        "60 KB of unknown Protobuf fields",
        300,
        PROTOBUF_HANDSHAKE,
        long_frame(FIELDS, 0x82),
    ),
    Attack("60 KB of empty Protobuf commands", 300, PROTOBUF_HANDSHAKE, long_frame(bytes(60_000), 0x82)),
    Attack(
        "compressed bombs of empty commands",
        60,
        COMPRESSED_HANDSHAKE,
        long_frame(deflated(b"{}\n" * 218_000), 0xC1),
        compression=True,
    ),
)


class Attacker:
    """One connection at a time: it sends its payload, reads until the server closes or is silent, and comes again."""

    def __init__(self, attack: Attack, port: int, selector: selectors.BaseSelector) -> None:
        self._attack = attack
        self._port = port
        self._selector = selector
        self.sent = 0
        self._open()

    def _open(self) -> None:
        self._socket = socket.socket()
        self._socket.setblocking(False)
        self._socket.connect_ex(("127.0.0.1", self._port))
        self._unsent = self._attack.opening or self._attack.payload
        self._is_open = not self._attack.opening
        self.active = time.monotonic()
        self._selector.register(self._socket, selectors.EVENT_READ | selectors.EVENT_WRITE, self)

    def again(self) -> None:
        """Replace the connection by a new one."""
        self._selector.unregister(self._socket)
        self._socket.close()
        self._open()

    def ready(self, events: int) -> None:
        self.active = time.monotonic()
        try:
            if events & selectors.EVENT_WRITE:
                self._write()
            if events & selectors.EVENT_READ:
                self._read()
        except BlockingIOError:
            pass
        except OSError:
            self.again()

    def _write(self) -> None:
        self._unsent = self._unsent[self._socket.send(self._unsent) :]
        if not self._unsent:
            self.sent += self._is_open
            self._selector.modify(self._socket, selectors.EVENT_READ, self)

    def _read(self) -> None:
        if not self._socket.recv(1 << 20):
            self.again()
        elif not self._is_open:
            self._is_open, self._unsent = True, self._attack.payload
            self._selector.modify(self._socket, selectors.EVENT_READ | selectors.EVENT_WRITE, self)


def attack_for(attack: Attack, port: int, seconds: float) -> None:
    """Attack from this process, and print how many payloads were sent."""
    # Attackers have machines of their own: here they shall not take time from the measured processes.
    os.nice(19)
    selector = selectors.DefaultSelector()
    attackers = [Attacker(attack, port, selector) for _ in range(attack.connections)]
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for key, events in selector.select(0.05):
            key.data.ready(events)
        silent = time.monotonic() - IMPATIENCE
        for attacker in attackers:
            if attacker.active < silent:
                attacker.again()
    print(f"    {sum(attacker.sent for attacker in attackers):,} payloads of {len(attack.payload):,} bytes were sent")


class Scene:
    """One server with clients."""

    def __init__(self, server: Served, seconds: float, newcomers: int) -> None:
        self._clients = Clients(server.port)
        self._server = server
        self._seconds = seconds
        self._newcomers = newcomers
        peers: list[Peer] = []
        for number in range(1, EXISTING + 1):
            Peer(self._clients, peers.append)
            self._clients.run(lambda number=number: len(peers) == number)  # type: ignore[misc]
        self._echoes = [Echoes(self._clients, peer) for peer in peers]
        begin = time.perf_counter()
        for number, echoes in enumerate(self._echoes):
            self._clients.at(begin + number * PACE / EXISTING, echoes.send)
        self._workers = {worker.pid for worker in server.workers()}

    def measure(self, attack: Attack | None) -> Measured:
        """Measure one period, under an attack or without one."""
        measured = Measured()
        for echoes in self._echoes:
            echoes.sample = measured.existing
        process = multiprocessing.get_context("fork").Process(
            target=attack_for, args=(attack, self._server.port, self._seconds)
        )
        if attack is not None:
            process.start()
        new = Newcomers(self._clients, int(self._newcomers * self._seconds), self._seconds, measured.new)
        self._run_for(self._seconds)
        for echoes in self._echoes:
            echoes.sample = Sample()
        self._clients.run(lambda: new.over)
        if attack is not None:
            process.join()
        self._run_for(REST)
        return measured

    def dead(self) -> int:
        """Return the number of workers that have died since the last call."""
        now = {worker.pid for worker in self._server.workers()}
        dead, self._workers = len(self._workers - now), now
        return dead

    def _run_for(self, seconds: float) -> None:
        until = time.perf_counter() + seconds
        self._clients.run(lambda: time.perf_counter() >= until)


def main(arguments: list[str]) -> int:
    print_verdicts(measure(arguments))
    return 0


def measure(arguments: list[str]) -> list[Verdict]:
    """Measure and print each situation; return the verdicts on the targets."""
    options = argparse.ArgumentParser(
        prog="scripts/bench attack", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--seconds", type=float, default=5.0, help="duration of each attack (default 5)")
    options.add_argument("--newcomers", type=int, default=50, help="new connections a second (default 50)")
    chosen = options.parse_args(arguments)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, -10)
    gc.disable()  # keeps collections of this process out of the figures
    print(
        f"2 workers, {EXISTING} existing connections with a round trip every {1000 * PACE:g} ms, {chosen.newcomers:,} "
        f"new connections a second, {chosen.seconds:g} s for each attack; milliseconds"
    )
    print(f"{'':42}{'existing':>16}{'new':>40}")
    print(f"{'':42}{'p50':>8}{'p99':>8}{'served':>9}{'failed':>7}{'p50':>8}{'p99':>8}{'max':>8}")
    verdicts: list[Verdict] = []
    for compression in (False, True):
        config = CONFIG.format(folder=HERE, compression=str(compression).lower())
        with Served(config) as server:
            scene = Scene(server, chosen.seconds, chosen.newcomers)
            scene.measure(None)  # warms the server up
            for attack in ATTACKS:
                if attack.compression == compression:
                    verdicts += _verdicts(scene, attack)
    return verdicts


def _verdicts(scene: Scene, attack: Attack) -> list[Verdict]:
    calm = scene.measure(None)
    show("no attack", calm)
    attacked = scene.measure(attack)
    show(attack.name, attacked)
    dead, failed = scene.dead(), attacked.new.failed
    idle, now = calm.existing.quantile(0.99), attacked.existing.quantile(0.99)
    return [
        Verdict(f"{attack.name}: p99 of a round trip", f"≤ 2 * {idle:.2f} ms (idle)", f"{now:.2f} ms", now <= 2 * idle),
        Verdict(f"{attack.name}: failed handshakes", "0", str(failed), not failed),
        Verdict(f"{attack.name}: dead workers", "0", str(dead), not dead),
    ]
