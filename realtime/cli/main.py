"""The `realtime` command: everything but running the server, which is `twistd realtime`.

Exit statuses: 0 done, 1 failed, 2 wrong usage, 78 wrong configuration (EX_CONFIG of sysexits.h).
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import sys
import urllib.parse
from collections.abc import Callable

from realtime._version import __version__
from realtime.cli import application, environment, running, tokens, top
from realtime.config import warnings
from realtime.config.conversion import convert_json
from realtime.config.settings import Settings
from realtime.config.sources import read, read_text
from realtime.config.toml_lines import commented_lines
from realtime.config.values import escape_unprintable, format_duration, parse_duration
from realtime.errors import KeysUnavailable, SettingsError

# Lifetimes of tokens, in seconds: the default, and the longest.
_WEEK = 604_800
_LONGEST = 10**10

Run = Callable[[argparse.Namespace], int]
"""A subcommand: takes the parsed arguments and returns the exit status. May raise SettingsError."""


def check_config(arguments: argparse.Namespace) -> int:
    """Read the configuration and import the application as the server does, and print their problems and warnings."""
    problems, lines = environment.find_problems(), []
    try:
        settings = read(arguments.config, {}, os.environ)
        if not arguments.without_app:
            found = application.check(settings)
            problems += [problem.line for problem in found.problems]
            lines = found.warnings
    except SettingsError as error:
        problems += error.problems
    if problems:
        print(*problems, sep="\n", file=sys.stderr)
        return os.EX_CONFIG
    lines = warnings.find_warnings(settings, os.environ) + lines
    for line in lines:
        print(f"warning: {line}", file=sys.stderr)
    if lines and arguments.strict:
        return os.EX_CONFIG
    print(f"{escape_unprintable(arguments.config or 'environment')}: good")
    return 0


def gen_config(arguments: argparse.Namespace) -> int:
    """Write a configuration that explains every key and contains new secrets, or convert one from JSON."""
    source = arguments.source
    text = generate_config() if source is None else convert_json(escape_unprintable(source), read_text(source))
    if arguments.config is None:
        print(text, end="")
        return 0
    name = escape_unprintable(arguments.config)
    try:
        # Only the owner may read the secrets. O_EXCL neither overwrites a file nor follows a link.
        descriptor = os.open(arguments.config, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        remedy = "remove it, or name another file" if isinstance(error, FileExistsError) else "name another file"
        print(f"{name}: can't be written: {error.strerror}; {remedy}", file=sys.stderr)
        return 1
    with open(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    print(f"{name}: written; start the server with: twistd -n realtime --config {name}")
    return 0


def generate_config() -> str:
    """Return the text of a configuration with all defaults, and with secrets that are new at each call."""
    given = {key: secrets.token_urlsafe(48) for key in ("client.token.hmac_secret_key", "http_api.key")}
    return "\n".join(
        [
            "# Configuration of realtime. A line such as #port = 8000 shows a default; remove its # to change it.",
            '# Durations have units ("1h30m", "25s", "300ms"), only "0" needs none; sizes are bytes. A variable of the',
            "# environment overrides its key in this file: REALTIME_HTTP_SERVER_PORT overrides http_server.port.",
            "# To check this file, run: realtime check-config --config FILE",
            "",
            *commented_lines(Settings, given),
        ]
    )


def gen_token(arguments: argparse.Namespace) -> int:
    """Print a connection token, signed with the secret of the configuration."""
    return _print_token(arguments, "")


def gen_sub_token(arguments: argparse.Namespace) -> int:
    """Print a subscription token, signed with the secret of the configuration."""
    return _print_token(arguments, arguments.channel)


def _print_token(arguments: argparse.Namespace, channel: str) -> int:
    client = read(arguments.config, {}, os.environ).client
    token = tokens.make_token(client, arguments.user, arguments.ttl, channel)
    if arguments.quiet:
        print(token, end="")
    else:
        validity = "never expires" if arguments.ttl is None else f"good for {format_duration(arguments.ttl)}"
        scope = f" and channel {json.dumps(channel)}" if channel else ""
        print(f"token of user {json.dumps(arguments.user)}{scope}, {validity}:\n{token}")
    return 0


def check_token(arguments: argparse.Namespace) -> int:
    """Verify a connection token as the server does, and print its claims."""
    return _verify_token(arguments, is_subscription=False)


def check_sub_token(arguments: argparse.Namespace) -> int:
    """Verify a subscription token as the server does, and print its claims."""
    return _verify_token(arguments, is_subscription=True)


def _verify_token(arguments: argparse.Namespace, is_subscription: bool) -> int:
    client = read(arguments.config, {}, os.environ).client
    try:
        claims, all_claims = tokens.verify_token(client, arguments.token, is_subscription)
    except tokens.TokenRefused as error:
        print(f"refused: {error}", file=sys.stderr)
        return 1
    except KeysUnavailable as error:
        print(f"not verified: {error}", file=sys.stderr)
        return 1
    print(tokens.describe_token(claims, all_claims))
    return 0


def _parse_ttl(text: str) -> int | None:
    """Return the whole seconds of a number or of a duration, None for -1. Raises ArgumentTypeError."""
    if text == "-1":
        return None
    try:
        seconds = int(text) if text.isdecimal() else int(parse_duration(text))
    except ValueError:
        seconds = 0
    if not 0 < seconds <= _LONGEST:
        raise argparse.ArgumentTypeError('write seconds, a duration such as "24h", or -1 for a token without end')
    return seconds


def info(arguments: argparse.Namespace) -> int:
    """Print the versions and kernel features that a bug report should include."""
    description = environment.describe(os.environ)
    width = max(map(len, description))
    for name, value in description.items():
        print(f"{name:{width}}  {value}")
    for line in (problems := environment.find_problems()):
        print(line, file=sys.stderr)
    return 1 if problems else 0


def dump(arguments: argparse.Namespace) -> int:
    """Print the stacks, tasks or memory of one process of the running server."""
    query = urllib.parse.urlencode({"worker": arguments.worker, "what": arguments.what})
    try:
        with running.send(running.url(arguments, f"/dump?{query}")) as response:
            sys.stdout.write(response.read().decode("utf-8", "replace"))
    except running.Unanswered as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def reload(arguments: argparse.Namespace) -> int:
    """Have the running server read its configuration again and replace its workers. Its clients stay connected."""
    return running.command(running.url(arguments, "/reload"))


def upgrade(arguments: argparse.Namespace) -> int:
    """Have the installed version of this package and of Python take the place of the running server, with all its
    processes. Its clients stay connected, and its channels keep their history."""
    return running.command(running.url(arguments, "/upgrade"), running.url(arguments, "/upgrade?join=1"))


def scale(arguments: argparse.Namespace) -> int:
    """Change the number of workers of the running server. Its clients stay connected."""
    return running.command(running.url(arguments, f"/scale?workers={arguments.workers}"))


def show_top(arguments: argparse.Namespace) -> int:
    """Show the workers of the running server: conditions, lag, rates, and blocking code. Press q to quit."""
    return top.once(arguments.url) if arguments.once else top.live(arguments.url)


def build_parser() -> argparse.ArgumentParser:
    """Build the command line. Each subcommand sets `run` to its function."""
    parser = argparse.ArgumentParser(
        prog="realtime", description="Tools for the realtime server. To run the server itself, use: twistd realtime"
    )
    parser.add_argument("--version", action="version", version=f"realtime {__version__}")
    commands = _Commands(parser)
    _add_config_commands(commands)
    _add_inspection_commands(commands)
    _add_change_commands(commands)
    _add_token_commands(commands)
    return parser


class _Commands:
    """The subcommands of a parser."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(self, name: str, run: Run, help: str) -> argparse.ArgumentParser:
        """Add a subcommand. A name with hyphens works without them too, as Centrifugo spells it."""
        spellings = [name.replace("-", "")] if "-" in name else []
        command = self._subparsers.add_parser(name, aliases=spellings, help=help, description=run.__doc__)
        command.set_defaults(run=run)
        return command


