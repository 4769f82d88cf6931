"""Private names of the libraries and of Python that this server uses, in one list, held to the installed versions.

A new version may change such a name without notice. These tests fail then: read the library's changes, adapt the code,
and correct the list. They also fail for a private name in the code that is not listed.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import pkgutil
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import autobahn.websocket.interfaces
import pytest
from autobahn.twisted.websocket import WebSocketAdapterProtocol
from autobahn.websocket.protocol import WebSocketProtocol, WebSocketServerProtocol

import realtime
from realtime.transports.websocket import WebSocketConnection

PACKAGE = Path(realtime.__file__).parent
LIBRARIES = ("twisted", "autobahn", "asyncio")

# By the class or module that has them, the functions with the names of their parameters.
FUNCTIONS: dict[str, dict[str, str]] = {
    "twisted.internet.asyncioreactor.AsyncioSelectorReactor": {
        "_disconnectSelectable": "self selectable why isRead faildict",
        "_readOrWrite": "self selectable read",
    },
    "twisted.internet.tcp.Server": {
        "_fromConnectedSocket": "fileDescriptor addressFamily factory reactor",
        "_getLogPrefix": "self applicationObject",
    },
    "twisted.internet.unix.Server": {"_fromConnectedSocket": "fileDescriptor factory reactor"},
    "twisted.protocols.amp.AMP": {"_sendFileDescriptor": "self descriptor"},
    "asyncio.tasks": {"_enter_task": "loop task", "_leave_task": "loop task"},
    "sys": {"_clear_type_cache": "", "_current_frames": "", "_getframe": "depth"},
    # Autobahn documents no interface for classes that replace parts of its own, so most of its names are internal.
    "autobahn.websocket.protocol.WebSocketServerProtocol": {
        "_connectionLost": "self reason",
        "processData": "self",
        "sendCloseFrame": "self code reasonUtf8 isReply",
    },
}
# The attributes likewise.
ATTRIBUTES: dict[str, str] = {
    "twisted.internet.asyncioreactor.AsyncioSelectorReactor": "_asyncioEventloop _readers _writers",
    "twisted.internet.posixbase": "_NO_FILEDESC _DisconnectSelectableMixin",
    "twisted.internet.tcp.Server": "_tempDataBuffer _tempDataLen _writeDisconnecting",
    "twisted.protocols.amp.AMP": "_currentBox _descriptors _getDescriptor _outstandingRequests _unprocessed",
    "twisted.internet.tcp.Port": "_preexistingSocket _logger",
    "asyncio.base_events.BaseEventLoop": "_ready _scheduled _stopping",
    "socket.socket": "_accept",
    "asyncio.Future": "_asyncio_future_blocking",
    "asyncio": "_set_running_loop",
    "asyncio.tasks": "_current_tasks",
    "autobahn.websocket.protocol.WebSocketServerProtocol": """
    STATE_CLOSED STATE_CLOSING STATE_OPEN _closeConnection _isMessageCompressed _perMessageCompress _transport_details
    applyMask autoFragmentSize autoPingPending autoPingPendingCall
    autoPingPendingSent autoPingPendingSeq autoPingRestartOnAnyTraffic autoPingTimeoutCall closeHandshakeTimeout
    closeHandshakeTimeoutCall closedByMe control_frame_data current_frame current_frame_masker data droppedByMe
    echoCloseCodeReason
    failByDrop failedByMe inside_message is_closed localCloseCode localCloseReason log logFrames logOctets
    maskServerFrames maxFramePayloadSize maxMessagePayloadSize message_data_total_length openHandshakeTimeoutCall
    remoteCloseCode remoteCloseReason requireMaskedClientFrames send_queue send_state state trackedTimings trafficStats
    triggered utf8validateIncoming utf8validator wasClean wasCloseHandshakeTimeout wasMaxFramePayloadSizeExceeded
    wasMaxMessagePayloadSizeExceeded wasNotCleanReason wasOpenHandshakeTimeout wasServerConnectionDropTimeout
    wasServingFlashSocketPolicyFile websocket_protocol_in_use websocket_version""",
}
# Attributes that Autobahn sets at the start of a connection, and that a server's connection does not use.
UNUSED = {"serverConnectionDropTimeoutCall"}
# The parts of a protocol that Twisted documents, although Autobahn's interface does not name them.
DOCUMENTED = {"connectionLost", "connectionMade", "dataReceived", "factory", "transport"}

AUTOBAHN = "autobahn.websocket.protocol.WebSocketServerProtocol"
_PRIVATE = re.compile(r"_[a-zA-Z]\w*")


def owner(path: str) -> Any:
    """Import a module, or a class in a module."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        module, _, name = path.rpartition(".")
        return getattr(importlib.import_module(module), name)


