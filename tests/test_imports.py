"""Which way imports point, held to the picture in docs/architecture.md."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "realtime"

# The room of each module below `realtime/`, and the rooms that it may import from, besides itself.
FREE = {"_version", "errors", "types", "metrics", "config", "json_text", "repetition", "client_log"}
SHELL = {*FREE, "supervision", "process"}
ROOMS: dict[str, set[str]] = {
    # Ground: everything may stand on it.
    "_version": set(),
    "errors": set(),
    "types": {"errors"},
    "metrics": {"errors", "types"},
    "json_text": {"errors"},
    "repetition": set(),
    "client_log": {"metrics", "repetition"},
    "config": {"errors", "types"},
    # The core, without I/O.
    "deadlines": set(),
    "http": FREE,
    "auth": FREE,
    "pubsub": FREE,
    "protocol": FREE | {"deadlines", "http", "auth", "pubsub"},
    "server_api": FREE | {"auth", "pubsub", "protocol"},
    "supervision": FREE,
    "cache": FREE,
    "app": FREE | {"cache"},
    # The shell: Twisted, sockets and processes.
    "process": FREE | {"supervision", "pubsub"},
    "redis": SHELL,
    "broker": SHELL | {"pubsub", "redis"},
    "handlers": SHELL | {"app", "cache"},
    "transports": SHELL | {"deadlines", "http", "pubsub", "protocol", "server_api", "app", "handlers"},
    "worker": SHELL
    | {"deadlines", "http", "auth", "pubsub", "protocol", "server_api", "app", "cache", "handlers", "transports"},
    "operators": SHELL | {"supervisor"},
    "supervisor": SHELL,
    # The entrances.
    "cli": FREE | {"auth"},
    "tap": FREE | {"cli", "process", "supervisor", "operators"},
    "__main__": {"cli"},
    "__init__": FREE | {"app", "cache"},
}
# Rooms that import Twisted and its like. All others use the standard library and msgspec, but for a few modules.
SHELL_ROOMS = {"process", "redis", "broker", "handlers", "transports", "worker", "operators", "supervisor"}
SHELL_OUTSIDE = {"twisted", "autobahn", "zope", "psutil", "prometheus_client"}
OUTSIDE = {
    "realtime.app.forms": {"python_multipart"},
    "realtime.config.checks": {"cryptography"},
    "realtime.auth.keys": {"cryptography", "jwt"},
    "realtime.tap": {"twisted"},
    "realtime.redis.connection": {"hiredis"},
    "realtime.redis.endpoints": {"OpenSSL"},
}


class Import(NamedTuple):
    """One import of a module: `name` is the module, with `from` imports of submodules resolved."""

    module: str
    name: str
    line: int
    function: str | None


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room_of(name: str) -> str:
    return name.split(".")[1] if "." in name else "__init__"


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(module: str) -> Iterator[Import]:
    yield from _imports(module, ast.parse(MODULES[module].read_text()), None)


def _imports(module: str, node: ast.AST, function: str | None) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(module, alias.name, child.lineno, function)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"{module}:{child.lineno}: a relative import"
            for alias in child.names:
                whole = f"{child.module}.{alias.name}"
                outside = not str(child.module).startswith("realtime")
                yield Import(
                    module, whole if whole in MODULES or outside else str(child.module), child.lineno, function
                )
        else:
            named = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))
            yield from _imports(module, child, child.name if named else function)


IMPORTS = [found for module in MODULES for found in imports_of(module)]


def places(found: list[Import]) -> list[str]:
    return [f"{MODULES[one.module].relative_to(ROOT)}:{one.line}: {one.name}" for one in found]


def is_ours(name: str) -> bool:
    return name == "realtime" or name.startswith("realtime.")


def test_no_module_loads_objects_or_code_from_bytes() -> None:
    # But for the application's state of a client, from another process of the server.
    found = [one for one in IMPORTS if one.name.split(".")[0] in {"pickle", "marshal", "shelve"}]
    assert places([one for one in found if one.module != "realtime.protocol.client_state"]) == []
    calls = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in MODULES.values()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in {"eval", "exec"}
    ]
    assert calls == []


def test_every_module_has_its_room_in_the_picture() -> None:
    assert {room_of(module) for module in MODULES} == set(ROOMS)


def test_rooms_import_only_what_lies_below_them() -> None:
    wrong = [
        found
        for found in IMPORTS
        if is_ours(found.name)
        and room_of(found.name) != room_of(found.module)
        and room_of(found.name) not in ROOMS[room_of(found.module)]
    ]
    assert places(wrong) == []


def test_the_core_uses_the_standard_library_and_the_codec_alone() -> None:
    def allowed(module: str) -> set[str]:
        shell = SHELL_OUTSIDE if room_of(module) in SHELL_ROOMS else set()
        return {"msgspec"} | OUTSIDE.get(module, set()) | shell

    wrong = [
        found
        for found in IMPORTS
        if not is_ours(found.name)
        and (top := found.name.split(".")[0]) not in sys.stdlib_module_names
        and top not in allowed(found.module)
    ]
    assert places(wrong) == []


def test_a_function_imports_nothing_but_the_reactor_and_only_where_a_process_is_put_together() -> None:
    wrong = [
        found
        for found in IMPORTS
        if (found.function is not None and found.name != "twisted.internet.reactor")
        or (found.name == "twisted.internet.reactor" and found.function not in ("main", "make_service"))
    ]
    assert places(wrong) == []


@pytest.mark.parametrize("module", MODULES)
def test_no_block_for_type_checkers_hides_a_cycle(module: str) -> None:
    assert "TYPE_CHECKING" not in MODULES[module].read_text()


def run(code: str) -> None:
    """Run code in a fresh interpreter, at the checkout's root; it must end well and say nothing."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_core_loads_where_there_is_no_twisted() -> None:
    core = [module for module in MODULES if room_of(module) not in {*SHELL_ROOMS, "tap", "__main__"}]
    run(
        f"""
import importlib, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("twisted", "autobahn", "zope", "txaio"):
            raise ImportError(f"{{name}} is blocked")

sys.meta_path.insert(0, Blocked())
for module in {core}:
    importlib.import_module(module)
"""
    )


