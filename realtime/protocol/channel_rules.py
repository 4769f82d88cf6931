"""The meaning of channel names: the options of a channel's namespace, and the permissions of clients in it.

The rules are those of the Centrifuge client protocol: the text before the first boundary (after one leading private
prefix) names the namespace; permissions are off until an option turns them on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from operator import attrgetter

import msgspec

from realtime.config.channel_settings import ChannelOptions, ChannelSettings, history_options
from realtime.errors import BAD_REQUEST, UNKNOWN_CHANNEL, ClientError
from realtime.types import HistoryOptions

# Names end up in logs, metrics and keys of other systems: no line ends and no invisible characters.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")

# Channels whose options are remembered, a quarter of a megabyte with the longest names.
_REMEMBERED = 1024

# By verb: returns whether it is granted to clients, to subscribers, and to the anonymous among them.
_GRANTS = {
    verb: attrgetter(*(f"allow_{verb}_for_{whom}" for whom in ("client", "subscriber", "anonymous")))
    for verb in ("publish", "presence", "history")
}


class ResolvedChannel(ChannelOptions, frozen=True, kw_only=True):
    """The options of one namespace, with values derived from them."""

    history_options: HistoryOptions
    pattern: re.Pattern[str] | None = None

    def allows(self, verb: str, user: str, subscribed: bool) -> bool:
        """Return whether `user` ("" for anonymous) is allowed to do `verb`: "publish", "presence" or "history"."""
        to_clients, to_subscribers, to_anonymous = _GRANTS[verb](self)
        return bool((to_clients or (subscribed and to_subscribers)) and (user or to_anonymous))

    def with_override(self, override: Mapping[str, bool]) -> ResolvedChannel:
        """Return these options with other values for some of them, by name."""
        return msgspec.structs.replace(self, **override) if override else self

    def check_client_data(self, data: bytes, is_json: bool) -> None:
        """Check data of a client as `check_data` does. Data that is not JSON needs the format "binary"."""
        self.check_data(data, is_json)
        if not (is_json or self.publication_data_format == "binary"):
            raise ClientError(*BAD_REQUEST)

    def check_data(self, data: bytes, is_json: bool) -> None:
        """Check data against `publication_data_format`. Raises ClientError 107.

        is_json: whether `data` is JSON text, see `Encoding.is_json`.
        """
        match self.publication_data_format:
            case "" if data:  # the short path
                return
            case "binary":
                return
            case "json_object":
                fits = is_json and data.lstrip(b" \t\r\n").startswith(b"{")
            case "json":
                fits = is_json
            case _:
                fits = True
        if not (fits and data) or (data.isspace() and self.publication_data_format):
            raise ClientError(*BAD_REQUEST)


class ChannelRules:
    """The channel rules of one configuration."""

    def __init__(self, settings: ChannelSettings) -> None:
        self._settings = settings
        self._without_namespace = self._resolve(settings.without_namespace)
        self._namespaces = {namespace.name: self._resolve(namespace) for namespace in settings.namespaces}
        # Of the names used last: nearly all commands concern few channels.
        self.checked_options = lru_cache(maxsize=_REMEMBERED)(self._checked_options)
        self.options = lru_cache(maxsize=_REMEMBERED)(self._options)

    def _resolve(self, options: ChannelOptions) -> ResolvedChannel:
        values = {name: getattr(options, name) for name in ChannelOptions.__struct_fields__}
        values["publication_data_format"] = options.publication_data_format or self._settings.publication_data_format
        return ResolvedChannel(
            **values,
            history_options=history_options(options, self._settings.history_meta_ttl),
            pattern=re.compile(options.channel_regex) if options.channel_regex else None,
        )

    def namespace(self, channel: str) -> str | None:
        """Return the namespace in the name of `channel`, configured or not; None for a name without one.

        A name that begins with the boundary has none.
        """
        name = channel.removeprefix(self._settings.private_prefix) if self._settings.private_prefix else channel
        if self._settings.user_boundary and name.startswith(self._settings.user_boundary):
            return None  # the personal channel of a user, whose id may be "user:42"
        namespace, boundary, _ = name.partition(self._settings.namespace_boundary)
        return namespace if boundary and namespace else None

    def _options(self, channel: str) -> ResolvedChannel:
        """Return the options of `channel`. Raises ClientError 102 when its namespace is not configured."""
        namespace = self.namespace(channel)
        if namespace is None:
            return self._without_namespace
        try:
            return self._namespaces[namespace]
        except KeyError:
            raise ClientError(*UNKNOWN_CHANNEL) from None

    def _checked_options(self, channel: str) -> ResolvedChannel:
        """Return the options of a channel that a client named.

        Raises ClientError: 107 for a name that is too long or not allowed, 102 for an unknown namespace.
        """
        if len(channel.encode()) > self._settings.max_length:
            raise ClientError(*BAD_REQUEST)
        options = self.options(channel)
        if options.pattern is not None:
            has_namespace = self.namespace(channel) is not None
            name = channel.partition(self._settings.namespace_boundary)[2] if has_namespace else channel
            fits = options.pattern.search(name) is not None
        else:
            fits = channel.isascii()
        if not fits or _CONTROL.search(channel):
            raise ClientError(*BAD_REQUEST)
        return options

    def is_private(self, channel: str) -> bool:
        """Return whether subscribing always needs a token."""
        prefix = self._settings.private_prefix
        return bool(prefix) and channel.startswith(prefix)

    def allowed_users(self, channel: str, options: ResolvedChannel) -> frozenset[str] | None:
        """Return the users that a user-limited channel names, or None for a channel that is not limited.

        An empty name is dropped: `chat#` allows no user, and never the anonymous one.
        """
        boundary = self._settings.user_boundary
        if not options.allow_user_limited_channels or not boundary or boundary not in channel:
            return None
        users = channel.rpartition(boundary)[2]
        separator = self._settings.user_separator
        return frozenset(filter(None, users.split(separator) if separator else [users]))

    def allows_subscribe(self, channel: str, options: ResolvedChannel, user: str) -> bool:
        """Return whether the options let `user` ("" for anonymous) subscribe without a token."""
        users = self.allowed_users(channel, options)
        if users is not None:
            return user in users
        return options.allow_subscribe_for_client and bool(user or options.allow_subscribe_for_anonymous)

    def personal_channel(self, namespace: str, user: str) -> str:
        """Return the personal channel of one user in `namespace` ("" for none).

        Returns "" for a user id whose channel other users may subscribe to: `#alice,bob` names alice and bob.
        """
        settings = self._settings
        if any(mark and mark in user for mark in (settings.user_boundary, settings.user_separator)):
            return ""
        name = settings.user_boundary + user
        return namespace + self._settings.namespace_boundary + name if namespace else name
