"""The log of refusals, comings and goings of clients, and that every refusal in the code has a line."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from realtime import errors
from realtime.client_log import _LABELS, KINDS, MAX_FIELD, ClientLog, show
from realtime.config.settings import ChannelOptions, Settings
from realtime.metrics import Metrics
from realtime.protocol.commands import COMMANDS
from realtime.repetition import REPEAT_AFTER
from realtime.transports.http_server import FAULTS

ROOT = Path(__file__).parents[1] / "realtime"


class Bench:
    """A log with both levels on."""

    def __init__(self, **levels: Any) -> None:
        self.now = 100.0
        self.metrics = Metrics()
        self.info: list[str] = []
        self.debug: list[str] = []
        levels = levels or {"info": self.info.append, "debug": self.debug.append}
        self.log = ClientLog(self.metrics, lambda: self.now, **levels)
        self.described = 0

    def describe(self) -> dict[str, object]:
        self.described += 1
        return {"client": "c-1", "user": "'alice'", "address": "203.0.113.7", "transport": "websocket"}

    def page(self, origin: str) -> None:
        self.log.refuse("origin", lambda: {"address": "203.0.113.7", "origin": origin})

    def bad_input(self) -> dict[str, float]:
        samples = self.metrics.snapshot(["realtime_bad_input"])
        return {dict(sample.labels)["kind"]: sample.value for sample in samples if sample.value}


def test_a_kind_has_one_line_a_minute_with_the_cause_the_key_and_the_number_left_out() -> None:
    bench = Bench()
    for number in range(50):
        bench.page(f"http://localhost:{5173 + number}")
    bench.log.refuse("connection_limit")
    assert bench.info[0] == "refused a page of http://localhost:5173: add it to client.allowed_origins (at 203.0.113.7)"
    assert len(bench.info) == 2 and "client.connection_limit" in bench.info[1]
    bench.now += REPEAT_AFTER
    bench.page("http://localhost:1")
    assert bench.info[2].startswith("refused a page of http://localhost:1: ")
    assert bench.info[2].endswith("; 49 more since the last such line")
    assert bench.bad_input() == {"origin": 51, "connection_limit": 1}


def test_calls_have_a_line_for_each_handler() -> None:
    bench = Bench()
    for handler in ("rpc a", "rpc b", "rpc a"):
        bench.log.refuse("handler_timeout", handler=handler)
    assert ["rpc a" in line for line in bench.info] == [True, False]


def test_refusals_left_out_are_reported_when_no_more_come() -> None:
    bench = Bench()
    for _ in range(3):
        bench.page("http://localhost:5173")
    assert bench.log.has_left_out
    bench.log.report_left_out()
    assert len(bench.info) == 1
    bench.now += REPEAT_AFTER
    bench.log.report_left_out()
    assert bench.info[1] == f"{bench.info[0]}; 2 more since the last such line"
    assert not bench.log.has_left_out


def test_level_debug_has_each_refusal_coming_and_going() -> None:
    bench = Bench()
    bench.log.came(bench.describe)
    for _ in range(2):
        bench.log.refuse_by(103, "", "publish", bench.describe, request="publish 'a'")
    bench.log.went(bench.describe, "its connection has ended")
    who = "(client c-1 user 'alice' at 203.0.113.7 by websocket)"
    assert bench.debug[0] == f"connected {who}"
    assert bench.debug[1] == bench.debug[2] and bench.debug[1].startswith("refused publish 'a' with 103: ")
    assert bench.debug[3] == f"left: its connection has ended {who}"
    assert all(line.endswith(who) for line in bench.debug)
    assert len(bench.info) == 1


def test_nothing_is_put_into_words_that_no_level_wants() -> None:
    bench = Bench(info=None, debug=None)
    assert not bench.log.debug
    bench.log.came(bench.describe)
    bench.log.refuse_by(3500, "", "", bench.describe)
    bench.log.went(bench.describe, "")
    assert bench.described == 0
    assert bench.bad_input() == {"token": 1}
    bench = Bench(info=bench.info.append)
    for _ in range(9):
        bench.log.refuse_by(3500, "", "", bench.describe)
    assert bench.described == 1


def test_details_of_another_line_are_for_level_debug() -> None:
    bench = Bench()
    bench.log.refuse_by(100, "", "rpc", bench.describe)
    assert (len(bench.info), len(bench.debug)) == (0, 1)


@pytest.mark.parametrize(
    ("code", "name", "command", "says"),
    [
        (3503, "", "", "by order of"),
        (4711, "", "", "4711 moved by order of"),
        (103, "private_channel", "subscribe", "channel.private_prefix"),
        (103, "", "subscribe", "allow_subscribe_for_client"),
        (103, "", "presence_stats", "allow_presence_for_client"),
        (108, "", "history", "history_size"),
        (108, "", "rpc", "no rpc handler"),
        (1400, "", "rpc", "1400 moved, an error of the application"),
    ],
)
def test_the_most_special_kind_has_the_line(code: int, name: str, command: str, says: str) -> None:
    bench = Bench()
    bench.log.refuse_by(code, name, command, bench.describe, reason="moved")
    assert says in bench.info[0]


def test_values_of_clients_are_escaped_and_cut() -> None:
    bench = Bench()
    bench.page("http://\r\n2026 [supervisor] forged\x1b[2J\x9b" + "x" * 10_000)
    [line] = bench.info
    assert line.isprintable()
    assert "forged\\x1b[2J\\x9b" in line
    assert len(line) < 2 * MAX_FIELD
    assert len(show("\n" * 10_000)) <= MAX_FIELD
    assert show("{origin} %s") == "{origin} %s"
    bench.log.refuse("emulation", lambda: {"path": "/{host}"})
    assert "/{host}" in bench.info[1]


# -- no kind is forgotten ---------------------------------------------------------------------------------------------


def calls(*names: str) -> Iterator[tuple[str, ast.Call]]:
    """Yield the place and the call of each function of these names in the package."""
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in names:
                yield f"{path.relative_to(ROOT)}:{node.lineno}", node


def texts(node: ast.expr | None) -> list[str]:
    return (
        [one.value for one in ast.walk(node) if isinstance(one, ast.Constant) and isinstance(one.value, str)]
        if node
        else []
    )


def named_kinds() -> Iterator[tuple[str, str]]:
    """Yield each place that names a kind, and the kind."""
    for place, call in calls("Refusal"):
        argument = call.args[2] if len(call.args) > 2 else None
        yield from ((place, text) for text in texts(argument))
    for place, call in calls("fault_response", "refuse", "_drop_peer", "refuse_body"):
        argument = call.args[0] if call.args else None
        if isinstance(argument, ast.Constant):
            yield from ((place, text) for text in texts(argument))
    for place, call in calls("ClientError", "Disconnect", "disconnect", "PreparedResponse", "replace"):
        for keyword in call.keywords:
            if keyword.arg in ("kind", "fault"):
                yield from ((place, text) for text in texts(keyword.value) if text)


def test_every_kind_that_the_code_names_has_a_line() -> None:
    found = list(named_kinds())
    assert len(found) > 60
    assert [(place, kind) for place, kind in found if kind not in KINDS] == []
    assert set(FAULTS) <= set(KINDS)


def test_every_code_of_the_protocol_has_a_line() -> None:
    codes = {value[0] for value in vars(errors).values() if isinstance(value, tuple)}
    assert len(codes) > 30
    assert [code for code in sorted(codes) if str(code) not in KINDS] == []


def test_kinds_of_commands_name_commands() -> None:
    assert {name.partition(" ")[0] for name in KINDS if " " in name} <= COMMANDS.keys()


def test_bad_input_is_counted_here_alone() -> None:
    assert {place.partition(":")[0] for place, _ in calls("bad_input_counter")} == {"client_log.py"}
    assert set(_LABELS) <= {name for name, kind in KINDS.items() if kind.is_bad_input}


def test_lines_name_keys_that_exist() -> None:
    sections = {name: getattr(Settings(), name) for name in Settings.__struct_fields__}
    named = re.compile(r"\b([a-z_]+)\.([a-z_]+)")
    for kind, (line, *_) in KINDS.items():
        for section, key in named.findall(line):
            if section in sections:
                assert hasattr(sections[section], key), (kind, section, key)
    options = set(ChannelOptions.__struct_fields__)
    for kind, (line, *_) in KINDS.items():
        for option in re.findall(
            r"\b(allow_[a-z]+_for_[a-z]+|history_[a-z]+|publication_data_format|channel_regex)\b", line
        ):
            assert option in options, (kind, option)
