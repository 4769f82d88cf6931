"""Declaring handlers, and loading the application: mistakes are found there and then, with file and line."""

from __future__ import annotations

import functools
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from realtime.app import App, Handler, Patterns, Request, Response, load
from realtime.cache import Cache
from realtime.config.settings import AppSettings
from realtime.errors import ClientError, SettingsError

HERE = str(Path(__file__))


@pytest.fixture
def app() -> App:
    return App()


def problem(declare: Callable[[], Any]) -> str:
    """The one line of the error that a declaration ends in."""
    with pytest.raises(SettingsError) as caught:
        declare()
    [line] = caught.value.problems
    assert "\n" not in line
    return line


def line_of(function: Callable[..., Any]) -> str:
    return f"{HERE}:{function.__code__.co_firstlineno}"


async def coroutine(*args: Any) -> Any: ...


def plain(*args: Any) -> Any: ...


# -- what is recorded -------------------------------------------------------------------------------------------------


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


# -- mistakes ---------------------------------------------------------------------------------------------------------

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
    assert "'thraed'; there are loop, thread, process, auto" in line


@pytest.mark.parametrize("run", ["thread", "process", "auto"])
def test_coroutine_runs_nowhere_but_on_the_loop(app: App, run: str) -> None:
    line = problem(lambda: app.rpc("f", run=run)(coroutine))
    assert line.endswith(f'is a coroutine, which runs on the loop; "{run}" is for a plain function')


def test_handler_that_takes_data_alone_may_run_in_a_process(app: App) -> None:
    app.rpc("one", run="process")(lambda data: None)
    app.rpc("any", run="process")(lambda *args: None)
    app.http.get("/", run="process")(lambda request: None)
    assert [handler.run for kind in ("rpc", "http") for handler in app.handlers(kind).values()] == ["process"] * 3
    assert ["client", "data"][app.handlers("rpc")["any"].taken] == ["data"]


def test_no_client_goes_to_a_process(app: App) -> None:
    line = problem(lambda: app.rpc("f", run="process")(lambda client, data: None))
    assert line.endswith(
        "is called with (data) in a process, where no client can go, which (client, data) does not take"
    )
    line = problem(lambda: app.on_publish("f", run="process")(lambda client, channel, data: None))
    assert line.endswith('is called with a client, which can\'t go to a process; use run="thread"')


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


# -- files ------------------------------------------------------------------------------------------------------------


def test_static_directory_is_relative_to_the_file_that_declares_it(app: App) -> None:
    app.http.static("/tests", ".")
    [static] = app.http.statics
    assert (static.prefix, static.directory) == ("/tests/", Path(__file__).parent.resolve())


def test_static_mistakes(app: App, tmp_path: Path) -> None:
    assert "no directory" in problem(lambda: app.http.static("/", "missing"))
    assert "begins with a slash" in problem(lambda: app.http.static("files", tmp_path))
    app.http.static("/files", tmp_path)
    assert "a second time" in problem(lambda: app.http.static("/files/", tmp_path))


# -- patterns ---------------------------------------------------------------------------------------------------------


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


# -- the application's voice ------------------------------------------------------------------------------------------


