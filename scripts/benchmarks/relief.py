"""The clients of a blocked worker themselves, with and without relief, and the price of relief while nothing blocks."""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

from crowd import Clients, Peer, Sample, text_frame
from served import HERE, Served
from tables import Verdict

# Ways to block a loop, and whether relief can help: a call in C that keeps the interpreter's lock leaves it no chance.
WAYS = {"time.sleep": True, "a blocking socket": True, "pure Python": True, "C with the interpreter's lock": False}
# Subscribers on the blocked worker, and seconds between two publications, and between two commands of each subscriber.
SUBSCRIBERS, PACE, COMMANDS = 20, 0.02, 0.1
REST = 1.5
# Connections and calls under way on each, and the subscribers of one channel, for the price.
CALLERS, DEPTH, AUDIENCE = 20, 8, 200

CONFIG = """
[http_server]
address = "127.0.0.1"
port = 0
internal_port = 0
[workers]
count = {workers}
[client]
commands_per_second = 0
[channel.without_namespace]
allow_subscribe_for_client = true
allow_publish_for_client = true
allow_presence_for_client = true
presence = true
[app]
module = "blocked_app:app"
path = "{folder}"
[loop]
relief = {relief}
max_lag = "0s"
"""


class Talking(Peer):
    """A connection that takes pushes and replies by id."""

    def __init__(self, clients: Clients, connected: Callable[[Peer], None]) -> None:
        self.on_publication: Callable[[Any], None] = lambda data: None
        self._waiting: dict[int, Callable[[], None]] = {}
        self._ids = itertools.count(2)
        super().__init__(clients, connected)

    def ask(self, command: dict[str, Any], replied: Callable[[], None] = lambda: None) -> None:
        id = next(self._ids)
        self._waiting[id] = replied
        self.send(text_frame({"id": id, **command}))

    def _take(self, reply: dict[str, Any]) -> None:
        publication = reply.get("push", {}).get("pub")
        if publication is not None:
            self.on_publication(publication["data"])
        elif reply.get("id") in self._waiting:
            self._waiting.pop(reply["id"])()
        else:
            super()._take(reply)


def connect(clients: Clients, count: int) -> list[Talking]:
    """Open connections, one after the other."""
    peers: list[Talking] = []
    for _ in range(count):
        arrived: list[Peer] = []
        peers.append(Talking(clients, arrived.append))
        clients.run(lambda arrived=arrived: bool(arrived))  # type: ignore[misc]
    return peers


def ask_all(clients: Clients, peers: Iterable[Talking], command: dict[str, Any]) -> None:
    """Send a command on each connection, and wait for the replies."""
    replies: list[bool] = []
    asked = [peer.ask(command, lambda: replies.append(True)) for peer in peers]
    clients.run(lambda: len(replies) == len(asked))


# The clients of a blocked worker


def measure_own_clients(seconds: float, rounds: int) -> list[Verdict]:
    """Block a worker in each of WAYS, and measure its own other clients."""
    print(
        f"\nThe blocked worker's own clients: {SUBSCRIBERS} subscribers, a publication every {1000 * PACE:g} ms by a"
        f" client of the other worker,\na command without a handler from each subscriber every {1000 * COMMANDS:g} ms;"
        f" {seconds:g} s, {rounds} rounds; milliseconds"
    )
    print(f"{'':42}{'delivery':>24}{'command':>24}")
    print(f"{'':42}" + f"{'p50':>8}{'p99':>8}{'max':>8}" * 2)
    verdicts = []
    for relief in (False, True):
        name = "with relief" if relief else "no relief"
        with Served(CONFIG.format(folder=HERE, workers=2, relief=str(relief).lower())) as server:
            scene = Scene(server, seconds)
            for way in ("idle", *WAYS):
                delivery, command = Sample(), Sample()
                for _ in range(rounds):
                    scene.measure(way, delivery, command)
                figures = [1.0 * sample.quantile(share) for sample in (delivery, command) for share in (0.5, 0.99, 1.0)]
                print(f"{name}: {way:{40 - len(name)}}" + "".join(f"{each:8.1f}" for each in figures), flush=True)
                if relief and WAYS.get(way):
                    verdicts += [
                        _verdict(f"{way}: p99 of the blocked worker's own clients", max(figures[1], figures[4]), 100),
                        _verdict(f"{way}: max of the blocked worker's own clients", max(figures[2], figures[5]), 150),
                    ]
    return verdicts


