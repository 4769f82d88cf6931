"""The cache: who computes, who waits, who gets what is there; by a clock and a load that the test sets."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from realtime.cache import (
    RETRY_AFTER,
    Cache,
    Host,
    Invalidation,
    MemoryStorage,
    NothingCached,
    decode_key,
    default_key,
    encode_key,
    pack_value,
    shared_key,
    undecorate,
    unpack_value,
)
from realtime.handlers.results import json_response
from realtime.metrics import Counter


def in_a_loop(test: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine on a loop of its own: that of the test run is busy with the reactor."""
    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, test).result()


async def settle() -> None:
    """Let everything run that can."""
    for _ in range(10):
        await asyncio.sleep(0)


@dataclass
class Run:
    """One computation under way."""

    key: Hashable
    number: int
    outcome: asyncio.Future[Any]


@dataclass
class World:
    """A cache with its surroundings, and the computations that it asked for."""

    now: float = 1000.0
    load: float = 0.0
    counters: dict[str, Counter] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)

    def cache(self, *args: Any, **arguments: Any) -> Cache:
        host = Host(
            clock=lambda: self.now,
            load=lambda: self.load,
            counter=lambda name, outcome: self.counters.setdefault(outcome, Counter()),
        )
        return Cache(*args, **arguments, host=host)

    def counts(self) -> dict[str, int]:
        return {outcome: counter.value for outcome, counter in self.counters.items() if counter.value}

    def ask(self, cache: Cache, key: Hashable = "k", **options: Any) -> asyncio.Task[Any]:
        """Call the cached function from a task of its own."""

        async def compute() -> Any:
            run = Run(key, len(self.runs), asyncio.get_running_loop().create_future())
            self.runs.append(run)
            return await run.outcome

        return asyncio.create_task(cache.call(compute, (key,), **options))

    async def kept(self, cache: Cache, value: Any, key: Hashable = "k") -> None:
        """Have `value` be kept from now on."""
        asking = self.ask(cache, key)
        await settle()
        self.runs[-1].outcome.set_result(value)
        assert await asking == value


def test_a_fresh_value_is_served_without_computing() -> None:
    async def test() -> None:
        world = World()
        cache = world.cache(ttl=10)
        await world.kept(cache, "one")
        world.now += 9.9
        assert await world.ask(cache) == "one"
        assert len(world.runs) == 1
        assert world.counts() == {"miss": 1, "hit": 1}

    in_a_loop(test())


def test_find_returns_what_a_call_would_return_at_once() -> None:
    async def test() -> None:
        world = World()
        cache = world.cache(ttl=10, stale=30)
        assert cache.find(("k",)) is None
        await world.kept(cache, "one")
        assert (entry := cache.find(("k",))) is not None and entry.value == "one"
        world.now += 11
        assert cache.find(("k",)) is None  # a call starts a refresh
        world.load = 1.0
        assert (entry := cache.find(("k",))) is not None and entry.value == "one"
        world.load = 0.0
        assert await world.ask(cache) == "one"
        assert cache.find(("k",)) is not None  # the refresh is under way
        assert world.counts() == {"miss": 1, "hit": 1, "stale": 3}
        assert await world.ask(cache) == "one"
        world.now += 30
        world.load = 1.0
        assert cache.find(("k",)) is None  # too old
        assert len(world.runs) == 2

    in_a_loop(test())


def test_callers_at_the_same_time_share_one_computation() -> None:
    async def test() -> None:
        world = World()
        cache = world.cache(ttl=10)
        asking = [world.ask(cache) for _ in range(5)]
        await settle()
        (run,) = world.runs
        run.outcome.set_result("one")
        assert await asyncio.gather(*asking) == ["one"] * 5
        assert world.counts() == {"miss": 1, "shared": 4}

    in_a_loop(test())


def test_a_caller_that_is_cancelled_takes_nothing_from_the_others() -> None:
    async def test() -> None:
        world = World()
        cache = world.cache(ttl=10)
        first, second = world.ask(cache), world.ask(cache)
        await settle()
        first.cancel()
        await settle()
        assert first.cancelled()
        world.runs[0].outcome.set_result("one")
        assert await second == "one"
        assert await world.ask(cache) == "one"

    in_a_loop(test())


