"""A loop's time: every nanosecond of work is charged once, to the right account."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realtime.supervision.loop_time import LoopTimeLedger, LoopWork


class Loop:
    """Accounts on a clock that the test sets."""

    def __init__(self) -> None:
        self.time = 1_000
        self.accounts = LoopTimeLedger(lambda: self.time)
        self.report = self.accounts.open(LoopWork.HANDLER, "rpc report")
        self.protocol = self.accounts.open(LoopWork.PROTOCOL)

    def work(self, nanoseconds: int) -> None:
        self.time += nanoseconds

    def rest(self, nanoseconds: int) -> None:
        self.accounts.idle(self.time)
        self.time += nanoseconds
        self.accounts.wake(self.time)

    def settle(self) -> dict[str, int]:
        """Return the time charged to each account until now, by name or kind."""
        self.accounts.switch(self.accounts.open(LoopWork.OTHER))
        return {account.name or account.kind.value: account.spent for account in self.accounts if account.spent}


def test_nested_work_is_charged_to_its_own_account_alone() -> None:
    loop = Loop()
    loop.work(1)
    outside = loop.accounts.switch(loop.protocol)
    loop.work(10)
    within = loop.accounts.switch(loop.report)
    loop.work(100)
    loop.accounts.switch(within)
    loop.work(20)
    loop.accounts.switch(outside)
    loop.work(2)
    assert loop.settle() == {"rpc report": 100, "protocol": 30, "other": 3}


def test_a_handler_within_itself_is_charged_once() -> None:
    loop = Loop()
    outside = loop.accounts.switch(loop.report)
    loop.work(10)
    within = loop.accounts.switch(loop.report)
    loop.work(5)
    loop.accounts.switch(within)
    loop.accounts.switch(outside)
    assert loop.settle() == {"rpc report": 15}


def test_idle_time_is_charged_to_no_account() -> None:
    loop = Loop()
    loop.work(7)
    loop.rest(1_000_000)
    loop.work(2)
    assert loop.settle() == {"other": 9}


def test_a_charged_function_keeps_arguments_results_and_exceptions() -> None:
    loop = Loop()

    def divide(by: int, *, length: int) -> float:
        loop.work(length)
        return 1 / by

    charged = loop.accounts.charging(loop.report, divide)
    assert charged(2, length=30) == 0.5
    with pytest.raises(ZeroDivisionError):
        charged(0, length=4)
    loop.work(1)
    assert loop.settle() == {"rpc report": 34, "other": 1}


def test_opening_an_account_again_returns_the_same_object() -> None:
    loop = Loop()
    assert loop.accounts.open(LoopWork.HANDLER, "rpc report") is loop.report
    assert loop.accounts.open(LoopWork.FANOUT, "rpc report") is not loop.report


ACTS = st.recursive(
    st.one_of(st.integers(0, 50), st.just("raise")),
    lambda acts: st.tuples(
        st.sampled_from(list(LoopWork)), st.sampled_from(["", "a", "b"]), st.lists(acts, max_size=4)
    ),
    max_leaves=40,
)


@given(st.lists(st.lists(ACTS, max_size=6), max_size=5))
def test_all_work_is_charged_exactly_once_at_any_nesting(turns: list[list[object]]) -> None:
    loop = Loop()
    busy = 0
    expected: dict[tuple[LoopWork, str], int] = {}

    def run(act: object, kind: LoopWork, name: str) -> None:
        nonlocal busy
        if isinstance(act, int):
            loop.work(act)
            busy += act
            expected[kind, name] = expected.get((kind, name), 0) + act
        elif act == "raise":
            raise ArithmeticError
        else:
            assert isinstance(act, tuple)
            inner_kind, inner_name, acts = act
            account = loop.accounts.open(inner_kind, inner_name)

            def work() -> None:
                for inner_act in acts:
                    run(inner_act, inner_kind, inner_name)

            try:
                loop.accounts.charging(account, work)()
            except ArithmeticError:
                if name:
                    raise

    for acts in turns:
        for act in acts:
            with suppress(ArithmeticError):
                run(act, LoopWork.OTHER, "")
        loop.rest(1_000)
    loop.settle()
    charged = {(account.kind, account.name): account.spent for account in loop.accounts}
    assert sum(charged.values()) == busy
    assert {key: spent for key, spent in charged.items() if spent} == {k: v for k, v in expected.items() if v}