def _verdict(what: str, value: float, limit: float) -> Verdict:
    return Verdict(f"relief from {what}", f"≤ {limit:g} ms", f"{value:.1f} ms", value <= limit)


class Scene:
    """A server of two workers. The first is blocked, and its subscribers are measured."""

    def __init__(self, server: Served, seconds: float) -> None:
        self.clients = Clients(server.port)
        self._seconds = seconds
        by_pid: dict[int, list[Talking]] = {}
        while len(by_pid) < 2 or min(map(len, by_pid.values())) <= SUBSCRIBERS:
            (peer,) = connect(self.clients, 1)
            by_pid.setdefault(peer.pid, []).append(peer)
        first, second = by_pid.values()
        self._victim, self._subscribers, self._publisher = first[0], first[1 : SUBSCRIBERS + 1], second[0]
        ask_all(self.clients, self._subscribers, {"subscribe": {"channel": "news"}})

    def measure(self, way: str, delivery: Sample, command: Sample) -> None:
        """Measure while the worker is blocked in this way, not at all for "idle"."""
        freed: list[bool] = []
        if way != "idle":
            self._victim.ask({"rpc": {"method": "block", "data": [way, self._seconds]}}, lambda: freed.append(True))
        begin = time.perf_counter()
        until = begin + self._seconds
        unanswered = 0
        due: list[int] = []

        def publish() -> None:
            if time.perf_counter() < until:
                due.append(len(self._subscribers))
                self._publisher.ask({"publish": {"channel": "news", "data": time.perf_counter()}})
                self.clients.at(time.perf_counter() + PACE, publish)

        def take(sent: float) -> None:
            delivery.seconds.append(time.perf_counter() - sent)
            due.append(-1)

        def ask(peer: Talking) -> None:
            nonlocal unanswered
            sent = time.perf_counter()
            if sent >= until:
                return

            def replied() -> None:
                nonlocal unanswered
                unanswered -= 1
                command.seconds.append(time.perf_counter() - sent)
                self.clients.at(max(time.perf_counter(), sent + COMMANDS), lambda: ask(peer))

            unanswered += 1
            peer.ask({"presence_stats": {"channel": "news"}}, replied)

        for number, peer in enumerate(self._subscribers):
            peer.on_publication = take
            self.clients.at(begin + number * COMMANDS / SUBSCRIBERS, lambda peer=peer: ask(peer))  # type: ignore[misc]
        publish()
        self.clients.run(lambda: time.perf_counter() >= until)
        self.clients.run(lambda: unanswered == 0 == sum(due) and (way == "idle" or bool(freed)))
        rested = time.perf_counter() + REST
        self.clients.run(lambda: time.perf_counter() >= rested)


# The price


