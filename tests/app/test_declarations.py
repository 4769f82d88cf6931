"""Declaring handlers: a mistake raises at once, with one line that names file and line."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from realtime.app import App, Patterns
from realtime.cache import Cache
from realtime.errors import SettingsError
from tests.app.declaring import coroutine, line_of, plain, problem

HERE = str(Path(__file__))


def test_declaration_returns_the_function_unchanged_and_records_it(app: App) -> None:
    def report(client: Any, data: Any) -> Any: ...

    assert app.rpc("report", timeout=5, limit=2)(report) is report
    [(key, handler)] = app.handlers("rpc").items()
    assert key == "report"
    assert (handler.function, handler.kind, handler.name) == (report, "rpc", "rpc report")
    assert (handler.run, handler.timeout, handler.limit) == ("thread", 5, 2)
    assert handler.place == line_of(report)
    with pytest.raises(AttributeError):
        handler.timeout = 9  # type: ignore[misc]


class AsyncCallable:
    async def __call__(self, data: Any) -> Any: ...


@pytest.mark.parametrize(
    ("function", "run", "expected"),
    [
        (coroutine, None, "loop"),
        (coroutine, "loop", "loop"),
        (plain, None, "thread"),
        (plain, "thread", "thread"),
        (plain, "loop", "loop"),
        (plain, "auto", "auto"),
        (functools.partial(coroutine, 1), None, "loop"),
        (functools.partial(plain, 1), None, "thread"),
        (AsyncCallable(), None, "loop"),
    ],
)
def test_where_a_function_runs(app: App, function: Any, run: str | None, expected: str) -> None:
    app.rpc("f", run=run)(function)
    assert app.handlers("rpc")["f"].run == expected


@pytest.mark.parametrize(
    ("function", "taken"),
    [
        (lambda data: None, ["data"]),
        (lambda client, data: None, ["client", "data"]),
        (lambda *args: None, ["client", "data"]),
        (lambda data=None: None, ["data"]),
        (lambda client, data=None: None, ["client", "data"]),
    ],
)
def test_arguments_of_a_procedure(app: App, function: Any, taken: list[str]) -> None:
    app.rpc("f")(function)
    assert ["client", "data"][app.handlers("rpc")["f"].taken] == taken


@pytest.mark.parametrize(
    ("function", "taken"),
    [
        (lambda client, channel: None, ["client", "channel"]),
        (lambda client, channel, data: None, ["client", "channel", "data"]),
        (lambda client, channel, data=None: None, ["client", "channel", "data"]),
        (lambda *args: None, ["client", "channel", "data"]),
    ],
)
def test_arguments_of_a_subscription(app: App, function: Any, taken: list[str]) -> None:
    app.on_subscribe("chat:*")(function)
    assert ["client", "channel", "data"][app.handlers("on_subscribe")["chat:*"].taken] == taken


def test_methods_of_an_object_can_be_handlers(app: App) -> None:
    class Rooms:
        async def open(self, client: Any, data: Any) -> Any: ...

    app.rpc("open")(Rooms().open)
    assert app.handlers("rpc")["open"].place == line_of(Rooms.open)


def test_several_start_handlers_keep_their_order(app: App) -> None:
    first = app.on_start(lambda: None)
    second = app.on_start(lambda: None)
    assert [handler.function for handler in app.handlers("on_start").values()] == [first, second]


DECLARERS: dict[str, Callable[[App], Callable[[Any], Any]]] = {
    "on_connecting": lambda app: app.on_connecting,
    "on_disconnected": lambda app: app.on_disconnected,
    "on_message": lambda app: app.on_message,
    "on_subscribe chat:*": lambda app: app.on_subscribe("chat:*"),
    "on_publish chat:*": lambda app: app.on_publish("chat:*"),
    "rpc report": lambda app: app.rpc("report"),
    "http GET /it": lambda app: app.http.get("/it"),
    "http POST /it": lambda app: app.http.post("/it"),
}


@pytest.mark.parametrize("name", DECLARERS)
def test_second_handler_of_one_name_names_both_places(app: App, name: str) -> None:
    declare = DECLARERS[name]
    declare(app)(plain)
    line = problem(lambda: declare(app)(coroutine))
    assert line == f"{line_of(coroutine)}: {name} is declared a second time; the first is at {line_of(plain)}"


@pytest.mark.parametrize("name", DECLARERS)
def test_signature_that_can_not_be_called_names_what_it_is_called_with(app: App, name: str) -> None:
    def odd(a: Any, b: Any, c: Any, d: Any) -> None: ...

    line = problem(lambda: DECLARERS[name](app)(odd))
    assert line.startswith(f"{line_of(odd)}: {name} is called with (")


def test_other_ways_to_run_are_refused(app: App) -> None:
    line = problem(lambda: app.rpc("f", run="thraed")(plain))
    assert line.startswith(line_of(plain))
    assert "'thraed'; choose one of loop, thread, process, auto" in line


@pytest.mark.parametrize("run", ["thread", "process", "auto"])
def test_coroutine_runs_nowhere_but_on_the_loop(app: App, run: str) -> None:
    line = problem(lambda: app.rpc("f", run=run)(coroutine))
    assert line.endswith(f'is a coroutine and runs on the loop; run="{run}" is for a plain function')


def test_handler_that_takes_data_alone_may_run_in_a_process(app: App) -> None:
    app.rpc("one", run="process")(lambda data: None)
    app.rpc("any", run="process")(lambda *args: None)
    app.http.get("/", run="process")(lambda request: None)
    assert [handler.run for kind in ("rpc", "http") for handler in app.handlers(kind).values()] == ["process"] * 3
    assert ["client", "data"][app.handlers("rpc")["any"].taken] == ["data"]


def test_no_client_goes_to_a_process(app: App) -> None:
    line = problem(lambda: app.rpc("f", run="process")(lambda client, data: None))
    assert line.endswith(
        "is called with (data) in a process, which can't receive a client, which (client, data) does not accept"
    )
    line = problem(lambda: app.on_publish("f", run="process")(lambda client, channel, data: None))
    assert line.endswith('takes a client, which a process can\'t receive; use run="thread"')


@pytest.mark.parametrize("options", [{"timeout": -1}, {"timeout": float("nan")}, {"limit": 0}, {"limit": -3}])
def test_limits_out_of_range(app: App, options: dict[str, Any]) -> None:
    assert problem(lambda: app.rpc("f", **options)(plain)).startswith(f"{line_of(plain)}: the ")


@pytest.mark.parametrize("kind", ["on_subscribe", "on_publish", "rpc"])
def test_forgotten_pattern_is_explained(app: App, kind: str) -> None:
    line = problem(lambda: getattr(app, kind)(plain))
    assert line.startswith(line_of(plain))
    assert f'@app.{kind}("name")' in line


def test_not_a_function(app: App) -> None:
    assert "not a function" in problem(lambda: app.rpc("f")("text"))  # type: ignore[type-var]


@pytest.mark.parametrize("path", ["it", "", "/a?b", "/ä"])
def test_paths_that_can_not_be(app: App, path: str) -> None:
    assert problem(lambda: app.http.get(path)).startswith(f"{HERE}:")


@pytest.mark.parametrize(
    ("channel", "found"),
    [
        ("chat:1", "chat"),
        ("chat:", "chat"),
        ("chat:lobby", "lobby"),
        ("chat:a:b\nc", "chat"),
        ("room7", "room"),
        ("room77", "rest"),
        ("other", "rest"),
        ("[x]", "literal"),
    ],
)
def test_exact_pattern_wins_then_the_first_glob(channel: str, found: str) -> None:
    patterns = Patterns({"chat:*": "chat", "[x]": "literal", "room?": "room", "*": "rest", "chat:lobby": "lobby"})
    assert patterns.find(channel) == found
    assert patterns.find(channel) == found  # as remembered


def test_no_pattern_fits() -> None:
    assert Patterns({"chat:*": 1, "news": 2}).find("chat") is None


def test_policies_have_their_defaults(app: App) -> None:
    cache = Cache(ttl=1)
    app.http.get("/plain")(coroutine)
    app.http.get("/kept", cache=cache)(coroutine)
    app.rpc("kept", cache=Cache(ttl=1))(coroutine)
    app.on_subscribe("a")(coroutine)
    app.on_publish("a", pressure="refuse")(coroutine)
    app.on_message(coroutine)
    assert {handler.name: handler.pressure for kind in ("http", "rpc") for handler in app.handlers(kind).values()} == {
        "http GET /plain": "refuse",
        "http GET /kept": "stale",
        "rpc kept": "ignore",
    }
    assert [app.handlers(f"on_{kind}")["a"].pressure for kind in ("subscribe", "publish")] == ["ignore", "refuse"]
    assert app.handlers("on_message")[""].pressure == "ignore"
    assert app.handlers("http")["GET /kept"].cache is cache
    assert cache.name == "http GET /kept"


def test_a_decorated_handler_has_its_cache_and_runs_where_it_would(app: App) -> None:
    @app.http.get("/a")
    @Cache(ttl=1)
    def a(request: Any) -> Any: ...

    handler = app.handlers("http")["GET /a"]
    assert handler.function is a.__wrapped__
    assert (handler.run, handler.pressure, handler.cache is not None) == ("thread", "stale", True)


def test_caches_and_policies_that_make_no_sense_are_refused(app: App) -> None:
    cache = Cache(ttl=1)
    app.rpc("first", cache=cache)(coroutine)
    assert "this Cache belongs to rpc first" in problem(lambda: app.rpc("second", cache=cache)(coroutine))
    assert "has two caches" in problem(lambda: app.rpc("third", cache=Cache(ttl=1))(Cache(ttl=1)(coroutine)))
    assert "only rpc and http handlers" in problem(lambda: app.on_publish("a")(Cache(ttl=1)(coroutine)))
    assert "choose one of refuse, stale, ignore" in problem(lambda: app.rpc("f", pressure="drop")(coroutine))
    assert "no cache=Cache(...)" in problem(lambda: app.http.get("/", pressure="stale")(coroutine))


@pytest.mark.parametrize(
    ("interval", "options", "complaint"),
    [
        ("1 fortnight", {}, "the interval of @app.every"),
        (0, {}, "choose one from 10 ms"),
        (None, {}, 'as in @app.every("1s")'),
        (1, {"where": "all"}, "where='all'; choose one of"),
    ],
)
def test_a_wrong_schedule_is_refused_with_the_line_of_the_declaration(
    interval: Any, options: Any, complaint: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        App().every(interval, **options)
    (problem,) = caught.value.problems
    assert complaint in problem
    assert problem.startswith(__file__)
