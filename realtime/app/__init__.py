"""The application's side: declaring handlers, answering HTTP requests, and acting on channels and clients.

    from realtime import App

    app = App()

    @app.on_subscribe("chat:*")
    async def may_join(client, channel):            # a coroutine runs on the loop
        return bool(client.user)

    @app.rpc("report", timeout=5, limit=2)
    def report(client, data):                       # a plain function runs in a thread
        app.publish("chat:news", {"asked by": client.user})
        return {"total": 42}

`application` has the `App`, `http` its routes with their requests and responses, `path_patterns` the paths of the
routes, `cookies` and `forms` the parts of requests, `client` the connected client that handlers receive, `declarations`
the rules for declaring a handler, and `loader` the import of an application by name.
An `App` does no I/O and knows no socket; each worker binds its server to it at the start (`App.bind`).
"""

from realtime.app.application import App, Server
from realtime.app.client import Client
from realtime.app.cookies import Cookie
from realtime.app.declarations import ARGUMENTS, POLICIES, Handler, Patterns
from realtime.app.forms import File, Form
from realtime.app.http import ErrorFunction, Request, Response, Static
from realtime.app.loader import load
from realtime.app.path_patterns import PathTree, parse_pattern

__all__ = [
    "ARGUMENTS",
    "POLICIES",
    "App",
    "Client",
    "Cookie",
    "ErrorFunction",
    "File",
    "Form",
    "Handler",
    "PathTree",
    "Patterns",
    "Request",
    "Response",
    "Server",
    "Static",
    "load",
    "parse_pattern",
]
