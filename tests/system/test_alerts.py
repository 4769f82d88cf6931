"""The PromQL of the documents, compared with the series of a real server."""

from __future__ import annotations

import json
import os
import re
import signal

from prometheus_client.parser import text_string_to_metric_families
from websockets.sync.client import connect

from tests.system.serving import CHECKOUT, Server, ServerStarter, wait_until

FENCED = re.compile(r"^```promql\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]*(?:rate|sum|count|increase|histogram_quantile)[ (][^`\n]*)`")
SELECTOR = re.compile(r"\b(realtime_\w+)(?:\{([^}]*)\})?")
GROUPING = re.compile(r"\bby \(([^)]*)\)(.*)")
MATCHER = re.compile(r'(\w+)(=~?)"([^"]*)"')


def expressions() -> list[str]:
    """Every expression in the documents."""
    found = []
    for document in (*CHECKOUT.glob("docs/*.md"), CHECKOUT / "README.md"):
        text = document.read_text()
        for block in FENCED.findall(text):
            found += [line for line in block.splitlines() if not line.startswith("#")]
        found += [code for code in INLINE.findall(text) if "realtime_" in code]
    return found


def series(server: Server) -> dict[str, list[dict[str, str]]]:
    """The labels of all series, by name."""
    found: dict[str, list[dict[str, str]]] = {}
    for family in text_string_to_metric_families(server.operate("/metrics")[1]):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample.labels)
    return found


def selected(found: dict[str, list[dict[str, str]]], name: str, matchers: str) -> list[dict[str, str]]:
    """The labels of the series that a selector selects."""

    def matches(labels: dict[str, str]) -> bool:
        return all(
            re.fullmatch(value if kind == "=~" else re.escape(value), labels.get(label, ""))
            for label, kind, value in MATCHER.findall(matchers)
        )

    return [labels for labels in found.get(name, ()) if matches(labels)]


def test_every_expression_in_the_documents_selects_series_with_the_labels_that_it_names(
    start_server: ServerStarter,
) -> None:
    server = start_server(workers={"count": 1, "handler_timeout": "500ms"})
    server.expect_traceback()
    os.kill(server.workers()[0], signal.SIGKILL)
    wait_until(lambda: server.health()["workers"][0]["restarts"], "a restart")
    wait_until(lambda: server.operate("/ready")[0] == 200, "the next worker")
    with connect(server.endpoint) as client:
        commands = [
            {"id": 1, "connect": {}},
            {"id": 2, "rpc": {"method": "fail"}},
            {"id": 3, "rpc": {"method": "slowly", "data": {"seconds": 20}}},
        ]
        client.send("\n".join(map(json.dumps, commands)))
        while '"id":3' not in str(client.recv(timeout=20)):
            pass
    found = wait_until(
        lambda: names if "realtime_loop_peak_lag_seconds_bucket" in (names := series(server)) else None, "lags"
    )
    assert len(expressions()) >= 10
    for expression in expressions():
        selectors = SELECTOR.findall(expression)
        assert selectors, expression
        for name, matchers in selectors:
            # An application without handlers in processes has no series of theirs.
            if not name.startswith("realtime_handler_process_"):
                assert selected(found, name, matchers), f"{name}{{{matchers}}} selects nothing, in: {expression}"
        for labels, operand in GROUPING.findall(expression):
            name, matchers = SELECTOR.findall(operand)[0]
            for label in labels.split(", "):
                assert any(label in series for series in selected(found, name, matchers)), f"{label}: {expression}"
