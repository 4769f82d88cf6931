"""The account of a soak: which publications happened, which client received which of them, and how.

The rules have the numbers of the delivery contract, see README.md. Each is one `require` here, in `members` or in
`clients`. Publications carry a number that the soak gives them once; so the account knows them apart whatever the
server makes of them.

Only what clients and publishers see counts here. Time is seconds of one clock, `now`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

LOST, REPEATED, REORDERED, BROKEN = "silently lost", "repeated", "reordered", "broken rule"
FINDINGS_KEPT = 100
# Seconds by which the soak may see a publication later than the server numbered it.
SLACK = 3.0
# Seconds around the death of a broker in which a publication without history may be lost with it.
BROKER_GONE = 20.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One breach of a rule. at: its time. fault: the fault just before it."""

    rule: str
    effect: str
    client: str
    channel: str
    text: str
    at: float
    fault: str

    def __str__(self) -> str:
        return (
            f"{self.at:9.3f} s  {self.rule} {self.effect}: {self.client} in {self.channel}: {self.text}"
            f"  [{self.fault or 'before any fault'}]"
        )


@dataclass(eq=False, slots=True)
class Epoch:
    """One run of a channel's numbering. top: the largest known offset. numbers, seen: what is at each offset, and
    when it was first seen there. offsets: of each number.
    """

    name: str
    index: int
    born: float
    top: int = 0
    numbers: dict[int, int] = field(default_factory=dict)
    seen: dict[int, float] = field(default_factory=dict)
    offsets: dict[int, int] = field(default_factory=dict)


class Channel:
    """A channel as all clients and publishers saw it.

    size, ttl: publications and seconds that its history keeps; 0 without history. passes: whether a publication of this
    number passes the filter of the channel's filtering subscribers. asked: the time of the first request for each
    number. last: a publication for which every subscriber was there, 0 for none.
    """

    def __init__(
        self, account: Account, name: str, size: int, ttl: float, passes: Callable[[int], bool] = lambda number: True
    ) -> None:
        self.name = name
        self.size = size
        self.ttl = ttl
        self.passes = passes
        self.epochs: list[Epoch] = []
        self.asked: dict[int, float] = {}
        self.accepted: dict[int, float] = {}
        self.unanswered: set[int] = set()
        self.last = 0
        self._account = account
        self._by_name: dict[str, Epoch] = {}

    def epoch(self, name: str) -> Epoch:
        """Return the epoch; the first mention makes it the channel's newest."""
        epoch = self._by_name.get(name)
        if epoch is None:
            now = self._account.now()
            if self.epochs:
                caused = self._account.has_lost_data_since(self.epochs[-1].born)
                self._account.require(
                    caused, "N8", BROKEN, "server", self.name, f"a new epoch {name} although no broker was lost"
                )
            epoch = self._by_name[name] = Epoch(name, len(self.epochs), now)
            self.epochs.append(epoch)
        return epoch

    def saw(self, who: str, epoch: Epoch, offset: int, number: int) -> None:
        """Note that `who` has seen publication `number` at this place."""
        known = epoch.numbers.get(offset)
        if known is None:
            before = epoch.offsets.get(number)
            self._account.require(
                before is None, "N10", REPEATED, who, self.name, f"publication {number} is at {before} and at {offset}"
            )
            epoch.numbers[offset] = number
            epoch.seen[offset] = self._account.now()
            epoch.offsets[number] = offset
            epoch.top = max(epoch.top, offset)
        elif known != number:
            text = f"offset {offset} of {epoch.name} is publication {known}, and here {number}"
            self._account.require(False, "N1", BROKEN, who, self.name, text)

    def ask(self, number: int) -> None:
        """Note that a publisher is about to ask for this publication."""
        self.asked[number] = self._account.now()

    def accept(self, number: int, place: tuple[str, int] | None, newest: int) -> None:
        """Note the answer to a publisher. place: epoch and offset, if it names them. newest: index of the newest epoch
        known when the request began, -1 for none."""
        self.accepted[number] = self._account.now()
        if place is None:
            return
        epoch = self.epoch(place[0])
        self.saw("publisher", epoch, place[1], number)
        self._account.require(
            epoch.index >= newest, "N7", BROKEN, "publisher", self.name, f"epoch {epoch.name} came back"
        )

    def give_up(self, number: int) -> None:
        """Note that a publisher got no answer in time: the publication may happen later, earlier or never."""
        self.unanswered.add(number)

    def newest(self) -> int:
        return len(self.epochs) - 1

    def span(self, first: tuple[Epoch, int], last: tuple[Epoch, int]) -> int:
        """Count the publications after the place `first`, up to and with the place `last`."""
        if first[0] is last[0]:
            return last[1] - first[1]
        between = sum(epoch.top for epoch in self.epochs[first[0].index + 1 : last[0].index])
        return first[0].top - first[1] + between + last[1]


