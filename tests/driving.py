"""How tests of the shell are driven: by our own driver, so that their bodies may await asyncio as well as Deferreds."""

from __future__ import annotations

import functools
from collections.abc import Callable, Coroutine
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred

from realtime.handlers.coroutines import start_future

# Seconds for one test.
LIMIT = 30.0


def on_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., Deferred[None]]:
    """Run a coroutine test on the loop, within the time limit."""

    @functools.wraps(test)
    def driven(*args: Any, **arguments: Any) -> Deferred[None]:
        return Deferred.fromFuture(start_future(test(*args, **arguments))).addTimeout(LIMIT, reactor)

    return driven
