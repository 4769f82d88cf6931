"""What this installation stands on: the packages around it and the kernel under it.

Read at start and by `realtime info`. Nothing here imports Twisted or Autobahn: their metadata says enough.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import os
import platform
import re
import resource
import socket
import ssl
import struct
from collections.abc import Mapping
from pathlib import Path

from realtime._version import __version__

DISTRIBUTION = "twisted-realtime"
LIBRARIES = ("Twisted", "autobahn", "msgspec", "PyJWT", "cryptography", "psutil", "prometheus-client")

# Linux, include/uapi/asm-generic/socket.h; Python has no name for it.
_SO_ATTACH_REUSEPORT_CBPF = 51


def problems() -> list[str]:
    """What keeps the server from starting: one line each, with the remedy. Takes some tens of milliseconds."""
    return [*_strangers(), *_too_old()]


def _strangers() -> list[str]:
    """Other distributions that installed a package called `realtime` into the same folder, over ours or under it."""
    owners = set(importlib.metadata.packages_distributions().get("realtime", ())) - {DISTRIBUTION}
    return [
        f"{owner}: also installs the package `realtime`, and one has overwritten the other; "
        f"reinstall {DISTRIBUTION} in a virtual environment without it"
        for owner in sorted(owners)
    ]


def _too_old() -> list[str]:
    """Libraries below the least version that our own metadata asks for: they have known holes."""
    found = []
    for requirement in _requirements():
        needed = re.match(r"([A-Za-z0-9._-]+)[^>;]*>=([0-9.]+)(?!.*;)", requirement)
        if needed and (version := _version(needed[1])) and _numbers(version) < _numbers(needed[2]):
            remedy = f"pip install --upgrade {needed[1]}"
            found.append(f"{needed[1]}: version {version} is too old, {needed[2]} or later is needed; {remedy}")
    return found


def _requirements() -> list[str]:
    try:
        return importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        return []


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def is_accelerated(environ: Mapping[str, str]) -> bool:
    """Whether Autobahn will use NVX, its compiled masking and UTF-8 check: a 4 KiB message in costs 20 µs, not 700."""
    present = all(importlib.util.find_spec(name) for name in ("_nvx_utf8validator", "_nvx_xormasker"))
    return present and environ.get("AUTOBAHN_USE_NVX", "").strip().lower() not in ("0", "no", "false")


def warnings(environ: Mapping[str, str]) -> list[str]:
    """What makes the server slower than it could be: one line each."""
    if is_accelerated(environ):
        return []
    return ["autobahn: runs without NVX, and large messages cost 30 times as much; install its binary wheel"]


def facts(environ: Mapping[str, str]) -> dict[str, str]:
    """What a report of a fault should say about the installation."""
    kernel = platform.uname()
    return {
        "realtime": __version__,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        **{name.lower(): _version(name) or "not installed" for name in LIBRARIES},
        "openssl": ssl.OPENSSL_VERSION,
        "nvx": "in use" if is_accelerated(environ) else "not in use",
        "kernel": f"{kernel.system} {kernel.release} {kernel.machine}",
        "cores": f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} usable",
        "port sharing": "SO_REUSEPORT" if hasattr(socket, "SO_REUSEPORT") else "none",
        "steering": "SO_ATTACH_REUSEPORT_CBPF" if can_steer() else "none, the kernel spreads connections by hash",
        "shared memory": "memfd" if hasattr(os, "memfd_create") else "none",
        "open files": "{} now, {} at most".format(*resource.getrlimit(resource.RLIMIT_NOFILE)),
        "accept queue": _first_line("/proc/sys/net/core/somaxconn") + " (net.core.somaxconn)",
    }


def can_steer() -> bool:
    """Whether the kernel lets an ordinary user choose which socket of a shared port gets a new connection."""
    # struct sock_filter with the one instruction `ret 0`, and the struct sock_fprog of it; see linux/filter.h.
    program = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0), 8)
    header = struct.pack("HP", 1, ctypes.addressof(program))
    with contextlib.suppress(OSError), socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        trial.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_REUSEPORT_CBPF, header)
        return True
    return False


def _first_line(path: str) -> str:
    try:
        return Path(path).read_text().split("\n", 1)[0]
    except OSError:
        return "unknown"