def loaded_by(module: str) -> set[str]:
    """The rooms of ours and the outside packages that a process has loaded after it imported `module`."""
    code = f"import sys, {module}\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    names = done.stdout.split()
    return {name.split(".")[0] for name in names} | {f"realtime/{room_of(name)}" for name in names if is_ours(name)}


def test_the_supervisor_process_loads_nothing_of_the_clients_protocols() -> None:
    loaded = loaded_by("realtime.tap")
    assert {"realtime/supervisor", "realtime/operators"} <= loaded
    clients = {"transports", "protocol", "http", "auth", "server_api", "handlers", "pubsub", "deadlines"}
    assert loaded & {f"realtime/{room}" for room in {*clients, "worker", "broker"}} == set()
    assert loaded & {"autobahn", "h11", "jwt"} == set()


def test_the_broker_process_loads_nothing_that_serves_clients() -> None:
    loaded = loaded_by("realtime.broker.process")
    assert "realtime/pubsub" in loaded
    clients = {"transports", "protocol", "http", "auth", "server_api", "handlers", "worker", "deadlines"}
    assert loaded & {f"realtime/{room}" for room in clients} == set()
    assert loaded & {"autobahn", "jwt", "prometheus_client", "realtime/supervisor", "realtime/operators"} == set()


def test_the_public_names_are_there_and_are_all() -> None:
    import realtime

    assert sorted(realtime.__all__) == list(realtime.__all__)
    public = {name for name, value in vars(realtime).items() if not name.startswith("_") and isinstance(value, type)}
    assert public == set(realtime.__all__) - {"__version__"}


def test_importing_realtime_reads_no_file_environment_or_clock_and_installs_no_reactor() -> None:
    # The second time, all that it stands on is loaded already: what is touched then is touched by realtime itself.
    run(
        """
import os, sys, time
import realtime

for name in [name for name in sys.modules if name.split(".")[0] == "realtime"]:
    del sys.modules[name]

class Untouchable(dict):
    def refuse(self, *_):
        raise AssertionError("the environment was read")
    __getitem__ = __contains__ = __iter__ = get = keys = items = refuse

def no_clock(*_):
    raise AssertionError("the clock was read")

def no_file(event, arguments):
    if event == "open" and not str(arguments[0]).endswith((".py", ".pyc")):
        raise AssertionError(f"{arguments[0]} was opened")

for name in ("time", "monotonic", "perf_counter", "time_ns", "monotonic_ns"):
    setattr(time, name, no_clock)
environment, os.environ = os.environ, Untouchable()
sys.addaudithook(no_file)
import realtime
os.environ = environment
assert "twisted" not in sys.modules, "twisted was imported"
"""
    )


def test_importing_the_plugin_and_its_tap_installs_no_reactor() -> None:
    run("import sys, realtime.tap\nassert 'twisted.internet.reactor' not in sys.modules")
