"""Health and load of the workers -> each slot's share of new connections, as a program for the kernel. Without I/O.

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
