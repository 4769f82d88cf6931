"""Patterns for channel names: matching, invalid patterns, and the time that matching takes."""

from __future__ import annotations

import fnmatch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realtime.protocol.channel_patterns import MAX_ALTERNATIVES, MAX_LENGTH, compile_pattern


@pytest.mark.parametrize(
    ("pattern", "fitting", "other"),
    [
        ("", ["", "news", "chat:1"], []),
        ("*", ["", "news", "chat:1", "a\nb"], []),
        ("news", ["news"], ["newsletter", "the news", "NEWS", ""]),
        ("chat:*", ["chat:", "chat:1", "chat:a:b"], ["chat", "a chat:1"]),
        ("chat:?", ["chat:1", "chat:*"], ["chat:", "chat:12"]),
        ("chat:[0-9]", ["chat:0", "chat:9"], ["chat:a", "chat:10"]),
        ("chat:[!0-9]", ["chat:a"], ["chat:1", "chat:"]),
        ("a[*]b", ["a*b"], ["axb"]),
        ("a[b", ["a[b"], ["ab"]),
        ("{chat,news}:*", ["chat:1", "news:"], ["other:1", "{chat,news}:1"]),
        ("x{,y}", ["x", "xy"], ["xx", "x,y"]),
        ("{a,b{c,d}e}f", ["af", "bcef", "bdef"], ["bf", "bcf", "acef"]),
        ("{ab,a}*b", ["ab", "abb", "acb"], ["a", "b"]),
        ("a.c", ["a.c"], ["abc"]),
        ("}", ["}"], ["{"]),
    ],
)
def test_matching_names(pattern: str, fitting: list[str], other: list[str]) -> None:
    fits = compile_pattern(pattern)
    assert [name for name in fitting if not fits(name)] == []
    assert [name for name in other if fits(name)] == []


@given(st.text("ab*?[]!-,", max_size=12), st.text("ab,", max_size=8))
def test_a_pattern_without_braces_means_the_same_as_in_shells(pattern: str, name: str) -> None:
    assert bool(compile_pattern(pattern)(name)) == (not pattern or fnmatch.fnmatchcase(name, pattern))


@pytest.mark.parametrize("pattern", ["{", "a{b", "{a,{b}", "x" * (MAX_LENGTH + 1), "{a,b}" * 7, "{a,b}" * 100])
def test_invalid_patterns(pattern: str) -> None:
    with pytest.raises(ValueError):
        compile_pattern(pattern)


def test_the_largest_number_of_alternatives() -> None:
    fits = compile_pattern("{" + ",".join(str(number) for number in range(MAX_ALTERNATIVES)) + "}")
    assert fits("0") and fits(str(MAX_ALTERNATIVES - 1)) and not fits(str(MAX_ALTERNATIVES))


@pytest.mark.timeout(20)
@pytest.mark.parametrize("pattern", ["*a" * 500, "*" * 1000 + "b", "{*a*a*a*a,*a*a*b}" * 6 + "c", "[" * 1000])
def test_matching_takes_linear_time(pattern: str) -> None:
    fits = compile_pattern(pattern)
    for _ in range(100):
        assert not fits("a" * 250)


@given(st.text("{},ab*[", max_size=30), st.text("ab{},", max_size=8))
def test_any_text_is_a_pattern_or_a_value_error(pattern: str, name: str) -> None:
    try:
        fits = compile_pattern(pattern)
    except ValueError:
        return
    fits(name)
