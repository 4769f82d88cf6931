"""Checks of single values that a type and limits can't express: predicates for `restricted` keys of the settings tree.

Conditions between several keys are in `realtime.config.rules`.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from urllib.parse import urlsplit

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

# The curves that sign tokens (RFC 7518 section 3.4).
_CURVES = ("secp256r1", "secp384r1", "secp521r1")

# In the address of a key set, {{name}} stands for the text that the named group of a pattern has matched.
PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}")
_LISTING_GROUP = re.compile(r"\(\?P<(\w+)>((?:[A-Za-z0-9_-]|\\\.)+(?:\|(?:[A-Za-z0-9_-]|\\\.)+)*)\)")


def listed_groups(pattern: str) -> dict[str, tuple[str, ...]]:
    """Return the named groups of a pattern that only list texts, such as (?P<tenant>acme|globex), with these texts."""
    return {name: tuple(texts.replace("\\.", ".").split("|")) for name, texts in _LISTING_GROUP.findall(pattern)}


def is_address_or_empty(text: str) -> bool:
    """Whether a text is an IP address, or empty."""
    try:
        return text == "" or bool(ipaddress.ip_address(text))
    except ValueError:
        return False


def is_loopback_address(text: str) -> bool:
    """Whether a text is an IP address of this machine's loopback interface."""
    return text != "" and is_address_or_empty(text) and ipaddress.ip_address(text).is_loopback


def are_networks(texts: tuple[str, ...]) -> bool:
    """Whether every text is an IP address or a network, such as 10.0.0.0/8."""
    try:
        return all(bool(ipaddress.ip_network(text, strict=False)) for text in texts)
    except ValueError:
        return False


def are_levels(levels: Mapping[str, object]) -> bool:
    """Whether every value is a level of the log."""
    return all(level in ("none", "trace", "debug", "info", "warn", "error") for level in levels.values())


def are_host_names(names: tuple[str, ...]) -> bool:
    """Whether every text is a host name in lower case, without scheme, port and path."""
    return all(re.fullmatch(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*", name) for name in names)


def are_origin_patterns(patterns: tuple[str, ...]) -> bool:
    """Whether every pattern is a glob for origins as browsers send them: scheme://host[:port], lower case, no path.

    Source: RFC 6454 section 6.2.
    """
    return all(re.fullmatch(r"\*[^\s/,A-Z]*|[a-z*?][-a-z0-9+.*?]*://[^\s/,A-Z]+", pattern) for pattern in patterns)


def is_key_set_url_or_empty(text: str) -> bool:
    """Whether a text is an http(s) URL with a host and a path and without credentials, or empty."""
    if not re.fullmatch(r"https?://[!-~]+", text):
        return text == ""
    try:
        url = urlsplit(text)
        return bool(url.hostname and url.path) and "@" not in url.netloc and url.port != 0
    except ValueError:  # brackets without an address, or an invalid port
        return False


def are_hosts(texts: tuple[str, ...]) -> bool:
    """Whether every text is a host as URLs name it: a name in lower case, an IPv4 address, or an IPv6 address."""
    return all(
        re.fullmatch(r"[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?", text) or (":" in text and text and is_address_or_empty(text))
        for text in texts
    )


def is_rsa_key_or_empty(text: str) -> bool:
    """Whether a text is the PEM of an RSA public key of 2048 to 16384 bits (RFC 7518 section 3.3), or empty."""
    key = _public_key(text)
    return text == "" or (isinstance(key, RSAPublicKey) and 2048 <= key.key_size <= 16384)


def is_elliptic_key_or_empty(text: str) -> bool:
    """Whether a text is the PEM of a public key on P-256, P-384 or P-521 (RFC 7518 section 3.4), or empty."""
    key = _public_key(text)
    return text == "" or (isinstance(key, EllipticCurvePublicKey) and key.curve.name in _CURVES)


def _public_key(pem: str) -> object:
    try:
        return load_pem_public_key(pem.encode())
    except (ValueError, UnsupportedAlgorithm):
        return None


def is_claim_name_or_empty(text: str) -> bool:
    """Whether a text consists of ASCII letters and underscores."""
    return re.fullmatch(r"[a-zA-Z_]*", text) is not None


def is_reference_or_empty(text: str) -> bool:
    """Whether a text has the form package.module:attribute, or is empty."""
    return text == "" or re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", text) is not None


def is_regular_expression(pattern: str) -> bool:
    """Whether Python compiles a regular expression."""
    try:
        return bool(re.compile(pattern))
    except (re.error, RecursionError, OverflowError):
        return False


def is_key_prefix(text: str) -> bool:
    """Whether a text can begin a key in Redis, without characters that have a meaning in patterns and hash tags."""
    return re.fullmatch(r"[A-Za-z0-9._:-]{1,64}", text) is not None


def is_without_spaces(text: str) -> bool:
    """Whether a text consists of visible ASCII characters, as CLIENT SETNAME requires, or is empty."""
    return re.fullmatch(r"[!-~]*", text) is not None
