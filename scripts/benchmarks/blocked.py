"""Block one of two workers for 2 s with a bad handler, and measure the effect on other clients.

The benchmark measures round trips (an RPC echo over WebSocket) on connections of the other worker, and 1,000 new
connections during the block, each from its SYN to the reply to its connect command. It measures idle workers first and
then the blocked worker; with steering and rescue, and without both. Then it measures the blocked worker's own clients,
with and without relief, and the price of relief while nothing blocks (`relief`). The load comes from this process, over
bare sockets and epoll, on the same machine, so every figure includes the delay of this process.
"""

from __future__ import annotations

import argparse
import gc
import resource
import time
from dataclasses import dataclass, field

import relief
from crowd import Clients, Peer, Sample, text_frame
from served import HERE, Served
from tables import Verdict, print_verdicts

# Existing connections of each worker, and the interval between two round trips on one connection, in seconds.
EXISTING = 20
PACE = 0.02
# Seconds after which a client gives up.
PATIENCE = 10.0
# Seconds between two rounds, in which the workers recover.
REST = 2.0

CONFIG = """
[http_server]
address = "127.0.0.1"
port = 0
internal_port = 0
[workers]
count = 2
[app]
module = "blocked_app:app"
path = "{folder}"
[loop]
steering = {helped}
rescue = {helped}
max_lag = "{max_lag}"
"""
ECHO = text_frame({"id": 2, "rpc": {"method": "echo", "data": "x" * 64}})


class Echoes:
    """Round trips on one connection at a steady pace, recorded in the current `sample`."""

    def __init__(self, clients: Clients, peer: Peer) -> None:
        self.sample = Sample()
        self._clients = clients
        self._peer = peer
        self._sent = 0.0
        peer.replied = self._replied

    def send(self) -> None:
        self._sent = time.perf_counter()
        self._peer.send(ECHO)

    def _replied(self) -> None:
        now = time.perf_counter()
        self.sample.seconds.append(now - self._sent)
        self._clients.at(max(now, self._sent + PACE), self.send)


class Newcomers:
    """New connections, evenly distributed over `seconds`."""

    def __init__(self, clients: Clients, number: int, seconds: float, sample: Sample) -> None:
        self._clients = clients
        self._sample = sample
        self._left = number
        begin = time.perf_counter()
        for each in range(number):
            clients.at(begin + each * seconds / number, self._come)

    @property
    def over(self) -> bool:
        return self._left == 0

    def _come(self) -> None:
        try:
            peer = Peer(self._clients, self._connected)
        except OSError:
            self._sample.failed += 1
            self._left -= 1
        else:
            self._clients.at(peer.began + PATIENCE, lambda: self._give_up(peer))

    def _connected(self, peer: Peer) -> None:
        self._left -= 1
        if peer.pid:
            self._sample.seconds.append(time.perf_counter() - peer.began)
        else:
            self._sample.failed += 1
        peer.close()

    def _give_up(self, peer: Peer) -> None:
        if peer.fileno() >= 0:
            self._sample.failed += 1
            self._left -= 1
            peer.close()


@dataclass
class Measured:
    """The figures of one situation."""

    existing: Sample = field(default_factory=Sample)
    new: Sample = field(default_factory=Sample)


class Scene:
    """One server with clients on both workers. Only the first worker is ever blocked."""

    def __init__(self, server: Served, chosen: argparse.Namespace) -> None:
        self.clients = Clients(server.port)
        self._chosen = chosen
        by_pid: dict[int, list[Peer]] = {}
        while len(by_pid) < 2 or min(map(len, by_pid.values())) < EXISTING:
            arrived: list[Peer] = []
            Peer(self.clients, arrived.append)
            self.clients.run(lambda arrived=arrived: bool(arrived))  # type: ignore[misc]
            by_pid.setdefault(arrived[0].pid, []).append(arrived[0])
        first, second = by_pid.values()
        self._victim = first[0]
        self._echoes = [Echoes(self.clients, peer) for peer in second[:EXISTING]]
        begin = time.perf_counter()
        for number, echoes in enumerate(self._echoes):
            self.clients.at(begin + number * PACE / EXISTING, echoes.send)

    def measure(self, into: Measured, newcomers: int, blocked: bool) -> None:
        """Measure one period. blocked: block the first worker from the beginning of the period."""
        seconds = self._chosen.seconds
        for echoes in self._echoes:
            echoes.sample = into.existing
        freed = [not blocked]
        if blocked:
            self._victim.replied = lambda: freed.append(True)
            self._victim.send(text_frame({"id": 3, "rpc": {"method": "block", "data": seconds}}))
        new = Newcomers(self.clients, newcomers, seconds, into.new)
        until = time.perf_counter() + seconds
        self.clients.run(lambda: time.perf_counter() >= until)
        for echoes in self._echoes:
            echoes.sample = Sample()  # the block has ended: discard later round trips
        self.clients.run(lambda: new.over and freed[-1])
        rested = time.perf_counter() + REST
        self.clients.run(lambda: time.perf_counter() >= rested)