class Subscription:
    """A positioned subscription of one client, over all its connections.

    cached: in cache mode. filtered: with the channel's filter. is_live: subscribed on a connection now.
    """

    __slots__ = (
        "_account", "_asked", "_newest", "_start", "cached", "channel", "client", "filtered", "is_live",
        "live", "missing", "position", "recovered", "superseded", "told", "told_times",
    )  # fmt: skip

    def __init__(
        self, account: Account, client: str, channel: Channel, *, cached: bool = False, filtered: bool = False
    ) -> None:
        self.client = client
        self.channel = channel
        self.cached = cached
        self.filtered = filtered
        self.is_live = False
        self.position: tuple[Epoch, int] | None = None
        self.live = self.recovered = self.told_times = 0
        # Gaps between two runs: (end of one, start of the next), by what the client was told.
        self.told: list[tuple[tuple[Epoch, int], tuple[Epoch, int]]] = []
        self.superseded: list[tuple[tuple[Epoch, int], tuple[Epoch, int]]] = []
        # Offsets that were skipped inside a run: (epoch, offset) -> (time, fault).
        self.missing: dict[tuple[Epoch, int], tuple[float, str]] = {}
        self._account = account
        self._asked: tuple[Epoch, int] | None = None
        self._newest = -1
        self._start: tuple[Epoch, int] | None = None
        account.subscriptions.append(self)

    def _require(self, holds: bool, rule: str, effect: str, text: str) -> bool:
        return self._account.require(holds, rule, effect, self.client, self.channel.name, text)

    def ask(self) -> tuple[str, int] | None:
        """Return epoch and offset to recover from, None for a first subscription. Call it for each request."""
        self._asked, self._newest = self.position, self.channel.newest()
        return (self.position[0].name, self.position[1]) if self.position else None

    def subscribed(
        self, epoch: str, offset: int, recovered: bool, was_recovering: bool, publications: list[tuple[int, int]]
    ) -> None:
        """Take the answer to a subscribe command. publications: offset and number of each."""
        asked, here = self._asked, self.channel.epoch(epoch)
        self.is_live = True
        self._require(here.index >= self._newest, "N7", BROKEN, f"epoch {epoch} came back")
        if self.cached:
            self._subscribed_to_cache(asked, here, offset, recovered, publications)
        elif asked is None:
            self._require(not publications, "N5", BROKEN, "publications in the answer to a first subscription")
            self._begin(here, offset)
        elif recovered:
            same = here is asked[0] and offset == asked[1]
            text = f"asked for {asked[0].name}:{asked[1]}, recovered {epoch}:{offset}"
            if self._require(here is asked[0], "N6", BROKEN, text) and self._require(same, "N4", BROKEN, text):
                for place, number in publications:
                    self._take(place, number, recovered=True)
            else:
                self._begin(here, offset)
        else:
            self._require(not publications, "N5", BROKEN, "publications although not recovered")
            self._require(was_recovering, "N5", BROKEN, "the application was not told that the recovery failed")
            self._note_told(asked, here, offset)

    def _subscribed_to_cache(
        self, asked: tuple[Epoch, int] | None, here: Epoch, offset: int, recovered: bool, found: list[tuple[int, int]]
    ) -> None:
        start = found[0][0] - 1 if found else offset
        self._require(len(found) <= 1, "N4", BROKEN, f"{len(found)} publications in cache mode")
        if asked is None:
            self._begin(here, start)
        elif here is asked[0]:
            if not self._require(start >= asked[1], "N3", REORDERED, f"from {asked[1]} back to {start}"):
                found = []
            else:
                self.superseded.append((asked, (here, start)))
                self._begin(here, start)
        else:
            self._note_told(asked, here, start)
        for place, number in found:
            self._take(place, number, recovered=True)

    def _note_told(self, asked: tuple[Epoch, int], here: Epoch, offset: int) -> None:
        self.told_times += 1
        self.told.append((asked, (here, offset)))
        if here is asked[0]:
            limit = min(self._account.recovery_limit, self.channel.size)
            forgotten = offset - asked[1] > limit or offset < asked[1]
            expired = self._has_expired(here, asked[1], offset)
            text = f"{here.name}:{asked[1]} not recovered although {offset} is the top, within size and ttl"
            self._require(forgotten or expired, "N8", BROKEN, text)
        self._begin(here, offset)

    def _has_expired(self, epoch: Epoch, last: int, top: int) -> bool:
        """Return whether history may have dropped a publication after `last`: the ttl has passed without another.

        A publication may have happened as soon as it was asked for: after the death of a worker it is seen much later.
        """
        offsets = [offset for offset in range(last + 1, top + 1) if offset in epoch.seen]
        seen = [epoch.seen[offset] for offset in offsets]
        asked = [self.channel.asked.get(epoch.numbers[offset], epoch.seen[offset]) for offset in offsets]
        pauses = [later - earlier for earlier, later in zip(asked, [*seen[1:], self._account.now()], strict=True)]
        return len(offsets) < top - last or max(pauses, default=0.0) >= self.channel.ttl - SLACK

    def _begin(self, epoch: Epoch, offset: int) -> None:
        self.position = (epoch, offset)
        self._start = self._start or self.position
        epoch.top = max(epoch.top, offset)

    def publication(self, offset: int, number: int, epoch: str = "") -> None:
        """Take a pushed publication. epoch: of the push, if it names one."""
        if self.position is None:
            self._require(False, "N13", BROKEN, f"offset {offset} before any subscription")
        elif epoch and epoch != self.position[0].name:
            self._require(False, "N3", BROKEN, f"a push of {epoch} in a subscription of {self.position[0].name}")
        else:
            self._take(offset, number, recovered=False)

    def _take(self, offset: int, number: int, *, recovered: bool) -> None:
        assert self.position is not None
        epoch, last = self.position
        if offset <= last:
            known = self.missing.pop((epoch, offset), None)
            effect = REPEATED if known is None else REORDERED
            self._require(False, "N3", effect, f"offset {offset} of {epoch.name} after {last}")
            if known is None:
                return
        else:
            if offset > last + 1:
                noted = (self._account.now(), self._account.fault())
                self.missing.update(((epoch, skipped), noted) for skipped in range(last + 1, offset))
            self.position = (epoch, offset)
        if self.filtered:
            self._require(self.channel.passes(number), "N9", BROKEN, f"{number} does not pass the filter")
        if recovered:
            self.recovered += 1
        else:
            self.live += 1
        self.channel.saw(self.client, epoch, offset, number)

    def ended(self) -> None:
        """The connection or the subscription ended; the client has its position."""
        self.is_live = False

    def close(self, totals: Counter[str]) -> None:
        """Balance this subscription (N14), and find what it lost. Adds to `totals`."""
        if self.position is None or self._start is None:
            return
        final = (self.channel.epochs[-1], self.channel.epochs[-1].top)
        promised = self.channel.span(self._start, final)
        told = sum(self.channel.span(*gap) for gap in self.told)
        superseded = sum(self.channel.span(*gap) for gap in self.superseded)
        waiting = self.channel.span(self.position, final)
        if self.filtered and self.is_live and self.position[0] is final[0]:
            waiting = 0  # what the client did not get must be what its filter excludes
            noted = (self._account.now(), self._account.fault())
            tail = range(self.position[1] + 1, final[1] + 1)
            self.missing.update(((final[0], offset), noted) for offset in tail)
        lost = self._losses()
        filtered = len(self.missing) - lost
        if self.is_live and waiting:
            text = f"stands at {self.position[0].name}:{self.position[1]}, the top is {final[0].name}:{final[1]}"
            self._require(False, "N14", LOST, text)
            lost, waiting = lost + waiting, 0
        balance = self.live + self.recovered + told + superseded + filtered + waiting + lost
        text = f"{promised} happened, {balance} are accounted for"
        self._require(balance == promised, "N14", BROKEN, text)
        totals.update(
            {
                "promised": promised, "delivered": self.live, "recovered": self.recovered, "told lost": told,
                "superseded": superseded, "filtered": filtered, "still in history": waiting, "silently lost": lost,
                "times told": self.told_times,
            }
        )  # fmt: skip

    def _losses(self) -> int:
        """Report the offsets that were skipped without a filter that demands it; return their number."""
        lost = 0
        for (epoch, offset), (at, fault) in self.missing.items():
            number = epoch.numbers.get(offset)
            if self.filtered and number is not None and not self.channel.passes(number):
                continue
            if self.filtered and number is None:
                continue  # no other client was there to say what it was
            lost += 1
            text = f"offset {offset} of {epoch.name} (publication {number})"
            self._account.report("N3", LOST, self.client, self.channel.name, text, at, fault)
        return lost


