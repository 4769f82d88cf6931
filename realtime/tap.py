"""`twistd realtime`: the command line's options, and the service that they make.

The configuration is read here, before twistd forks: each mistake shows as one line on the terminal, while nothing is
open yet. Exit status 78 (EX_CONFIG of sysexits.h) keeps a service manager from trying again.

`make_service` is the composition root of the supervisor's process: it joins the supervisor, the operators' port and the
reactor.
"""

from __future__ import annotations

import atexit
import os
import resource
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, NoReturn

import msgspec
from msgspec.structs import replace
from twisted.application.service import IService
from twisted.internet.error import ReactorNotRunning
from twisted.logger import Logger
from twisted.python import usage

from realtime._version import __version__
from realtime.cli import application, environment
from realtime.config import settings as configuration
from realtime.config import warnings
from realtime.config.reload import keep_fixed, with_fixed
from realtime.config.schema import PREFIX
from realtime.config.settings import Settings
from realtime.config.sources import Sources, read
from realtime.errors import SettingsError
from realtime.operators.port import OperatorPort
from realtime.process import log, output
from realtime.supervisor import inheritance
from realtime.supervisor.inheritance import Inheritance
from realtime.supervisor.service import BROKER_MODULES, WORKER_MODULE, Supervisor
from realtime.supervisor.upgrade import Launch
from realtime.supervisor.zygote import EarlyZygote, fork_early

_log = Logger(observer=log.observer)

# Most descriptors to allow one process, even where the system grants more: some libraries are slow with a billion.
_MAX_DESCRIPTORS = 1 << 20

# The descriptor of the result of a trial: `realtime.supervisor.trial`.
_RESULT = 3

# The configuration key of each option.
_KEYS = {"workers": "workers.count", "app": "app.module", "port": "http_server.port"}


class Options(usage.Options):
    """The command line's options. They win over environment variables, which win over the file."""

    longdesc = "Start the realtime server. `realtime gen-config` writes a file with every key explained."

    optParameters = [
        ["config", "c", None, "TOML file with the configuration.  [default: none]"],
        ["workers", "w", None, "Worker processes; 0: one for each core.  [default: 0]"],
        ["app", "a", None, "The App, as package.module:attribute."],
        ["port", "p", None, "Port for clients; 0: any free port.  [default: 8000]"],
        ["resume", None, None, "Descriptor from a former version of the server, for `realtime upgrade` alone.", int],
    ]
    compData = usage.Completions(optActions={"config": usage.CompleteFiles("*.toml")})

    def postOptions(self) -> None:
        """Keep twistd from writing a pid file of its default name in the foreground.

        In a container every server has the same pid, so the file of a killed one would keep the next from starting;
        and the directory may be read-only.
        """
        twistd = getattr(self, "parent", None)
        if twistd is not None and twistd.get("nodaemon") and twistd.get("pidfile") == "twistd.pid":
            twistd["pidfile"] = ""

    def opt_version(self) -> None:
        """Print the version and exit."""
        print(f"realtime {__version__}")
        sys.exit(0)


def makeService(options: Mapping[str, Any]) -> IService:
    """Make the supervisor for these options. With mistakes in them it prints all of them and raises SystemExit(78).

    An exception at the import of the application is no such mistake: as in the foreground, the workers try again.
    """
    given = {key: options[name] for name, key in _KEYS.items() if options[name] is not None}
    if options["resume"] is not None:
        return _resume(options, given)
    problems, passing = environment.find_problems(), []
    try:
        settings = read(options["config"], given, os.environ)
        if _becomes_daemon(options):  # its log is the only place for a later failure, and twistd has returned 0 by then
            found = application.check(settings).problems
            problems += [problem.line for problem in found if not problem.may_pass]
            passing = [f"{problem.line}; the workers will try again" for problem in found if problem.may_pass]
    except SettingsError as error:
        problems += error.problems
    if problems:
        print(*problems, sep="\n", file=sys.stderr)
        raise SystemExit(os.EX_CONFIG)
    _allow_descriptors()
    lines = [
        *passing,
        *warnings.find_warnings(settings, os.environ),
        *environment.find_warnings(os.environ),
        *environment.find_exposure(options["config"], settings, _drops_root(options)),
    ]
    service = make_service(
        settings,
        insecure_keys=_insecure_keys(settings, options),
        capture_output=_has_another_log(options),
        sources=_sources(options["config"], given),
        launch=_launch(options, given),
        early_zygote=_fork_early(settings, options),
    )
    if passing:
        print(*passing, sep="\n", file=sys.stderr)
    for line in lines:
        _log.warn("{line}", line=line)
    return service


