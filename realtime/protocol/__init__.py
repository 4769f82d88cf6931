"""One client's connection, without I/O: messages, session, permissions, tokens, the queue of a slow socket."""
