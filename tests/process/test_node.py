"""The identity of a node, which all its processes share."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import uuid

from msgspec.structs import replace

from realtime._version import __version__
from realtime.config.settings import HTTPServerSettings, NodeSettings, Settings
from realtime.process.node import NodeIdentity

SETTINGS = replace(Settings(), http_server=HTTPServerSettings(port=8123))


def test_all_processes_of_a_node_name_it_alike() -> None:
    first, second = NodeIdentity(SETTINGS).describe(), NodeIdentity(SETTINGS).describe()
    assert (first.uid, first.name, first.version) == (second.uid, second.name, __version__)
    assert first.name == f"{socket.gethostname()}_8123"
    assert str(uuid.UUID(first.uid)) == first.uid


def test_a_configured_name_wins() -> None:
    assert NodeIdentity(replace(SETTINGS, node=NodeSettings(name="east-1"))).describe().name == "east-1"


def test_each_supervisor_is_a_node_and_its_uptime_the_node_s_even_if_its_name_has_brackets() -> None:
    code = "import ctypes, time; ctypes.CDLL(None).prctl(15, b'a) b (c', 0, 0, 0); print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as supervisor:
        assert supervisor.stdout is not None
        supervisor.stdout.readline()
        identity = NodeIdentity(SETTINGS, supervisor.pid)
        before = identity.describe().uptime
        while (after := identity.describe().uptime) < before + 0.05:
            pass
        supervisor.kill()
    assert 0 <= before < 60
    assert NodeIdentity(SETTINGS).describe().uptime >= after - 0.1
    assert os.getppid() != supervisor.pid
    assert identity.uid != NodeIdentity(SETTINGS).uid
