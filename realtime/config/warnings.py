"""What is allowed in the settings but worth a look: warnings, never errors."""

from __future__ import annotations

import difflib
import fnmatch
import ipaddress
import re
from collections.abc import Callable, Iterator, Mapping

from realtime.config import centrifugo_keys
from realtime.config.reader import PREFIX, KeyPath, one_line, variable, variables
from realtime.config.settings import Settings, TokenSettings

# RFC 7518 section 3.2, for HS256: whoever has a token can try secrets at home.
_SECRET_BYTES = 32


def _strong(secret: str) -> bool:
    """Whether a secret is beyond guessing. None at all lets nobody in."""
    return not secret or len(secret.encode()) >= _SECRET_BYTES


# Pages that nobody lists by name (RFC 2606 section 2).
_STRANGERS = ("http://stranger.invalid", "https://stranger.invalid", "https://stranger.invalid:8443")


def _lists_origins(patterns: tuple[str, ...]) -> bool:
    """Whether the patterns leave any page out."""
    return not any(fnmatch.fnmatchcase(stranger, pattern) for stranger in _STRANGERS for pattern in patterns)


def _lists_networks(networks: tuple[str, ...]) -> bool:
    return all(ipaddress.ip_network(network, strict=False).prefixlen for network in networks)


def _of_tokens(table: str, of: Callable[[Settings], TokenSettings | None]) -> tuple[_Caution, ...]:
    """The cautions of a table of tokens. of: has the table, or None when it is not used."""

    def well(holds: Callable[[TokenSettings], bool]) -> Callable[[Settings], bool]:
        return lambda tree: (token := of(tree)) is None or holds(token)

    return (
        (
            f"{table}.hmac_secret_key",
            well(lambda token: _strong(token.hmac_secret_key)),
            "is under 32 bytes and can be guessed; make a longer one (realtime gen-config does)",
        ),
        (
            f"{table}.hmac_previous_secret_key",
            well(lambda token: _strong(token.hmac_previous_secret_key)),
            "is under 32 bytes and can be guessed; remove it as soon as the change of keys is over",
        ),
        (
            f"{table}.jwks_allow_insecure",
            well(lambda token: not token.jwks_allow_insecure),
            "whoever is between may put in keys of his own, and so be any user; for development only",
        ),
    )


# The key, whether it is as it should be, and what to say if not.
_Caution = tuple[str, Callable[[Settings], bool], str]
_CAUTIONS: tuple[_Caution, ...] = (
    (
        "client.insecure",
        lambda tree: not tree.client.insecure,
        "anybody may connect and do anything; for development only",
    ),
    ("http_api.insecure", lambda tree: not tree.http_api.insecure, "anybody may call the API; for development only"),
    (
        "http_api.key",
        lambda tree: _strong(tree.http_api.key),
        "is under 32 bytes and can be guessed; make a longer one (realtime gen-config does)",
    ),
    (
        "client.allowed_origins",
        lambda tree: _lists_origins(tree.client.allowed_origins),
        "any web page may connect; name the origins that you serve",
    ),
    (
        "client.trusted_proxies",
        lambda tree: _lists_networks(tree.client.trusted_proxies),
        "any client may say which address it has; name the networks of your proxies",
    ),
    *_of_tokens("client.token", lambda tree: tree.client.token),
    *_of_tokens(
        "client.subscription_token",
        lambda tree: tree.client.subscription_token if tree.client.subscription_token.enabled else None,
    ),
    (
        "client.user_id_http_header",
        lambda tree: not tree.client.user_id_http_header,
        "whoever sends this header is the user that it names; only behind a proxy that always sets it itself",
    ),
)


def unwise(settings: Settings) -> list[str]:
    """The keys whose values are allowed but worth a look."""
    return [key for key, well, _ in _CAUTIONS if not well(settings)]


def warnings(settings: Settings, environ: Mapping[str, str]) -> list[str]:
    """What is allowed but worth a look: one line each, without secrets."""
    cautions = [f"{key}: {says}" for key, well, says in _CAUTIONS if not well(settings)]
    return [*cautions, *_unread(settings, environ)]


# What Kubernetes puts into every container for a Service called `realtime` or `realtime-...`.
_KUBERNETES = re.compile(PREFIX.rstrip("_") + r"(?:_[A-Z0-9_]+)?_(PORT|SERVICE_)")


def _unread(settings: Settings, environ: Mapping[str, str]) -> Iterator[str]:
    """Warnings of variables that look meant for this server but are not read."""
    names: dict[KeyPath, list[str]] = {("channel", "namespaces"): [entry.name for entry in settings.channel.namespaces]}
    known = [name for name, _, _ in variables(Settings, names)]
    foreign = {variable(tuple(key.split("."))): key for key in centrifugo_keys.LATER | centrifugo_keys.NEVER}
    for name in sorted(set(environ) - set(known)):
        if not name.startswith(PREFIX) or _KUBERNETES.match(name):
            continue
        parts = name.split("_")
        key = next((key for end in range(len(parts), 1, -1) if (key := foreign.get("_".join(parts[:end])))), None)
        near = difflib.get_close_matches(name, known, 1, 0.85)
        if key:
            yield f"{one_line(name)}: {centrifugo_keys.explain(key)}"
        else:
            hint = f"; did you mean {near[0]}?" if near else ""
            yield f"{one_line(name)}: not a variable that realtime reads{hint}"
    others = sorted(name for name in environ if name.startswith("CENTRIFUGO_"))
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        yield f"{one_line(others[0])}{more}: CENTRIFUGO_ variables are not read; rename them to {PREFIX}..."