def test_a_computation_goes_on_when_nobody_is_left() -> None:
    async def test() -> None:
        world = World()
        cache = world.cache(ttl=10)
        asking = world.ask(cache)
        await settle()
        asking.cancel()
        await settle()
        world.runs[0].outcome.set_result("one")
        await settle()
        assert await world.ask(cache) == "one"
        assert len(world.runs) == 1

    in_a_loop(test())


def test_after_ttl_one_refresh_runs_while_everybody_gets_the_stale_value() -> None:
    async def test() -> None:
        world = World()
        cache = world.cache(ttl=10, stale=30)
        await world.kept(cache, "one")
        world.now += 10
        assert [await world.ask(cache) for _ in range(3)] == ["one"] * 3
        await settle()
        assert len(world.runs) == 2
        world.runs[1].outcome.set_result("two")
        await settle()
        assert await world.ask(cache) == "two"
        assert world.counts() == {"miss": 1, "stale": 3, "hit": 1}

    in_a_loop(test())


def test_what_is_too_old_is_waited_for() -> None:
    async def test() -> None:
        world = World()
        cache = world.cache(ttl=10, stale=30)
        await world.kept(cache, "one")
        world.now += 20  # ttl, and a window of ttl while nothing presses
        asking = world.ask(cache)
        await settle()
        world.runs[1].outcome.set_result("two")
        assert await asking == "two"

    in_a_loop(test())


@pytest.mark.parametrize(("load", "window"), [(0, 10), (0.5, 20), (1, 30), (7, 30)])
def test_the_stale_window_widens_with_the_load(load: float, window: float) -> None:
    assert Cache(ttl=10, stale=30).window(load) == window


@pytest.mark.parametrize(("ttl", "stale"), [(10, 0), (10, 5)])
def test_the_stale_window_never_passes_the_stale_time(ttl: float, stale: float) -> None:
    assert Cache(ttl, stale).window(0) == Cache(ttl, stale).window(1) == stale


def test_under_pressure_nothing_is_computed_while_a_stale_value_can_serve() -> None:
    async def test() -> None:
        world = World()
        cache = world.cache(ttl=10, stale=30)
        await world.kept(cache, "one")
        world.now, world.load = world.now + 39.9, 1.0
        assert await world.ask(cache, may_compute=False) == "one"
        await settle()
        assert len(world.runs) == 1
        world.now += 0.1
        with pytest.raises(NothingCached):
            await world.ask(cache, may_compute=False)

    in_a_loop(test())


def test_errors_reach_those_who_wait_and_are_not_kept() -> None:
    async def test() -> None:
        world = World()
        cache = world.cache(ttl=10)
        asking = [world.ask(cache) for _ in range(3)]
        await settle()
        world.runs[0].outcome.set_exception(KeyError("no"))
        results = await asyncio.gather(*asking, return_exceptions=True)
        assert [type(result) for result in results] == [KeyError] * 3
        await world.kept(cache, "one")
        assert await world.ask(cache) == "one"

    in_a_loop(test())


def test_a_refresh_that_fails_leaves_the_stale_value_until_its_limit() -> None:
    async def test() -> None:
        world = World()
        complaints: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
        cache = world.cache(ttl=10, stale=30)
        await world.kept(cache, "one")
        world.now += 15
        assert await world.ask(cache) == "one"
        await settle()
        world.runs[1].outcome.set_exception(KeyError("no"))
        await settle()
        assert [type(complaint["exception"]) for complaint in complaints] == [KeyError]

        assert await world.ask(cache) == "one"
        await settle()
        assert len(world.runs) == 2  # not tried again so soon
        world.now += max(RETRY_AFTER, 10)
        asking = world.ask(cache)  # beyond the window of a calm time: waits for a new value
        await settle()
        world.runs[2].outcome.set_exception(KeyError("no"))
        assert await asking == "one"
        world.now += 15
        asking = world.ask(cache)
        await settle()
        world.runs[3].outcome.set_exception(KeyError("no"))
        with pytest.raises(KeyError):
            await asking

    in_a_loop(test())


