"""`twistd realtime`: the options, and the service that they make.

Configuration is read here, before twistd forks: a mistake is seen on the terminal, one line each, and nothing has been
opened yet. Exit status 78 (EX_CONFIG of sysexits.h) keeps a service manager from trying again.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from twisted.application.service import IService
from twisted.logger import Logger
from twisted.python import usage

from realtime._version import __version__
from realtime.cli import environment
from realtime.config import warnings
from realtime.config.sources import read
from realtime.errors import SettingsError
from realtime.process import log
from realtime.supervisor.service import make_service

_log = Logger(observer=log.observer)

# Descriptors of one process that are asked for, where more are allowed: some libraries are slow with a billion.
_DESCRIPTORS = 1 << 20

# Which key each option sets.
_KEYS = {"workers": "workers.count", "app": "app.module", "port": "http_server.port"}


class Options(usage.Options):
    """The command line. What is given here wins over the environment, and that over the file."""

    longdesc = "Start the realtime server. `realtime gen-config` writes a file with every key explained."

    optParameters = [
        ["config", "c", None, "TOML file with the configuration; none is read by default."],
        ["workers", "w", None, "Worker processes; 0: one for each core.  [default: 0]"],
        ["app", "a", None, "The App, as package.module:attribute."],
        ["port", "p", None, "Port for clients; 0: one that is free.  [default: 8000]"],
    ]
    compData = usage.Completions(optActions={"config": usage.CompleteFiles("*.toml")})

    def opt_version(self) -> None:
        """Print the version and exit."""
        print(f"realtime {__version__}")
        sys.exit(0)


def makeService(options: Mapping[str, Any]) -> IService:
    """The supervisor for these options. Raises SystemExit 78, with all problems printed, when it can't be had."""
    given = {key: options[name] for name, key in _KEYS.items() if options[name] is not None}
    problems = environment.find_problems()
    try:
        settings = read(options["config"], given, os.environ)
    except SettingsError as error:
        problems += error.problems
    if problems:
        print(*problems, sep="\n", file=sys.stderr)
        raise SystemExit(os.EX_CONFIG)
    _allow_descriptors()
    service = make_service(settings, unwise=warnings.insecure_keys(settings))
    for line in [*warnings.find_warnings(settings, os.environ), *environment.find_warnings(os.environ)]:
        _log.warn("{line}", line=line)
    return service


def _allow_descriptors() -> None:
    """Use all the descriptors that are ours to use: each client takes one.

    Most systems grant 1,024 at first, for programs that use select(2), and many times that to those that ask.
    """
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _DESCRIPTORS if most == resource.RLIM_INFINITY else min(most, _DESCRIPTORS)
    if resource.RLIM_INFINITY != now < wanted:
        with suppress(ValueError, OSError):  # a sandbox may forbid it, and it can be done without
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))
