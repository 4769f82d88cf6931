"""`realtime top`: the live figures of a running server in a terminal.

Once a second the command fetches /snapshot from the operators' port (see `realtime.operators.live`) and draws it. Names
in a snapshot come from applications and their clients: unprintable characters are escaped, so that no name can control
the terminal.
"""

from __future__ import annotations

import http.client
import json
import os
import select
import signal
import sys
import termios
import time
import tty
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from realtime.config.values import escape_unprintable

# Seconds between two snapshots.
INTERVAL = 1.0
# Seconds for the server to answer.
LIMIT = 5.0
# Problems below the first line, which has the worst.
MAX_PROBLEMS = 4
WIDTH, HEIGHT = 120, 40  # of the table that `--once` prints where there is no terminal
_DEFAULT_SIZE = 80, 24  # of a terminal that reports no size

_NONE = "-"
_PLAIN, _BOLD, _DIM, _RED, _YELLOW, _GREEN = "0", "1", "2", "31", "33", "32"
_COLOURS = {"healthy": _GREEN, "lagging": _YELLOW, "draining": _YELLOW, "pressed": _RED, "absent": _RED}
_ALTERNATE, _NORMAL = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
_HOME, _CLEAR_LINE, _CLEAR_REST = "\x1b[H", "\x1b[K", "\x1b[J"

Line = list[tuple[str, str]]
"""Pieces of text, each with its style."""


class Unreachable(Exception):
    """The server did not answer, or another program did. The message is one readable line."""


def fetch(url: str) -> dict[str, Any]:
    """Fetch the server's latest snapshot. url: of its operators' port. Raises Unreachable."""
    # A proxy from the environment can't reach this machine's loopback.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    name = escape_unprintable(url)
    try:
        with opener.open(f"{url.rstrip('/')}/snapshot", timeout=LIMIT) as answer:
            snapshot = json.load(answer)
    except urllib.error.HTTPError as error:
        question = "is this the operators' port (http_server.internal_port)?"
        raise Unreachable(f"{name}: answered with status {error.code}; {question}") from None
    except urllib.error.URLError as error:
        raise Unreachable(f"{name}: cannot connect: {escape_unprintable(str(error.reason))}") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise Unreachable(f"{name}: unreadable answer: {escape_unprintable(str(error))}") from None
    if not isinstance(snapshot, dict) or "workers" not in snapshot:
        raise Unreachable(f"{name}: no snapshot; is this the operators' port of a server that has started?")
    return snapshot


# The screen


def render(snapshot: dict[str, Any], width: int, height: int, hint: str = "", trouble: str = "") -> list[Line]:
    """Draw a screen of at most `height` lines of `width` columns.

    hint: which keys there are. trouble: why the snapshot is old; "" for a current one. Where the screen is too small
    for all workers, unhealthy ones come first, and some lines are kept for loop time and blocks.
    """
    workers = snapshot["workers"]
    loop, places = list(_loop(snapshot["loop"], len(workers))), list(_places(snapshot["places"], width))
    incidents = list(_incidents(snapshot["incidents"], width))
    further = [[_problem(problem)] for problem in snapshot["problems"][1 : 1 + MAX_PROBLEMS]]
    head = [_head(snapshot, hint, trouble), *further, _totals(snapshot), []]
    if len(head) + 2 + len(workers) + len(loop) + len(places) + len(incidents) > height:
        loop, places = loop[:5], places[:4]
    sections = [*loop, *places, *incidents]
    room = max(height - len(head) - 1 - min(len(sections), 12), 3)
    broker = [_worker({**snapshot["broker"], "slot": "broker"}, width)] if snapshot["broker"] else []
    room -= len(broker)
    table = [_titles(width), *(_worker(worker, width) for worker in workers), *broker]
    if len(workers) > room:
        ordered = sorted(workers, key=lambda worker: (worker["condition"] == "healthy", worker["slot"]))
        left_out: Line = [(f"... and {len(workers) - room + 1} more workers", _DIM)]
        table = [_titles(width), *(_worker(worker, width) for worker in ordered[: room - 1]), left_out, *broker]
    return [_cut(line, width) for line in (*head, *table, *sections)][:height]


def _head(snapshot: dict[str, Any], hint: str, trouble: str) -> Line:
    when = time.strftime("%H:%M:%S", time.localtime(snapshot["at"]))
    if trouble:
        return [(f"realtime  {when}  ", _BOLD), (trouble, _RED)]
    problems = snapshot["problems"]
    state = _problem(problems[0]) if problems else ("all processes are healthy", _GREEN)
    return [(f"realtime  {when}  ", _BOLD), state, (f"  port {snapshot['port']}  {hint}", _DIM)]


def _problem(problem: dict[str, str]) -> tuple[str, str]:
    return escape_unprintable(problem["text"]), _RED if problem["tone"] == "bad" else _YELLOW


