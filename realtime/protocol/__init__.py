"""The client protocol, without I/O: messages and their encodings, sessions, subscriptions, channel rules."""
