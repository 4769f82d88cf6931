"""Changes: one at a time, what their requests receive, and what the service manager hears."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred
from twisted.logger import capturedLogs, formatEvent

from realtime.config.settings import HTTPServerSettings, Settings
from realtime.supervisor.changes import Changes
from realtime.supervisor.trial import TrialResult


class Scene:
    """Changes whose trials and replacements the test ends; it is their service manager too."""

    def __init__(self) -> None:
        self.trials: list[Deferred[TrialResult]] = []
        self.begun: list[Settings] = []
        self.heard: list[str] = []
        trial: Any = self
        self.reloads = Changes(trial, self.begun.append, Settings)
        notifier: Any = self
        self.reloads.notifier = notifier
        self.told: list[str] = []

    def run(self, timeout: float) -> Deferred[TrialResult]:
        self.trials.append(Deferred())
        return self.trials[-1]

    def reloading(self, now: float) -> None:
        self.heard.append("reloading")

    def ready(self) -> None:
        self.heard.append("ready")

    def request(self) -> list[str]:
        """Request a reload. Returns a list that receives its outcome."""
        outcome: list[str] = []
        self.reloads.request(self.told.append).addCallback(outcome.append)
        return outcome


def test_a_reload_replaces_the_workers_once_the_trial_is_good() -> None:
    scene = Scene()
    outcome = scene.request()
    assert (scene.begun, scene.heard) == ([], ["reloading"])
    scene.trials[0].callback(TrialResult(Settings(), warnings=["beware"]))
    scene.reloads.tell("worker 0 has been replaced")
    assert (scene.begun, outcome) == ([Settings()], [])
    scene.reloads.ended("")
    assert outcome == [""]
    assert scene.told[-2:] == ["beware", "worker 0 has been replaced"]
    assert scene.heard == ["reloading", "ready"]


def test_a_failed_trial_replaces_nothing_and_is_logged() -> None:
    scene = Scene()
    outcome = scene.request()
    with capturedLogs() as events:
        scene.trials[0].callback(TrialResult(problems=["realtime.toml:3: bad", "realtime.toml:4: worse"]))
    assert (scene.begun, outcome) == ([], ["realtime.toml:3: bad; realtime.toml:4: worse"])
    assert [formatEvent(event) for event in events] == [
        "the reload failed: realtime.toml:3: bad; realtime.toml:4: worse"
    ]
    assert scene.heard == ["reloading", "ready"], "the server serves as before"


def test_a_setting_that_needs_a_restart_is_named() -> None:
    scene = Scene()
    scene.request()
    scene.trials[0].callback(TrialResult(Settings(http_server=HTTPServerSettings(port=9000))))
    assert "http_server.port = 9000: needs a restart of the server; until then 8000 stays" in scene.told
    assert scene.begun == [Settings()]


def test_requests_during_a_reload_share_the_next_one() -> None:
    scene = Scene()
    first, second, third = scene.request(), scene.request(), scene.request()
    assert scene.told == ["a reload is under way; the reload follows"] * 2
    scene.trials[0].callback(TrialResult(Settings()))
    scene.reloads.ended("")
    assert (first, second, third, len(scene.trials)) == ([""], [], [], 2)
    scene.trials[1].callback(TrialResult(problems=["bad"]))
    assert (second, third, len(scene.trials)) == (["bad"], ["bad"], 2)


def test_a_change_of_the_number_of_workers_runs_alone() -> None:
    scene = Scene()
    begun: list[str] = []

    def scale(name: str) -> list[str]:
        outcome: list[str] = []
        scene.reloads.scale(scene.told.append, lambda: begun.append(name)).addCallback(outcome.append)
        return outcome

    first, second = scale("first"), scale("second")
    assert second == ["a change of the number of workers is under way; try again when it has ended"]
    reload = scene.request()
    scene.reloads.ended("")
    assert (begun, first, reload, len(scene.trials)) == (["first"], [""], [], 1)
    assert scale("third") == ["a reload is under way; try again when it has ended"]
    assert scene.heard == ["reloading"], "a change of the number is no reload for the service manager"


def test_a_server_that_stops_refuses_requests_and_ends_a_trial_without_a_replacement() -> None:
    scene = Scene()
    first = scene.request()
    second = scene.request()
    scene.reloads.stop()
    assert (first, second) == (["the server is stopping"], ["the server is stopping"])
    scene.trials[0].callback(TrialResult(Settings()))
    assert scene.begun == []
    assert scene.request() == ["the server is stopping"]
    assert scene.heard == ["reloading"], "a stopping server does not become ready"


def test_an_upgrade_runs_alone_and_the_service_manager_hears_of_it() -> None:
    scene = Scene()
    outcome: list[str] = []
    scene.reloads.upgrade(scene.told.append, lambda: scene.told.append("begun")).addCallback(outcome.append)
    reload = scene.request()
    assert scene.told == ["begun", "an upgrade is under way; the reload follows"]
    scene.reloads.ended("it can't be executed")
    assert (outcome, reload, len(scene.trials)) == (["it can't be executed"], [], 1)
    assert scene.heard == ["reloading", "ready", "reloading"]


def test_the_next_program_goes_on_with_an_upgrade_which_others_may_join() -> None:
    scene = Scene()
    outcomes: list[str] = []
    scene.reloads.join_upgrade(scene.told.append).addCallback(outcomes.append)
    scene.reloads.continue_upgrade(lambda: None)
    scene.reloads.join_upgrade(scene.told.append).addCallback(outcomes.append)
    scene.reloads.tell("broker has been replaced")
    assert outcomes == ["no upgrade is under way"]
    scene.reloads.ended("")
    scene.reloads.join_upgrade(scene.told.append).addCallback(outcomes.append)
    assert (outcomes[1:], scene.told) == (["", ""], ["broker has been replaced"])
    assert scene.heard == ["reloading", "ready"]