def test_invalidating_a_key_also_voids_what_is_being_computed_for_it() -> None:
    async def test() -> None:
        world = World()
        cache = world.cache(ttl=10, key=lambda name: name)
        await world.kept(cache, "one", "a")
        await world.kept(cache, "other", "b")
        cache.invalidate("a")
        await settle()
        early = world.ask(cache, "a")
        await settle()
        await cache.invalidate("a")
        late = world.ask(cache, "a")
        await settle()
        world.runs[3].outcome.set_result("three")
        assert await late == "three"
        world.runs[2].outcome.set_result("two")
        assert await early == "two"
        assert await world.ask(cache, "a") == "three"
        assert await world.ask(cache, "b") == "other"

    in_a_loop(test())


def test_invalidating_a_tag_forgets_all_that_has_it() -> None:
    async def test() -> None:
        world = World()
        cache = world.cache(ttl=10, tags=lambda name: ["all", f"of {name}"])
        for key in ("a", "b", "c"):
            await world.kept(cache, f"{key}1", key)
        await cache.invalidate_tags("of a", "of b", "unknown")
        assert await world.ask(cache, "c") == "c1"
        waiting = world.ask(cache, "a")
        await settle()
        await cache.invalidate_tags("all")
        world.runs[-1].outcome.set_result("a2")
        assert await waiting == "a2"
        assert len(cache._storage) == 0  # type: ignore[arg-type]

    in_a_loop(test())


def test_the_entry_that_was_not_asked_for_longest_makes_room() -> None:
    async def test() -> None:
        world = World()
        cache = world.cache(ttl=10, max_entries=2)
        await world.kept(cache, 1, "a")
        await world.kept(cache, 2, "b")
        assert await world.ask(cache, "a") == 1
        await world.kept(cache, 3, "c")
        assert await world.ask(cache, "a") == 1
        assert world.counts()["evicted"] == 1
        await world.kept(cache, 4, "b")  # was the one that went

    in_a_loop(test())


def test_a_computation_that_ends_before_its_caller_waits_reaches_it() -> None:
    async def test() -> None:
        async def one() -> int:
            return 1

        def at_once(coroutine: Coroutine[Any, Any, Any], done: Callable[[Any, BaseException | None], None]) -> None:
            try:
                coroutine.send(None)
            except StopIteration as stop:
                done(stop.value, None)

        assert await Cache(ttl=10, host=Host(start=at_once)).call(one, ()) == 1

    in_a_loop(test())


def test_a_coroutine_function_is_decorated() -> None:
    async def test() -> None:
        calls = []

        @Cache(ttl=10)
        async def double(number: int, *, plus: int = 0) -> int:
            """Twice."""
            calls.append(number)
            return 2 * number + plus

        assert [await double(2), await double(2), await double(3), await double(2, plus=1)] == [4, 4, 6, 5]
        assert calls == [2, 3, 2]
        assert double.__doc__ == "Twice."
        function, cache = undecorate(double)
        assert (function, cache is not None) == (double.__wrapped__, True)

    in_a_loop(test())


def test_a_plain_function_is_decorated_for_its_handler_alone() -> None:
    @Cache(ttl=1)
    def plain() -> None: ...

    with pytest.raises(TypeError, match=r"plain.* is a plain function"):
        plain()
    assert undecorate(plain)[1] is not None
    assert undecorate(len) == (len, None)


def test_a_cache_belongs_to_one_function() -> None:
    cache = Cache(ttl=1)
    cache(lambda: None)
    with pytest.raises(TypeError, match="needs its own Cache"):
        cache(lambda: None)


@pytest.mark.parametrize("wrong", [{"ttl": -1}, {"ttl": 1, "stale": -1}, {"ttl": 1, "max_entries": 0}])
def test_impossible_limits_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="a Cache needs"):
        Cache(**wrong)


json = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from([0.0, 1.0, 2.5]) | st.text("ab", max_size=2),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=2), inner, max_size=3),
    max_leaves=6,
)


@given(json, json)
def test_keys_are_equal_just_when_json_is(one: Any, other: Any) -> None:
    def text(value: Any) -> str:
        match value:
            case dict():
                return "{" + ",".join(sorted(f"{name!r}:{text(item)}" for name, item in value.items())) + "}"
            case list():
                return "[" + ",".join(map(text, value)) + "]"
        return repr(value)

    assert (default_key(one) == default_key(other)) == (text(one) == text(other))
    assert hash(default_key(one)) == hash(default_key(one))


