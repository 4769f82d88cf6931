"""Replay recorded conversations of clients with a Centrifugo server, against this server.

Exit status: 0 if nothing differs but known faults, 1 if something else does, 2 if there is nothing to play or the
server does not start.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import tempfile
import time
from pathlib import Path

from tests.conformance.clients import TRANSPORTS
from tests.conformance.corpus import Conversation, chosen, configuration, conversations, profiles
from tests.conformance.known_faults import KnownFaults
from tests.conformance.player import play_all
from tests.system.serving import Server


def parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/conformance", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="only a sample of each family")
    parser.add_argument("--profile", action="append", choices=profiles(), help="only this one; may be given again")
    parser.add_argument("--only", default="", metavar="TEXT", help="only conversations with TEXT in their names")
    transports = f"{', '.join(TRANSPORTS)}; each with _protobuf too; http"
    parser.add_argument("--transport", help=f"only conversations with it: {transports}")
    parser.add_argument("--show", metavar="TEXT", help="print conversations with TEXT in their names; start no server")
    return parser.parse_args(arguments)


class Replay:
    """The conversations that a command plays, and their differences."""

    def __init__(self, workers: int) -> None:
        self.known = KnownFaults.read()
        self.played: list[Conversation] = []
        self.differing: set[Conversation] = set()
        self.faults = 0  # differences that are not known, and servers that did not end well
        self._workers = workers

    def play(self, profile: str, among: list[Conversation]) -> None:
        """Play with a new server and print the differences. AssertionError: the server does not start."""
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="conformance-") as folder:
            config = Path(folder, f"{profile}.toml")
            config.write_text(configuration(profile))
            server = Server(config, ("--workers", str(self._workers)))
            try:
                server.wait_ready()
                found = asyncio.run(play_all(among, server.port, self.known))
                new = [one for one in found if not self.known.covers(one)]
                print(
                    f"{profile}: {len(among)} conversations, {len(among) - len(found)} as wanted, "
                    f"{len(found) - len(new)} known faults, {len(new)} differences, {time.monotonic() - began:.0f} s",
                    *new,
                    sep="\n\n",
                    flush=True,
                )
                self._end(server)
            finally:
                server.kill()
        self.played += among
        self.differing |= {one.conversation for one in found}
        self.faults += len(new)

    def _end(self, server: Server) -> None:
        try:
            server.stop()
        except AssertionError as error:
            self.faults += 1
            print(f"\n{error}", flush=True)


def main(arguments: list[str]) -> int:
    options = parsed(arguments)
    text = options.only if options.show is None else options.show
    corpus = {
        profile: chosen(conversations(profile), text, transport=options.transport, quick=options.quick)
        for profile in options.profile or profiles()
    }
    if not any(corpus.values()):
        print("there is no such conversation")
        return 2
    if options.show is not None:
        print(*(f"{profile}: {one}" for profile, among in corpus.items() for one in among), sep="\n")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(2))
    replay = Replay(options.workers)
    for profile, among in corpus.items():
        try:
            if among:
                replay.play(profile, among)
        except AssertionError as error:
            print(f"{profile}: {error}")
            return 2
    for line in replay.known.mended(replay.played, replay.differing):
        print(f"fault {line.fault} is mended: delete its line {line.pattern!r} from known-faults.txt")
    return 1 if replay.faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
