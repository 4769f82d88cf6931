"""What happens on a channel, as long as it has not reached the members: events, and a queue of them."""

from __future__ import annotations

from collections import deque
from enum import Enum, auto
from typing import NamedTuple

from realtime.pubsub.subscriber import Subscriber
from realtime.types import ClientInfo, Publication


class EventKind(Enum):
    PUBLISHED = auto()
    JOINED = auto()
    LEFT = auto()
    BROKEN = auto()


class Event(NamedTuple):
    """Something that came from the engine, or that shows those who wait that something did not."""

    kind: EventKind
    publication: Publication | None = None
    epoch: str = ""
    info: ClientInfo | None = None

    @property
    def size(self) -> int:
        """Bytes of data."""
        return len(self.publication.data) if self.publication is not None else 0


class DeltaBase(NamedTuple):
    """What somebody was sent last, so that the next one can be said as its difference from that."""

    publication: Publication
    epoch: str

    def same(self, other: DeltaBase) -> bool:
        mine, its = self.publication, other.publication
        return mine is its or (0 < mine.offset == its.offset and self.epoch == other.epoch)


class Opening(NamedTuple):
    """A member that is open, but shall first get what was held back for it."""

    member: Subscriber
    events: list[Event]
    base: DeltaBase | None


class Backlog:
    """What a channel has yet to deliver, in order.

    events: how many of the jobs are not openings. size: the bytes of their publications. late: the members whose
    opening is among the jobs, or under way.
    """

    __slots__ = ("events", "jobs", "late", "size")

    def __init__(self) -> None:
        self.jobs: deque[Event | Opening] = deque()
        self.events = 0
        self.size = 0
        self.late: set[Subscriber] = set()

    def append(self, job: Event | Opening) -> None:
        self.jobs.append(job)
        if isinstance(job, Opening):
            self.late.add(job.member)
        else:
            self.events += 1
            self.size += job.size

    def popleft(self) -> Event | Opening:
        job = self.jobs.popleft()
        if isinstance(job, Event):
            self.events -= 1
            self.size -= job.size
        return job

    def drop(self, *kinds: EventKind) -> None:
        """Drop the events of these kinds."""
        jobs, self.jobs = self.jobs, deque()
        self.events = self.size = 0
        for job in jobs:
            if isinstance(job, Opening) or job.kind not in kinds:
                self.append(job)
