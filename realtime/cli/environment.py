"""The environment of the server: installed packages and kernel features, checked at start and by `realtime info`.

This module reads the metadata of Twisted and Autobahn, and imports neither.
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
import stat
import struct
from collections.abc import Mapping
from pathlib import Path

from realtime._version import __version__
from realtime.config import cores
from realtime.config.settings import Settings
from realtime.config.values import escape_unprintable

DISTRIBUTION = "twisted-realtime"
LIBRARIES = ("Twisted", "autobahn", "msgspec", "PyJWT", "cryptography", "psutil", "prometheus-client")

# Linux, include/uapi/asm-generic/socket.h; Python has no name for it.
_SO_ATTACH_REUSEPORT_CBPF = 51


def find_problems() -> list[str]:
    """Return one line, with the remedy, for each problem that prevents a start. Takes tens of milliseconds."""
    return [*_conflicting_distributions(), *_outdated_libraries()]


def _conflicting_distributions() -> list[str]:
    """Report other distributions that install a package `realtime` into the same folder: one overwrote the other."""
    owners = set(importlib.metadata.packages_distributions().get("realtime", ())) - {DISTRIBUTION}
    return [
        f"{owner}: also installs the package `realtime`, and one has overwritten the other; "
        f"reinstall {DISTRIBUTION} in a virtual environment without {owner}"
        for owner in sorted(owners)
    ]


def _outdated_libraries() -> list[str]:
    """Report libraries older than our metadata requires: older versions have known vulnerabilities."""
    problems = []
    for requirement in _requirements():
        minimum = re.match(r"([A-Za-z0-9._-]+)[^>;]*>=([0-9.]+)(?!.*;)", requirement)
        if not minimum:
            continue
        name, version = minimum[1], _version(minimum[1])
        if version is not None and _release(version) < _release(minimum[2]):
            remedy = f"pip install --upgrade {name}"
            problems.append(f"{name}: version {version} is too old, realtime needs {minimum[2]} or later; {remedy}")
    return problems


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


def _release(version: str) -> tuple[int, ...]:
    """Return the first three numbers of a version."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def uses_nvx(environ: Mapping[str, str]) -> bool:
    """Whether Autobahn will use NVX, its compiled masking and UTF-8 validation.

    With it, receiving a 4 KiB message takes 20 µs, without it 700 µs.
    """
    is_installed = all(importlib.util.find_spec(name) for name in ("_nvx_utf8validator", "_nvx_xormasker"))
    return is_installed and environ.get("AUTOBAHN_USE_NVX", "").strip().lower() not in ("0", "no", "false")


def find_warnings(environ: Mapping[str, str]) -> list[str]:
    """Return one line, with the remedy, for each feature whose absence makes the server slower."""
    if uses_nvx(environ):
        return []
    return ["autobahn: runs without NVX, so large messages take 30 times as long; install its binary wheel"]


def stays_root(drops_root: bool) -> bool:
    """Whether the server and the application serve as root. drops_root: see `find_exposure`."""
    return os.geteuid() == 0 and not drops_root


def find_exposure(config: str | None, settings: Settings, drops_root: bool) -> list[str]:
    """Return one line, with the remedy, for rights that the server or others need not have.

    config: path of the configuration. drops_root: whether the process gives up the rights of root after the start.
    """
    lines = []
    if stays_root(drops_root):
        lines.append(
            "the server and the application run as root: give twistd a user and a group, as in "
            "`twistd --uid realtime --gid realtime realtime`, or use the systemd unit"
        )
    token, subscription_token = settings.client.token, settings.client.subscription_token
    secrets = (settings.http_api.key, token.hmac_secret_key, subscription_token.hmac_secret_key)
    with contextlib.suppress(OSError):
        if config and any(secrets) and os.stat(config).st_mode & stat.S_IROTH:
            name = escape_unprintable(config)
            lines.append(
                f"{name}: every user of this machine may read its secrets; use chmod 640 and the server's group"
            )
    return lines


def describe(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the versions and kernel features that a bug report should include, by name."""
    kernel = platform.uname()
    return {
        "realtime": __version__,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        **{name.lower(): _version(name) or "not installed" for name in LIBRARIES},
        "openssl": ssl.OPENSSL_VERSION,
        "nvx": "in use" if uses_nvx(environ) else "not in use",
        "kernel": f"{kernel.system} {kernel.release} {kernel.machine}",
        "cores": _describe_cores(),
        "port sharing": "SO_REUSEPORT" if hasattr(socket, "SO_REUSEPORT") else "none",
        "steering": "SO_ATTACH_REUSEPORT_CBPF" if can_steer() else "none; the kernel spreads connections by hash",
        "shared memory": "memfd" if hasattr(os, "memfd_create") else "none",
        "open files": "limit {}, at most {}".format(*resource.getrlimit(resource.RLIMIT_NOFILE)),
        "accept queue": "limit " + _first_line("/proc/sys/net/core/somaxconn") + " (net.core.somaxconn)",
    }


def _describe_cores() -> str:
    quota = cores.cpu_quota()
    limit = f", quota of {quota:g} by the control group" if quota < (os.cpu_count() or 1) else ""
    return f"{cores.count_cores()} usable: {len(os.sched_getaffinity(0))} of {os.cpu_count()} by affinity{limit}"


def can_steer() -> bool:
    """Whether the kernel lets an unprivileged user choose the socket of a shared port for each new connection."""
    # One struct sock_filter with the instruction `ret 0`, and the struct sock_fprog that points to it (linux/filter.h).
    program = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0), 8)
    header = struct.pack("HP", 1, ctypes.addressof(program))
    with contextlib.suppress(OSError), socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        probe.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_REUSEPORT_CBPF, header)
        return True
    return False


def _first_line(path: str) -> str:
    try:
        return Path(path).read_text().split("\n", 1)[0]
    except OSError:
        return "unknown"
