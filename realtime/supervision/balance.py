"""Health and load of the workers -> each slot's share of new connections, as a program for the kernel, and the moves of
established ones. Without I/O.

By default the kernel spreads the connections of a shared port over the slots' listening sockets by a hash of the
client's address. A classic BPF program attached to the group of sockets replaces the hash (SO_ATTACH_REUSEPORT_CBPF,
socket(7)): the kernel runs it for each SYN, and it returns the index of a socket, in the order in which the sockets
began to listen. `program` writes one that draws a slot at random by weight.

A *weight* is a small integer: 0 for a slot that gets no connections, FULL for the slot with the most capacity. The
weight grows with the spare capacity of a worker, and with its deficit of connections: a worker that has just started
gets more of the new connections until it has as many as the others.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

from msgspec import Struct

from realtime.supervision.health import Condition, Health

FULL = 16
MAX_SLOTS = 1024

# Spare capacity assumed at least, as a share: a loop that is always busy may still keep up.
_MIN_SPARE = 0.1
# Portion of its share that a lagging worker gets.
_LAGGING_PORTION = 0.25
# Largest factor on the share of a worker with fewer connections than the average; its inverse is the smallest factor,
# for a worker with more. It keeps a reconnect storm from going entirely to a worker that has just started.
_MAX_CATCH_UP = 4.0
# Connections added to every count, so that small differences between small counts matter little.
_SMOOTHING = 32
# Difference from which a weight changes: more than half a step, so that it does not flap between two steps.
_TOLERANCE = 0.75

MAX_MOVED = 100
"""Connections that move at a time."""

# Portion of the connections that would make two workers equal, if all cost the same, that move at a time.
_MOVED_PART = 0.5
# Delays for which a worker that has received connections gives none.
_REST = 10.0
_PRESENT = (Condition.HEALTHY, Condition.LAGGING, Condition.PRESSED)

# linux/filter.h: struct sock_filter {__u16 code; __u8 jt; __u8 jf; __u32 k;}
_INSTRUCTION = struct.Struct("=HBBI")
INSTRUCTION_BYTES = _INSTRUCTION.size
# linux/bpf_common.h: class | size or operation | mode or source.
_LOAD_WORD = 0x00 | 0x00 | 0x20  # BPF_LD | BPF_W | BPF_ABS
_MODULO = 0x04 | 0x90 | 0x00  # BPF_ALU | BPF_MOD | BPF_K
_JUMP_IF_NOT_LESS = 0x05 | 0x30 | 0x00  # BPF_JMP | BPF_JGE | BPF_K
_RETURN = 0x06 | 0x00  # BPF_RET | BPF_K
# SKF_AD_OFF + SKF_AD_RANDOM: a load from here yields 32 random bits.
_RANDOM = (-0x1000 + 56) & 0xFFFFFFFF
# An index beyond all sockets: the kernel falls back to its own hash (net/core/sock_reuseport.c).
_KERNELS_CHOICE = 0xFFFFFFFF


class Balance:
    """Weighs the slots. It keeps the present weights, so that small changes of load do not change them."""

    def __init__(self, slots: int) -> None:
        self.weights = (0,) * slots

    def resize(self, slots: int) -> None:
        """Have another number of slots: the last ones come or go."""
        self.weights = (*self.weights, *(0,) * slots)[:slots]

    def weigh(self, health: Mapping[int, Health]) -> tuple[int, ...]:
        """Return the weights of all slots, by number. All are 0 when no slot can take connections, or none is known."""
        shares = _shares([health.get(slot) for slot in range(len(self.weights))])
        top = max(shares, default=0.0)
        if top:
            exact = [share / top * FULL for share in shares]
            self.weights = tuple(_rounded(old, new) for old, new in zip(self.weights, exact, strict=True))
        else:
            self.weights = (0,) * len(self.weights)
        return self.weights


class Move(Struct, frozen=True):
    """Some connections of one slot's worker that should move to another. lasting: seconds for which the source has been
    busier."""

    source: int
    target: int
    connections: int
    lasting: float


class Rebalancing:
    """Finds moves from a hot worker to the idlest one, by the busy shares of their loops (`Health.utilization`).

    A worker is hot while its share exceeds the lowest by the difference, until it is below half of the difference. When
    it has been hot for the delay, a part of its connections moves; then it must be hot for the delay again. A worker
    that has received connections gives none for _REST delays: a client that makes every worker hot does not wander.
    """

    def __init__(self, difference: float, delay: float) -> None:
        self.configure(difference, delay)
        self._hot_since: dict[int, float] = {}
        self._rests_until: dict[int, float] = {}

    def configure(self, difference: float, delay: float) -> None:
        """Use another difference and delay (seconds) from now on."""
        self._difference = difference
        self._delay = delay

    def find_move(self, health: Mapping[int, Health], now: float) -> Move | None:
        """Return the move that is due at `now` (monotonic seconds), if any. Call it about once a second."""
        present = {slot: one for slot, one in health.items() if one.condition in _PRESENT}
        targets = [one for one in present.values() if one.condition is Condition.HEALTHY]
        if not targets:
            return None
        target = min(targets, key=lambda one: (one.utilization, one.connections, one.slot))
        for slot in health:
            excess = present[slot].utilization - target.utilization if slot in present else 0.0
            if excess >= self._difference:
                self._hot_since.setdefault(slot, now)
            elif excess < self._difference / 2:
                self._hot_since.pop(slot, None)
        due = [
            present[slot]
            for slot, since in self._hot_since.items()
            if slot in present and now - since >= self._delay and now >= self._rests_until.get(slot, now)
        ]
        source = max(due, key=lambda one: one.utilization, default=None)
        if source is None or source.connections < 2:
            return None
        excess = source.utilization - target.utilization
        if excess < self._difference:
            return None
        # Half of the excess would make both equal. A part of that, as connections differ in what they cost.
        part = _MOVED_PART * excess / 2 / source.utilization
        count = max(1, min(round(source.connections * part), MAX_MOVED, source.connections - 1))
        lasting = now - self._hot_since.pop(source.slot)
        self._rests_until[target.slot] = now + _REST * self._delay
        return Move(source.slot, target.slot, count, lasting)


def _shares(slots: Sequence[Health | None]) -> list[float]:
    """Return the share of each slot, in proportion to the others."""
    accepting = [health for health in slots if health is not None and _portion(health)]
    average = sum(health.connections for health in accepting) / max(1, len(accepting))
    return [_share(health, average) if health is not None else 0.0 for health in slots]


def _share(health: Health, average: float) -> float:
    catch_up = (average + _SMOOTHING) / (health.connections + _SMOOTHING)
    spare = max(1.0 - health.utilization, _MIN_SPARE)
    return _portion(health) * spare * min(max(catch_up, 1 / _MAX_CATCH_UP), _MAX_CATCH_UP)


def _portion(health: Health) -> float:
    return {Condition.HEALTHY: 1.0, Condition.LAGGING: _LAGGING_PORTION}.get(health.condition, 0.0)


def _rounded(old: int, new: float) -> int:
    """Round `new` to a weight, or keep `old` when it is close enough."""
    if new == 0:
        return 0
    if old and abs(new - old) < _TOLERANCE:
        return old
    return max(1, round(new))


def program(weights: Sequence[int]) -> bytes:
    """Write the BPF program (an array of sock_filter) that returns i with probability weights[i] / sum(weights).

    With all weights 0 the program leaves the choice to the kernel. Raises ValueError for more than MAX_SLOTS weights: a
    program is limited to 4,096 instructions (BPF_MAXINSNS).
    """
    if len(weights) > MAX_SLOTS:
        raise ValueError(f"{len(weights)} slots are too many")
    code = [] if not any(weights) else [(_LOAD_WORD, 0, 0, _RANDOM), (_MODULO, 0, 0, sum(weights))]
    bound = 0
    for index, weight in enumerate(weights):
        if weight:
            bound += weight
            code += [(_JUMP_IF_NOT_LESS, 1, 0, bound), (_RETURN, 0, 0, index)]
    code.append((_RETURN, 0, 0, _KERNELS_CHOICE))
    return b"".join(_INSTRUCTION.pack(*instruction) for instruction in code)
