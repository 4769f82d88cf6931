"""The exceptions, in one tree, and the codes that a client may see.

A `RealtimeError` reports a fault of a peer, a configuration or another process. Bugs of this package raise ordinary
Python exceptions and never share a type with it.

A client receives an error in one of two forms. An *error reply* (`ClientError`) answers one command, and the connection
stays open. A *disconnect* (`Disconnect`) closes the connection with a code: SDKs stop at 3500-3999 and 4500-4999, and
reconnect at all others. Both lists of codes are those of the Centrifuge client protocol.
"""

from __future__ import annotations


class RealtimeError(Exception):
    """Base class of errors caused by a peer, a configuration or a lost process."""


class SettingsError(RealtimeError):
    """The configuration is invalid. problems: one readable line for each mistake, all of them."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class ApplicationFailed(RealtimeError):
    """The application's own code failed at its start, for a reason that may pass: a later start may succeed."""


class EngineUnavailable(RealtimeError):
    """The engine did not answer. It may have carried out the request; an idempotency key makes a retry safe."""


class TakeoverFailed(RealtimeError):
    """A process could not take the place of another one, which goes on."""


class KeysUnavailable(RealtimeError):
    """The keys of an identity provider are unavailable at the moment. No token was judged; the caller may retry."""


class HandlerTimeout(RealtimeError):
    """A handler did not finish within its time limit."""


class PoolFull(RealtimeError):
    """All threads or processes for handlers are busy, and the queue for them is full."""


class Overloaded(RealtimeError):
    """The worker is overloaded, and the handler's policy refuses calls that its cache can't answer."""


class ClientError(RealtimeError):
    """An error reply: one command failed, and the connection stays open.

    A handler may raise it with an application code from 400 to 1999; the protocol defines the codes below 400.
    Raises ValueError for an empty message.

    kind: of the refusal, for the log (`realtime.client_log`), where the code alone does not tell it; "" where it does.
    """

    def __init__(self, code: int, message: str, temporary: bool = False, *, kind: str = "") -> None:
        if not message:
            raise ValueError("an error reply needs a message: SDKs fail on an empty one")
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.temporary = temporary
        self.kind = kind

    def __reduce__(self) -> tuple[type[ClientError], tuple[int, str, bool]]:  # a ProcessPoolExecutor pickles it
        return type(self), (self.code, self.message, self.temporary)


class Disconnect(RealtimeError):
    """A disconnect: the server closes the connection with `code` and `reason`.

    A handler may raise it with an application code: the client reconnects at 4000-4499 and stops at 4500-4999.
    Raises ValueError for a code outside 3000-4999, and for a reason that is empty or exceeds 123 bytes of UTF-8 (RFC
    6455 section 5.5: a control frame carries 125 bytes, and the code takes two of them).

    kind: as for `ClientError`.
    """

    def __init__(self, code: int, reason: str, *, kind: str = "") -> None:
        if not 3000 <= code <= 4999:
            raise ValueError(f"a disconnect code must be within 3000-4999, not {code}")
        if not reason or len(reason.encode()) > 123:
            raise ValueError("a disconnect reason must have 1 to 123 bytes")
        super().__init__(f"{code}: {reason}")
        self.code = code
        self.reason = reason
        self.kind = kind


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
# Not sent to a client: its worker has died.
WORKER_LOST = (3000, "worker lost")
# Both pass by themselves, so SDKs must come back: an uplink that stalls before the connect command, and a user's own
# dead connections, which count until their ping is overdue.
STALE = (3000, "stale")
USER_CONNECTIONS = (3000, "connection limit")
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
FORCE_DISCONNECT = (3503, "force disconnect")
CONNECTION_LIMIT = (3504, "connection limit")
CHANNEL_LIMIT = (3505, "channel limit")
INAPPROPRIATE_PROTOCOL = (3506, "inappropriate protocol")
DENIED = (3507, "permission denied")
UNAVAILABLE = (3508, "not available")
TOO_MANY_ERRORS = (3509, "too many errors")

# Unsubscribe pushes: (code, reason). At codes from 2500 on, the SDK resubscribes at once, with recovery.
SERVER_UNSUBSCRIBE = (2000, "server unsubscribe")
LOST_POSITION = (2500, "insufficient state")
SUBSCRIPTION_EXPIRED_PUSH = (2501, "subscription expired")
