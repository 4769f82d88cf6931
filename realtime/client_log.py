"""The log of clients: every refusal with its cause and its remedy, and every client's coming and going. Without I/O.

A refusal has a kind, a key of KINDS. At level info the log gets one line for each kind and minute (of calls, for each
handler too), with the number of refusals left out. At level debug it also gets a line for each refusal, and for each
client that comes or goes. Below these levels a refusal costs a counter at most, and nothing is put into words.

`ClientLog.refuse` both counts and logs, so code that refuses something can't do one without the other. `refuse` raises
KeyError for a kind without a line; tests/test_client_log.py looks for such kinds in the code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from realtime.metrics import Metrics, bad_input_counter
from realtime.repetition import Repetition

MAX_FIELD = 256
"""Characters of one value of a client in a line."""


class Kind(NamedTuple):
    """What the log says of one kind of refusal, with the names of facts in braces.

    is_bad_input: whether `realtime_bad_input` counts it. is_detail: the line is for level debug alone, because another
    line says the cause, or because it belongs to normal operation.
    """

    line: str
    is_bad_input: bool = False
    is_detail: bool = False


def _bad(line: str) -> Kind:
    return Kind(line, is_bad_input=True)


def _detail(line: str) -> Kind:
    return Kind(line, is_detail=True)


_HTTP = {
    "origin": _bad("refused a page of {origin}: add it to client.allowed_origins"),
    "host": _bad(
        "refused a request with the Host {host}: add the name to http_server.host_names, or list the origins of your"
        " pages in client.allowed_origins"
    ),
    "null_origin": _bad(
        "refused a page with the origin null, such as a local file or a sandboxed frame: serve the page over HTTP"
    ),
    "api_origin": _bad(
        "refused a page of {origin} at {path}: http_api.insecure opens the API to pages of this server alone; set"
        " http_api.key"
    ),
    "api_disabled": _bad("refused a call of the API at {path}: http_api.disabled is set"),
    "handshake": _bad(
        "refused a request for {path}, which is no WebSocket handshake: {detail}; does a proxy drop Upgrade?"
    ),
    "stream": _bad("refused a stream at {path}: {detail}"),
    "emulation": _bad("refused commands posted to {path}: the body is not a request of an SDK"),
    "emulation_node": _bad(
        "refused commands posted to {path}, which are for a server that has ended or shares no Redis with this one:"
        ' set engine.type to "redis" on all servers behind the load balancer, or keep each client on one server'
    ),
    "emulation_session": _detail("dropped commands that a client posted for a session that has ended"),
    "websocket_path": _bad(
        "refused a WebSocket handshake at {path}, where no transport is: compare the client's URL with"
        " websocket.handler_prefix"
    ),
    "method": _bad(
        "answered a {method} request for {path} with 405: the path takes other methods, which the response lists"
    ),
    "not_found": _detail("answered a request for {path} with 404"),
    "transport_disabled": _bad(
        "refused a client at {path}, the path of a transport that is off: set `enabled` in its section, or remove"
        " websocket.disabled"
    ),
    "head_syntax": _bad("refused a request that is not HTTP/1.1: {detail}; does the client speak TLS to a plain port?"),
    "head_version": _bad("refused a request in another version of HTTP than 1.0 and 1.1"),
    "head_size": _bad("refused a long request: {detail}; see http_server.max_header_bytes and http_server.max_headers"),
    "head_timeout": _bad("closed a connection without a whole request within http_server.header_timeout"),
    "body_timeout": _bad("refused a request to {path} whose body was not complete within http_api.body_timeout"),
    "body_too_large": _bad(
        "refused a request to {path} with a large body: see http_api.max_body_size, and max_request_body_size of"
        " the transports"
    ),
    "body_memory": _bad(
        "refused a request to {path} with a long body: the incomplete bodies of this worker have more than"
        " http_server.max_queued_body_bytes"
    ),
    "body_syntax": _bad("refused a request to {path} whose body is malformed"),
    "body_encoding": _bad("refused a request to {path} with a compressed body, which the server does not read"),
    "parameters": _bad("refused a request with more query parameters than http_server.max_query_parameters"),
    "api_key": _bad("refused a call of the API at {path} without the right key: compare it with http_api.key"),
    "connection_limit": _bad(
        "refused a connection: the server has as many as client.connection_limit, or the limit of open files"
        " (`ulimit -n`), allows"
    ),
    "connection_rate": _bad("refused a connection: more came than client.connection_rate_limit allows"),
    "connection_limit_per_address": _bad(
        "refused a connection: its address has client.connection_limit_per_address others; list your proxies in"
        " client.trusted_proxies"
    ),
    "idle": Kind(
        "closed the longest idle HTTP connection to make room for a new one: see client.connection_limit, and the limit"
        " of open files (`ulimit -n`)"
    ),
    "pressure": Kind("refused a connection: this worker is under pressure, and no other worker has room; see [loop]"),
    "no_worker": Kind(
        "the supervisor refused a client with 503: no worker accepts clients; see the lines about blocked and dead"
        " workers"
    ),
    "operator_host": Kind(
        "refused a request to the operators' port with the Host {host}: use localhost, or http_server.internal_address"
    ),
    "operator_origin": Kind("refused a page of {origin} at the operators' port, which serves its own page alone"),
    "api_error": Kind("answered the API call {method} with the error {code} {reason}"),
}

_FRAMES = {
    "frame": _bad("disconnected a client for a WebSocket frame that breaks RFC 6455"),
    "frame_data": _bad("disconnected a client for a message that is not valid UTF-8, or not decompressible"),
    "frame_rate": _bad("disconnected a client that sends too many pings, pongs or ignored messages"),
    "frame_size": _bad(
        "disconnected a client for a long message: see websocket.message_size_limit, max_fragments and message_timeout"
    ),
    "batch_size": _bad(
        "disconnected a client for a long message of many commands (3013): see websocket.batch_size_limit"
    ),
    "inappropriate": _bad("disconnected a client for a frame of the wrong type: text to Protobuf, or not UTF-8"),
    "text": _bad("disconnected a client for commands that are not valid UTF-8"),
    "ignored": _bad("ignored a message of a unidirectional client, which can send its connect request alone"),
    "pong": _bad("ignored a pong of a client without a ping"),
    "emulation_flood": _bad("disconnected a client that posts commands faster than the server carries them out"),
    "slow": _bad(
        "disconnected a slow client: client.queue_max_size bytes waited for it; its SDK comes back and recovers"
    ),
    "largest_queue": _bad(
        "disconnected the slow client with the longest queue: all queues of the worker together exceed"
        " loop.max_queued_bytes; its SDK comes back and recovers"
    ),
    "stalled": _bad("disconnected a client that acknowledged nothing for websocket.write_timeout"),
}

_COMMANDS = {
    "recovery_ahead": _bad("a client asked to recover {channel} from behind its newest publication"),
    "replay": Kind(
        "could not send a client the rest of its missed publications in {channel} after offset {offset}: history has"
        " dropped them, so the client subscribes again; see history_size and history_ttl"
    ),
    "filter": _bad("left out a tags filter of a client in its connect request: {detail}; see allow_tags_filter"),
    "encoding": _bad(
        "a client could not be sent a publication in {channel}: the data is not JSON, and the client speaks JSON; see"
        " publication_data_format"
    ),
    "command_rate": _bad(
        "answered {request} with 111 too many requests: the client sends more than client.commands_per_second"
    ),
    "command_fields": _bad("disconnected a client for a command of too many parts: see client.max_command_fields"),
    "handler": Kind("the application's handler refused {request} with {code} {reason}"),
    "filter_refused": Kind(
        "refused {request} with 107: {detail}; a namespace needs allow_tags_filter for filters by tags"
    ),
    "personal_channel": Kind(
        "gave user {user} no personal channel: the id contains channel.user_boundary or channel.user_separator, so that"
        " other users could subscribe to the channel"
    ),
    "private_channel": Kind(
        "refused to subscribe a client to {channel} with 103: a name that begins with channel.private_prefix needs a"
        " subscription token"
    ),
    "user_channel": Kind(
        "refused to subscribe a client to {channel} with 103: the name lists its users (allow_user_limited_channels)"
    ),
    "subscription_token": Kind(
        "refused to subscribe a client to {channel} with {code}: its subscription token is invalid ({detail}); see"
        " client.subscription_token and client.token"
    ),
    "channel_limit": Kind("refused to subscribe a client to {channel} with 106: it has client.channel_limit others"),
    "engine": Kind(
        "answered {request} with 100: the broker did not answer within engine.publish_timeout; see its lines"
    ),
    "keys": Kind("answered {request} with 100: the key set of the token's issuer can't be fetched; see its line"),
    "100": _detail("answered {request} with 100 internal server error; its cause has a line of its own"),
    "connect_subs": Kind(
        "left out {channel} of a connect request, which its channel options do not open to the client: set"
        " allow_subscribe_for_client in its namespace, or send a subscribe command with a token"
    ),
    "unsubscribed": Kind("refused {request} with 103: the client's subscription has ended meanwhile"),
    "102": Kind("refused {request} with 102 unknown channel: see channel.namespaces"),
    "103": Kind("refused {request} with 103: its namespace lacks allow_{verb}_for_client or _for_subscriber"),
    "subscribe 103": Kind(
        "refused to subscribe a client to {channel} with 103: set allow_subscribe_for_client in its namespace (for"
        " clients without a user allow_subscribe_for_anonymous too), declare on_subscribe, or send a subscription token"
    ),
    "sub_refresh 103": Kind("refused {request} with 103: the client is not subscribed"),
    "104": Kind("refused {request} with 104: the application declares no handler of this name"),
    "105": Kind("refused {request} with 105: the client is subscribed already"),
    "106": Kind("refused {request} with 106 limit exceeded: see engine.max_channels and engine.queue_max_size"),
    "107": Kind(
        "refused {request} with 107 bad request: see channel.max_length, channel_regex and publication_data_format"
    ),
    "108": Kind("refused {request} with 108: the server has no such feature"),
    "history 108": Kind("refused {request} with 108: set history_size and history_ttl in its namespace"),
    "presence 108": Kind("refused {request} with 108: set presence in its namespace"),
    "presence_stats 108": Kind("refused {request} with 108: set presence in its namespace"),
    "subscribe 108": Kind("refused {request} with 108: map and shared_poll subscriptions are not served"),
    "rpc 108": Kind("refused {request} with 108: the application declares no rpc handler"),
    "109": Kind("refused {request} with 109: the client's token has expired; its SDK asks for another one"),
    "110": Kind("refused {request} with 110: its credentials had expired already; compare the clocks"),
    "111": _detail("refused {request} with 111 too many requests; its cause has a line of its own"),
    "112": Kind("refused {request} with 112: the client's position is lost; see history_size and history_ttl"),
    "application": Kind("refused {request} with {code} {reason}, an error of the application"),
}

_DISCONNECTS = {
    "stale": _bad("disconnected a client without a connect command within client.stale_close_delay"),
    "user_connections": _bad("disconnected user {user}, who has client.user_connection_limit other connections"),
    "no_token": _bad(
        "disconnected a client without a token (3501): send one, declare on_connecting, or set"
        " client.allow_anonymous_connect_without_token"
    ),
    "no_user": Kind(
        "disconnected a client whose token names no user (3507): see client.disallow_anonymous_connection_tokens"
    ),
    "handler_disconnect": Kind("the application's handler disconnected a client with {code} {reason}"),
    "ordered": Kind("disconnected a client with {code} {reason} by order of the application or the server API"),
    "refused": _detail("disconnected a client with {code} {reason}; the line before has the cause"),
    "2000": Kind(
        "ended the subscription of a client to {channel} with 2000 by order of the application or the server API"
    ),
    "2500": Kind(
        "ended the subscription of a client to {channel} with 2500: it may have missed publications; it subscribes"
        " again, and recovers if it can"
    ),
    "2501": Kind(
        "ended the subscription of a client to {channel} with 2501: it was not refreshed within"
        " client.expired_sub_close_delay"
    ),
    "3000": _detail("disconnected a client with 3000 {reason}"),
    "3001": _detail("disconnected a client with 3001 shutdown: this worker ends, and the client goes to another one"),
    "3004": Kind("disconnected a client with 3004 internal server error; its cause has a line of its own"),
    "3005": Kind("disconnected a client whose credentials have expired (3005); see client.expired_close_delay"),
    "3006": Kind("disconnected a client whose subscription has expired (3006); see client.expired_sub_close_delay"),
    "3008": _detail("disconnected a client with 3008 slow"),
    "3009": _detail("disconnected a client with 3009 write error"),
    "3010": Kind(
        "disconnected a client that lost its place in a channel (3010); it comes back, and recovers if it can"
    ),
    "3012": _bad("disconnected a client that did not answer a ping within client.pong_timeout (3012)"),
    "3013": _bad("disconnected a client that sends far more than client.commands_per_second (3013)"),
    "3500": _bad(
        "disconnected a client whose token is invalid (3500): {detail}; compare [client.token] with the token's issuer"
    ),
    "3501": _bad("disconnected a client for a bad request (3501): {detail}; is it a Centrifugo SDK?"),
    "3503": Kind("disconnected a client by order of the application or the server API (3503)"),
    "3504": Kind(
        "disconnected an older connection of user {user} (3504): see single_connection of"
        " client.subscribe_to_user_personal_channel"
    ),
    "3505": _bad("disconnected a client with more subscriptions than client.channel_limit (3505)"),
    "3506": Kind("disconnected a client whose encoding can't carry its data (3506): the data is not JSON"),
    "3507": Kind("disconnected a client without permission to connect (3507)"),
    "3508": Kind("disconnected a client that sent a message (3508): the application declares no on_message handler"),
    "3509": _bad("disconnected a client with more than client.error_limit refused commands in 5 s (3509)"),
}

_CALLS = {
    "handler_timeout": Kind(
        "a call of handler {handler} at {place} ended by its time limit: {detail}; make it faster, or raise its timeout"
        " or workers.handler_timeout{threads}"
    ),
    "threads_hang": Kind(
        "a call of handler {handler} at {place} found no thread: all {size} (workers.threads) hang in calls past their"
        " time. Give the requests that these handlers make time limits of their own; a restart frees the threads"
    ),
    "handler_queue": Kind(
        "refused a call of handler {handler}: {detail}; see workers.threads, workers.thread_queue,"
        " workers.process_queue, and the handler's own limit{threads}"
    ),
    "handler_pressure": Kind(
        "refused a call of handler {handler}: the worker is under pressure by {reason}; see [loop] and the handler's"
        " pressure policy"
    ),
}

KINDS: dict[str, Kind] = _HTTP | _FRAMES | _COMMANDS | _DISCONNECTS | _CALLS
"""Every kind of refusal."""

# Metric labels of kinds that are named by their code or share a counter with another kind.
_LABELS = {
    "host": "origin",
    "null_origin": "origin",
    "api_origin": "origin",
    "no_token": "command",
    "3012": "no_pong",
    "3013": "command_flood",
    "3500": "token",
    "3501": "command",
    "3505": "channels",
    "3509": "command_errors",
}

Facts = Mapping[str, object]
Describe = Callable[[], Facts]
"""Returns the facts about a client, called only if a line needs them: client, user, address, transport, and others."""

Write = Callable[[str], object]
"""Writes one line."""


class ClientLog:
    """The log of one process's clients. Loop thread only.

    info, debug: whether lines of these levels are written.
    """

    def __init__(
        self,
        metrics: Metrics | None = None,
        now: Callable[[], float] = lambda: 0.0,
        info: Write | None = None,
        debug: Write | None = None,
    ) -> None:
        """now: monotonic seconds. info, debug: write a line of that level; None while the level is off."""
        metrics = metrics or Metrics()
        self._counters = {
            name: bad_input_counter(metrics, _LABELS.get(name, name))
            for name, kind in KINDS.items()
            if kind.is_bad_input
        }
        self._now = now
        self._write_info = info
        self._write_debug = debug
        self._repetition: Repetition[tuple[str, object]] = Repetition()  # by kind and handler
        self._latest: dict[tuple[str, object], str] = {}  # the latest line of these at level info
        self.debug = debug is not None

    def refuse(self, name: str, describe: Describe = dict, **facts: object) -> None:
        """Count and log a refusal. name: a key of KINDS. facts: add to those of `describe`."""
        kind = KINDS[name]
        counter = self._counters.get(name)
        if counter is not None:
            counter.value += 1
        if self._write_debug is not None:
            self._write_debug(_line(kind, {**describe(), **facts}))
        if self._write_info is None or kind.is_detail:
            return
        key = name, facts.get("handler")
        left_out = self._repetition.admit(key, self._now())
        if left_out is not None:
            self._latest[key] = line = _line(kind, {**describe(), **facts})
            self._write_info(line + _repeats(left_out))

    def refuse_by(self, code: int, name: str, command: str, describe: Describe, **facts: object) -> None:
        """As `refuse`, for an error reply or a disconnect by its code.

        name: of a more special kind, "" for none. command: that was refused, "" for none.
        """
        kinds = (name, f"{command} {code}", str(code), "application" if command else "ordered")
        found = next(kind for kind in kinds if kind in KINDS)
        self.refuse(found, describe, code=code, verb=command.removesuffix("_stats"), **facts)

    def came(self, describe: Describe) -> None:
        """Log that a client has connected."""
        if self._write_debug is not None:
            self._write_debug(_line(_CAME, describe()))

    def went(self, describe: Describe, reason: str) -> None:
        """Log that a client has left, or was lost."""
        if self._write_debug is not None:
            self._write_debug(_line(_WENT, {**describe(), "reason": reason}))

    @property
    def has_left_out(self) -> bool:
        """Whether `report_left_out` will have something to log."""
        return self._repetition.has_left_out

    def report_left_out(self) -> None:
        """Log the refusals left out in the minutes that are over; to be called now and then."""
        for key, left_out in self._repetition.take_left_out(self._now()):
            if self._write_info is not None:
                self._write_info(self._latest[key] + _repeats(left_out))


_CAME = Kind("connected")
_WENT = Kind("left: {reason}")


def _line(kind: Kind, facts: Facts) -> str:
    shown = _Shown({name: show(value) for name, value in facts.items()})
    return " ".join([kind.line.format_map(shown), *_peer(shown)])


def _peer(shown: Mapping[str, str]) -> list[str]:
    """Describe the client of a line, as far as it is known."""
    known = [
        f"{word} {shown[name]}".strip()
        for word, name in (("client", "client"), ("user", "user"), ("at", "address"), ("by", "transport"))
        if shown.get(name)
    ]
    return [f"({' '.join(known)})"] if known else []


def _repeats(left_out: int) -> str:
    return f"; {left_out} more since the last such line" if left_out else ""


class _Shown(dict[str, str]):
    """Values of a line; an unknown one is ""."""

    def __missing__(self, name: str) -> str:
        return ""


def show(value: object) -> str:
    """Return a value for a line: characters that are not printable escaped, and cut to MAX_FIELD characters."""
    text = str(value)[: MAX_FIELD + 1]
    if not text.isprintable():
        text = "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)
    return text if len(text) <= MAX_FIELD else f"{text[: MAX_FIELD - 1]}…"