def measure_price(seconds: float, rounds: int) -> list[Verdict]:
    """Compare the CPU time of a worker with and without relief, while no handler blocks."""
    print(
        f"\nThe price of relief while nothing blocks: CPU µs of the worker, {rounds} rounds of {seconds:g} s in turns"
    )
    print(f"{'':42}{'without':>10}{'with':>10}{'ratio':>9}{'spread':>9}")
    costs: dict[tuple[str, bool], list[float]] = {}
    servers = {
        relief: Served(CONFIG.format(folder=HERE, workers=1, relief=str(relief).lower())) for relief in (False, True)
    }
    with servers[False], servers[True]:
        prices = {relief: Price(server) for relief, server in servers.items()}
        for number in range(rounds):
            for what in ("echo: a command without a handler", "RPC: a coroutine handler", "fan-out: one delivery"):
                for relief in (False, True) if number % 2 else (True, False):
                    costs.setdefault((what, relief), []).append(prices[relief].measure(what, seconds))
    verdicts = []
    for what in dict.fromkeys(what for what, _ in costs):
        without, relieved = costs[what, False], costs[what, True]
        # The cheapest quarter of the rounds: whatever else the machine does only adds to the cost.
        least, most = cheapest(without), cheapest(relieved)
        ratio = most / least
        spread = (statistics.median(without) - min(without)) / least
        print(f"{what:42}{least:10.2f}{most:10.2f}{ratio:9.3f}{spread:9.3f}", flush=True)
        verdicts.append(
            Verdict(
                f"price of relief, {what.partition(':')[0]}", "at most 1.02 of without", f"{ratio:.3f}", ratio <= 1.02
            )
        )
    return verdicts


def cheapest(costs: list[float]) -> float:
    """Return the mean of the cheapest quarter."""
    return statistics.mean(sorted(costs)[: max(len(costs) // 4, 1)])


class Price:
    """One worker, its callers, and the subscribers of a channel."""

    def __init__(self, server: Served) -> None:
        self.clients = Clients(server.port)
        (self._worker,) = server.workers()
        self._callers = connect(self.clients, CALLERS)
        self._audience = connect(self.clients, AUDIENCE)
        self.done = 0
        self._next: Callable[[], None] = lambda: None  # called when every subscriber has a publication
        for peer in self._audience:
            peer.on_publication = self._delivered
        ask_all(self.clients, self._audience, {"subscribe": {"channel": "crowd"}})

    def _delivered(self, data: Any) -> None:
        self.done += 1
        if self.done % AUDIENCE == 0:
            self._next()

    def measure(self, what: str, seconds: float) -> float:
        """Return the CPU microseconds of the worker for each command or delivery."""
        self.done = 0
        began = self._spent()
        until = time.perf_counter() + seconds
        under_way = 0
        command: dict[str, Any] = {"rpc": {"method": "echo", "data": "x" * 64}}
        if what.startswith("echo"):
            command = {"presence_stats": {"channel": "empty"}}

        def ask(peer: Talking) -> None:
            nonlocal under_way
            if time.perf_counter() < until:
                under_way += 1
                peer.ask(command, lambda: replied(peer))

        def replied(peer: Talking) -> None:
            nonlocal under_way
            under_way -= 1
            self.done += 1
            ask(peer)

        def publish() -> None:
            # The next one follows when all subscribers have the last: a generator that is behind is no slow client.
            if time.perf_counter() < until:
                self._callers[0].ask({"publish": {"channel": "crowd", "data": "x" * 64}})

        if what.startswith("fan-out"):
            self._next = publish
            publish()
            self.clients.run(lambda: time.perf_counter() >= until and self.done % AUDIENCE == 0)
        else:
            for peer in self._callers * DEPTH:
                ask(peer)
            self.clients.run(lambda: time.perf_counter() >= until and under_way == 0)
        self._next = lambda: None
        return 1e6 * (self._spent() - began) / max(self.done, 1)

    def _spent(self) -> float:
        times = self._worker.cpu_times()
        return float(times.user + times.system)


def main(arguments: list[str]) -> int:
    """For tries: `python relief.py price|clients SECONDS ROUNDS`."""
    what, seconds, rounds = arguments
    measure = measure_price if what == "price" else measure_own_clients
    print(json.dumps([verdict.__dict__ for verdict in measure(float(seconds), int(rounds))], indent=1))
    return 0


if __name__ == "__main__":
    import sys

    sys.exit(main(sys.argv[1:]))
