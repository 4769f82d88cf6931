"""The broker process with Redis. The supervisor starts it with `python -m realtime.broker.redis_process`.

A module of its own: without `engine.type = "redis"` nothing of it is imported, and its requirement `hiredis` is an
extra.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from realtime.broker.delivery import LinkDelivery
from realtime.broker.process import BrokerService
from realtime.broker.shared_core import SharedCore
from realtime.metrics import Counter
from realtime.process import child
from realtime.process.link import Link
from realtime.pubsub.broker_core import BrokerCore
from realtime.types import NodeInfo


class RedisBrokerService(BrokerService):
    """The broker between the workers and Redis."""

    def make_core(
        self, delivery: LinkDelivery, max_channels: int, publications: Counter, describe_node: Callable[[], NodeInfo]
    ) -> BrokerCore[Link]:
        """See `BrokerService`."""
        process = self.process
        self._core = SharedCore(
            process.settings,
            delivery,
            publications,
            describe_node,
            process.reactor,
            process.metrics,
            process.accounts,
        )
        return self._core

    async def start(self) -> None:
        """Connect to Redis, and wait for it a moment: without it the server starts all the same."""
        await super().start()
        await self._core.start()

    async def hand_over(self, stream: int, connections: int, timeout: float) -> dict[str, object]:
        """Refuse: answers of Redis may be under way at any time."""
        return child.hand_nothing_over(stream, "a broker with Redis can't hand its state over; restart the server")

    async def drain(self, timeout: float) -> None:
        """See `BrokerService`. Other nodes learn of the leaves, and that this node has ended."""
        await super().drain(timeout)
        self._broker.let_all_leave()
        await self._core.leave()
        self._core.close()


def main(argv: Sequence[str]) -> int:
    """See `realtime.process.child.main`."""
    return child.main(argv, RedisBrokerService)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
