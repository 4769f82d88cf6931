"""The formats in which processes of a server talk to each other, in one string.

A reload replaces the workers, and the broker and the supervisor stay. After an installation of another version of the
package, the new workers belong to that version and the others to the former one. They understand each other if the
string is the same for both, and the reload fails otherwise (`realtime.supervisor.zygote`).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from typing import Any

import msgspec
from twisted.protocols import amp

from realtime.process import control
from realtime.pubsub import broker_messages
from realtime.supervision import vitals
from realtime.worker import handover

# Where an object is in memory.
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def formats() -> str:
    """Return the string: the versions of the messages, and a digest of their fields and of the vitals page."""
    messages = (
        *broker_messages.TO_BROKER,
        *broker_messages.TO_WORKER,
        *handover.HandOverMessage.__subclasses__(),
    )
    parts = describe(messages) + _commands() + vitals.LAYOUT
    digest = hashlib.sha256(parts.encode()).hexdigest()[:16]
    return f"{broker_messages.VERSION}.{handover.VERSION}.{digest}"


def describe(types: Iterable[Any]) -> str:
    """Describe types with all types that they contain: names, fields, defaults."""
    return _ADDRESS.sub("", repr(msgspec.inspect.multi_type_info(types)))


def _commands() -> str:
    commands = (value for value in vars(control).values() if isinstance(value, type) and issubclass(value, amp.Command))
    return repr(
        [
            (command.__name__, [[(name, type(kind).__name__) for name, kind in fields] for fields in _fields(command)])
            for command in commands
        ]
    )


def _fields(command: Any) -> tuple[Any, Any]:
    return command.arguments, command.response
