"""Events of one channel before their delivery, and the queue that holds them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from enum import Enum, auto
from typing import NamedTuple

from realtime.pubsub.subscriber import Subscriber
from realtime.types import ClientInfo, Publication


class EventKind(Enum):
    """The kinds of `Event`. BROKEN marks a gap: publications are missing, or the epoch has changed."""

    PUBLISHED = auto()
    JOINED = auto()
    LEFT = auto()
    BROKEN = auto()


class Event(NamedTuple):
    """A publication, a join, a leave or a gap on a channel.

    publication, epoch: of PUBLISHED. info: the client of JOINED and LEFT.
    """

    kind: EventKind
    publication: Publication | None = None
    epoch: str = ""
    info: ClientInfo | None = None

    @property
    def size(self) -> int:
        """Bytes of the publication's data."""
        return len(self.publication.data) if self.publication is not None else 0


class DeltaBase(NamedTuple):
    """The publication that a subscriber received last, from which the next delta starts."""

    publication: Publication
    epoch: str

    def is_same(self, other: DeltaBase) -> bool:
        """Whether a delta from one is a delta from the other."""
        mine, its = self.publication, other.publication
        return mine is its or mine.data == its.data


class Activation(NamedTuple):
    """A subscriber that first receives its held events. base: its delta base, if it has one.

    is_behind: from then on it receives joins and leaves alone (`realtime.pubsub.fanout`). is_late: it receives nothing
    else until then; false for a subscriber that was behind. continues: the held events may be deltas from `base`.
    """

    subscriber: Subscriber
    events: list[Event]
    base: DeltaBase | None
    is_behind: bool = False
    is_late: bool = True
    continues: bool = False


class Mark(NamedTuple):
    """A place between two events. reached: called when all earlier events have been delivered."""

    reached: Callable[[], None]


Job = Event | Activation | Mark


class Backlog:
    """The deliveries of one channel that are still to be made, in order.

    events: the number of jobs that are events. size: the bytes of their publications. late: the new subscribers whose
    activation is queued or in progress; they do not receive events yet.
    """

    __slots__ = ("events", "jobs", "late", "size")

    def __init__(self) -> None:
        self.jobs: deque[Job] = deque()
        self.events = 0
        self.size = 0
        self.late: set[Subscriber] = set()

    def append(self, job: Job) -> None:
        """Queue a job."""
        self.jobs.append(job)
        if isinstance(job, Event):
            self.events += 1
            self.size += job.size
        elif isinstance(job, Activation) and job.is_late:
            self.late.add(job.subscriber)

    def popleft(self) -> Job:
        """Remove the oldest job and return it. An activation's subscriber stays in `late`."""
        job = self.jobs.popleft()
        if isinstance(job, Event):
            self.events -= 1
            self.size -= job.size
        return job

    def drop(self, *kinds: EventKind) -> None:
        """Drop the events of these kinds; other jobs stay."""
        jobs, self.jobs = self.jobs, deque()
        self.events = self.size = 0
        for job in jobs:
            if not (isinstance(job, Event) and job.kind in kinds):
                self.append(job)