def main(arguments: list[str]) -> int:
    print_verdicts(measure(arguments))
    return 0


def measure(arguments: list[str]) -> list[Verdict]:
    """Measure and print each situation; return the verdicts on the targets."""
    options = argparse.ArgumentParser(
        prog="scripts/bench blocked", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--seconds", type=float, default=2.0, help="duration of the block (default 2)")
    options.add_argument("--newcomers", type=int, default=1000, help="new connections during the block (default 1000)")
    options.add_argument(
        "--rounds", type=int, default=3, help="rounds of each situation, evaluated together (default 3)"
    )
    options.add_argument("--price-rounds", type=int, default=20, help="rounds of the price of relief (default 20)")
    options.add_argument("--price-seconds", type=float, default=1.0, help="duration of each (default 1)")
    chosen = options.parse_args(arguments)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    gc.disable()  # keeps collections of this process out of the figures
    print(
        f"2 workers, {EXISTING} existing connections with a round trip every {1000 * PACE:g} ms, {chosen.newcomers:,} "
        f"new connections in {chosen.seconds:g} s, {chosen.rounds} rounds; milliseconds"
    )
    print(f"{'':42}{'existing':>16}{'new':>40}")
    print(f"{'':42}{'p50':>8}{'p99':>8}{'served':>9}{'failed':>7}{'p50':>8}{'p99':>8}{'max':>8}")
    verdicts = _compare(chosen, helped=True)
    _compare(chosen, helped=False)
    verdicts += relief.measure_own_clients(chosen.seconds, chosen.rounds)
    return verdicts + relief.measure_price(chosen.price_seconds, chosen.price_rounds)


def _compare(chosen: argparse.Namespace, helped: bool) -> list[Verdict]:
    config = CONFIG.format(folder=HERE, helped=str(helped).lower(), max_lag="200ms" if helped else "0s")
    idle, busy, blocked = Measured(), Measured(), Measured()
    with Served(config) as server:
        scene = Scene(server, chosen)
        for _ in range(chosen.rounds):
            scene.measure(idle, 0, blocked=False)
            scene.measure(busy, chosen.newcomers, blocked=False)
            scene.measure(blocked, chosen.newcomers, blocked=True)
        log_lines = [line for line in server.lines if "blocked_app.py" in line]
    means = "with steering and rescue" if helped else "no steering, no rescue"
    show(f"{means}: idle", idle)
    show(f"{means}: new clients", busy)
    show(f"{means}: one blocked", blocked)
    if log_lines:
        print("    " + log_lines[0].strip())
    return [_existing(idle, blocked), *_new(blocked, chosen.newcomers * chosen.rounds)]


def _existing(idle: Measured, blocked: Measured) -> Verdict:
    calm, now = idle.existing.quantile(0.99), blocked.existing.quantile(0.99)
    what = "one of two workers blocked: p99 of a round trip on the other worker"
    return Verdict(what, f"≤ 2 * {calm:.2f} ms (idle)", f"{now:.2f} ms", met=now <= 2 * calm)


def _new(blocked: Measured, asked: int) -> list[Verdict]:
    served, late = len(blocked.new.seconds), blocked.new.quantile(0.99)
    return [
        Verdict(
            "one of two workers blocked: new connections served", "100 %", f"{served / asked:.2%}", served == asked
        ),
        Verdict("one of two workers blocked: p99 of a new connection", "≤ 100 ms", f"{late:.1f} ms", late <= 100),
    ]


def show(name: str, measured: Measured) -> None:
    """Print one line of figures."""
    existing, new = measured.existing, measured.new
    print(f"{name:42}{existing.quantile(0.5):8.2f}{existing.quantile(0.99):8.2f}", end="")
    if new.seconds or new.failed:
        quantiles = "".join(f"{new.quantile(share):8.1f}" for share in (0.5, 0.99, 1.0))
        print(f"{len(new.seconds):9,}{new.failed:7,}{quantiles}", end="")
    print(flush=True)