class Recorder:
    """Takes the place of the server: notes each call."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **options: self.calls.append((name, args, options))


def test_methods_reach_the_server(app: App) -> None:
    server = Recorder()
    app.bind(server, lambda result: "performed")  # type: ignore[arg-type]
    assert app.publish("news", {"a": 1}, tags={"t": "1"}, idempotency_key="k") == "performed"
    app.publish("news", msgspec.Raw(b'{"as": 1.0}'))
    app.broadcast(iter(["a", "b"]), None, skip_history=True)
    app.publish("news", b"\xff", binary=True)
    app.history("news", limit=3)
    app.channels("chat:*")
    app.disconnect("ada", whitelist=["c1"], code=4500, reason="bye")
    app.unsubscribe("ada", "news", client="c1")
    app.subscribe("ada", "news", info={"n": 1}, data=False, override={"presence": True}, expire_at=7)
    app.refresh("ada", session="s1", expire_at=7, info=[])
    app.refresh("", expired=True)
    plainly = {
        "binary": False,
        "tags": None,
        "skip_history": False,
        "idempotency_key": "",
        "delta": False,
        "version": 0,
        "version_epoch": "",
    }
    subscribed = {"recover_since": None, "override": {"presence": True}, "expire_at": 7}
    assert server.calls == [
        ("publish", ("news", b'{"a":1}'), plainly | {"tags": {"t": "1"}, "idempotency_key": "k"}),
        ("publish", ("news", b'{"as": 1.0}'), plainly),
        ("broadcast", (["a", "b"], b"null"), plainly | {"skip_history": True}),
        ("publish", ("news", b"\xff"), plainly | {"binary": True}),
        ("history", ("news",), {"limit": 3, "since": None, "reverse": False}),
        ("channels", ("chat:*",), {}),
        ("disconnect", ("ada",), {"client": "", "session": "", "whitelist": ("c1",), "code": 4500, "reason": "bye"}),
        ("unsubscribe", ("ada", "news"), {"client": "c1", "session": ""}),
        (
            "subscribe",
            ("ada", "news"),
            {"client": "", "session": "", "info": b'{"n":1}', "data": b"false"} | subscribed,
        ),
        ("refresh", ("ada",), {"client": "", "session": "s1", "expired": False, "expire_at": 7, "info": b"[]"}),
        ("refresh", ("",), {"client": "", "session": "", "expired": True, "expire_at": 0.0, "info": b""}),
    ]


def test_binary_data_is_bytes(app: App) -> None:
    app.bind(Recorder(), lambda result: result)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="bytes, not str"):
        app.publish("news", "text", binary=True)


def test_data_that_is_no_json_fails_at_the_caller(app: App) -> None:
    server = Recorder()
    app.bind(server, lambda result: result)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        app.publish("news", object())
    assert server.calls == []


def test_nothing_can_be_published_before_the_server_runs(app: App) -> None:
    with pytest.raises(RuntimeError, match="once the server runs"):
        app.publish("news", 1)


def test_nothing_can_be_declared_after_it(app: App) -> None:
    app.bind(Recorder(), lambda result: result)  # type: ignore[arg-type]
    assert "after the server started" in problem(lambda: app.rpc("f")(plain))


def test_json_of_a_request() -> None:
    def request(body: bytes) -> Request:
        return Request("POST", "/", {}, {}, body)

    assert request(b'{"a":[1]}').json() == {"a": [1]}
    for body in (b"", b"{", b"\xff", b"[" * 100_000):
        with pytest.raises(ClientError) as caught:
            request(body).json()
        assert caught.value.code == 107
    assert Response().status == 200


# -- loading ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], AppSettings]]:
    """Write a module `its_app` and give the settings that name it; forget both afterwards."""
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write(source: str, module: str = "its_app:app", **files: str) -> AppSettings:
        for name, text in {"its_app": source, **files}.items():
            (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
        return AppSettings(module=module, path=str(tmp_path), options={"greeting": "hello"})

    yield write
    for name in ("its_app", "below"):
        sys.modules.pop(name, None)


def test_load_gives_the_app_its_options(write: Any) -> None:
    settings = write(
        """
        import realtime.app
        app = realtime.app.App()
        @app.rpc("f")
        async def f(data): ...
        """
    )
    app = load(settings)
    assert app.options == {"greeting": "hello"}
    assert isinstance(app.handlers("rpc")["f"], Handler)
    assert sys.path[0] == settings.path


def test_no_module_is_an_app_without_handlers() -> None:
    assert load(AppSettings()).handlers("rpc") == {}


@pytest.mark.parametrize(
    ("source", "place", "says"),
    [
        ("import realtime\n\nlimit = 1 / 0\n", "its_app.py:3", "ZeroDivisionError: division by zero"),
        ("app = (\n", "its_app.py:1", "SyntaxError"),
        ("import nothing_of_that_name\n", "its_app.py:1", "No module named 'nothing_of_that_name'"),
        ("import json\n\njson.loads('{')\n", "its_app.py:3", "JSONDecodeError"),
        ("import sys\nsys.exit(3)\n", "its_app.py:2", "SystemExit: 3"),
        ("import below\n", "below.py:2", "ValueError: from below"),
        ("raise ValueError('one\\ntwo')\n", "its_app.py:1", "ValueError: one"),
        ("raise ValueError\n", "its_app.py:1", "ValueError"),
        (
            "from realtime.app import App\napp = App()\n@app.rpc('f')\ndef f(): ...\n",
            "its_app.py:3",
            "is called with (data) or (client, data)",
        ),
        ("other = 1\n", "its_app.py", "'app' is missing, and should be an App"),
        ("app = 7\n", "its_app.py", "'app' is of type int, and should be an App"),
    ],
)
def test_mistake_in_the_users_code_is_one_line_with_its_place(write: Any, source: str, place: str, says: str) -> None:
    settings = write(source, below="\nraise ValueError('from below')\n")
    line = problem(lambda: load(settings))
    assert f"{settings.path}/{place}" in line
    assert says in line


@pytest.mark.parametrize("module", ["not_there:app", "not_there.below:app", "its_app.below:app"])
def test_missing_module_is_named_with_the_path(write: Any, module: str) -> None:
    settings = write("app = 1\n", module)
    line = problem(lambda: load(settings))
    assert f'app.module = "{module}"' in line
    assert "there is no module" in line or "is not a package" in line


def test_attribute_is_app_unless_named(write: Any) -> None:
    settings = write("from realtime.app import App\napp = App()\nother = App()\n", "its_app")
    assert load(settings) is sys.modules["its_app"].app
    assert load(AppSettings("its_app:other", settings.path)) is sys.modules["its_app"].other


# -- caches and pressure ----------------------------------------------------------------------------------------------


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
    assert "this Cache is that of rpc first" in problem(lambda: app.rpc("second", cache=cache)(coroutine))
    assert "has two caches" in problem(lambda: app.rpc("third", cache=Cache(ttl=1))(Cache(ttl=1)(coroutine)))
    assert "which is for rpc and http" in problem(lambda: app.on_publish("a")(Cache(ttl=1)(coroutine)))
    assert "there are refuse, stale, ignore" in problem(lambda: app.rpc("f", pressure="drop")(coroutine))
    assert "has no cache=Cache(...)" in problem(lambda: app.http.get("/", pressure="stale")(coroutine))


def test_a_requests_key_tells_users_apart() -> None:
    def key(**changes: Any) -> Any:
        fields = {"method": "GET", "path": "/", "query": {"b": "2", "a": "1"}, "headers": {"accept": "x"}, "body": b""}
        return Request(**{**fields, **changes}).cache_key()

    assert key() == key(query={"a": "1", "b": "2"}, headers={"accept": "y"}, remote_address="1.2.3.4")
    different = [
        key(),
        key(path="/a"),
        key(query={"a": "1"}),
        key(headers={"cookie": "id=1"}),
        key(headers={"authorization": "id=1"}),
        key(body=b"1"),
        key(method="HEAD"),
    ]
    assert len(set(different)) == len(different)


def test_an_application_that_does_not_run_is_under_no_pressure(app: App) -> None:
    assert app.pressure == ()
