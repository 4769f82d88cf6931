"""The reactor of a child, in a separate process: another reactor runs in this one."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import asyncio, socket
from twisted.internet.main import installReactor
from realtime.process.selector import ReadingSelector
from realtime.process.reactor import Reactor

selector = ReadingSelector()
installReactor(Reactor(asyncio.SelectorEventLoop(selector), selector))
from twisted.internet import reactor
from twisted.internet.defer import ensureDeferred
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import deferLater
from realtime.process.transport import DirectServer

ends = []

class Echo(Protocol):
    def dataReceived(self, data):
        if data == b"fail":
            raise RuntimeError("a bug")
        if data == b"wait":
            self.transport.pauseProducing()
            reactor.callLater(0.01, self.transport.resumeProducing)
        self.transport.write(data)

    def connectionLost(self, reason):
        ends.append(reason.type.__name__)

async def said(peer, data):
    peer.sendall(data)
    while True:
        try:
            return peer.recv(100)
        except BlockingIOError:
            await deferLater(reactor, 0.001)

async def main():
    port = reactor.listenTCP(0, Factory.forProtocol(Echo), interface="127.0.0.1")
    port.transport = DirectServer
    peers = []
    for _ in range(4):
        peer = socket.create_connection(("127.0.0.1", port.getHost().port))
        peer.setblocking(False)
        peers.append(peer)
    for peer in peers:
        print(await said(peer, b"hello"))
    print("direct", len(reactor.server.getReaders()))
    print(await said(peers[0], b"wait"))
    print(await said(peers[0], b"again"))
    peers[1].close()                      # the peer closes
    print(await said(peers[2], b"fail"))  # an exception ends that connection, and no other
    print(await said(peers[3], b"well"))
    while len(ends) < 2:
        await deferLater(reactor, 0.001)
    print(sorted(ends))
    for server in list(reactor.getReaders()):
        if isinstance(server, DirectServer):
            server.abortConnection()
    while len(ends) < 4:
        await deferLater(reactor, 0.001)
    print("direct", len(reactor.server.getReaders()))
    await port.stopListening()
    reactor.stop()

def failed(failure):
    failure.printTraceback()
    reactor.stop()

reactor.callWhenRunning(lambda: ensureDeferred(main()).addErrback(failed))
reactor.run()
"""


def test_direct_reading_behaves_like_twisteds_reading() -> None:
    ran = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60)
    assert ran.stdout.splitlines() == [
        *["b'hello'"] * 4,
        "direct 4",
        "b'wait'",
        "b'again'",
        "b''",
        "b'well'",
        "['ConnectionDone', 'RuntimeError']",
        "direct 0",
    ], ran.stderr


@pytest.mark.timeout(300)
def test_it_passes_twisteds_own_tests_of_reactors(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "twisted.trial",
        "--temp-directory",
        str(tmp_path / "trial"),
        "tests.process.reactor_suites",
    ]
    found = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert found.returncode == 0, found.stdout
    passed = re.search(r"PASSED \(skips=\d+, successes=(\d+)\)", found.stdout)
    assert passed is not None and int(passed[1]) > 280
