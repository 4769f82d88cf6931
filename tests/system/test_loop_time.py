"""What a real worker's loop spends its time on: charged to whom it belongs, in /metrics and in `realtime top`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.request
from contextlib import ExitStack
from pathlib import Path

from websockets.sync.client import ClientConnection, connect

from tests.system.serving import HERE, Server, ServerStarter, wait_until

SUBSCRIBERS, PUBLICATIONS = 20, 200
SERIES = re.compile(r'realtime_loop_seconds_total\{kind="(\w+)",name="([^"]*)",process="worker",worker="0"\} (\S+)')


def charged(server: Server) -> dict[tuple[str, str], float]:
    """Seconds by kind and name, of worker 0."""
    status, text = server.operate("/metrics")
    assert status == 200
    return {(kind, name): float(seconds) for kind, name, seconds in SERIES.findall(text)}


def ask(client: ClientConnection, **command: object) -> dict[str, object]:
    """The reply to a command; what is pushed before is passed over."""
    client.send(json.dumps({"id": 1, **command}))
    while True:
        reply: dict[str, object] = json.loads(client.recv(timeout=20))
        if reply.get("id") == 1:
            assert "error" not in reply, reply
            return reply


def publish(server: Server, channel: str, number: int) -> None:
    commands = [{"publish": {"channel": channel, "data": "x" * 100}}] * number
    request = urllib.request.Request(
        f"{server.http}/api/batch", json.dumps({"commands": commands}).encode(), {"X-API-Key": "test-key"}
    )
    with urllib.request.urlopen(request, timeout=20) as answer:
        assert answer.status == 200


def test_handlers_and_fan_out_are_charged_for_their_own_time_alone(start_server: ServerStarter) -> None:
    server = start_server(workers={"count": 1}, app={"module": "spinning:app", "path": str(HERE / "apps")})
    before = charged(server)
    assert before["fanout", "stream"] == before["fanout", "none"] == before["handler", "rpc spin"] == 0

    with ExitStack() as stack:
        clients = [stack.enter_context(connect(server.endpoint, max_queue=None)) for _ in range(SUBSCRIBERS)]
        for client in clients:
            ask(client, connect={})
            ask(client, subscribe={"channel": "stream:news"})
        for _ in range(5):
            ask(clients[0], rpc={"method": "spin", "data": {"seconds": 0.1}})
        ask(clients[0], rpc={"method": "rest", "data": {"seconds": 0.5}})
        with urllib.request.urlopen(f"{server.http}/spin", timeout=20):
            pass
        publish(server, "stream:news", PUBLICATIONS)
        for client in clients:
            while json.loads(client.recv(timeout=20)).get("push", {}).get("pub", {}).get("offset") != PUBLICATIONS:
                pass

        after = charged(server)
        spent = {key: seconds - before[key] for key, seconds in after.items()}
        assert spent["handler", "rpc spin"] >= 0.5
        assert spent["handler", "http GET /spin"] >= 0.1
        assert spent["handler", "rpc rest"] < 0.25  # it waited
        # What runs within something else is not charged to that as well.
        assert 0 < spent["protocol", "none"] < 0.5
        assert spent["http", "none"] > 0
        assert spent["fanout", "stream"] > 0
        assert spent["fanout", "none"] == spent["fanout", "checked"] == 0
        assert all(spent[kind, "none"] > 0 for kind in ("engine", "timers", "other"))

        def told() -> bool:
            accounts = json.loads(server.operate("/snapshot")[1])["loop"]
            return {"rpc spin", "fan-out stream"} <= {account["account"] for account in accounts}

        wait_until(told, "shares of the loop")
        url = f"http://127.0.0.1:{server.operator_port}"
        command = [sys.executable, "-m", "realtime", "top", "--once", "--url", url]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
        assert re.search(r"\d%  +rpc spin\n", shown), shown


def test_more_series_than_a_message_can_hold_are_all_there(start_server: ServerStarter) -> None:
    namespaces = [{"name": f"namespace{number}"} for number in range(1_000)]
    server = start_server(workers={"count": 1}, channel={"namespaces": namespaces})
    names = {name for kind, name in charged(server) if kind == "fanout"}
    assert names == {"none"} | {namespace["name"] for namespace in namespaces}


LAG = re.compile(r'realtime_loop_lag_seconds\{process="worker",worker="0"\} (\S+)')
PEAKS = re.compile(r'realtime_loop_peak_lag_seconds_(bucket\{le="0.5"|count\{)[^}]*worker="0"\} (\S+)')


def test_metrics_show_the_lag_of_a_loop_while_it_is_blocked_and_keep_the_spike(
    start_server: ServerStarter, tmp_path: Path
) -> None:
    server = start_server(workers={"count": 1}, app={"module": "spinning:app", "path": str(HERE / "apps")})

    def lag() -> float:
        found = LAG.search(server.operate("/metrics")[1])
        return float(found[1]) if found else 0.0

    with connect(server.endpoint) as client:
        ask(client, connect={})
        end = tmp_path / "end"
        client.send(json.dumps({"id": 2, "rpc": {"method": "spin until", "data": str(end)}}))
        wait_until(lambda: lag() >= 1.0, "a lag of a second while the loop is blocked")
        end.touch()
        while json.loads(client.recv(timeout=30)).get("id") != 2:
            pass
    wait_until(lambda: lag() < 0.5, "the end of the lag")

    def is_kept() -> bool:
        peaks = {name: float(count) for name, count in PEAKS.findall(server.operate("/metrics")[1])}
        return peaks["count{"] > peaks['bucket{le="0.5"']

    wait_until(is_kept, "the spike in the histogram")
