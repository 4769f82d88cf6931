"""Finds calls in coroutines of an application that block the loop, such as `time.sleep`, before they do.

The search covers the source of each handler on the loop, for calls of functions known to block. It does not find
methods of objects, or calls deeper in the application; `realtime.supervision.incidents` names these once they have
blocked.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from types import ModuleType
from typing import Any

from realtime.app.application import App
from realtime.app.declarations import ARGUMENTS, Handler

_IN_A_THREAD = "declare the handler with `def`, so that it runs in a thread"

BLOCKING: dict[str, str] = {
    "time.sleep": "await asyncio.sleep in its place",
    "os.system": _IN_A_THREAD,
    "os.popen": _IN_A_THREAD,
    "os.waitpid": _IN_A_THREAD,
    "socket.create_connection": _IN_A_THREAD,
    "socket.getaddrinfo": _IN_A_THREAD,
    "socket.gethostbyname": _IN_A_THREAD,
    "subprocess.call": "await asyncio.create_subprocess_exec in its place",
    "subprocess.check_call": "await asyncio.create_subprocess_exec in its place",
    "subprocess.check_output": "await asyncio.create_subprocess_exec in its place",
    "subprocess.run": "await asyncio.create_subprocess_exec in its place",
    "urllib.request.urlopen": _IN_A_THREAD,
    "urllib.request.urlretrieve": _IN_A_THREAD,
    "httpx.get": "use httpx.AsyncClient",
    "httpx.post": "use httpx.AsyncClient",
    "httpx.request": "use httpx.AsyncClient",
    "httpx.Client": "use httpx.AsyncClient",
    "psycopg.connect": "use psycopg.AsyncConnection",
    "redis.Redis": "use redis.asyncio",
    "redis.StrictRedis": "use redis.asyncio",
    "redis.from_url": "use redis.asyncio",
}
"""Functions that block, with what to do instead."""

PACKAGES = ("requests", "sqlite3", "_sqlite3", "psycopg2", "pymysql", "MySQLdb", "pymongo", "smtplib", "ftplib")
"""Modules whose functions block, all of them."""


def find_blocking_calls(app: App) -> list[str]:
    """Return a line for each such call in a handler on the loop, with its place and a remedy."""
    handlers = {
        handler.function: handler
        for kind in ARGUMENTS
        for handler in app.handlers(kind).values()
        if handler.run == "loop" and kind not in ("on_start", "on_stop")
    }
    return [line for handler in handlers.values() for line in _find(handler)]


def _find(handler: Handler) -> Iterator[str]:
    function = inspect.unwrap(handler.function)
    try:
        lines, first = inspect.getsourcelines(function)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, TypeError, SyntaxError):  # a callable object, or one without a source
        return
    file = inspect.getsourcefile(function)
    names = _names(function)
    definition = tree.body[0]
    if not isinstance(definition, ast.FunctionDef | ast.AsyncFunctionDef):
        return
    for call in _calls(definition.body):
        called, remedy = _blocking(call.func, names)
        if called:
            place = f"{file}:{first + call.lineno - 1}"
            yield (
                f"{place}: {handler.name} calls {called} on the loop, which blocks all clients of the worker meanwhile;"
                f" {remedy}"
            )


def _names(function: Callable[..., Any]) -> Mapping[str, Any]:
    names = dict(getattr(function, "__globals__", {}))
    with suppress(TypeError, ValueError):  # it is no Python function
        names.update(inspect.getclosurevars(function).nonlocals)
    return names


def _calls(body: list[ast.stmt]) -> Iterator[ast.Call]:
    """Yield the calls of a function's own code, without those of the functions that it defines."""
    waiting: list[ast.AST] = list(reversed(body))
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef):
            continue
        if isinstance(node, ast.Call):
            yield node
        waiting += reversed(list(ast.iter_child_nodes(node)))


def _blocking(node: ast.expr, names: Mapping[str, Any]) -> tuple[str, str]:
    """Return the name of a blocking function, and the remedy; empty texts for any other."""
    for name in _dotted(node, names):
        if name in BLOCKING:
            return name, BLOCKING[name]
        if name.partition(".")[0] in PACKAGES:
            return name.removeprefix("_"), _IN_A_THREAD
    return "", ""


def _dotted(node: ast.expr, names: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names of a function: as the module that it is taken from calls it, and as it calls itself."""
    path: list[str] = []
    while isinstance(node, ast.Attribute):
        path.insert(0, node.attr)
        node = node.value
    found = names.get(node.id) if isinstance(node, ast.Name) else None
    while isinstance(found, ModuleType):
        if not path:
            return
        yield ".".join([found.__name__, *path])
        found = getattr(found, path.pop(0), None)
    if found is not None and not path and isinstance(getattr(found, "__module__", None), str):
        yield f"{found.__module__}.{getattr(found, '__qualname__', '')}"