class PlainSubscription:
    """A subscription without history, in a channel with one publisher, whose accepted numbers count up (N11)."""

    __slots__ = ("_account", "_last", "_late", "_missing", "_seen", "channel", "client", "is_live", "live")

    def __init__(self, account: Account, client: str, channel: Channel) -> None:
        self.client = client
        self.channel = channel
        self.is_live = False
        self.live = 0
        self._account = account
        self._last = 0  # the latest number on this connection, 0 before the first
        self._seen = 0
        self._missing: dict[int, tuple[float, str]] = {}
        self._late: set[int] = set()
        account.plain.append(self)

    def subscribed(self) -> None:
        self.is_live = True
        self._last = 0

    def publication(self, number: int) -> None:
        if number in self.channel.unanswered and number not in self._late and number != self._seen:
            self._late.add(number)  # the broker may have got it at any time
            self._missing.pop(number, None)
            self.live += 1
            return
        if number <= self._seen:
            effect = REORDERED if self._missing.pop(number, None) else REPEATED
            text = f"publication {number} after {self._seen}"
            self._account.require(False, "N11", effect, self.client, self.channel.name, text)
            return
        if self._last and number > self._last + 1:
            noted = (self._account.now(), self._account.fault())
            self._missing.update((skipped, noted) for skipped in range(self._last + 1, number))
        self._last = self._seen = number
        self.live += 1

    def ended(self) -> None:
        self.is_live = False

    @property
    def lacks_last(self) -> bool:
        return self.is_live and self._seen < self.channel.last

    def close(self) -> list[tuple[int, float, str]]:
        """Return the accepted publications that this subscriber did not get although its connection stayed, each with
        the time and the fault before it; without those that a broker may have taken with it."""
        accepted = self.channel.accepted
        if self.lacks_last:
            self._missing[self.channel.last] = (self._account.now(), self._account.fault())
        return [
            (number, at, fault)
            for number, (at, fault) in self._missing.items()
            if number in accepted and not self._account.was_interrupted(accepted[number], at)
        ]