def test_a_key_asks_objects_that_know_their_own() -> None:
    class User:
        def __init__(self, name: str) -> None:
            self.name = name

        def cache_key(self) -> str:
            return self.name

    assert default_key(User("ada")) == default_key(User("ada")) != default_key(User("bob"))
    with pytest.raises(TypeError, match="pass key="):
        default_key({1, 2})


def test_invalidating_from_a_thread_is_done_on_return() -> None:
    async def test() -> None:
        loop = asyncio.get_running_loop()

        def perform(coroutine: Coroutine[Any, Any, Any]) -> Any:
            if threading.current_thread() is owner:
                return asyncio.ensure_future(coroutine)
            return asyncio.run_coroutine_threadsafe(coroutine, loop).result()

        owner = threading.current_thread()
        cache = Cache(ttl=10, key=lambda: "k", host=Host(perform=perform))
        values = iter(range(9))

        async def compute() -> int:
            return next(values)

        assert await cache.call(compute, ()) == 0
        await asyncio.to_thread(cache.invalidate, "k")
        assert await cache.call(compute, ()) == 1
        await asyncio.to_thread(cache.clear)
        assert await cache.call(compute, ()) == 2

    in_a_loop(test())


steps = st.one_of(
    st.tuples(st.just("ask"), st.sampled_from("abc")),
    st.tuples(st.just("ask"), st.sampled_from("abc")),
    st.tuples(st.just("finish"), st.integers(0, 20)),
    st.tuples(st.just("fail"), st.integers(0, 20)),
    st.tuples(st.just("cancel"), st.integers(0, 20)),
    st.tuples(st.just("wait"), st.sampled_from([0.5, 1.0, 3.0])),
    st.tuples(st.just("invalidate"), st.sampled_from("abc")),
    st.tuples(st.just("tag"), st.sampled_from("abc")),
    st.tuples(st.just("load"), st.sampled_from([0.0, 0.5, 1.0])),
)


class Checked(World):
    """Keeps to what must hold, whatever happens in whatever order."""

    TTL, STALE, ROOM = 2.0, 5.0, 2

    def __init__(self) -> None:
        super().__init__()
        self.subject = self.cache(self.TTL, self.STALE, self.ROOM, key=str, tags=lambda key: [key])
        self.asked: list[tuple[asyncio.Task[Any], str, int]] = []
        self.invalidated: dict[str, int] = {}  # for each key, the number of runs that had begun
        self.made: dict[int, float] = {}

    async def step(self, what: str, which: Any) -> None:
        open_runs = [run for run in self.runs if not run.outcome.done()]
        open_calls = [task for task, _, _ in self.asked if not task.done()]
        if what == "ask":
            task = self.ask(self.subject, which)
            self.asked.append((task, which, self.invalidated.get(which, 0)))
            task.add_done_callback(lambda task: self.check(task, which))
        elif what in ("finish", "fail") and open_runs:
            run = open_runs[which % len(open_runs)]
            if what == "fail":
                run.outcome.set_exception(KeyError(run.key))
            else:
                self.made[run.number] = self.now
                run.outcome.set_result(run)
        elif what == "cancel" and open_calls:
            open_calls[which % len(open_calls)].cancel()
        elif what == "wait":
            self.now += which
        elif what == "load":
            self.load = which
        elif what == "invalidate":
            await self.subject.invalidate(which)
            self.invalidated[which] = len(self.runs)
        elif what == "tag":
            await self.subject.invalidate_tags(which)
            self.invalidated[which] = len(self.runs)
        await settle()
        self.check_runs()

    def check(self, task: asyncio.Task[Any], key: str) -> None:
        if task.cancelled() or task.exception() is not None:
            return
        run = task.result()
        assert run.key == key
        assert self.now - self.made[run.number] < self.TTL + self.STALE
        since = next(since for asked, _, since in self.asked if asked is task)
        assert run.number >= since, "a value from before it was invalidated"

    def check_runs(self) -> None:
        for key in "abc":
            current = [
                run
                for run in self.runs
                if run.key == key and not run.outcome.done() and run.number >= self.invalidated.get(key, 0)
            ]
            assert len(current) <= 1, "two computations of one key"
        assert len(self.subject._storage) <= self.ROOM  # type: ignore[arg-type]


