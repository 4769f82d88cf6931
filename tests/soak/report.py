"""Prints what a soak did, and its account."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tests.soak.account import BROKEN, LOST, REORDERED, REPEATED, Account
from tests.soak.bad_input import Attack
from tests.soak.clients import Crowd
from tests.soak.faults import Faults
from tests.soak.publishers import APIPublisher, Speakers
from tests.soak.served import Service

LINES = (
    "accepted",
    "happened",
    "promised",
    "delivered",
    "recovered",
    "filtered",
    "superseded",
    "told lost",
    "still in history",
    "times told",
    "plain delivered",
    "plain dropped and counted",
)
MOST = 30  # lines of one table


def tell_account(account: Account, totals: Mapping[str, int], tell: Callable[[str], None]) -> None:
    tell("\nTHE ACCOUNT, publications summed over all subscriptions")
    for name in LINES:
        tell(f"  {totals[name]:12,}  {name}")
    tell(f"  {totals['silently lost']:12,}  {LOST}")
    for effect in (REPEATED, REORDERED, BROKEN):
        tell(f"  {account.effects[effect]:12,}  {effect}")
    for rule, number in sorted(account.rules.items()):
        tell(f"  {number:12,}  findings of {rule}")


@dataclass(frozen=True, slots=True)
class Report:
    """totals: of `Account.close`."""

    account: Account
    totals: Mapping[str, int]
    crowd: Crowd
    services: list[Service]
    faults: Faults
    publishers: list[APIPublisher]
    speakers: Speakers
    attack: Attack

    def tell(self, tell: Callable[[str], None]) -> None:
        tell("")
        for title, counts in self._tables().items():
            tell(f"{title}: {sum(counts.values())}")
            for kind, number in counts.most_common(MOST):
                tell(f"  {number:9,}  {kind}")
        tell_account(self.account, self.totals, tell)

    def _tables(self) -> dict[str, Counter[str]]:
        services = self.services
        dropped = sum((service.dropped for service in services), Counter[tuple[tuple[str, str], ...]]())
        return {
            "clients": Counter({"all": len(self.crowd.clients)}),
            "faults carried out": self.faults.done,
            "faults without effect": self.faults.impossible,
            "ends of processes": sum((service.deaths for service in services), Counter[str]()),
            "publishers by the API": sum((one.counts for one in self.publishers), Counter[str]()),
            "publishers by connection": self.speakers.counts,
            "connections": self.crowd.counts,
            "bad input": self.attack.sent,
            "answers to bad input": self.attack.answers,
            "comparisons of members": Counter(
                {"all": sum(room.comparisons for room in self.crowd.world.rooms.values())}
            ),
            "dropped, as the server says": Counter({str(dict(key)): int(n) for key, n in dropped.items() if n}),
            "largest process, MiB": Counter(
                {
                    role: max(service.largest[role] for service in services) >> 20
                    for service in services
                    for role in service.largest
                }
            ),
        }
