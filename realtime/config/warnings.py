"""Warnings about settings that are allowed but risky, and about variables that the server ignores. Never errors."""

from __future__ import annotations

import difflib
import fnmatch
import ipaddress
import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from realtime.config import centrifugo_keys
from realtime.config.schema import PREFIX, KeyPath, environment_variables, variable_name
from realtime.config.settings import Settings, TokenSettings
from realtime.config.values import escape_unprintable

# RFC 7518 section 3.2, for HS256: anyone who has a token can test guesses of a shorter secret offline.
_SECRET_BYTES = 32

# Origins that no deployment lists by name (RFC 2606 section 2): patterns that match one of them match any page.
_UNRELATED_ORIGINS = ("http://stranger.invalid", "https://stranger.invalid", "https://stranger.invalid:8443")

_SHORT_SECRET = "is shorter than 32 bytes and can be guessed; generate a longer one with realtime gen-config"


class _Risk(NamedTuple):
    """A key, a predicate that holds while its value is safe, and the warning otherwise."""

    key: str
    is_safe: Callable[[Settings], bool]
    warning: str


def _is_strong(secret: str) -> bool:
    """Whether a secret can't be guessed. An empty one admits no client, so it is safe."""
    return not secret or len(secret.encode()) >= _SECRET_BYTES


def _exclude_unrelated_origins(patterns: tuple[str, ...]) -> bool:
    return not any(fnmatch.fnmatchcase(origin, pattern) for origin in _UNRELATED_ORIGINS for pattern in patterns)


def _are_limited(networks: tuple[str, ...]) -> bool:
    """Whether no network is the whole internet."""
    return all(ipaddress.ip_network(network, strict=False).prefixlen for network in networks)


def _token_risks(table: str, select: Callable[[Settings], TokenSettings | None]) -> tuple[_Risk, ...]:
    """Return the risks of one table of tokens. select: returns the table, or None when it is not in use."""

    def unless_unused(is_safe: Callable[[TokenSettings], bool]) -> Callable[[Settings], bool]:
        return lambda tree: (token := select(tree)) is None or is_safe(token)

    return (
        _Risk(
            f"{table}.hmac_secret_key", unless_unused(lambda token: _is_strong(token.hmac_secret_key)), _SHORT_SECRET
        ),
        _Risk(
            f"{table}.hmac_previous_secret_key",
            unless_unused(lambda token: _is_strong(token.hmac_previous_secret_key)),
            "is shorter than 32 bytes and can be guessed; remove it as soon as no client uses it any more",
        ),
        _Risk(
            f"{table}.jwks_allow_insecure",
            unless_unused(lambda token: not token.jwks_allow_insecure),
            "anyone on the network path can insert keys and pose as any user; use it in development only",
        ),
    )


_RISKS: tuple[_Risk, ...] = (
    _Risk(
        "client.insecure",
        lambda tree: not tree.client.insecure,
        "anyone can connect and has every permission; use it in development only",
    ),
    _Risk(
        "http_api.insecure",
        lambda tree: not tree.http_api.insecure,
        "anyone can call the HTTP API; use it in development only",
    ),
    _Risk("http_api.key", lambda tree: _is_strong(tree.http_api.key), _SHORT_SECRET),
    _Risk(
        "client.allowed_origins",
        lambda tree: _exclude_unrelated_origins(tree.client.allowed_origins),
        "any web page can connect; list the origins of your own pages",
    ),
    _Risk(
        "client.trusted_proxies",
        lambda tree: _are_limited(tree.client.trusted_proxies),
        "any client can claim any address; list the networks of your proxies",
    ),
    *_token_risks("client.token", lambda tree: tree.client.token),
    *_token_risks(
        "client.subscription_token",
        lambda tree: tree.client.subscription_token if tree.client.subscription_token.enabled else None,
    ),
    _Risk(
        "client.user_id_http_header",
        lambda tree: not tree.client.user_id_http_header,
        "a client that sends this header is the user that it names; use it only behind a proxy that always sets it",
    ),
)


def insecure_keys(settings: Settings) -> list[str]:
    """Return the keys with allowed but risky values, for the metric of insecure settings."""
    return [risk.key for risk in _RISKS if not risk.is_safe(settings)]


def find_warnings(settings: Settings, environ: Mapping[str, str]) -> list[str]:
    """Return one line for each risky value and each ignored variable. No line shows a secret."""
    risks = [f"{risk.key}: {risk.warning}" for risk in _RISKS if not risk.is_safe(settings)]
    return [*risks, *_ignored_variables(settings, environ)]


# Variables that Kubernetes adds to every container for a Service called `realtime` or `realtime-...`.
_KUBERNETES = re.compile(PREFIX.rstrip("_") + r"(?:_[A-Z0-9_]+)?_(PORT|SERVICE_)")


def _ignored_variables(settings: Settings, environ: Mapping[str, str]) -> Iterator[str]:
    """Yield a warning for each variable that is probably meant for this server but not one of its settings."""
    entries: dict[KeyPath, list[str]] = {
        ("channel", "namespaces"): [namespace.name for namespace in settings.channel.namespaces]
    }
    known = [name for name, _, _ in environment_variables(Settings, entries)]
    foreign_keys = centrifugo_keys.PLANNED | centrifugo_keys.UNSUPPORTED
    foreign = {variable_name(tuple(key.split("."))): key for key in foreign_keys}
    for name in sorted(set(environ) - set(known)):
        if not name.startswith(PREFIX) or _KUBERNETES.match(name):
            continue
        parts = name.split("_")
        key = next((key for end in range(len(parts), 1, -1) if (key := foreign.get("_".join(parts[:end])))), None)
        if key:
            yield f"{escape_unprintable(name)}: {centrifugo_keys.explain_key(key)}"
        else:
            close = difflib.get_close_matches(name, known, 1, 0.85)
            hint = f"; did you mean {close[0]}?" if close else ""
            yield f"{escape_unprintable(name)}: realtime has no such setting{hint}"
    others = sorted(name for name in environ if name.startswith("CENTRIFUGO_"))
    if others:
        count = f" and {len(others) - 1} more" if len(others) > 1 else ""
        yield f"{escape_unprintable(others[0])}{count}: CENTRIFUGO_ variables are ignored; rename them to {PREFIX}..."
