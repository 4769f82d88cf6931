"""Channels, without I/O: history, presence, routing, and the fan-out on one worker."""