@functools.cache
def source(found: Any) -> str:
    if not inspect.isclass(found):
        return inspect.getsource(found)
    # inspect parses the module for a class, and CPython 3.11 refuses that once in a while (cpython issue 106905).
    lines, _ = inspect.findsource(sys.modules[found.__module__])
    start = next(number for number, line in enumerate(lines) if re.match(rf"\s*class {found.__name__}\b", line))
    return "".join(inspect.getblock(lines[start:]))


def source_of(found: Any) -> str:
    """The source of a module, or of a class and its bases outside this package."""
    classes = found.__mro__ if inspect.isclass(found) else (found,)
    return "".join(
        source(each)
        for each in classes
        if getattr(each, "__module__", "").split(".")[0] in LIBRARIES or not inspect.isclass(each)
    )


def uses(name: str, text: str) -> bool:
    return re.search(rf"\bself\.{name}\b|\bdef {name}\b|^    {name}\b", text, re.MULTILINE) is not None


def listed(path: str) -> set[str]:
    return {*FUNCTIONS.get(path, {}), *ATTRIBUTES.get(path, "").split()}


def classes_of_ours() -> Iterator[type]:
    for module in pkgutil.walk_packages(realtime.__path__, "realtime."):
        if not module.name.endswith("__main__"):
            for found in vars(importlib.import_module(module.name)).values():
                if inspect.isclass(found) and found.__module__ == module.name:
                    yield found


@pytest.mark.parametrize(
    ("path", "name", "parameters"),
    [(path, name, parameters) for path, names in FUNCTIONS.items() for name, parameters in names.items()],
)
def test_a_private_function_has_the_parameters_that_we_pass(path: str, name: str, parameters: str) -> None:
    assert " ".join(inspect.signature(getattr(owner(path), name)).parameters) == parameters


@pytest.mark.parametrize("path", ATTRIBUTES)
def test_the_private_attributes_exist(path: str) -> None:
    found = owner(path)
    missing = [name for name in ATTRIBUTES[path].split() if not hasattr(found, name)]
    text = source_of(found) if missing else ""
    assert [name for name in missing if not uses(name, text)] == []


def test_a_connection_has_the_attributes_that_autobahn_would_set() -> None:
    starts = (WebSocketAdapterProtocol.connectionMade, WebSocketProtocol._connectionMade)
    text = "".join(inspect.getsource(start) for start in (*starts, WebSocketServerProtocol._connectionMade))
    names = set(re.findall(r"self\.(\w+) = ", text))
    ours = {
        name for each in WebSocketConnection.__mro__ if each.__module__.startswith("realtime") for name in vars(each)
    }
    assert len(names) > 30
    assert names - ours - DOCUMENTED - {"state", "peer"} == UNUSED


def test_every_internal_name_of_autobahn_is_listed() -> None:
    interfaces = [each for each in vars(autobahn.websocket.interfaces).values() if inspect.isclass(each)]
    public = {name for each in interfaces for name in dir(each)}
    ours = [each for each in WebSocketConnection.__mro__ if each.__module__.startswith("realtime")]
    text = "".join(map(source, ours))
    names = set(re.findall(r"\b(?:self|super\(\))\.(\w+)", text))
    names |= {name for each in ours for name in vars(each) if not name.startswith("__")}
    theirs = source_of(WebSocketServerProtocol)
    internal = {name for name in names if uses(name, theirs)} - public - DOCUMENTED
    assert internal == listed(AUTOBAHN)


def test_every_private_name_of_a_base_class_is_listed() -> None:
    known = {name for path in (*FUNCTIONS, *ATTRIBUTES) for name in listed(path)}
    found = {
        (each.__name__, name)
        for each in classes_of_ours()
        if any(base.__module__.split(".")[0] in LIBRARIES for base in each.__mro__)
        for name in set(re.findall(r"\bself\.(_[a-zA-Z]\w*)", source(each))) - known
        if uses(name, source_of(each))
    }
    assert found == set()


def test_every_private_name_of_another_object_is_listed() -> None:
    """Private names that the package uses and does not define itself."""
    used: dict[str, str] = {}
    defined: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name, ctx=ast.Store()):
                    defined.add(name)
                case ast.Attribute(attr=name) if _PRIVATE.fullmatch(name):
                    used[name] = f"{path.relative_to(PACKAGE)}:{node.lineno}"
                case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                    defined.add(name)
                case ast.Name(id=name, ctx=ast.Store()):
                    defined.add(name)
                case ast.ImportFrom(module=str(module), names=names) if not module.startswith("realtime"):
                    used |= {one.name: f"{path}:{node.lineno}" for one in names if _PRIVATE.fullmatch(one.name)}
    known = {name for path in (*FUNCTIONS, *ATTRIBUTES) for name in listed(path)}
    assert {name: place for name, place in used.items() if name not in defined | known} == {}
