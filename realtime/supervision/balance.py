"""Health and load of the workers -> how new connections are shared out, as a program for the kernel. Without I/O.

The kernel deals the connections of a shared port out over the slots' listening sockets by a hash of the client's
address. A classic BPF program attached to the group of sockets decides instead (SO_ATTACH_REUSEPORT_CBPF, socket(7)):
it is run for each SYN, and returns the index of a socket, which counts in the order in which the sockets began to
listen. `program` writes one that draws a slot at random by weight.

A *weight* is a small whole number: 0 for a slot that is to get nothing, FULL for the one that can take most. Spare
capacity counts, and being behind: a worker that has just started gets more of the new connections, until it is level
with the others.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

from realtime.supervision.health import Condition, Health

FULL = 16
MAX_SLOTS = 1024

# What a loop is thought to have left that is always busy: it may keep up none the less.
_LEAST_SPARE = 0.1
# Of its share, what a lagging worker gets.
_LAGGING_SHARE = 0.25
# How many times its share a worker gets that is behind in connections; and, inverted, one that is ahead. A worker
# that has just started is not to be overrun by all of a reconnect storm.
_MOST_CATCHING_UP = 4.0
# Connections below which nobody is ahead or behind by much.
_FEW = 32
# Steps by which a weight must be off before it is changed: more than half, so that it does not flap between two.
_TOLERANCE = 0.75

# linux/filter.h: struct sock_filter {__u16 code; __u8 jt; __u8 jf; __u32 k;}
_INSTRUCTION = struct.Struct("=HBBI")
INSTRUCTION_BYTES = _INSTRUCTION.size
# linux/bpf_common.h: class | size or operation | mode or source.
_LOAD_WORD = 0x00 | 0x00 | 0x20  # BPF_LD | BPF_W | BPF_ABS
_MODULO = 0x04 | 0x90 | 0x00  # BPF_ALU | BPF_MOD | BPF_K
_JUMP_IF_NOT_LESS = 0x05 | 0x30 | 0x00  # BPF_JMP | BPF_JGE | BPF_K
_RETURN = 0x06 | 0x00  # BPF_RET | BPF_K
# SKF_AD_OFF + SKF_AD_RANDOM: reads as 32 random bits.
_RANDOM = (-0x1000 + 56) & 0xFFFFFFFF
# The index of no socket: the kernel then chooses by its own hash (net/core/sock_reuseport.c).
_KERNELS_CHOICE = 0xFFFFFFFF


class Balance:
    """Weighs the slots, and remembers the weights, so that small changes of load leave them alone."""

    def __init__(self, slots: int) -> None:
        self.weights = (0,) * slots

    def weigh(self, health: Mapping[int, Health]) -> tuple[int, ...]:
        """The weights of all slots, by number. All 0 when no slot is to be preferred, or none is known."""
        shares = _shares([health.get(slot) for slot in range(len(self.weights))])
        top = max(shares, default=0.0)
        if top:
            exact = [share / top * FULL for share in shares]
            self.weights = tuple(_settle(old, new) for old, new in zip(self.weights, exact, strict=True))
        else:
            self.weights = (0,) * len(self.weights)
        return self.weights


def _shares(slots: Sequence[Health | None]) -> list[float]:
    """What each slot should get, in proportion to one another."""
    taking = [health for health in slots if health is not None and _portion(health)]
    level = sum(health.connections for health in taking) / max(1, len(taking))
    return [_share(health, level) if health is not None else 0.0 for health in slots]


def _share(health: Health, level: float) -> float:
    catching_up = (level + _FEW) / (health.connections + _FEW)
    spare = max(1.0 - health.utilization, _LEAST_SPARE)
    return _portion(health) * spare * min(max(catching_up, 1 / _MOST_CATCHING_UP), _MOST_CATCHING_UP)


def _portion(health: Health) -> float:
    return {Condition.HEALTHY: 1.0, Condition.LAGGING: _LAGGING_SHARE}.get(health.condition, 0.0)


def _settle(old: int, new: float) -> int:
    """The weight nearest to `new`, unless the old one will do."""
    if new == 0:
        return 0
    if old and abs(new - old) < _TOLERANCE:
        return old
    return max(1, round(new))


def program(weights: Sequence[int]) -> bytes:
    """The BPF program that returns index i with a probability of weights[i] to their sum: an array of sock_filter.

    All weights 0: the choice is left to the kernel. Raises ValueError for more than MAX_SLOTS: programs are limited to
    4,096 instructions (BPF_MAXINSNS).
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
