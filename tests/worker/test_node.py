"""The identity of a node, which all its workers share."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import uuid

from msgspec.structs import replace

from realtime._version import __version__
from realtime.config.settings import HTTPServerSettings, NodeSettings, Settings
from realtime.worker.node import NodeIdentitySource

SETTINGS = replace(Settings(), http_server=HTTPServerSettings(port=8123))


def test_all_workers_of_a_node_name_it_alike() -> None:
    first, second = NodeIdentitySource(SETTINGS)(), NodeIdentitySource(SETTINGS)()
    assert (first.uid, first.name, first.version) == (second.uid, second.name, __version__)
    assert first.name == f"{socket.gethostname()}_8123"
    assert str(uuid.UUID(first.uid)) == first.uid


def test_another_port_is_another_node_and_a_configured_name_wins() -> None:
    other = NodeIdentitySource(replace(SETTINGS, http_server=HTTPServerSettings(port=8124)))
    named = NodeIdentitySource(replace(SETTINGS, node=NodeSettings(name="east-1")))
    assert other().uid != NodeIdentitySource(SETTINGS)().uid
    assert (named().name, named().uid) == ("east-1", NodeIdentitySource(SETTINGS)().uid)


def test_uptime_is_the_supervisors_even_if_its_name_has_brackets() -> None:
    code = "import ctypes, time; ctypes.CDLL(None).prctl(15, b'a) b (c', 0, 0, 0); print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as supervisor:
        assert supervisor.stdout is not None
        supervisor.stdout.readline()
        identity = NodeIdentitySource(SETTINGS, supervisor.pid)
        before = identity().uptime
        while (after := identity().uptime) < before + 0.05:
            pass
        supervisor.kill()
    assert 0 <= before < 60
    assert NodeIdentitySource(SETTINGS)().uptime >= after - 0.1
    assert os.getppid() != supervisor.pid
