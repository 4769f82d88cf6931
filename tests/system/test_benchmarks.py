"""The benchmarks run, small; and their page is made from figures."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.system.serving import CHECKOUT


def bench(*arguments: str, path: str = os.environ["PATH"]) -> str:
    """What scripts/benchmarks prints. path: where it finds programs."""
    command = [sys.executable, str(CHECKOUT / "scripts" / "benchmarks"), *arguments]
    environment = {**os.environ, "PATH": path}
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, env=environment, cwd=CHECKOUT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def rows(table: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in table["rows"]}


@pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")
def test_a_fan_out_is_measured_beside_the_floor(tmp_path: Path) -> None:
    small = ("--subscribers", "20", "--runs", "1", "--seconds", "0.5")

    bench("fanout", *small, "--against", "floor", "--json", str(tmp_path / "rows.json"))

    found = json.loads((tmp_path / "rows.json").read_text())
    assert list(rows(found)) == ["realtime", "floor"]
    for row in found["rows"]:
        assert 0 < row["costs"][0] < 100_000
        assert 0 < row["p50"][0] <= row["p99"][0]
    assert [one["what"] for one in found["verdicts"]] == ["fanout: cost relative to floor"]


def test_calls_are_measured_and_a_peer_that_is_not_there_is_left_out(tmp_path: Path) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "taskset").symlink_to(shutil.which("taskset") or "/usr/bin/taskset")
    asked = ("--times", "200", "--runs", "1", "--against", "floor,ws", "--json", str(tmp_path / "rows.json"))

    said = bench("rpc", *asked, path=str(programs))

    found = json.loads((tmp_path / "rows.json").read_text())
    assert list(rows(found)) == ["realtime"]
    assert "floor is left out: no C compiler; install one" in said
    assert set(found["left_out"]) == {"floor", "ws"}


@pytest.mark.skipif(not shutil.which("strace"), reason="needs strace")
def test_the_system_calls_of_a_publication_are_counted(tmp_path: Path) -> None:
    small = ("--runs", "1", "--seconds", "0.2", "--against", "")

    bench("room", *small, "--json", str(tmp_path / "rows.json"))

    (own,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    if own["more"]:  # else tracing is not allowed here
        # The least: the publication and its answer are read, passed on twice, and sent to two clients.
        assert own["more"]["system calls"][0] >= 7


def row(
    name: str, *costs: float, size: int = 0, load: float = 0.1, more: dict[str, float] | None = None
) -> dict[str, Any]:
    once = [0.0] * len(costs)
    return {
        "name": name,
        "size": size,
        "costs": list(costs),
        "idle": once,
        "busy": [0.5] * len(costs),
        "load": [load] * len(costs),
        "more": {key: [value] * len(costs) for key, value in (more or {}).items()},
    }


def table(name: str, *its_rows: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"name": name, "title": name, "unit": "each", "rows": list(its_rows), **more}


def test_the_page_is_made_from_figures(tmp_path: Path) -> None:
    verdict = {"what": "an echo", "target": "≤ 25 µs", "found": "50.0 µs", "met": False}
    sized = [row("100 subscribers", 8, 9, 10, size=100), row("1,000 subscribers", 8, 7, 9, size=1000)]
    tables = [
        table("fanout", row("realtime", 6, 8, 7), row("floor", 3, 4, 3.5), left_out={"ws": "no Node.js"}),
        table("burst", row("realtime", 2, 2, 2)),
        table("rpc", row("realtime", 50, 49, 60, load=0.9), verdicts=[verdict]),
        table("connect", row("realtime", 500, 500, 500)),
        table(
            "idle",
            row("0 connections", 7000, more={"MB": 100}),
            row("1,000 connections", 9000, size=1000, more={"MB": 8, "µs a ping": 25}),
        ),
        table("growth", *sized),
        table("publish", row("1,000 channels", 70, 70, 70, more={"broker µs": 14})),
    ]
    found = {
        "date": "2026-01-02",
        "minutes": 9.6,
        "machine": "a machine with 2 cores",
        "runs": 3,
        "versions": {"realtime": "1.2.3"},
        "commands": ["scripts/bench all"],
        "tables": {one["name"]: one for one in tables},
        "scenes": [{"title": "A scene", "about": "Do something.", "text": "what it printed"}],
        "verdicts": [{**verdict, "what": "a scene", "met": True}],
    }
    (tmp_path / "found.json").write_text(json.dumps(found))

    bench("page", str(tmp_path / "found.json"), str(tmp_path / "page.md"))

    page = (tmp_path / "page.md").read_text()
    assert "2026-01-02, 10 minutes, on a machine with 2 cores." in page
    assert "| realtime | 1.2.3 |" in page
    assert "| an echo | ≤ 25 µs | 50.0 µs | **not met** |" in page
    assert "| a scene | ≤ 25 µs | 50.0 µs | met |" in page
    assert "| floor | 3.50 | ± 14% | 0.00 | 2.00 |" in page  # ours costs twice as much
    assert "ws is left out: no Node.js." in page
    assert "90% !" in page  # the generator was too busy
    assert "## A scene\n\nDo something.\n\n```\nwhat it printed\n```" in page
    # One core at 70 %, the median of 50 µs; seven of them, at 7 + 50/10 + 25/25 µs for a client and second.
    assert "| RPC round trips | 50.00 | 14,000 a second |" in page
    assert "7 cores * 700,000 µs / 13.00 µs = 376,923 clients" in page
    assert "| 2 | 753,846 |" in page
    assert json.loads((tmp_path / "page" / "figures.json").read_text()) == found
    assert "![growth](page/growth.svg)" in page
    graph = ElementTree.parse(tmp_path / "page" / "growth.svg")
    dots = graph.findall(".//{http://www.w3.org/2000/svg}circle")
    assert len(dots) == 2
    assert float(dots[0].attrib["cy"]) < float(dots[1].attrib["cy"])  # 9 µs is above 8
