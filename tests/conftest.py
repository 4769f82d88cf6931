"""What every test gets: a time limit for coroutine tests, a hypothesis profile, and real servers to talk to."""

from __future__ import annotations

import gc
import inspect
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from twisted.internet.defer import Deferred

from tests.redis.deployments import PROGRAMS, RedisProcess, RedisStarter
from tests.system.serving import Server, ServerStarter

# Seconds for a coroutine test without a `timeout` mark.
COROUTINE_LIMIT = 60.0

# Shared cores make single examples slow at random, which says nothing about the code.
settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow])
# Many times the examples: `scripts/test --hypothesis-profile=thorough`, before a release.
settings.register_profile("thorough", settings.get_profile("default"), max_examples=500)
settings.load_profile("default")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("realtime")
    group.addoption("--idle-connections", type=int, default=1_000, help="for tests/system/test_idle.py")
    group.addoption("--idle-seconds", type=float, default=5.0, help="for tests/system/test_idle.py")
    group.addoption("--relief-seconds", type=float, default=4.0, help="for tests/system/test_relief.py")
    group.addoption("--reloads", type=int, default=4, help="for tests/system/test_reloads_sdk.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the modules that take longest, so that no process waits for one of them at the end."""
    items.sort(key=lambda item: not item.path.match("tests/system/*"))


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> None:
    """Give a coroutine test a limit of its own, so that one that hangs fails alone.

    pytest-timeout's own means end the reactor of pytest-twisted, and with it every test that follows; it stays as the
    outer guard, a little later.
    """
    function = pyfuncitem.obj
    if not inspect.iscoroutinefunction(function):
        return
    mark = pyfuncitem.get_closest_marker("timeout")
    limit = 0.9 * mark.args[0] if mark else COROUTINE_LIMIT

    def limited(**arguments: Any) -> Deferred[None]:
        from twisted.internet import reactor  # pytest-twisted has installed it by now, and not before

        return Deferred.fromCoroutine(function(**arguments)).addTimeout(limit, reactor)

    pyfuncitem.obj = limited


class _Reports(logging.Handler):
    """Keeps what asyncio reports of forgotten objects, without the text of their tracebacks."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture(scope="module", autouse=True)
def _nothing_forgotten() -> Iterator[None]:
    """Fail the module whose tests leave sockets open, or failed futures unread, to the garbage collector.

    It would find them in any test, later, and fail that: asyncio's report of a future formats a traceback, which parses
    source, and CPython 3.11 can't do that within `ast.parse`.
    """
    yield
    reports, logger = _Reports(), logging.getLogger("asyncio")
    logger.addHandler(reports)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ResourceWarning)
            gc.collect()
    finally:
        logger.removeHandler(reports)
        gc.freeze()  # what is left is not looked at again, which makes this quick
    found = reports.lines + [str(warning.message) for warning in caught if warning.category is ResourceWarning]
    assert not found, "\n".join(found)


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[ServerStarter]:
    """Start real servers: `start_server(**sections)` gives a `Server` that is ready; all are ended afterwards."""
    starter = ServerStarter(tmp_path)
    yield starter
    starter.finish()


@pytest.fixture
def server(start_server: ServerStarter) -> Server:
    """A ready server with two workers and the application of tests/system/apps."""
    return start_server()


@pytest.fixture(params=PROGRAMS)
def redis_starter(request: pytest.FixtureRequest) -> Iterator[RedisStarter]:
    """Start Redis servers of a test's own, of each program of this machine; all are ended afterwards."""
    starter = RedisStarter(program=request.param)
    yield starter
    starter.finish()


@pytest.fixture(scope="session", params=PROGRAMS)
def shared_redis_server(request: pytest.FixtureRequest) -> Iterator[RedisProcess]:
    starter = RedisStarter(program=request.param)
    yield starter.standalone()
    starter.finish()


@pytest.fixture
def redis_server(shared_redis_server: RedisProcess) -> RedisProcess:
    """An empty server, with the user of docs/redis.md. Tests share it: they neither stop nor configure it."""
    shared_redis_server.command("FLUSHALL")
    shared_redis_server.command("SCRIPT", "FLUSH")
    return shared_redis_server
