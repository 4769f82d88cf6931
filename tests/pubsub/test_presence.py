"""Presence over several peers: absences, and the numbers of clients and users."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realtime.errors import ClientError
from realtime.pubsub.engine import PRESENCE_PAGE, AddPresence, GetPresence, RemovePresence
from realtime.pubsub.presence import COUNT_FROM, LISTING_TIME, MAX_LISTINGS, RETURN_GRACE, Presence, PresenceEntry
from realtime.types import ClientInfo

GRACE = 2.0


class Desk:
    """Presence of two peers, and a log of the joins and leaves of all channels."""

    def __init__(self, limit: int = 1000) -> None:
        self.log: list[str] = []
        self.presence = Presence[str](limit, self)
        self.now = 0.0
        for peer in ("one", "two"):
            self.presence.attach(peer)

    def on_present(self, channel: str, entry: PresenceEntry, *, is_new: bool, announce: bool) -> None:
        if is_new and announce and entry.announce:
            self.log.append(f"join {entry.info.client}")

    def on_absent(self, channel: str, entry: PresenceEntry) -> None:
        if entry.announce:
            self.log.append(f"leave {entry.info.client}")

    def add(self, client: str, user: str = "ann", *, peer: str = "one", channel: str = "a", grace: float = 0.0) -> None:
        self.presence.add(peer, AddPresence(channel, ClientInfo(user, client), True, True, grace))

    def remove(self, client: str, *, peer: str = "one", connected: bool = True, returning: bool = False) -> None:
        self.presence.remove(self.now, peer, RemovePresence("a", client, returning), is_connected=connected)

    def advance(self, seconds: float) -> None:
        self.now += seconds
        while self.presence.sweep(self.now, 10):
            pass

    def heard(self) -> list[str]:
        log, self.log = self.log, []
        return log

    @property
    def listed(self) -> list[str]:
        return sorted(self.presence.list("a"))


@pytest.fixture
def desk() -> Desk:
    return Desk()


class TestAClientThatIsAskedToSubscribeAgain:
    def test_it_returns_without_leave_and_join(self, desk: Desk) -> None:
        desk.add("c1")
        desk.remove("c1", returning=True)
        assert (desk.heard(), desk.listed) == (["join c1"], ["c1"])
        desk.advance(RETURN_GRACE / 2)
        desk.add("c1")
        desk.advance(RETURN_GRACE * 2)
        assert (desk.heard(), desk.listed, desk.presence.absent) == ([], ["c1"], 0)
        desk.remove("c1")
        assert desk.heard() == ["leave c1"]

    def test_it_leaves_when_it_does_not_return(self, desk: Desk) -> None:
        desk.add("c1")
        desk.remove("c1", returning=True)
        desk.advance(RETURN_GRACE + 0.5)
        assert (desk.heard(), desk.listed) == (["join c1", "leave c1"], [])

    def test_it_leaves_when_its_connection_ends(self, desk: Desk) -> None:
        desk.add("c1")
        desk.remove("c1", returning=True)
        desk.presence.client_gone(desk.now, "c1")
        assert (desk.heard(), desk.listed) == (["join c1", "leave c1"], [])

    def test_it_leaves_when_its_peer_ends(self, desk: Desk) -> None:
        desk.add("c1")
        desk.remove("c1", returning=True)
        desk.presence.detach(desk.now, "one", ["c1"])
        assert (desk.heard(), desk.presence.absent) == (["join c1", "leave c1"], 0)

    def test_nobody_takes_its_place(self, desk: Desk) -> None:
        desk.add("c1", grace=GRACE)
        desk.remove("c1", returning=True)
        desk.add("c2", grace=GRACE)
        assert (desk.heard(), desk.listed) == (["join c1", "join c2"], ["c1", "c2"])


class TestGrace:
    def test_a_blip_shows_neither_leave_nor_join(self, desk: Desk) -> None:
        desk.add("c1", grace=GRACE)
        desk.remove("c1", connected=False)
        desk.advance(0.3)
        desk.add("c2", grace=GRACE, peer="two")
        desk.advance(10.0)
        assert (desk.heard(), desk.listed) == (["join c1"], ["c1"])
        assert desk.presence.list("a") == {"c1": ClientInfo("ann", "c1")}
        # A later info, and a second blip.
        desk.presence.add("two", AddPresence("a", ClientInfo("ann", "c2", b'"A."'), True, True, GRACE))
        assert desk.presence.list("a") == {"c1": ClientInfo("ann", "c1", b'"A."')}
        desk.presence.detach(desk.now, "two", ["c2"])
        desk.add("c3", grace=GRACE)
        desk.remove("c3")
        assert (desk.heard(), desk.listed) == (["leave c1"], [])

    def test_who_stays_away_leaves(self, desk: Desk) -> None:
        desk.add("c1", grace=GRACE)
        desk.remove("c1", connected=False)
        desk.advance(GRACE - 0.1)
        assert (desk.heard(), desk.listed) == (["join c1"], ["c1"])
        desk.advance(0.5)
        desk.add("c2", grace=GRACE)
        assert (desk.heard(), desk.listed) == (["leave c1", "join c2"], ["c2"])

    def test_an_unsubscribe_of_the_clients_own_is_no_blip(self, desk: Desk) -> None:
        desk.add("c1", grace=GRACE)
        desk.remove("c1")
        assert desk.heard() == ["join c1", "leave c1"]

    def test_without_a_grace_a_blip_shows_both(self, desk: Desk) -> None:
        desk.add("c1")
        desk.remove("c1", connected=False)
        desk.add("c2")
        assert desk.heard() == ["join c1", "leave c1", "join c2"]

    def test_other_users_and_the_anonymous_one_take_no_place(self, desk: Desk) -> None:
        desk.add("c1", grace=GRACE)
        desk.add("c2", "", grace=GRACE)
        desk.remove("c1", connected=False)
        desk.remove("c2", connected=False)
        desk.add("c3", "bob", grace=GRACE)
        desk.add("c4", "", grace=GRACE)
        assert desk.heard() == ["join c1", "join c2", "leave c2", "join c3", "join c4"]

    def test_the_absent_are_limited(self) -> None:
        desk = Desk(limit=2)
        for number in range(4):
            desk.add(f"c{number}", f"user {number}", grace=GRACE)
            desk.remove(f"c{number}", connected=False)
        assert desk.presence.absent == 2
        assert [line for line in desk.heard() if line.startswith("leave")] == ["leave c2", "leave c3"]


def test_the_channels_of_a_peer_are_limited() -> None:
    desk = Desk(limit=1)
    desk.add("c1")
    with pytest.raises(ClientError):
        desk.add("c1", channel="b")
    desk.add("c1", channel="b", peer="two")


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["add", "update", "remove", "return", "end", "advance"]), st.integers(0, 5), st.integers(0, 2)
    ),
    max_size=60,
)


@given(STEPS, st.sampled_from([0.0, GRACE]))
def test_lists_numbers_and_announcements_agree(steps, grace):
    desk = Desk()
    connected: set[str] = set()
    shown: set[str] = set()
    desk.presence.count("a")
    for name, number, user in steps:
        client = f"c{number} {user}"
        peer = ("one", "two")[number % 2]
        match name:
            case "add" | "update":
                desk.add(client, f"user {user}", peer=peer, grace=grace)
                connected.add(client)
            case "remove" | "return":
                desk.remove(client, peer=peer, connected=client in connected, returning=name == "return")
            case "end":
                connected.discard(client)
                desk.presence.client_gone(desk.now, client)
                desk.remove(client, peer=peer, connected=False)
                # A client id never comes again.
                if client in desk.listed:
                    desk.advance(RETURN_GRACE + 1.0)
            case "advance":
                desk.advance(user)
        for line in desk.heard():
            verb, _, client = line.partition(" ")
            assert (client in shown) == (verb == "leave")
            (shown.add if verb == "join" else shown.remove)(client)
        listed = desk.presence.list("a")
        assert set(listed) == shown
        assert desk.presence.count("a") == (len(listed), len({info.user for info in listed.values()}))
    for peer in ("one", "two"):
        desk.presence.detach(desk.now, peer, connected)
    desk.advance(100.0)
    assert (desk.listed, desk.presence.absent, desk.presence._counts) == ([], 0, {})
    assert desk.presence._returning == desk.presence._gone == desk.presence._absent == {}


def test_counting_takes_the_same_time_for_any_number_of_members(desk: Desk) -> None:
    for number in range(20_000):
        desk.add(f"c{number}", f"user {number}")
    assert desk.presence.count("a") == (20_000, 20_000)
    start = time.thread_time()
    for _ in range(1_000):
        desk.presence.count("a")
    assert time.thread_time() - start < 0.2  # one count of all takes 4 ms


class TestPages:
    """Lists of clients, page by page."""

    def pages(self, desk: Desk, listing: int, peer: str = "one") -> Iterator[dict[str, ClientInfo]]:
        page = dict.fromkeys(range(PRESENCE_PAGE))
        while len(page) == PRESENCE_PAGE:
            page = desk.presence.page(desk.now, peer, GetPresence("a", listing))
            assert len(page) <= PRESENCE_PAGE
            yield page

    @pytest.mark.parametrize("members", [0, 1, PRESENCE_PAGE, PRESENCE_PAGE + 1, 3 * PRESENCE_PAGE])
    def test_all_pages_have_the_clients_of_the_first_request(self, desk: Desk, members: int) -> None:
        for number in range(members):
            desk.add(f"c{number}", peer="one" if number % 2 else "two")
        desk.presence.add("one", AddPresence("a", ClientInfo("ann", "unlisted"), False, True))
        expected, listed = desk.presence.list("a"), {}
        for number, page in enumerate(self.pages(desk, 7)):
            listed.update(page)
            desk.add(f"later {number}")
            desk.remove(f"c{members - number - 1}", peer="one" if members - number - 1 & 1 else "two")
        assert listed == expected
        assert not desk.presence._listings

    def test_listings_are_independent(self, desk: Desk) -> None:
        for number in range(2 * PRESENCE_PAGE):
            desk.add(f"c{number}")
        found = [{}, {}, {}]
        listings = [self.pages(desk, 1), self.pages(desk, 2), self.pages(desk, 1, "two")]
        for pages in zip(*listings, strict=True):
            for members, page in zip(found, pages, strict=True):
                members.update(page)
        assert all(members == desk.presence.list("a") for members in found)

    def test_abandoned_ones_make_room_and_others_are_refused(self, desk: Desk) -> None:
        for number in range(PRESENCE_PAGE):
            desk.add(f"c{number}")
        for number in range(1, MAX_LISTINGS + 1):
            next(self.pages(desk, number))
        with pytest.raises(ClientError) as refused:
            next(self.pages(desk, MAX_LISTINGS + 1))
        assert refused.value.code == 111
        desk.now += LISTING_TIME
        next(self.pages(desk, MAX_LISTINGS + 1))
        assert len(desk.presence._listings) == 1
        desk.presence.detach(desk.now, "one", ())
        assert not desk.presence._listings


def test_large_channels_are_counted_before_the_first_question(desk: Desk) -> None:
    for number in range(COUNT_FROM + 10):
        desk.add(f"c{number}", f"user {number % 7}")
    assert desk.presence._counts["a"].clients == COUNT_FROM + 10
    assert desk.presence.count("a") == (COUNT_FROM + 10, 7)