def _totals(snapshot: dict[str, Any]) -> Line:
    workers, errors = snapshot["workers"], snapshot["handler_errors"]["count"]

    def total_rate(name: str) -> str:
        return _rate(sum((worker["rates"] or {}).get(name, 0.0) for worker in workers))

    connections = sum(worker["connections"] or 0 for worker in workers)
    return [
        (f"{connections} connections, {total_rate('received')} messages/s in, ", _PLAIN),
        (f"{total_rate('sent')} out, {total_rate('connects')} connects/s", _PLAIN),
        (f", {errors} errors of handlers" if errors else "", _PLAIN),
    ]


# Title, width, and the narrowest terminal that shows the column. The first two are left-aligned.
_COLUMNS = [
    ("PROCESS", 7, 0), ("CONDITION", 9, 0), ("LAG", 7, 0), ("UTIL", 5, 0), ("CONNS", 7, 0), ("IN/S", 6, 0),
    ("OUT/S", 7, 0), ("RSS", 7, 0), ("RESTARTS", 8, 80), ("QUEUED", 7, 88), ("WEIGHT", 6, 96), ("ACCEPT", 6, 104),
    ("NEW/S", 6, 112),
]  # fmt: skip


def _titles(width: int) -> Line:
    return [(_row([title for title, _, _ in _COLUMNS], width), _DIM)]


def _row(cells: Sequence[str], width: int) -> str:
    parts = [
        cell.ljust(size) if index < 2 else cell.rjust(size)
        for index, (cell, (_, size, min_width)) in enumerate(zip(cells, _COLUMNS, strict=True))
        if width >= min_width
    ]
    return "  ".join(parts)


def _worker(worker: dict[str, Any], width: int) -> Line:
    rates = worker["rates"] or {}
    cells = [
        str(worker["slot"]), _condition(worker), _seconds(worker["peak_lag"]), _percent(worker["utilization"]),
        _count(worker["connections"]), _rate(rates.get("received")), _rate(rates.get("sent")), _bytes(worker["rss"]),
        _count(worker["restarts"]), _bytes(worker["queued_bytes"]), _count(worker.get("weight")),
        _count(worker.get("accept_queue")), _rate(rates.get("connects")),
    ]  # fmt: skip
    row = _row(cells, width)
    begin = _COLUMNS[0][1] + 2
    end = begin + _COLUMNS[1][1]
    style = _COLOURS.get(worker["condition"], _PLAIN)
    line = [(row[:begin], _PLAIN), (row[begin:end], style), (row[end:], _PLAIN)]
    if second := worker.get("replacement"):
        line.append((f"  {second['role']} {second['state']}, {_count(second['connections'])} connections", _YELLOW))
    return [*line, (f"  {escape_unprintable(worker['handler'])}", _DIM)] if worker["handler"] else line


def _condition(worker: dict[str, Any]) -> str:
    if worker["crash_loop"] and worker["condition"] == "absent":
        return "crashing"
    return str(worker["state"] if worker["condition"] in (None, "absent") else worker["condition"])


def _loop(accounts: Sequence[dict[str, Any]], workers: int) -> Iterator[Line]:
    """Draw how the workers' loops spent the last seconds."""
    if not accounts:
        return
    yield []
    several = workers > 1
    yield [(f"{'LOOPS':>8}  {'HIGHEST':>10}  WORK" if several else f"{'LOOP':>8}  WORK", _DIM)]
    for account in accounts:
        most = f"{_share(account['most'])} of {account['slot']}"
        shares = f"{_share(account['share']):>8}  {most:>10}" if several else f"{_share(account['share']):>8}"
        yield [(f"{shares}  ", _PLAIN), (escape_unprintable(account["account"]), _BOLD)]


def _places(places: Sequence[dict[str, Any]], width: int) -> Iterator[Line]:
    if not places:
        return
    yield []
    yield [(f"{'BLOCKED':>8}  {'RELIEF':>8}  {'TIMES':>6}  BY", _DIM)]
    for place in places[:5]:
        where = _place(place["place"], place["handler"], width - 28)
        figures = f"{_seconds(place['seconds']):>8}  {_seconds(place['relieved']):>8}  {_count(place['count']):>6}  "
        yield [(figures, _PLAIN), *where]


def _incidents(incidents: Sequence[dict[str, Any]], width: int) -> Iterator[Line]:
    if not incidents:
        return
    yield []
    yield [(f"{'AT':8}  {'FOR':>7}  {'WORKER':6}  INCIDENT", _DIM)]
    for incident in incidents:
        when = time.strftime("%H:%M:%S", time.localtime(incident["at"]))
        style = _RED if incident["lasts"] else _PLAIN
        where = _place(incident["place"], incident["handler"], width - 27)
        duration = f"{_seconds(incident['duration']):>7}"
        yield [(f"{when}  ", _PLAIN), (duration, style), (f"  {incident['slot']:<6}  ", _PLAIN), *where]


def _place(place: str, handler: str | None, width: int) -> Line:
    """Draw file and line, cut at their beginning where the room is short, and the handler."""
    place, handler = escape_unprintable(place), escape_unprintable(handler or "")
    room = max(width - len(handler) - 2 if handler else width, 24)
    if len(place) > room:
        place = "..." + place[3 - room :]
    return [(place, _BOLD), (f"  {handler}", _PLAIN)] if handler else [(place, _BOLD)]


