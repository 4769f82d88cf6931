"""What a channel's name means: its namespace's options, and who may do what in it.

The rules are those of the Centrifuge client protocol: the text before the first boundary (after one leading private
prefix) names the namespace; permissions are off until an option turns them on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import msgspec

from realtime.config.channel_settings import ChannelOptions, ChannelSettings, history_options
from realtime.errors import BAD_REQUEST, UNKNOWN_CHANNEL, ClientError
from realtime.types import HistoryOptions

# Names end up in logs, metrics of others and keys of stores: nothing that ends a line or hides.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


class ResolvedChannel(ChannelOptions, frozen=True, kw_only=True):
    """The options of one namespace, with what follows from them worked out once."""

    history_options: HistoryOptions
    pattern: re.Pattern[str] | None = None

    def allows(self, verb: str, user: str, subscribed: bool) -> bool:
        """Whether the options let `user` ("" for anonymous) do `verb`: "publish", "presence" or "history"."""
        granted = getattr(self, f"allow_{verb}_for_client") or (
            subscribed and getattr(self, f"allow_{verb}_for_subscriber")
        )
        return bool(granted and (user or getattr(self, f"allow_{verb}_for_anonymous")))

    def overridden(self, override: Mapping[str, bool]) -> ResolvedChannel:
        """The same with other values for some options, by name."""
        return msgspec.structs.replace(self, **override) if override else self

    def check_data(self, data: bytes, is_json: bool) -> None:
        """Raises ClientError 107 for data that `publication_data_format` rules out.

        is_json: whether it is JSON text, see `Encoding.is_json`.
        """
        match self.publication_data_format:
            case "binary":
                return
            case "json_object":
                fits = is_json and data.lstrip(b" \t\r\n").startswith(b"{")
            case "json":
                fits = is_json
            case _:
                fits = True
        if not (fits and data):
            raise ClientError(*BAD_REQUEST)


class ChannelRules:
    """The channel rules of one configuration."""

    def __init__(self, settings: ChannelSettings) -> None:
        self._settings = settings
        self._without_namespace = self._resolve(settings.without_namespace)
        self._namespaces = {namespace.name: self._resolve(namespace) for namespace in settings.namespaces}

    def _resolve(self, options: ChannelOptions) -> ResolvedChannel:
        values = {name: getattr(options, name) for name in ChannelOptions.__struct_fields__}
        values["publication_data_format"] = options.publication_data_format or self._settings.publication_data_format
        return ResolvedChannel(
            **values,
            history_options=history_options(options, self._settings.history_meta_ttl),
            pattern=re.compile(options.channel_regex) if options.channel_regex else None,
        )

    def namespace(self, channel: str) -> str | None:
        """The namespace that the name of `channel` says, whether there is one or not; None when it says none."""
        name = channel.removeprefix(self._settings.private_prefix) if self._settings.private_prefix else channel
        namespace, boundary, _ = name.partition(self._settings.namespace_boundary)
        return namespace if boundary else None

    def options(self, channel: str) -> ResolvedChannel:
        """The options that hold for `channel`. Raises ClientError 102 when its namespace is not configured."""
        namespace = self.namespace(channel)
        if namespace is None:
            return self._without_namespace
        try:
            return self._namespaces[namespace]
        except KeyError:
            raise ClientError(*UNKNOWN_CHANNEL) from None

    def checked(self, channel: str) -> ResolvedChannel:
        """The options for a name that a client sent.

        Raises ClientError: 107 for a name that is too long or does not fit, 102 for an unknown namespace.
        """
        if len(channel.encode()) > self._settings.max_length:
            raise ClientError(*BAD_REQUEST)
        options = self.options(channel)
        if options.pattern is not None:
            _, boundary, rest = channel.partition(self._settings.namespace_boundary)
            fits = options.pattern.search(rest if boundary else channel) is not None
        else:
            fits = channel.isascii()
        if not fits or _CONTROL.search(channel):
            raise ClientError(*BAD_REQUEST)
        return options

    def is_private(self, channel: str) -> bool:
        """Whether subscribing always needs a token."""
        prefix = self._settings.private_prefix
        return bool(prefix) and channel.startswith(prefix)

    def limited_to(self, channel: str, options: ResolvedChannel) -> frozenset[str] | None:
        """The users that a user-limited channel names, or None for a channel that is not limited.

        An empty name is dropped: `chat#` admits nobody, least of all the anonymous.
        """
        boundary = self._settings.user_boundary
        if not options.allow_user_limited_channels or not boundary or boundary not in channel:
            return None
        users = channel.rpartition(boundary)[2]
        separator = self._settings.user_separator
        return frozenset(filter(None, users.split(separator) if separator else [users]))

    def admits(self, channel: str, options: ResolvedChannel, user: str) -> bool:
        """Whether the options let `user` ("" for anonymous) subscribe without a token."""
        users = self.limited_to(channel, options)
        if users is not None:
            return user in users
        return options.allow_subscribe_for_client and bool(user or options.allow_subscribe_for_anonymous)

    def personal_channel(self, namespace: str, user: str) -> str:
        """The channel in `namespace` ("" for none) that belongs to one user."""
        name = self._settings.user_boundary + user
        return namespace + self._settings.namespace_boundary + name if namespace else name
