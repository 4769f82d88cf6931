"""Orphans: exited processes that only their new parent can remove from the process table."""

from __future__ import annotations

import subprocess
import sys

# A process that adopts orphans, with an orphan and a child of its own that have exited.
PARENT = """
import os, subprocess, sys, time
from twisted.internet import protocol, reactor
from realtime.supervisor import orphans

class Process(protocol.ProcessProtocol):
    def __init__(self, ended):
        self.ended = ended
    def processEnded(self, reason):
        self.ended.append(reason.value.exitCode or 0)
        reactor.stop()

orphans.adopt_all()
# It ends after its parent, the shell, which would remove it: as soon as this pipe is closed.
until, end = os.pipe()
script = f"(exec cat <&{until} >/dev/null 2>&1) & echo $!"
shell = subprocess.run(["sh", "-c", script], stdout=subprocess.PIPE, text=True, pass_fds=[until], process_group=0)
os.close(end)
orphan = int(shell.stdout)
zombie = lambda pid: open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] == "Z"
while not zombie(orphan):
    time.sleep(0.01)
reaped = orphans.reap(lambda: [])
assert reaped == 1, reaped
assert not os.path.exists(f"/proc/{orphan}")
assert orphans.reap(lambda: []) == 0
known, other = subprocess.Popen(["true"], process_group=0), subprocess.Popen(["true"])
while not (zombie(known.pid) and zombie(other.pid)):
    time.sleep(0.01)
assert orphans.reap(lambda: [known.pid]) == 0
assert known.wait() == 0
assert orphans.reap(lambda: []) == 0
assert other.wait() == 0
ended = []
process = Process(ended)
# It ends as this pipe is closed: an earlier end might be reaped by Twisted within `spawnProcess`.
until, end = os.pipe()
reactor.spawnProcess(process, "cat", ["cat"], env={}, childFDs={0: until, 1: 1, 2: 2})
os.close(end)
while not zombie(process.transport.pid):
    time.sleep(0.01)
assert orphans.reap(lambda: []) == 0
reactor.run()
assert ended == [0], ended
"""


def test_orphans_are_reaped_and_own_children_are_left_to_their_owner() -> None:
    done = subprocess.run([sys.executable, "-c", PARENT], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