def _add_config_commands(commands: _Commands) -> None:
    check = commands.add("check-config", check_config, "check a configuration")
    check.add_argument("-c", "--config", metavar="FILE", help="TOML file; default: only environment variables")
    check.add_argument("-s", "--strict", action="store_true", help="treat warnings as problems")
    check.add_argument("--without-app", action="store_true", help="do not import the application")
    generate = commands.add("gen-config", gen_config, "write a configuration")
    generate.add_argument(
        "-c", "--config", metavar="FILE", help="new file, which only you may read; default: print the configuration"
    )
    generate.add_argument(
        "--from", dest="source", metavar="FILE", help="Centrifugo configuration in JSON, which the command converts"
    )


def _add_inspection_commands(commands: _Commands) -> None:
    watch = commands.add("top", show_top, "watch the workers of the running server")
    watch.add_argument(
        "--url", default="http://127.0.0.1:8001", help="URL of the operators' port; default: http://127.0.0.1:8001"
    )
    watch.add_argument("--once", action="store_true", help="print one table and exit")
    show = commands.add("dump", dump, "show the stacks, tasks or memory of a running worker")
    show.add_argument("what", choices=["stacks", "tasks", "memory"])
    show.add_argument("-w", "--worker", default="0", metavar="N", help='number of the worker, or "broker"; default: 0')
    _add_server(show)
    commands.add("info", info, "print versions and kernel features")