class Account:
    """All subscriptions and channels of a soak, and the findings about them."""

    def __init__(
        self,
        now: Callable[[], float],
        fault: Callable[[], str] = str,
        recovery_limit: int = 300,
        on_finding: Callable[[Finding, int], object] = lambda finding, number: None,
        *,
        keeps_data: bool = False,
    ) -> None:
        """fault: describes the latest fault. recovery_limit: publications that a client may recover at once.
        on_finding: called with a finding, and how many its rule has by now. keeps_data: the data outlives a broker."""
        self.now = now
        self.fault = fault
        self.recovery_limit = recovery_limit
        self.on_finding = on_finding
        self.channels: dict[str, Channel] = {}
        self.subscriptions: list[Subscription] = []
        self.plain: list[PlainSubscription] = []
        self.findings: list[Finding] = []
        self.effects: Counter[str] = Counter()
        self.rules: Counter[str] = Counter()
        self._keeps_data = keeps_data
        self._losses: list[float] = []  # the times at which data may have been lost
        self._interruptions: list[float] = []  # and publications without history

    def add_channel(
        self, name: str, size: int = 0, ttl: float = 0.0, passes: Callable[[int], bool] = lambda number: True
    ) -> Channel:
        channel = self.channels[name] = Channel(self, name, size, ttl, passes)
        return channel

    # What faults may lose.

    def broker_lost(self) -> None:
        """A fault is about to end a broker, or its link to the store: publications without history may be lost, and
        with the embedded store all data, so that new epochs may follow."""
        self._interruptions.append(self.now())
        if not self._keeps_data:
            self._losses.append(self.now())

    def data_lost(self) -> None:
        """A fault is about to take the data of the store, or to let it seem so: new epochs may follow."""
        self._interruptions.append(self.now())
        self._losses.append(self.now())

    def has_lost_data_since(self, time: float) -> bool:
        """Return whether data was lost after `time`, or so shortly before that answers were on their way."""
        return bool(self._losses) and self._losses[-1] >= time - BROKER_GONE

    def has_lost_data_after(self, time: float) -> bool:
        """Return whether data may have been lost that was accepted at `time`."""
        return _is_any_between(self._losses, time - BROKER_GONE, self.now())

    def was_interrupted(self, first: float, last: float) -> bool:
        """Return whether a publication without history may be lost, accepted at `first` and missed at `last`."""
        return _is_any_between(self._interruptions, first - BROKER_GONE, last + BROKER_GONE)

    # Findings.

    def require(self, holds: bool, rule: str, effect: str, client: str, channel: str, text: str) -> bool:
        """Report a breach of `rule` unless it holds. Returns whether it holds."""
        if not holds:
            self.report(rule, effect, client, channel, text, self.now(), self.fault())
        return holds

    def report(self, rule: str, effect: str, client: str, channel: str, text: str, at: float, fault: str) -> None:
        self.effects[effect] += 1
        self.rules[rule] += 1
        if self.rules[rule] <= FINDINGS_KEPT:
            self.findings.append(Finding(rule, effect, client, channel, text, at, fault))
            self.on_finding(self.findings[-1], self.rules[rule])

    # The end.

    def close(self, dropped: float = 0.0) -> Counter[str]:
        """Balance every subscription, and return the totals. dropped: publications that the server says it dropped."""
        totals: Counter[str] = Counter()
        for subscription in self.subscriptions:
            subscription.close(totals)
        self._close_plain(totals, dropped)
        self._check_acceptances(totals)
        return totals

    def _close_plain(self, totals: Counter[str], dropped: float) -> None:
        absent = [(one, *missed) for one in self.plain for missed in one.close()]
        totals["plain delivered"] = sum(one.live for one in self.plain)
        totals["plain dropped and counted"] = min(len(absent), int(dropped))
        for one, number, at, fault in absent if len(absent) > dropped else ():
            text = f"publication {number}, and the server counts only {dropped:g} as dropped"
            self.report("N11", LOST, one.client, one.channel.name, text, at, fault)

    def _check_acceptances(self, totals: Counter[str]) -> None:
        """An accepted publication has a place, unless a broker was lost after its acceptance (N2, N8)."""
        for channel in self.channels.values():
            totals["accepted"] += len(channel.accepted)
            if not channel.size:
                continue
            placed = {number for epoch in channel.epochs for number in epoch.offsets}
            totals["happened"] += sum(epoch.top for epoch in channel.epochs)
            for number in channel.accepted.keys() - placed:
                at = channel.accepted[number]
                if not self.has_lost_data_after(at):
                    text = f"publication {number} was accepted at {at:.3f} s and has no place"
                    self.report("N2", LOST, "publisher", channel.name, text, at, "")

    def expect_last(self, since: float) -> None:
        """Every subscriber has been there since this time, and lacks none of the publications accepted after it."""
        for channel in self.channels.values():
            channel.last = max((number for number, at in channel.accepted.items() if at >= since), default=0)

    def unsettled(self) -> Iterable[Subscription | PlainSubscription]:
        """Return the subscriptions that are not at the top of their channel."""
        yield from (one for one in self.plain if one.lacks_last)
        for one in self.subscriptions:
            if one.position and not one.filtered:
                newest = one.channel.epochs[-1]
                if not one.is_live or one.position != (newest, newest.top):
                    yield one


def _is_any_between(times: list[float], first: float, last: float) -> bool:
    """Whether any of the ordered times is after `first` and not after `last`."""
    index = bisect_right(times, first)
    return index < len(times) and times[index] <= last