def _cut(line: Line, width: int) -> Line:
    """Cut a line at the terminal's edge."""
    kept: Line = []
    for text, style in line:
        if width <= 0:
            break
        kept.append((text[:width], style))
        width -= len(text)
    return kept


# Figures as text


def _seconds(value: float | None) -> str:
    if value is None:
        return _NONE
    if value < 0.9995:
        return f"{value * 1000:.1f}ms" if value < 0.00995 else f"{value * 1000:.0f}ms"
    return f"{value:.2f}s" if value < 99.5 else f"{value:.0f}s"


def _percent(value: float | None) -> str:
    return _NONE if value is None else f"{value * 100:.0f}%"


def _share(value: float) -> str:
    return f"{value * 100:.1f}%" if value < 0.0995 else f"{value * 100:.0f}%"


def _count(value: int | None) -> str:
    return _NONE if value is None else str(value)


def _rate(value: float | None) -> str:
    if value is None:
        return _NONE
    if value >= 99_950:
        return f"{value / 1000:.0f}k"
    return f"{value:.1f}" if 0 < value < 9.95 else f"{value:.0f}"


def _bytes(value: float | None) -> str:
    if value is None:
        return _NONE
    power = 0
    while value >= 999.5 and power < 4:
        value, power = value / 1000, power + 1
    unit = ("B", "kB", "MB", "GB", "TB")[power]
    return f"{value:.1f}{unit}" if power and value < 99.5 else f"{value:.0f}{unit}"


# The command


def once(url: str) -> int:
    """Print one table. Returns the exit status: 1 when the server is unreachable."""
    try:
        snapshot = fetch(url)
    except Unreachable as error:
        print(error, file=sys.stderr)
        return 1
    width = os.get_terminal_size().columns if sys.stdout.isatty() else WIDTH
    for line in render(snapshot, width, HEIGHT + len(snapshot["workers"])):
        print("".join(text for text, _ in line).rstrip())
    return 0


def live(url: str) -> int:
    """Show the figures until `q` or Ctrl-C. Returns the exit status: 1 when the server is unreachable at the start."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        print("standard input and output must be a terminal; use --once for one table", file=sys.stderr)
        return 2
    try:
        snapshot = fetch(url)
    except Unreachable as error:
        print(error, file=sys.stderr)
        return 1
    trouble = ""
    with _screen() as resizes:
        due = time.monotonic() + INTERVAL
        while True:
            _show(snapshot, trouble)
            if _is_quit(resizes, max(due - time.monotonic(), 0.0)):
                return 0
            if time.monotonic() < due:
                continue  # the terminal was resized: draw again
            due = time.monotonic() + INTERVAL
            try:
                snapshot, trouble = fetch(url), ""
            except Unreachable as error:
                trouble = str(error)
    return 0


def _show(snapshot: dict[str, Any], trouble: str) -> None:
    width, height = (size or default for size, default in zip(os.get_terminal_size(), _DEFAULT_SIZE, strict=True))
    lines = render(snapshot, width, height, "q quits", trouble)
    # Each line is cleared before it is written: after a full-width line the cursor stays on the last character.
    drawn = "\r\n".join(_CLEAR_LINE + "".join(map(_styled, line)) for line in lines)
    sys.stdout.write(_HOME + drawn + (f"\r\n{_CLEAR_REST}" if len(lines) < height else ""))
    sys.stdout.flush()


def _styled(piece: tuple[str, str]) -> str:
    text, style = piece
    return text if style == _PLAIN else f"\x1b[{style}m{text}\x1b[0m"


@contextmanager
def _screen() -> Iterator[int]:
    """Use the alternate screen, with unbuffered keys and no cursor, and restore the terminal afterwards.

    Gives a descriptor that is readable after a change of the terminal's size.
    """
    keyboard = sys.stdin.fileno()
    attributes = termios.tcgetattr(keyboard)
    resizes, wakeup = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    previous_handler = signal.signal(signal.SIGWINCH, lambda *_: None)
    previous_wakeup = signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
    tty.setcbreak(keyboard)
    sys.stdout.write(_ALTERNATE)
    try:
        yield resizes
    except KeyboardInterrupt:
        pass
    finally:
        sys.stdout.write(_NORMAL)
        sys.stdout.flush()
        termios.tcsetattr(keyboard, termios.TCSADRAIN, attributes)
        signal.set_wakeup_fd(previous_wakeup)
        signal.signal(signal.SIGWINCH, previous_handler)
        os.close(resizes)
        os.close(wakeup)


def _is_quit(resizes: int, seconds: float) -> bool:
    """Wait for a key or a resize, `seconds` at most. Returns whether the key was `q` or the terminal is gone."""
    keyboard = sys.stdin.fileno()
    ready, _, _ = select.select([keyboard, resizes], [], [], seconds)
    if resizes in ready:
        os.read(resizes, 4096)
    if keyboard not in ready:
        return False
    keys = os.read(keyboard, 64)
    return not keys or b"q" in keys.lower()
