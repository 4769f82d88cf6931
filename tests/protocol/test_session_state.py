"""The way of a session through its states."""

from __future__ import annotations

import pytest

from realtime.protocol.session_state import ACCEPTING, SessionState
from tests.protocol.sessions import Peer, Server, error_of, token


@pytest.fixture
def peer() -> Peer:
    return Server().peer()


def test_an_accepted_connect_and_the_end_of_the_connection(peer: Peer) -> None:
    assert peer.session.state is SessionState.OPENED
    peer.connect(token=token(sub="42"))
    assert peer.session.state is SessionState.CONNECTED
    peer.session.closed()
    assert peer.session.state is SessionState.CLOSED


def test_a_refused_connect_and_a_disconnect(peer: Peer) -> None:
    assert error_of(peer.say({"id": 1, "connect": {"token": token(sub="42", exp=1)}})) == 109
    assert peer.session.state is SessionState.REFUSED
    peer.session.disconnect(3000, "")
    assert peer.session.state is SessionState.CLOSED


@pytest.mark.parametrize("state", SessionState)
def test_other_states_accept_no_command(peer: Peer, state: SessionState) -> None:
    peer.session.state = state
    peer.say(b"not a command")
    assert (peer.close_code is not None) == (state in ACCEPTING)
