"""A multi-reactor realtime messaging server on Twisted, with handlers in plain Python."""

from realtime._version import __version__
from realtime.app import App, Client, Cookie, File, Form, Request, Response
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
from realtime.types import (
    ClientInfo,
    ConnectRequest,
    Credentials,
    Grant,
    HistoryPage,
    Position,
    Publication,
    PublishOptions,
    WorkerInfo,
)

__all__ = [
    "App",
    "Cache",
    "Client",
    "ClientError",
    "ClientInfo",
    "ConnectRequest",
    "Cookie",
    "Credentials",
    "Disconnect",
    "EngineUnavailable",
    "File",
    "Form",
    "Grant",
    "HandlerTimeout",
    "HistoryPage",
    "PoolFull",
    "Position",
    "Publication",
    "PublishOptions",
    "RealtimeError",
    "Request",
    "Response",
    "SettingsError",
    "WorkerInfo",
    "__version__",
]
