"""The trial, with real processes: what each end of one means."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from twisted.internet import reactor

from realtime.config.sources import Sources
from realtime.supervisor import trial
from realtime.supervisor.trial import Trial, TrialResult

TIMEOUT = 50.0


async def try_out(tmp_path: Path, application: str, timeout: float = TIMEOUT) -> TrialResult:
    (tmp_path / "tried.py").write_text(application)
    config = tmp_path / "realtime.toml"
    config.write_text('[app]\nmodule = "tried:app"\n')
    return await Trial(reactor, Sources(str(config))).run(timeout)


async def test_a_good_configuration_gives_its_settings(tmp_path: Path) -> None:
    result = await try_out(tmp_path, "import realtime\napp = realtime.App()\n")
    assert (result.settings and result.settings.app.module, result.problems) == ("tried:app", [])


async def test_a_bad_application_gives_one_line(tmp_path: Path) -> None:
    result = await try_out(tmp_path, "import nothing_there\n")
    assert result.settings is None
    (problem,) = result.problems
    assert problem.endswith("tried.py:1: ModuleNotFoundError: No module named 'nothing_there'")


async def test_an_application_that_ends_its_process_gives_one_line(tmp_path: Path) -> None:
    result = await try_out(tmp_path, "import os\nos._exit(3)\n")
    assert result == TrialResult(problems=["the import of the application ended its process with status 3"])


async def test_a_process_that_the_application_has_forked_does_not_delay_the_result(tmp_path: Path) -> None:
    forks = "import os, time, realtime\nif not os.fork():\n    time.sleep(20)\n    os._exit(0)\napp = realtime.App()\n"
    assert (await try_out(tmp_path, forks)).settings is not None


async def test_an_import_that_hangs_is_ended(tmp_path: Path) -> None:
    result = await try_out(tmp_path, "import threading\nthreading.Event().wait()\n", 3.0)
    (problem,) = result.problems
    assert "takes more than 3 s (workers.start_timeout)" in problem


async def test_another_version_of_the_package_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "__version__", "0.0.1")
    result = await try_out(tmp_path, "import realtime\napp = realtime.App()\n")
    assert (result.settings is None, result.problems) == (False, [])
    assert "the supervisor and the broker go on with version 0.0.1 until `realtime upgrade`" in result.warnings[-1]


async def test_a_process_that_can_not_be_started_gives_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        callLater = reactor.callLater  # type: ignore[attr-defined]

        def spawnProcess(self, *arguments: object, **options: object) -> None:
            raise OSError(11, "Resource temporarily unavailable")

    result = await Trial(Full(), Sources()).run(TIMEOUT)
    assert result.problems == [
        "no process can be started for the import of the application: Resource temporarily unavailable"
    ]


@pytest.mark.parametrize(
    ("program", "problem"),
    [
        ("import sys; print('starting'); sys.exit('option --resume not recognized')", "with status 1: option --resume"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "with signal 9"),
        ("import os; os.write(3, b'?'); os._exit(0)", "with status 0"),
    ],
)
async def test_a_program_that_makes_no_supervisor_gives_one_line(program: str, problem: str) -> None:
    with open(os.devnull) as file:
        result = await Trial(reactor, None).run_program([sys.executable, "-c", program], file.fileno(), TIMEOUT)
    (line,) = result.problems
    assert line.startswith(f"the start of the installed version ended its process {problem}")
