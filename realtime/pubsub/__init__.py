"""Channels, without I/O: the engine's interface, history, presence, and the fan-out on one worker."""
