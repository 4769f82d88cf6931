"""A network of its own for a Redis server, with several cables to it that can be cut one by one."""

from __future__ import annotations

import os
import random
import subprocess

from tests.redis.deployments import Place


def run(*words: str) -> bool:
    return subprocess.run(["ip", *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0


class Namespace:
    """A network namespace with two cables. hosts: of the server in it, by cable. Close it at last.

    Raises PermissionError where network namespaces are not permitted.
    """

    def __init__(self) -> None:
        self.name = f"rt{os.getpid()}{random.randrange(1000)}"
        subnet = f"10.{random.randrange(1, 255)}.{random.randrange(1, 255)}"
        self.hosts = [f"{subnet}.{4 * number + 2}" for number in range(2)]
        self._here = [f"{self.name[-8:]}h{number}" for number in range(2)]
        commands = [["netns", "add", self.name]]
        for number, here in enumerate(self._here):
            there = f"there{number}"
            commands += [
                ["link", "add", here, "type", "veth", "peer", "name", there, "netns", self.name],
                ["addr", "add", f"{subnet}.{4 * number + 1}/30", "dev", here],
                ["-n", self.name, "addr", "add", f"{self.hosts[number]}/30", "dev", there],
                ["link", "set", here, "up"],
                ["-n", self.name, "link", "set", there, "up"],
            ]
        if os.geteuid() or not all(run(*command) for command in commands):
            self.close()
            raise PermissionError("no network namespaces here")

    def place(self) -> Place:
        """Where a server in the namespace runs, for clients over the first cable."""
        return Place(self.hosts[0], "0.0.0.0", ("ip", "netns", "exec", self.name))

    def cut(self, number: int) -> None:
        """Lose every packet of a cable from now on, without a word to either side."""
        assert run("-n", self.name, "link", "set", f"there{number}", "down")

    def mend(self, number: int) -> None:
        """Undo `cut`."""
        assert run("-n", self.name, "link", "set", f"there{number}", "up")

    def close(self) -> None:
        run("netns", "del", self.name)
