"""The exceptions that applications raise, and the codes that reach clients."""

from __future__ import annotations

import pickle

import pytest

from realtime import errors
from realtime.errors import ClientError, Disconnect, RealtimeError, SettingsError


@pytest.mark.parametrize("code", [2999, 5000, 0, -1])
def test_a_disconnect_code_outside_its_range_is_refused(code: int) -> None:
    with pytest.raises(ValueError, match="3000-4999"):
        Disconnect(code, "bye")


@pytest.mark.parametrize("reason", ["", "x" * 124, "ü" * 62])
def test_a_disconnect_reason_must_fit_a_close_frame(reason: str) -> None:
    with pytest.raises(ValueError, match="1 to 123 bytes"):
        Disconnect(4000, reason)


def test_the_longest_reason_fits() -> None:
    assert len(Disconnect(4999, "ü" * 61 + "x").reason.encode()) == 123


def test_an_error_reply_needs_a_message() -> None:
    with pytest.raises(ValueError, match="needs a message"):
        ClientError(400, "")


def test_an_error_reply_survives_pickling() -> None:
    copy = pickle.loads(pickle.dumps(ClientError(429, "slow down", temporary=True)))
    assert (copy.code, copy.message, copy.temporary) == (429, "slow down", True)


def test_a_settings_error_shows_all_its_problems() -> None:
    error = SettingsError(["a: wrong", "b: missing"])
    assert isinstance(error, RealtimeError)
    assert str(error).splitlines() == error.problems


def test_the_codes_of_the_protocol_build_their_exceptions() -> None:
    codes = [value for name, value in vars(errors).items() if name.isupper() and isinstance(value, tuple)]
    replies = [ClientError(*code) for code in codes if len(code) == 3]
    disconnects = [Disconnect(*code) for code in codes if len(code) == 2 and code[0] >= 3000]
    assert len({reply.code for reply in replies}) == len(replies) == 12
    assert len({(disconnect.code, disconnect.reason) for disconnect in disconnects}) == len(disconnects)
