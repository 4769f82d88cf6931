"""Roles in the memory of a broker, by a clock of the test."""

from __future__ import annotations

import pytest

from realtime.pubsub.engine import HoldRole, ResignRole, Term
from realtime.pubsub.roles import Roles

ADA, BEN = "node/0-2", "node/1-3"


def hold(roles: Roles, now: float, holder: str, term: int = 0) -> Term:
    return roles.hold(now, HoldRole("tasks", holder, 5.0, term))


def test_a_role_has_one_holder_until_its_time_ends() -> None:
    roles = Roles()
    assert hold(roles, 10.0, ADA) == Term(1, 5.0)
    assert hold(roles, 14.0, BEN) == Term(0, 1.0)
    assert hold(roles, 14.5, ADA) == Term(1, 5.0)
    assert hold(roles, 19.0, BEN) == Term(0, 0.5)
    assert hold(roles, 19.5, BEN) == Term(2, 5.0)
    assert hold(roles, 20.0, ADA) == Term(0, 4.5)


def test_a_holder_without_a_successor_keeps_its_term() -> None:
    roles = Roles()
    hold(roles, 10.0, ADA)
    assert hold(roles, 100.0, ADA).number == 1


def test_the_holder_alone_can_resign() -> None:
    roles = Roles()
    hold(roles, 10.0, ADA)
    assert not roles.resign(ResignRole("tasks", BEN, b""))
    assert hold(roles, 11.0, BEN).number == 0
    assert roles.resign(ResignRole("tasks", ADA, b""))
    assert hold(roles, 11.0, BEN) == Term(2, 5.0)


def test_roles_go_on_in_the_broker_that_takes_over() -> None:
    roles, other = Roles(), Roles()
    hold(roles, 10.0, ADA)
    for part in roles.export():
        other.import_part(part)
    assert hold(other, 11.0, BEN) == Term(0, 4.0)
    assert hold(other, 15.0, BEN) == Term(2, 5.0)


@pytest.mark.parametrize("claimed", [0, 7])
def test_a_broker_that_has_lost_the_roles_gives_them_to_their_holders_alone(claimed: int) -> None:
    roles = Roles()
    roles.note_loss(100.0)
    assert hold(roles, 101.0, BEN) == Term(0, 4.0)
    if claimed:
        assert hold(roles, 102.0, ADA, claimed) == Term(7, 5.0)
        assert hold(roles, 105.0, BEN) == Term(0, 2.0)
    else:
        assert hold(roles, 105.0, BEN) == Term(1, 5.0)
