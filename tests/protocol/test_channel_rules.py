"""The meaning of channel names: namespaces, permissions, limits."""

from __future__ import annotations

import pytest

from realtime.config.settings import ChannelOptions, ChannelSettings, Namespace
from realtime.errors import ClientError
from realtime.protocol.channel_rules import ChannelRules

RULES = ChannelRules(
    ChannelSettings(
        without_namespace=ChannelOptions(presence=True),
        namespaces=(
            Namespace(name="chat", history_size=5, history_ttl=60.0, allow_user_limited_channels=True),
            Namespace(name="id", channel_regex="^[0-9]+$"),
            Namespace(name="words", channel_regex="^\\w+$", history_size=1, history_ttl=5.0, history_meta_ttl=9.0),
        ),
        history_meta_ttl=100.0,
    )
)


@pytest.mark.parametrize(
    ("channel", "answer"),
    [
        ("news", None),
        ("chat:a", None),
        ("$chat:a", None),
        ("chat:a:b", None),
        ("id:15", None),
        ("words:gr\u00fc\u00dfe", None),
        ("words:\u6f22\u5b57", None),
        ("", None),
        ("chta:a", 102),
        (":a", None),
        (":chat:a", None),
        ("#user:42", None),
        ("$:a", None),
        ("id:x", 107),
        ("$id:x", 107),
        ("gr\u00fc\u00dfe", 107),
        ("chat:\u6f22", 107),
        ("a\x00b", 107),
        ("a\nb", 107),
        ("a\x7f", 107),
        ("a" * 255, None),
        ("a" * 256, 107),
        ("words:" + "\u6f22" * 84, 107),
    ],
)
def test_names(channel, answer):
    try:
        RULES.checked_options(channel)
    except ClientError as error:
        assert error.code == answer
    else:
        assert answer is None


def test_history_options_have_the_default_meta_ttl():
    assert RULES.options("chat:a").history_options.meta_ttl == 100.0
    assert RULES.options("words:a").history_options.meta_ttl == 9.0
    assert RULES.options("chat:a").history_options.enabled
    assert not RULES.options("news").history_options.enabled


@pytest.mark.parametrize(
    ("channel", "users"),
    [
        ("chat:a", None),
        ("news#1", None),
        ("chat:a#1", {"1"}),
        ("chat:a#1,2", {"1", "2"}),
        ("chat:a#1#2,3", {"2", "3"}),
        ("chat:a#", set()),
        ("chat:a#,", set()),
    ],
)
def test_user_limited_names(channel, users):
    assert RULES.allowed_users(channel, RULES.options(channel)) == users


def test_private_names():
    assert RULES.is_private("$chat:a")
    assert not RULES.is_private("chat:$a")
    assert not ChannelRules(ChannelSettings(private_prefix="")).is_private("$chat:a")


@pytest.mark.parametrize("verb", ["publish", "presence", "history"])
@pytest.mark.parametrize("client", [False, True])
@pytest.mark.parametrize("subscriber", [False, True])
@pytest.mark.parametrize("anonymous", [False, True])
def test_permissions(verb, client, subscriber, anonymous):
    options = ChannelRules(
        ChannelSettings(
            without_namespace=ChannelOptions(
                **{
                    f"allow_{verb}_for_client": client,
                    f"allow_{verb}_for_subscriber": subscriber,
                    f"allow_{verb}_for_anonymous": anonymous,
                }
            )
        )
    ).options("a")
    assert options.allows(verb, "42", False) == client
    assert options.allows(verb, "42", True) == (client or subscriber)
    assert options.allows(verb, "", False) == (client and anonymous)
    assert options.allows(verb, "", True) == ((client or subscriber) and anonymous)


@pytest.mark.parametrize(
    ("namespace", "user", "channel"),
    [
        ("", "ann", "#ann"),
        ("chat", "ann", "chat:#ann"),
        ("", "user:42", "#user:42"),
        ("chat", "user:42", "chat:#user:42"),
        ("", "alice,bob", ""),
        ("chat", "alice,bob", ""),
        ("", "alice#bob", ""),
    ],
)
def test_a_personal_channel_is_open_to_its_user_alone(namespace, user, channel):
    assert RULES.personal_channel(namespace, user) == channel
    if channel:
        options = RULES.options(channel)
        assert RULES.allowed_users(channel, options) in (None, frozenset((user,)))
