"""Registers `twistd realtime`. Every twistd command imports this module, so it holds nothing else."""

from twisted.application.service import ServiceMaker

realtime = ServiceMaker(
    "realtime",
    "realtime.tap",
    "A realtime messaging server: WebSockets, channels, history, handlers in Python.",
    "realtime",
)