def _fork_early(settings: Settings, options: Mapping[str, Any]) -> EarlyZygote | None:
    """Fork the zygote, if twistd leaves this process its parent, user and directories: the children have the same."""
    twistd = getattr(options, "parent", None) or {}
    changed = any(twistd.get(option) is not None for option in ("uid", "gid", "chroot"))
    if changed or not twistd.get("nodaemon") or twistd.get("rundir") != ".":
        return None
    if twistd.get("umask") is not None:
        os.umask(twistd["umask"])  # now instead of later
    with suppress(OSError):  # the supervisor starts one, or logs why it can't
        return fork_early([WORKER_MODULE, BROKER_MODULES[settings.engine.type]])
    return None


def _insecure_keys(settings: Settings, options: Mapping[str, Any]) -> list[str]:
    keys = warnings.insecure_keys(settings)
    if environment.stays_root(_drops_root(options)):
        keys.append("root")
    return keys


def _resume(options: Mapping[str, Any], given: dict[str, str]) -> IService:
    """Make the supervisor that takes the place of a former version, as `realtime.supervisor.upgrade` describes it.

    In the trial before, end the process with the result instead.
    """
    inherited = inheritance.read(options["resume"])
    if not inherited.settings:
        _try_out(inherited, options["config"], given)
    settings = configuration.load(inherited.settings)
    launch = _launch(options, given)
    return make_service(
        settings,
        insecure_keys=_insecure_keys(settings, options),
        capture_output=_has_another_log(options),
        sources=_sources(options["config"], given),
        early_zygote=_fork_early(settings, options),
        launch=launch and replace(launch, pidfile=inherited.pidfile),
        inherited=inheritance.take(options["resume"]),
    )


def _try_out(inherited: Inheritance, config: str | None, given: dict[str, str]) -> NoReturn:
    """Report to the former version whether this one could take its place, with which settings."""
    result: dict[str, object]
    try:
        wanted = read(config, given, os.environ)
    except SettingsError as error:
        result = {"problems": error.problems}
    else:
        settings, lines = keep_fixed(with_fixed(wanted, inherited.fixed), wanted)
        make_service(settings, inherited=inherited)
        lines += warnings.find_warnings(settings, os.environ)
        result = {"settings": settings, "warnings": lines, "version": __version__}
    with open(_RESULT, "wb") as pipe:
        pipe.write(msgspec.msgpack.encode(result))
    os._exit(0)


def _launch(options: Mapping[str, Any], given: Mapping[str, str]) -> Launch | None:
    """Return how twistd was started, for the installed version to be executed in its place; None without twistd.

    That starts in the same process, so it becomes no daemon, and keeps the working directory, the user, the umask and
    the file with the process id as they are.
    """
    twistd = getattr(options, "parent", None)
    if twistd is None:
        return None
    # The interpreter with its flags, and the script or `-m` and the module.
    *flags, script = sys.orig_argv[1 : len(sys.orig_argv) - len(sys.argv) + 1]
    command = [sys.executable, *flags, os.path.abspath(script) if os.path.exists(script) else script]
    command += ["--nodaemon", "--pidfile=", "--no_save", "--originalname"]
    logfile = twistd.get("logfile")
    if not logfile and _becomes_daemon(options) and not _has_another_log(options):
        logfile = "twistd.log"
    named = {"logfile": logfile, "logger": twistd.get("logger"), "reactor": twistd.get("reactor")}
    command += [f"--{name}={value}" for name, value in named.items() if value]
    command += ["--syslog", f"--prefix={twistd['prefix']}"] if twistd.get("syslog") else []
    options_of_ours = {"config": options["config"] and os.path.abspath(options["config"])}
    options_of_ours |= {name: given[key] for name, key in _KEYS.items() if key in given}
    command += ["realtime", *(f"--{name}={value}" for name, value in options_of_ours.items() if value is not None)]
    return Launch(command, twistd.get("pidfile") or "")


