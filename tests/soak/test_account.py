"""The checker itself: it finds what is planted, and nothing else."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.soak.account import BROKEN, LOST, REORDERED, REPEATED, Account, Channel, PlainSubscription, Subscription
from tests.soak.members import EVENTUALLY, Room


class Clock:
    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


class Scene:
    """A channel, and a subscriber in it. Number n is at offset n of the epoch "a", unless a test says otherwise."""

    def __init__(self, *, size: int = 100, ttl: float = 60.0, cached: bool = False, filtered: bool = False) -> None:
        self.clock = Clock()
        self.account = Account(self.clock, lambda: "a fault")
        self.channel: Channel = self.account.add_channel("news", size, ttl, lambda number: number % 2 == 0)
        self.one = Subscription(self.account, "Ann", self.channel, cached=cached, filtered=filtered)

    def publish(self, *numbers: int, epoch: str = "a") -> None:
        for number in numbers:
            self.channel.accept(number, (epoch, number), self.channel.newest())

    def subscribe(self, offset: int, *found: int, epoch: str = "a", recovered: bool = False, told: bool = True) -> None:
        asked = self.one.ask()
        was_recovering = asked is not None and told
        self.one.subscribed(epoch, offset, recovered, was_recovering, [(number, number) for number in found])

    def push(self, *numbers: int) -> None:
        for number in numbers:
            self.one.publication(number, number)

    def close(self) -> Counter[str]:
        return self.account.close()

    def found(self) -> set[tuple[str, str]]:
        return {(finding.rule, finding.effect) for finding in self.account.findings}


def test_a_life_without_a_fault_balances() -> None:
    scene = Scene()
    scene.publish(1, 2)
    scene.subscribe(2)
    scene.publish(3, 4, 5, 6)
    scene.push(3, 4)
    scene.one.ended()
    scene.subscribe(4, 5, recovered=True)
    scene.push(6)
    totals = scene.close()
    assert scene.account.findings == []
    assert (totals["promised"], totals["delivered"], totals["recovered"], totals["silently lost"]) == (4, 3, 1, 0)


def test_a_loss_is_found_with_its_place_and_the_fault_before_it() -> None:
    scene = Scene()
    scene.subscribe(0)
    scene.publish(1, 2, 3)
    scene.push(1)
    scene.clock.time = 123.0
    scene.push(3)
    scene.clock.time = 200.0
    assert scene.close()["silently lost"] == 1
    (finding,) = scene.account.findings
    assert (finding.rule, finding.effect, finding.client, finding.channel) == ("N3", LOST, "Ann", "news")
    assert (finding.at, finding.fault) == (123.0, "a fault")
    assert "offset 2 of a" in finding.text


def test_a_loss_at_the_end_is_found() -> None:
    scene = Scene()
    scene.subscribe(0)
    scene.publish(1, 2)
    scene.push(1)
    assert scene.close()["silently lost"] == 1
    assert scene.found() == {("N14", LOST)}


def test_a_loss_between_two_connections_is_found() -> None:
    scene = Scene()
    scene.subscribe(0)
    scene.publish(1, 2, 3)
    scene.push(1)
    scene.one.ended()
    scene.subscribe(1, 3, recovered=True)
    assert scene.close()["silently lost"] == 1
    assert scene.found() == {("N3", LOST)}


@pytest.mark.parametrize("repeated", [(1, 1), (1, 2, 1)])
def test_a_repeat_is_found(repeated: tuple[int, ...]) -> None:
    scene = Scene()
    scene.subscribe(0)
    scene.publish(*sorted({*repeated}))
    scene.push(*repeated)
    scene.close()
    assert scene.found() == {("N3", REPEATED)}


def test_a_reorder_is_found_and_is_no_loss() -> None:
    scene = Scene()
    scene.subscribe(0)
    scene.publish(1, 2, 3)
    scene.push(1, 3, 2)
    assert scene.close()["silently lost"] == 0
    assert scene.found() == {("N3", REORDERED)}


def test_what_is_told_is_no_loss_but_counted() -> None:
    scene = Scene(size=2)
    scene.subscribe(0)
    scene.publish(1, 2, 3, 4, 5)
    scene.push(1)
    scene.subscribe(5)
    totals = scene.close()
    assert scene.account.findings == []
    assert (totals["delivered"], totals["told lost"], totals["times told"]) == (1, 4, 1)


def test_a_client_must_not_be_told_without_need() -> None:
    scene = Scene(size=100)
    scene.subscribe(0)
    scene.publish(1, 2)
    scene.push(1)
    scene.subscribe(2)
    scene.close()
    assert scene.found() == {("N8", BROKEN)}


def test_history_that_has_expired_is_a_need() -> None:
    scene = Scene(ttl=10.0)
    scene.subscribe(0)
    scene.publish(1, 2)
    scene.push(1)
    scene.clock.time += 10.0
    scene.subscribe(2)
    scene.close()
    assert scene.account.findings == []


def test_history_may_expire_before_its_publication_was_seen() -> None:
    scene = Scene(ttl=10.0)
    scene.subscribe(0)
    scene.publish(1)
    scene.push(1)
    scene.channel.ask(2)
    scene.clock.time += 10.0
    scene.publish(2)
    scene.subscribe(2)
    scene.close()
    assert scene.account.findings == []


def test_history_that_expired_before_the_newest_publication_is_a_need() -> None:
    scene = Scene(ttl=10.0)
    scene.subscribe(0)
    scene.publish(1, 2)
    scene.push(1)
    scene.clock.time += 10.0
    scene.publish(3)
    scene.subscribe(3)
    scene.close()
    assert scene.account.findings == []


def test_an_application_that_is_not_told_is_found() -> None:
    scene = Scene(size=2)
    scene.subscribe(0)
    scene.publish(1, 2, 3, 4)
    scene.push(1)
    scene.subscribe(4, told=False)
    assert ("N5", BROKEN) in scene.found()


def test_publications_without_recovery_are_found() -> None:
    scene = Scene(size=2)
    scene.subscribe(0)
    scene.publish(1, 2, 3, 4)
    scene.subscribe(4, 3, 4)
    assert ("N5", BROKEN) in scene.found()


@pytest.mark.parametrize(("epoch", "offset", "rule"), [("a", 2, "N4"), ("b", 1, "N6")])
def test_a_recovery_from_another_position_is_found(epoch: str, offset: int, rule: str) -> None:
    scene = Scene()
    scene.subscribe(0)
    scene.publish(1, 2, 3)
    scene.push(1)
    scene.account.data_lost()
    scene.subscribe(offset, epoch=epoch, recovered=True)
    assert (rule, BROKEN) in scene.found()


def test_the_death_of_a_broker_is_told() -> None:
    scene = Scene()
    scene.subscribe(0)
    scene.publish(1, 2, 3)
    scene.push(1)
    scene.account.data_lost()
    scene.clock.time += 1
    scene.publish(1, 2, epoch="b")
    scene.subscribe(1, epoch="b")
    scene.push(2)
    totals = scene.close()
    assert scene.account.findings == []
    assert (totals["promised"], totals["delivered"], totals["told lost"]) == (5, 2, 3)


def test_a_new_epoch_without_a_dead_broker_is_found() -> None:
    scene = Scene()
    scene.publish(1)
    scene.publish(1, epoch="b")
    assert scene.found() == {("N8", BROKEN)}


def test_an_epoch_that_comes_back_is_found() -> None:
    scene = Scene()
    scene.publish(1)
    scene.account.data_lost()
    scene.publish(1, epoch="b")
    scene.publish(2)
    assert scene.found() == {("N7", BROKEN)}


def test_a_client_of_an_epoch_that_comes_back_is_found() -> None:
    scene = Scene()
    scene.publish(1)
    scene.account.data_lost()
    scene.publish(1, epoch="b")
    scene.subscribe(1)
    assert scene.found() == {("N7", BROKEN)}


def test_two_publications_at_one_offset_are_found() -> None:
    scene = Scene()
    scene.channel.accept(1, ("a", 1), -1)
    scene.channel.accept(2, ("a", 1), 0)
    assert scene.found() == {("N1", BROKEN)}


def test_another_publication_at_a_client_than_at_the_publisher_is_found() -> None:
    scene = Scene()
    scene.subscribe(0)
    scene.publish(1)
    scene.one.publication(1, 7)
    assert scene.found() == {("N1", BROKEN)}


def test_a_publication_at_two_offsets_is_found() -> None:
    scene = Scene()
    scene.channel.accept(1, ("a", 1), -1)
    scene.channel.saw("Bob", scene.channel.epoch("a"), 2, 1)
    assert scene.found() == {("N10", REPEATED)}


def test_an_accepted_publication_that_is_nowhere_is_found() -> None:
    scene = Scene()
    scene.channel.accept(1, None, -1)
    scene.close()
    assert scene.found() == {("N2", LOST)}


def test_a_push_before_the_subscription_or_of_another_epoch_is_found() -> None:
    scene = Scene()
    scene.push(1)
    assert scene.found() == {("N13", BROKEN)}
    scene.subscribe(0)
    scene.one.publication(1, 1, "b")
    assert ("N3", BROKEN) in scene.found()


def test_a_filter_explains_gaps_and_nothing_else() -> None:
    scene = Scene(filtered=True)
    scene.subscribe(0)
    scene.publish(1, 2, 3, 4, 5, 6, 7)
    scene.push(2, 6)
    totals = scene.close()
    assert (totals["filtered"], totals["delivered"], totals["silently lost"]) == (4, 2, 1)
    (finding,) = scene.account.findings
    assert (finding.rule, finding.effect) == ("N3", LOST)
    assert "offset 4" in finding.text


def test_a_filter_that_lets_everything_pass_is_found() -> None:
    scene = Scene(filtered=True)
    scene.subscribe(0)
    scene.push(1)
    assert scene.found() == {("N9", BROKEN)}


def test_a_cache_skips_to_the_newest_and_never_back() -> None:
    scene = Scene(cached=True)
    scene.subscribe(0)
    scene.publish(1, 2, 3, 4, 5)
    scene.push(1)
    scene.subscribe(1, 4, recovered=True)
    scene.push(5)
    totals = scene.close()
    assert scene.account.findings == []
    assert (totals["delivered"], totals["recovered"], totals["superseded"]) == (2, 1, 2)
    scene.subscribe(5, 3, recovered=True)
    assert scene.found() == {("N3", REORDERED)}


def test_a_client_that_has_not_come_back_has_its_publications_in_history() -> None:
    scene = Scene()
    scene.subscribe(0)
    scene.publish(1, 2, 3)
    scene.push(1)
    scene.one.ended()
    totals = scene.close()
    assert scene.account.findings == []
    assert totals["still in history"] == 2


class TestWithoutHistory:
    def scene(self) -> tuple[Account, PlainSubscription]:
        account = Account(Clock(), lambda: "a fault")
        channel = account.add_channel("plain")
        for number in range(1, 10):
            channel.accept(number, None, -1)
        one = PlainSubscription(account, "Ann", channel)
        one.subscribed()
        return account, one

    def rules(self, account: Account) -> set[tuple[str, str]]:
        return {(finding.rule, finding.effect) for finding in account.findings}

    def test_a_gap_on_one_connection_is_a_loss(self) -> None:
        account, one = self.scene()
        one.publication(2)
        one.publication(4)
        account.close()
        assert self.rules(account) == {("N11", LOST)}

    def test_a_loss_at_the_end_is_found(self) -> None:
        account, one = self.scene()
        one.publication(2)
        account.expect_last(since=0.0)
        assert list(account.unsettled()) == [one]
        account.close()
        assert self.rules(account) == {("N11", LOST)}

    def test_a_gap_that_the_server_counts_is_none(self) -> None:
        account, one = self.scene()
        one.publication(2)
        one.publication(4)
        assert account.close(dropped=1)["plain dropped and counted"] == 1
        assert account.findings == []

    def test_a_gap_between_two_connections_is_none(self) -> None:
        account, one = self.scene()
        one.publication(2)
        one.ended()
        one.subscribed()
        one.publication(4)
        account.close()
        assert account.findings == []

    def test_a_publication_that_went_with_its_broker_is_none(self) -> None:
        account, one = self.scene()
        one.publication(2)
        account.data_lost()
        one.publication(4)
        account.close()
        assert account.findings == []

    def test_a_publication_without_an_answer_has_no_order_but_happens_once(self) -> None:
        account, one = self.scene()
        del one.channel.accepted[3]
        one.channel.give_up(3)
        for number in (1, 2, 4, 3, 5):
            one.publication(number)
        account.close()
        assert account.findings == []
        one.publication(3)
        assert self.rules(account) == {("N11", REPEATED)}

    @pytest.mark.parametrize(("numbers", "effect"), [((1, 2, 2), REPEATED), ((1, 3, 2), REORDERED)])
    def test_repeats_and_reorders(self, numbers: tuple[int, ...], effect: str) -> None:
        account, one = self.scene()
        for number in numbers:
            one.publication(number)
        account.close()
        assert self.rules(account) == {("N11", effect)}


class TestMembers:
    def scene(self) -> tuple[Clock, Account, Room]:
        clock = Clock()
        account = Account(clock)
        return clock, account, Room(account, "room")

    def test_lists_have_time_to_become_right(self) -> None:
        clock, account, room = self.scene()
        room.join("here")
        room.join("gone")
        room.leave("gone")
        clock.time += 1000
        room.compare("watcher", {"gone"}, since=0.0)
        clock.time += EVENTUALLY
        room.compare("watcher", {"gone"}, since=0.0)
        assert account.findings == []

    def test_a_list_that_becomes_right_has_time_again(self) -> None:
        clock, account, room = self.scene()
        room.join("here")
        for listed in (set(), {"here"}, set()):
            clock.time += EVENTUALLY
            room.compare("watcher", listed, since=0.0)
        assert account.findings == []

    @pytest.mark.parametrize("listed", [set(), {"here", "gone"}])
    def test_a_ghost_or_an_absent_member_is_found(self, listed: set[str]) -> None:
        clock, account, room = self.scene()
        room.join("here")
        room.join("gone")
        room.leave("gone")
        room.compare("watcher", listed, since=0.0)
        clock.time += EVENTUALLY + 1
        room.compare("watcher", listed, since=0.0)
        assert [finding.rule for finding in account.findings] == ["N12"]

    def test_a_member_of_whom_the_server_may_have_given_up_is_in_doubt(self) -> None:
        clock, account, room = self.scene()
        room.join("deaf")
        room.doubt("deaf")
        room.compare("watcher", set(), since=0.0)
        clock.time += EVENTUALLY + 1
        room.compare("watcher", set(), since=0.0)
        assert account.findings == []
