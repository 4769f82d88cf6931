"""The exceptions, in one tree, and the codes that a client may see.

Two families never share a type: what a peer or an operator did wrong (`RealtimeError` and below), and our own
mistakes, which are ordinary Python exceptions and are never caught as one of these.

A client is answered in one of two ways. An *error reply* (`ClientError`) answers one command, and the connection
goes on. A *disconnect* (`Disconnect`) closes the connection with a code whose range tells the SDK whether to come
back: 3500-3999 and 4500-4999 are final, all others reconnect. Both lists are those of the Centrifuge client protocol.
"""

from __future__ import annotations


class RealtimeError(Exception):
    """Base of all that this package raises on account of a peer, a configuration or a lost process."""


class SettingsError(RealtimeError):
    """The configuration can't be used. problems: one readable line for each mistake, none hidden behind another."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class EngineUnavailable(RealtimeError):
    """The engine can't be reached just now: nothing was accepted, and the caller may try again."""


class KeysUnavailable(RealtimeError):
    """The keys of an identity provider can't be had just now: a token was not judged, and may be tried again."""


class HandlerTimeout(RealtimeError):
    """A handler did not finish within its time limit."""


class PoolFull(RealtimeError):
    """No thread was free for a handler and the queue before the pool was full."""


class Overloaded(RealtimeError):
    """The worker is under pressure, and the handler's policy is to refuse what it can't answer from its cache."""


class ClientError(RealtimeError):
    """An error reply: one command failed, the connection lives.

    A handler may raise it with a code of its own, 400 to 1999; codes below 400 are the protocol's.
    """

    def __init__(self, code: int, message: str, temporary: bool = False) -> None:
        if not message:
            raise ValueError("an error reply needs a message: SDKs stop on an empty one")
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.temporary = temporary

    def __reduce__(self) -> tuple[type[ClientError], tuple[int, str, bool]]:  # for the processes of handlers
        return type(self), (self.code, self.message, self.temporary)


class Disconnect(RealtimeError):
    """Close the connection with `code` and `reason`.

    A handler may raise it with a code of its own: 4000-4499 to have the client come back, 4500-4999 to stop it.
    Raises ValueError for a code outside 3000-4999, and for a reason that is empty or longer than 123 bytes of UTF-8
    (RFC 6455 section 5.5: a control frame carries 125 bytes, two of which are the code).
    """

    def __init__(self, code: int, reason: str) -> None:
        if not 3000 <= code <= 4999:
            raise ValueError(f"a disconnect code lies within 3000-4999, not {code}")
        if not reason or len(reason.encode()) > 123:
            raise ValueError("a disconnect reason has 1 to 123 bytes")
        super().__init__(f"{code}: {reason}")
        self.code = code
        self.reason = reason


# Error replies: (code, message, temporary), the arguments of ClientError.
INTERNAL_ERROR = (100, "internal server error", True)
UNKNOWN_CHANNEL = (102, "unknown channel", False)
PERMISSION_DENIED = (103, "permission denied", False)
METHOD_NOT_FOUND = (104, "method not found", False)
ALREADY_SUBSCRIBED = (105, "already subscribed", False)
LIMIT_EXCEEDED = (106, "limit exceeded", False)
BAD_REQUEST = (107, "bad request", False)
NOT_AVAILABLE = (108, "not available", False)
TOKEN_EXPIRED = (109, "token expired", False)
EXPIRED = (110, "expired", False)
TOO_MANY_REQUESTS = (111, "too many requests", True)
UNRECOVERABLE_POSITION = (112, "unrecoverable position", False)

# Disconnects: (code, reason), the arguments of Disconnect.
CONNECTION_CLOSED = (3000, "connection closed")
SHUTDOWN = (3001, "shutdown")
SERVER_ERROR = (3004, "internal server error")
CONNECTION_EXPIRED = (3005, "connection expired")
SUBSCRIPTION_EXPIRED = (3006, "subscription expired")
SLOW = (3008, "slow")
WRITE_ERROR = (3009, "write error")
INSUFFICIENT_STATE = (3010, "insufficient state")
NO_PONG = (3012, "no pong")
TOO_MANY_COMMANDS = (3013, "too many requests")
INVALID_TOKEN = (3500, "invalid token")
BAD_PROTOCOL = (3501, "bad request")
STALE = (3502, "stale")
FORCE_DISCONNECT = (3503, "force disconnect")
CONNECTION_LIMIT = (3504, "connection limit")
CHANNEL_LIMIT = (3505, "channel limit")
INAPPROPRIATE_PROTOCOL = (3506, "inappropriate protocol")
DENIED = (3507, "permission denied")
UNAVAILABLE = (3508, "not available")
TOO_MANY_ERRORS = (3509, "too many errors")

# Unsubscribe pushes: (code, reason). From 2500 on the SDK subscribes again at once, with recovery.
SERVER_UNSUBSCRIBE = (2000, "server unsubscribe")
LOST_POSITION = (2500, "insufficient state")
SUBSCRIPTION_EXPIRED_PUSH = (2501, "subscription expired")
