"""Embedded JSON text: the limits of its depth, its characters, and its line ends."""

from __future__ import annotations

import msgspec
import pytest

from realtime import json_text
from realtime.errors import ClientError
from realtime.json_text import payload


def raw(text: bytes) -> msgspec.Raw:
    return msgspec.Raw(text)


@pytest.mark.parametrize("depth", [127, 128])
@pytest.mark.parametrize(("opening", "closing"), [(b"[", b"]"), (b'{"a":', b"}")])
def test_depth_up_to_the_limit(depth, opening, closing):
    text = opening * depth + b"1" + closing * depth
    assert payload(raw(text)) == text


@pytest.mark.parametrize("depth", [129, 900])
@pytest.mark.parametrize(("opening", "closing"), [(b"[", b"]"), (b'{"a":', b"}")])
def test_depth_over_the_limit(depth, opening, closing):
    with pytest.raises(ClientError) as caught:
        payload(raw(opening * depth + b"1" + closing * depth))
    assert caught.value.code == 107


def test_many_brackets_are_not_deep():
    text = b"[" + b",".join([b"[]"] * 1000) + b"]"
    assert payload(raw(text)) == text
    text = b'"' + b"[" * 1000 + b'"'
    assert payload(raw(text)) == text


@pytest.mark.parametrize("text", [b'"\\ud800"', b'"\\udfffx"', b'{"\\ud83d": 1}', b'["\\ude00\\ud83d"]'])
def test_half_a_surrogate_pair_is_refused(text):
    with pytest.raises(ClientError):
        payload(raw(text))


@pytest.mark.parametrize("text", [b'"\\ud83d\\ude00"', b'"\\u0000"', b'"\\\\ud800"', b"9" * 5000, b"1e400"])
def test_unusual_but_valid_text_passes(text):
    assert payload(raw(text)) == text


@pytest.mark.parametrize("data", [b"1", b' {"a": "\xc3\xbc"}\r\n', b'"\\ud83d\\ude00"', b"[" * 128 + b"]" * 128])
def test_text_that_every_encoding_carries(data):
    assert json_text.is_json(data)


@pytest.mark.parametrize(
    "data",
    [b"\x00", b"nan", b"01", b"{} {}", b'"\xff"', b'"\\ud800"', b'"a\nb"', b"[" * 129 + b"]" * 129, b"[" * 5000],
)
def test_bytes_that_json_can_not_carry(data):
    assert not json_text.is_json(data)


def test_line_ends_between_tokens_are_removed():
    assert payload(raw(b'{\r\n"a": [1,\n2]}')) == b'{"a": [1,2]}'
    assert json_text.one_line(b"1\n") == b"1"


@pytest.mark.parametrize("spelled", ["AP8=", "A\nP\r\n8=\r\n", "\nAP8=\n"])
def test_base64_has_line_ends_or_none(spelled):
    assert json_text.decode_base64(spelled) == b"\0\xff"


@pytest.mark.parametrize("spelled", ["A P8=", "AP8", "AP8=\t", "AP_=", "\u00fc", "AP8=AP8="])
def test_other_spellings_of_base64_are_refused(spelled):
    with pytest.raises(ValueError):
        json_text.decode_base64(spelled)


def test_bytes_that_are_not_json_stand_behind_a_zero_byte():
    assert json_text.text_or_bytes(b'{\n"a": 1}') == b'{"a": 1}'
    assert json_text.text_or_bytes(b"") == b""
    for data in (b"\xff", b"\0", b"no json", b"1 2", b'"\xff"', b"[" * 5000, b"[" * 129 + b"]" * 129, b'"\\ud800"'):
        assert json_text.text_or_bytes(data) == b"\0" + data
        assert json_text.value_or_bytes(b"\0" + data) == data
    assert (json_text.value_or_bytes(b'{"a": 1}'), json_text.value_or_bytes(b"")) == ({"a": 1}, None)


def test_a_value_is_decoded_and_an_absent_one_is_none():
    assert (json_text.value(b'{"a": 1}'), json_text.value(b"null"), json_text.value(b"")) == ({"a": 1}, None, None)
    with pytest.raises(ClientError):
        json_text.value(b"1e400")
