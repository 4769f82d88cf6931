"""RFC 6455 by the Autobahn Testsuite: 301 cases against a real worker that echoes messages.

One of the two workers is stopped, so about half of the connections take the way of a rescued connection: the supervisor
accepts them and passes them on. The testsuite runs on Python 2.7; `scripts/test` installs it where it finds one.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.system.serving import CHECKOUT, ServerStarter
from tests.system.test_rescued import NEVER_STUCK, pid_of, stopped, total

TESTSUITE = CHECKOUT / ".autobahn-testsuite"
# All cases but those of compression, for which the testsuite offers parameters that this server declines.
CASES = [f"{chapter}.*" for chapter in range(1, 11)]
NUMBER_OF_CASES = 301
# On a busy machine its client is slow itself, so it gets ten times as long for the longest messages.
RUN = """
import site, sys
site.addsitedir(sys.argv.pop(1))
from autobahntestsuite import fuzzing
close_after = fuzzing.FuzzingProtocol.closeAfter
fuzzing.FuzzingProtocol.closeAfter = lambda self, delay: close_after(self, delay if delay < 10 else 10 * delay)
from autobahntestsuite.wstest import run
run()
"""
# The largest messages of the testsuite have 16 MiB.
LARGE = 64 * 1024 * 1024


@pytest.mark.timeout(500)
@pytest.mark.skipif(not (TESTSUITE / "python").exists(), reason="the Autobahn Testsuite needs a Python 2.7 with pip")
def test_the_autobahn_testsuite_finds_no_failure(start_server: ServerStarter, tmp_path: Path) -> None:
    server = start_server(
        app={"module": "echoing:app"},
        websocket={"message_size_limit": LARGE, "max_fragments": 0},
        client={"queue_max_size": LARGE, "stale_close_delay": "600s"},
        # The long messages make a busy worker late, which must not refuse the next case.
        loop={**NEVER_STUCK, "stuck": "600s", "steering": False, "max_lag": "2s"},
    )
    specification = tmp_path / "specification.json"
    url = f"ws://127.0.0.1:{server.port}/connection/websocket"
    specification.write_text(
        json.dumps(
            {
                "outdir": str(tmp_path),
                "servers": [{"agent": "realtime", "url": url}],
                "cases": CASES,
                "exclude-cases": [],
                "exclude-agent-cases": {},
            }
        )
    )
    with stopped(pid_of(server, 0)):
        command = [TESTSUITE / "python", "-c", RUN, TESTSUITE, "--mode", "fuzzingclient", "--spec", specification]
        # Its exit status is always 0.
        subprocess.run(command, check=True, capture_output=True, timeout=480)
        assert total(server, "realtime_rescued_connections_total") > NUMBER_OF_CASES / 4
    results = json.loads((tmp_path / "index.json").read_text())["realtime"]
    assert len(results) == NUMBER_OF_CASES
    allowed = {"OK", "INFORMATIONAL"}  # NON-STRICT is a failure
    failures = {
        case: found for case, found in results.items() if not {found["behavior"], found["behaviorClose"]} <= allowed
    }
    assert not failures
    server.stop()
