"""A multi-reactor realtime messaging server on Twisted, with handlers in plain Python."""

from realtime._version import __version__
from realtime.app import App, Client, ConnectRequest, Credentials, Grant, Request, Response
from realtime.cache import Cache
from realtime.errors import (
    ClientError,
    Disconnect,
    EngineUnavailable,
    HandlerTimeout,
    PoolFull,
    RealtimeError,
    SettingsError,
)

__all__ = [
    "App",
    "Cache",
    "Client",
    "ClientError",
    "ConnectRequest",
    "Credentials",
    "Disconnect",
    "EngineUnavailable",
    "Grant",
    "HandlerTimeout",
    "PoolFull",
    "RealtimeError",
    "Request",
    "Response",
    "SettingsError",
    "__version__",
]