def make_service(
    settings: Settings,
    worker: str = WORKER_MODULE,
    broker: str | None = None,
    insecure_keys: Iterable[str] = (),
    capture_output: bool = False,
    sources: Sources | None = None,
    early_zygote: EarlyZygote | None = None,
    launch: Launch | None = None,
    inherited: Inheritance | None = None,
) -> Supervisor:
    """Compose the service that `twistd realtime` runs.

    The service stops the reactor after its last process has exited, and sets twistd's exit status: 0 after an orderly
    stop, 1 when a port can't be opened, 78 when the application can't be started.

    worker, broker: modules to run as children. insecure_keys: keys of insecure settings, and `root`, for the metrics.
    capture_output: copy the children's output to our log, because that is not our standard output. sources: of the
    settings, for reloads. early_zygote: see `realtime.supervisor.zygote.fork_early`. launch, inherited: see
    `Supervisor`.
    """
    from twisted.internet import reactor

    log.limit(settings.log.level)
    output.install(settings.log.max_queued_bytes)
    supervisor = Supervisor(
        reactor,
        settings,
        OperatorPort,
        worker=worker,
        broker=broker,
        leave=lambda status: _leave(reactor, status, inherited.pidfile if inherited else ""),
        handle_signals=True,
        capture_output=capture_output,
        sources=sources,
        early_zygote=early_zygote,
        launch=launch,
        inherited=inherited,
    )
    supervisor.metrics.sources.append(output.samples)
    for key in insecure_keys:
        supervisor.metrics.gauge("realtime_insecure_settings", "Insecure settings in use.", lambda: 1.0, key=key)
    return supervisor


def _sources(config: str | None, arguments: dict[str, str]) -> Sources:
    # A daemon changes its working directory, so the path must be absolute.
    environ = {name: value for name, value in os.environ.items() if name.startswith(PREFIX)}
    return Sources(config and os.path.abspath(config), arguments, environ)


def _drops_root(options: Mapping[str, Any]) -> bool:
    twistd = getattr(options, "parent", None)
    return twistd is not None and bool(twistd.get("uid"))


def _becomes_daemon(options: Mapping[str, Any]) -> bool:
    twistd = getattr(options, "parent", None)
    return twistd is not None and not twistd.get("nodaemon") and not twistd.get("debug")


def _has_another_log(options: Mapping[str, Any]) -> bool:
    """Whether twistd's log goes to a file or to syslog, also in the foreground, and not to its standard output."""
    twistd = getattr(options, "parent", None) or {}
    return twistd.get("logfile") not in (None, "-") or bool(twistd.get("syslog") or twistd.get("logger"))


def _leave(reactor: Any, status: int, pidfile: str = "") -> None:
    """Stop the reactor, and end this process with `status`. pidfile: remove it, in place of the twistd that wrote it.

    twistd has no way to set an exit status, and reports a SystemExit from the reactor as a crash. So an atexit function
    exits with the status: at that time twistd has closed its log and removed its pid file.
    """
    if pidfile:
        with suppress(OSError):  # as twistd: after a change of the user it may belong to another one
            os.unlink(pidfile)
    if status:
        atexit.register(_exit, status)
    with suppress(ReactorNotRunning):  # the reactor is already stopping, and waits for `stopService`
        reactor.stop()


def _exit(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    output.drain()
    os._exit(status)


def _allow_descriptors() -> None:
    """Raise the limit on open descriptors, since each client takes one.

    Most systems grant 1,024 at first, for programs that use select(2), and many times that on request.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = _MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MAX_DESCRIPTORS)
    if resource.RLIM_INFINITY != soft < limit:
        with suppress(ValueError, OSError):  # a sandbox may forbid it, and the server runs without it
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
