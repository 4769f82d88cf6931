"""The tables below [channel]: the options of channels, by namespace, and the syntax of channel names."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct, field

from realtime.config import checks
from realtime.config.annotations import NonNegative, Positive, WholeSeconds, about, restricted
from realtime.types import HistoryOptions

_DATA_FORMAT_HELP = (
    "Required format of a publication's data. json: any JSON. json_object: a JSON object. binary: anything, even"
    " nothing."
)


class ChannelOptions(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options of the channels without a namespace: history, presence and permissions."""

    presence: Annotated[bool, about("The server keeps a list of a channel's subscribers.")] = False
    join_leave: Annotated[
        bool, about("Subscribers that ask for it receive an event when another client joins or leaves.")
    ] = False
    force_push_join_leave: Annotated[
        bool, about("All subscribers receive join and leave events, whether or not they ask for them.")
    ] = False
    presence_grace: Annotated[
        float,
        Meta(ge=0, le=300),
        about(
            "Time for which a user stays listed after the end of its connection. If the user returns in time, other"
            " clients see neither a leave nor a join, and the new connection is listed with the id of the old one."
            " 0: no grace."
        ),
    ] = 0.0
    history_size: Annotated[
        NonNegative,
        about("Maximum number of publications in a channel's history. Needs history_ttl. 0: no history."),
    ] = 0
    history_ttl: Annotated[
        WholeSeconds,
        about(
            "Time from the latest publication until the server drops a channel's history, in whole seconds."
            " Needs history_size. 0: no history."
        ),
    ] = 0.0
    history_meta_ttl: Annotated[
        WholeSeconds,
        about(
            "Time from the last use until the server forgets a channel's offsets, in whole seconds."
            " 0: as in channel.history_meta_ttl."
        ),
    ] = 0.0
    force_positioning: Annotated[bool, about("The server checks every subscription for missed publications.")] = False
    allow_positioning: Annotated[
        bool, about("The server checks a subscription for missed publications when the client asks for it.")
    ] = False
    force_recovery: Annotated[
        bool, about("Every returning subscriber recovers missed publications. Needs history.")
    ] = False
    allow_recovery: Annotated[
        bool, about("A returning subscriber recovers missed publications when it asks for it. Needs history.")
    ] = False
    allow_subscribe_for_client: Annotated[bool, about("Users may subscribe.")] = False
    allow_subscribe_for_anonymous: Annotated[bool, about("The anonymous user may subscribe too, where users may.")] = (
        False
    )
    allow_publish_for_client: Annotated[bool, about("Users may publish.")] = False
    allow_publish_for_subscriber: Annotated[bool, about("Subscribers may publish.")] = False
    allow_publish_for_anonymous: Annotated[
        bool, about("The anonymous user may publish too, where users or subscribers may.")
    ] = False
    allow_presence_for_client: Annotated[bool, about("Users may read presence.")] = False
    allow_presence_for_subscriber: Annotated[bool, about("Subscribers may read presence.")] = False
    allow_presence_for_anonymous: Annotated[
        bool, about("The anonymous user may read presence too, where users or subscribers may.")
    ] = False
    allow_history_for_client: Annotated[bool, about("Users may read the history.")] = False
    allow_history_for_subscriber: Annotated[bool, about("Subscribers may read the history.")] = False
    allow_history_for_anonymous: Annotated[
        bool, about("The anonymous user may read the history too, where users or subscribers may.")
    ] = False
    allow_user_limited_channels: Annotated[
        bool,
        about("A channel name that lists users after channel.user_boundary admits these users, and no others."),
    ] = False
    channel_regex: Annotated[
        str,
        restricted("a regular expression that Python compiles", checks.is_regular_expression),
        about(
            "Regular expression that must match somewhere in a channel's name after the namespace. Empty: any ASCII"
            " name."
        ),
    ] = ""
    force_recovery_mode: Annotated[
        Literal["", "stream", "cache"],
        about(
            "Recovery of a returning subscriber. stream: all missed publications. cache: the latest publication alone."
            " Empty: stream."
        ),
    ] = ""
    auto_cache_recover: Annotated[
        bool,
        about(
            "Every new subscription starts with the latest publication. Needs force_recovery and"
            ' force_recovery_mode = "cache".'
        ),
    ] = False
    allowed_delta_types: Annotated[
        tuple[Literal["fossil"], ...],
        about(
            'Delta formats that clients may ask for, such as ["fossil"]: publications then arrive as differences from'
            " the one before. Empty: none."
        ),
    ] = ()
    delta_publish: Annotated[
        bool,
        about("The server sends differences for all publications. false: only for those published with delta."),
    ] = False
    allow_tags_filter: Annotated[bool, about("Subscribers may filter publications by their tags.")] = False
    publication_data_format: Annotated[
        Literal["", "json", "json_object", "binary"],
        about(f"{_DATA_FORMAT_HELP} Empty: as in channel.publication_data_format."),
    ] = ""
    priority: Annotated[
        Literal["high", "normal", "low"],
        about(
            "Order of delivery when a worker has more publications to deliver than fit in one loop.slice: channels of"
            " higher priority come first more often."
        ),
    ] = "normal"


class Namespace(ChannelOptions, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options of the channels of one namespace. A namespace inherits no options."""

    name: Annotated[
        str,
        Meta(pattern=r"^[-a-zA-Z0-9_.]{2,}\Z", examples=["chat"]),
        Meta(extra={"expected": 'a name of two or more of A-Z a-z 0-9 - _ ., such as "chat"'}),
        about("Name of the namespace: the part of a channel's name before the namespace boundary."),
    ]


class ChannelSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """Channels: the syntax of their names, and the options of each namespace."""

    without_namespace: ChannelOptions = field(default_factory=ChannelOptions)
    namespaces: Annotated[
        tuple[Namespace, ...],
        about(
            "Add one such table for each namespace. It has the options of [channel.without_namespace] and inherits"
            " none of their values."
        ),
    ] = ()
    max_length: Annotated[Positive, about("Maximum length of a channel name, in bytes.")] = 255
    namespace_boundary: Annotated[
        str, Meta(min_length=1), about("Separator between the namespace and the rest of a channel name.")
    ] = ":"
    private_prefix: Annotated[
        str,
        about("Prefix of private channels, which need a subscription token. Empty: there are no private channels."),
    ] = "$"
    user_boundary: Annotated[str, about("Separator before the list of users in a user-limited channel name.")] = "#"
    user_separator: Annotated[str, about("Separator between users in a user-limited channel name.")] = ","
    history_meta_ttl: Annotated[
        WholeSeconds,
        about(
            "Time from the last use until the server forgets a channel's offsets, in whole seconds, for"
            " namespaces that set none."
        ),
    ] = 2_592_000.0
    publication_data_format: Annotated[
        Literal["", "json", "json_object", "binary"],
        about(f"{_DATA_FORMAT_HELP} Empty: any data that is not empty. For namespaces that set no format."),
    ] = ""


def history_options(options: ChannelOptions, default_meta_ttl: float) -> HistoryOptions:
    """Return the history options of a channel. default_meta_ttl: `channel.history_meta_ttl`, in seconds."""
    return HistoryOptions(options.history_size, options.history_ttl, options.history_meta_ttl or default_meta_ttl)
