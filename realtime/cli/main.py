"""The `realtime` command: everything but running the server, which is `twistd realtime`.

Exit statuses: 0 done, 1 failed, 2 wrong usage, 78 wrong configuration (EX_CONFIG of sysexits.h).
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import sys
import urllib.error
import urllib.parse
import urllib.request

from realtime._version import __version__
from realtime.cli import environment, tokens, top
from realtime.config import warnings
from realtime.config.reader import duration, one_line, write_duration
from realtime.config.settings import Settings, read
from realtime.config.toml_lines import commented
from realtime.errors import KeysUnavailable, SettingsError

# Seconds that a token is good for, unless said otherwise, and at most.
_WEEK = 604_800
_LONGEST = 10**10
# Seconds to wait for a server that is asked.
_DUMP_LIMIT = 10.0


def check_config(arguments: argparse.Namespace) -> int:
    """Read the configuration just as the server does, and print what is wrong with it."""
    problems = environment.problems()
    try:
        settings = read(arguments.config, {}, os.environ)
    except SettingsError as error:
        problems += error.problems
    if problems:
        print(*problems, sep="\n", file=sys.stderr)
        return os.EX_CONFIG
    found = warnings.warnings(settings, os.environ)
    for line in found:
        print(f"warning: {line}", file=sys.stderr)
    if found and arguments.strict:
        return os.EX_CONFIG
    print(f"{one_line(arguments.config or 'environment')}: good")
    return 0


def gen_config(arguments: argparse.Namespace) -> int:
    """Write a configuration with every key explained and fresh secrets."""
    text = generated()
    if arguments.config is None:
        print(text, end="")
        return 0
    name = one_line(arguments.config)
    try:
        # The secrets are for the owner's eyes, and O_EXCL neither overwrites a file nor follows a link.
        descriptor = os.open(arguments.config, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        remedy = "remove it first, or name another" if isinstance(error, FileExistsError) else "name another file"
        print(f"{name}: can't be written: {error.strerror}; {remedy}", file=sys.stderr)
        return 1
    with open(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    print(f"{name}: written; start with: twistd -n realtime --config {name}")
    return 0


def generated() -> str:
    """The text of a configuration that differs from the defaults only by having secrets, new ones each time."""
    given = {key: secrets.token_urlsafe(48) for key in ("client.token.hmac_secret_key", "http_api.key")}
    return "\n".join(
        [
            "# Configuration of realtime. A line like #port = 8000 shows a default; remove the # to change it.",
            '# Durations have units ("1h30m", "25s", "300ms"); sizes are bytes. The environment wins over this file:',
            "# http_server.port is REALTIME_HTTP_SERVER_PORT. To check it: realtime check-config --config FILE",
            "",
            *commented(Settings, given),
        ]
    )


def gen_token(arguments: argparse.Namespace) -> int:
    """Print a connection token, signed with the key of the configuration."""
    return _generate(arguments, "")


def gen_sub_token(arguments: argparse.Namespace) -> int:
    """Print a subscription token, signed with the key of the configuration."""
    return _generate(arguments, arguments.channel)


def _generate(arguments: argparse.Namespace, channel: str) -> int:
    try:
        client = read(arguments.config, {}, os.environ).client
        token = tokens.made(client, arguments.user, arguments.ttl, channel)
    except SettingsError as error:
        print(*error.problems, sep="\n", file=sys.stderr)
        return os.EX_CONFIG
    if arguments.quiet:
        print(token, end="")
    else:
        lasts = "for ever" if arguments.ttl is None else f"for {write_duration(arguments.ttl)}"
        where = f" and channel {json.dumps(channel)}" if channel else ""
        print(f"token of user {json.dumps(arguments.user)}{where}, good {lasts}:\n{token}")
    return 0


def check_token(arguments: argparse.Namespace) -> int:
    """Judge a connection token as the server does, and print what it says."""
    return _check(arguments, subscription=False)


def check_sub_token(arguments: argparse.Namespace) -> int:
    """Judge a subscription token as the server does, and print what it says."""
    return _check(arguments, subscription=True)


def _check(arguments: argparse.Namespace, subscription: bool) -> int:
    try:
        client = read(arguments.config, {}, os.environ).client
    except SettingsError as error:
        print(*error.problems, sep="\n", file=sys.stderr)
        return os.EX_CONFIG
    try:
        print(tokens.shown(*tokens.judged(client, arguments.token, subscription)))
    except tokens.TokenRefused as error:
        print(f"refused: {error}", file=sys.stderr)
        return 1
    except KeysUnavailable as error:
        print(f"not judged: {error}", file=sys.stderr)
        return 1
    return 0


def _lifetime(text: str) -> int | None:
    """Whole seconds of a number of them or of a duration, None for -1. Raises ArgumentTypeError."""
    if text == "-1":
        return None
    try:
        seconds = int(text) if text.isdecimal() else int(duration(text))
    except ValueError:
        seconds = 0
    if not 0 < seconds <= _LONGEST:
        raise argparse.ArgumentTypeError('write seconds, a duration such as "24h", or -1 for no end')
    return seconds


def info(arguments: argparse.Namespace) -> int:
    """Print versions and what the kernel offers, as a report of a fault should have them."""
    found = environment.facts(os.environ)
    width = max(map(len, found))
    for name, value in found.items():
        print(f"{name:{width}}  {value}")
    for line in (problems := environment.problems()):
        print(line, file=sys.stderr)
    return 1 if problems else 0


def dump(arguments: argparse.Namespace) -> int:
    """Print what one process of the running server tells of itself."""
    try:
        server = read(arguments.config, {}, os.environ).http_server
    except SettingsError as error:
        print(*error.problems, sep="\n", file=sys.stderr)
        return os.EX_CONFIG
    host = f"[{server.internal_address}]" if ":" in server.internal_address else server.internal_address
    asked = urllib.parse.urlencode({"worker": arguments.worker, "what": arguments.what})
    url = f"http://{host}:{arguments.port or server.internal_port}/dump?{asked}"
    # Loopback is not reached by way of a proxy, whatever the environment says.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=_DUMP_LIMIT) as response:
            sys.stdout.write(response.read().decode("utf-8", "replace"))
    except urllib.error.HTTPError as error:
        print(f"{url}: {error.read().decode('utf-8', 'replace').strip()}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{url}: nobody answers: {error}", file=sys.stderr)
        return 1
    return 0


def show_top(arguments: argparse.Namespace) -> int:
    """Show the workers of the running server live: conditions, lag, rates, and what blocks them. q quits."""
    return top.once(arguments.url) if arguments.once else top.live(arguments.url)


def parser() -> argparse.ArgumentParser:
    """The command line; each subcommand's `run` takes the parsed arguments and gives the exit status."""
    line = argparse.ArgumentParser(
        prog="realtime", description="Tools of the realtime server. The server itself is: twistd realtime"
    )
    line.add_argument("--version", action="version", version=f"realtime {__version__}")
    commands = line.add_subparsers(title="commands", metavar="COMMAND", required=True)

    check = commands.add_parser(
        "check-config", aliases=["checkconfig"], help="check a configuration", description=check_config.__doc__
    )
    check.add_argument("-c", "--config", metavar="FILE", help="TOML file; none: check the environment alone")
    check.add_argument("-s", "--strict", action="store_true", help="warnings count as problems")
    check.set_defaults(run=check_config)

    generate = commands.add_parser(
        "gen-config", aliases=["genconfig"], help="write a configuration", description=gen_config.__doc__
    )
    generate.add_argument("-c", "--config", metavar="FILE", help="new file, readable by you alone; none: print it")
    generate.set_defaults(run=gen_config)

    watching = commands.add_parser("top", help="watch the workers of the running server", description=show_top.__doc__)
    watching.add_argument(
        "--url", default="http://127.0.0.1:8001", help="the operators' port; default: http://127.0.0.1:8001"
    )
    watching.add_argument("--once", action="store_true", help="print one table and end")
    watching.set_defaults(run=show_top)

    telling = commands.add_parser(
        "dump", help="show the stacks, tasks or memory of a running worker", description=dump.__doc__
    )
    telling.add_argument("what", choices=["stacks", "tasks", "memory"])
    telling.add_argument("-w", "--worker", default="0", metavar="N", help='its number, or "broker"; default: 0')
    telling.add_argument("-c", "--config", metavar="FILE", help="the running server's TOML file")
    telling.add_argument("-p", "--port", type=int, default=0, help="the operators' port, when not as configured")
    telling.set_defaults(run=dump)

    for name, run, of in (
        ("gen-token", gen_token, "connection"),
        ("gen-sub-token", gen_sub_token, "subscription"),
    ):
        making = commands.add_parser(
            name, aliases=[name.replace("-", "")], help=f"make a {of} token", description=run.__doc__
        )
        making.add_argument("-c", "--config", metavar="FILE", help="TOML file; none: the environment alone")
        making.add_argument("-u", "--user", default="", metavar="ID", help="the user; default: an anonymous one")
        if run is gen_sub_token:
            making.add_argument("-s", "--channel", required=True, help="the channel that it is for")
        making.add_argument(
            *("-t", "--ttl"), type=_lifetime, default=_WEEK, help="seconds, a duration, or -1 for no end; default: 168h"
        )
        making.add_argument("-q", "--quiet", action="store_true", help="print the token alone, without a line end")
        making.set_defaults(run=run)

    for name, run, of in (
        ("check-token", check_token, "connection"),
        ("check-sub-token", check_sub_token, "subscription"),
    ):
        judging = commands.add_parser(
            name, aliases=[name.replace("-", "")], help=f"check a {of} token", description=run.__doc__
        )
        judging.add_argument("token", metavar="TOKEN")
        judging.add_argument("-c", "--config", metavar="FILE", help="TOML file; none: the environment alone")
        judging.set_defaults(run=run)

    about = commands.add_parser("info", help="print versions and features", description=info.__doc__)
    about.set_defaults(run=info)
    return line


def main() -> int:
    """The console script. Returns the exit status; argparse itself exits with 2 for wrong usage."""
    arguments = parser().parse_args()
    status: int = arguments.run(arguments)
    return status