@given(st.lists(steps, max_size=40))
def test_whatever_happens_nobody_gets_too_old_a_value_or_waits_for_ever(script: list[tuple[str, Any]]) -> None:
    async def test() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: broken.append(context))
        world = Checked()
        for what, which in script:
            await world.step(what, which)
        while any(not run.outcome.done() for run in world.runs):
            await world.step("finish", 0)
        assert all(task.done() for task, _, _ in world.asked)
        assert not world.subject._computations
        assert not [context for context in broken if not isinstance(context["exception"], KeyError)]

    broken: list[dict[str, Any]] = []
    in_a_loop(test())


def test_memory_forgets_its_tags_with_its_entries() -> None:
    async def test() -> None:
        world = World()
        memory = MemoryStorage(1)
        cache = world.cache(ttl=10, storage=memory, tags=lambda name: [name])
        for number in range(5):
            await world.kept(cache, number, f"key {number}")
        assert len(memory._tagged) == len(memory) == 1
        await memory.clear()
        assert not memory._tagged

    in_a_loop(test())


@pytest.mark.parametrize(
    "key",
    ["oslo", b"\xff", None, True, 1, -(2**63), 1.5, (), ("a", (1, frozenset({"b"}))), default_key({"a": [1, True]})],
)
def test_a_key_survives_the_way_to_the_other_workers(key: Hashable) -> None:
    decoded = decode_key(encode_key(key))
    assert decoded == key
    assert hash(decoded) == hash(key)


@pytest.mark.parametrize("key", [object(), 2**64, ("a", object()), Cache])
def test_a_key_that_can_not_be_sent_is_refused_before_anything_is_removed(key: Hashable) -> None:
    cache = World().cache(ttl=1)
    with pytest.raises(TypeError, match="a Cache can't send"):
        cache.invalidate(key)


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x90", b"\x91\xa4type", b"\x92\xa4type\xa6object", b"\x80"])
def test_bytes_that_are_no_key_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError):
        decode_key(data)


def test_a_cache_sends_its_invalidations_under_its_name() -> None:
    sent: list[Invalidation] = []

    async def scene() -> None:
        async def broadcast(invalidation: Invalidation) -> None:
            sent.append(invalidation)

        cache = Cache(ttl=1, host=Host(broadcast=broadcast))
        cache.attach_to("forecast")
        await cache.invalidate("oslo")
        await cache.invalidate_tags("weather")
        await cache.clear()

    in_a_loop(scene())
    assert sent == [
        Invalidation("forecast", keys=[encode_key("oslo")]),
        Invalidation("forecast", tags=["weather"]),
        Invalidation("forecast"),
    ]


JSON_LIKE = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
    max_leaves=10,
)


@given(JSON_LIKE)
def test_a_value_survives_the_way_to_the_other_workers(value: Any) -> None:
    assert repr(unpack_value(pack_value(value))) == repr(value)


def test_an_encoded_answer_survives_it_too() -> None:
    response = json_response(200, {"a": [1]})
    assert unpack_value(pack_value(response)) == response
    assert bytes(unpack_value(pack_value(msgspec.Raw(b"{}")))) == b"{}"


@pytest.mark.parametrize("value", [object(), {1, 2}, 2**64, [Cache], Counter()])
def test_a_value_of_another_type_stays_in_its_worker(value: Any) -> None:
    with pytest.raises(TypeError, match="a Cache can't share"):
        pack_value(value)


def test_a_key_is_the_same_in_every_worker() -> None:
    """Another process has other hashes of texts, and so another order of a set."""
    program = (
        "from realtime.cache import default_key, shared_key; from realtime.types import Position;"
        "print(shared_key((Position, default_key({str(n): [n, True] for n in range(20)}))).hex())"
    )
    keys = {
        subprocess.run([sys.executable, "-c", program], env={"PYTHONHASHSEED": seed}, check=True, stdout=-1).stdout
        for seed in ("1", "2")
    }
    assert len(keys) == 1
    assert shared_key(1) != shared_key(True) != shared_key("1")
    assert shared_key(object()) is None
