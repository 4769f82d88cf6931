"""What the log of a whole server says of refused clients, of many short calls, and of the application's own events."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jwt
import psutil
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from tests.system.serving import BASE, HERE, TWISTD, Server, ServerStarter, merged, toml, wait_until

KEY = "a secret of thirty-two characters"
SECTIONS: dict[str, Any] = {
    "app": {"module": "logging_app:app", "path": str(HERE / "apps")},
    "workers": {"count": 1, "processes": 1, "threads": 2},
    "log": {"level": "debug", "loggers": {"shop": "info", "asyncio": "warn"}},
    "loop": {"max_lag": "10s"},  # the many calls below press the worker
    "client": {"allowed_origins": ["https://shop.example"], "token": {"hmac_secret_key": KEY}},
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    start = ServerStarter(tmp_path_factory.mktemp("lines"))
    yield start(**SECTIONS)
    start.finish()


def token(**claims: object) -> str:
    return jwt.encode({"sub": "alice", **claims}, KEY, algorithm="HS256")


def converse(server: Server, *commands: dict[str, Any], **connect_request: Any) -> list[Any]:
    """Connect, and send all commands in one message. Returns the replies, or the close code at the end."""
    replies: list[Any] = []
    with connect(server.endpoint, open_timeout=20) as client:
        try:
            for message in filter(None, ([{"id": 1, "connect": {"token": token(), **connect_request}}], commands)):
                client.send("\n".join(map(json.dumps, message)))
                wanted = len(replies) + sum("id" in command for command in message)
                while len(replies) < wanted:
                    replies += [json.loads(line) for line in str(client.recv(timeout=20)).splitlines() if line != "{}"]
            if commands and "id" not in commands[-1]:
                client.recv(timeout=20)
        except ConnectionClosed as closed:
            replies.append(closed.rcvd.code if closed.rcvd else None)
    return replies


def lines_with(server: Server, *parts: str) -> list[str]:
    return [line for line in server.lines if all(part in line for part in parts)]


def test_a_page_of_another_origin_has_one_line_that_names_the_key(server: Server) -> None:
    for _ in range(5):
        with pytest.raises(InvalidStatus):
            connect(server.endpoint, origin="http://localhost:5173")  # type: ignore[arg-type]
    says = "refused a page of http://localhost:5173: add it to client.allowed_origins"
    server.wait_for_log(says)
    wait_until(lambda: len(lines_with(server, says, "#debug]")) == 5, "a line for each at level debug")
    [line] = lines_with(server, says, "#info]")
    assert "[worker 0 realtime.clients#info]" in line
    assert "(at 127.0.0.1)" in line


def test_each_refused_command_names_its_remedy(server: Server) -> None:
    commands = [
        ({"subscribe": {"channel": "nowhere:x"}}, "see channel.namespaces"),
        ({"subscribe": {"channel": "$orders"}}, "channel.private_prefix"),
        ({"subscribe": {"channel": "$orders", "token": "no token"}}, "its subscription token is invalid"),
        ({"history": {"channel": "news"}}, "set history_size and history_ttl"),
        ({"publish": {"channel": "checked:x", "data": 1}}, "allow_publish_for_client"),
        ({"rpc": {"method": "buy"}}, "declares no handler"),
        ({"rpc": {"method": "refuse"}}, "handler refused rpc 'refuse' with 1400 out of stock"),
        ({"rpc": {"method": "slow"}}, "rpc slow did not finish within 0.2 s"),
    ]
    replies = converse(server, *({"id": 2 + number, **command} for number, (command, _) in enumerate(commands)))
    assert [("error" in reply) for reply in replies] == [False] + [True] * len(commands)
    for _, says in commands:
        wait_until(lambda says=says: lines_with(server, says, "#info]"), f"a line with {says}")


def test_each_disconnect_names_its_cause(server: Server) -> None:
    assert converse(server, {"send": {"data": 1}})[-1] == 3508
    assert converse(server, token=jwt.encode({"sub": "alice"}, "another" * 6, algorithm="HS256")) == [3500]
    assert converse(server, token=token(exp=1))[0]["error"]["code"] == 109
    assert converse(server, token="") == [3501]
    for says in ("declares no on_message", "not signed by a known key", "has expired", "allow_anonymous_connect"):
        wait_until(lambda says=says: lines_with(server, says, "#info]"), f"a line with {says}")


def test_a_client_comes_and_goes_at_level_debug(server: Server) -> None:
    client = converse(server)[0]["connect"]["client"]
    wait_until(lambda: len(lines_with(server, client)) == 2, "two lines")
    came, went = lines_with(server, client)
    assert "user 'alice' at 127.0.0.1 by websocket" in came and "connected" in came
    assert "left: " in went and "#debug]" in went


def test_hung_threads_have_a_line(server: Server) -> None:
    for _ in range(4):
        assert converse(server, {"id": 2, "rpc": {"method": "hang"}})[1]["error"]["code"] == 100
    server.wait_for_log(r"#info\] a call of handler rpc hang .* found no thread: all 2 \(workers.threads\) hang")


def test_many_short_calls_are_blamed_together(server: Server) -> None:
    replies = converse(server, *({"id": 2 + number, "rpc": {"method": "cpu"}} for number in range(14)))
    assert len(replies) == 15
    line = server.wait_for_log(r"worker 0 was blocked for [\d.]+ s in (\d+) calls of rpc cpu")
    assert int(line[1]) >= 10


def test_events_of_the_application_have_time_worker_logger_and_level(server: Server) -> None:
    converse(server, *({"id": 2 + number, "rpc": {"method": name}} for number, name in enumerate(["loop", "process"])))
    time = r"(?m)^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4} "
    for pattern in (
        r"\[worker 0 shop.orders#info\] imported",
        r"\[worker 0 shop.orders#info\] started",
        r"\[worker 0 root#info\] in a coroutine",
        r"\[worker 0 py.warnings#warn\] .*UserWarning: a careless use",
        r"\[worker 0 process \d+ shop.orders#info\] imported",
        r"\[worker 0 process \d+ shop.orders#info\] in a process",
    ):
        server.wait_for_log(time + pattern)
    assert "of no interest" not in server.log


def test_a_log_file_in_the_foreground_has_the_lines_of_all_processes(tmp_path: Path) -> None:
    config, log = tmp_path / "realtime.toml", tmp_path / "twistd.log"
    sections = merged(merged(BASE, SECTIONS), {"client": {"allowed_origins": ["*"]}})
    config.write_text("".join(f"{key} = {toml(value)}\n" for key, value in sections.items()))
    arguments = ["--nodaemon", "--pidfile=", f"--logfile={log}", "realtime", "--config", str(config)]
    process = subprocess.Popen([str(TWISTD), *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    family = [psutil.Process(process.pid)]
    try:
        said = lambda: log.read_text() if log.exists() else ""  # noqa: E731
        wait_until(lambda: "ready: 1 workers" in said(), "readiness")
        wait_until(lambda: "[worker 0 shop.orders#info] started" in said(), "a line of the worker")
        wait_until(
            lambda: "shop.orders#info] imported" in said().partition("[worker 0 process ")[2], "one of a process"
        )
        family += family[0].children(recursive=True)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=30)
        assert process.returncode == 0
        assert b"shop.orders" not in output
    finally:
        for one in family:
            if one.is_running():
                one.kill()