def _add_change_commands(commands: _Commands) -> None:
    _add_server(commands.add("reload", reload, "replace the workers: new configuration, new code of the application"))
    _add_server(commands.add("upgrade", upgrade, "take over the installed version of this package and of Python"))
    change = commands.add("scale", scale, "change the number of workers")
    change.add_argument("workers", type=int, metavar="N", help="number of workers")
    _add_server(change)


def _add_server(command: argparse.ArgumentParser) -> None:
    """Add the options that name the running server, see `running.url`."""
    command.add_argument("-c", "--config", metavar="FILE", help="TOML file of the running server")
    command.add_argument(
        "-p", "--port", type=int, default=0, help="operators' port; default: http_server.internal_port"
    )


def _add_token_commands(commands: _Commands) -> None:
    config = "TOML file; default: only environment variables"
    for name, generate, kind in (
        ("gen-token", gen_token, "connection"),
        ("gen-sub-token", gen_sub_token, "subscription"),
    ):
        command = commands.add(name, generate, f"make a {kind} token")
        command.add_argument("-c", "--config", metavar="FILE", help=config)
        command.add_argument("-u", "--user", default="", metavar="ID", help="user ID; default: the anonymous user")
        if generate is gen_sub_token:
            command.add_argument("-s", "--channel", required=True, help="channel that the token admits to")
        command.add_argument(
            *("-t", "--ttl"),
            type=_parse_ttl,
            default=_WEEK,
            help="lifetime in seconds, as a duration, or -1 for a token without end; default: 168h",
        )
        command.add_argument("-q", "--quiet", action="store_true", help="print only the token, without a line break")
    for name, check, kind in (
        ("check-token", check_token, "connection"),
        ("check-sub-token", check_sub_token, "subscription"),
    ):
        command = commands.add(name, check, f"check a {kind} token")
        command.add_argument("token", metavar="TOKEN")
        command.add_argument("-c", "--config", metavar="FILE", help=config)


def main() -> int:
    """Run the command line and return the exit status. argparse itself exits with 2 for wrong usage."""
    arguments = build_parser().parse_args()
    run: Run = arguments.run
    try:
        return run(arguments)
    except SettingsError as error:
        print(*error.problems, sep="\n", file=sys.stderr)
        return os.EX_CONFIG
