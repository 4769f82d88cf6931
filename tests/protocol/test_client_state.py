"""The application's state of a client, as bytes for another process."""

from __future__ import annotations

import pickle
import threading
from dataclasses import dataclass
from typing import Any

import pytest

from realtime.protocol.client_state import StateError, dump, load


@dataclass
class Cart:
    articles: set[str]


def test_a_state_is_restored_as_it_was() -> None:
    state: dict[Any, Any] = {"cart": Cart({"pen"}), 1: (2, 3), "data": b"\xff"}
    data = dump(state)
    assert data is not None
    assert load(data) == state


def test_an_empty_state_takes_no_bytes() -> None:
    assert dump({}) is None
    assert load(None) == {}


def test_a_state_that_can_not_move_is_an_error() -> None:
    with pytest.raises(StateError, match="can't be pickled: TypeError: cannot pickle"):
        dump({"lock": threading.Lock()})


def test_a_class_that_the_other_application_lacks_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    data = pickle.dumps({"cart": Cart(set())})
    monkeypatch.delitem(globals(), "Cart")
    with pytest.raises(StateError, match="can't be restored: AttributeError"):
        load(data)
