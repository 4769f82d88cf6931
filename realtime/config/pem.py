"""Certificates and keys in the configuration: PEM text, base64 of it, or the path of a file, as in Centrifugo."""

from __future__ import annotations

import base64
import binascii
from pathlib import Path

from realtime.errors import SettingsError

_MARK = b"-----BEGIN "
_MAX_BYTES = 1024 * 1024


def is_inline_pem(value: str) -> bool:
    """Whether a value is PEM text or base64 of it, and not a path."""
    return bool(_inline(value))


def _inline(value: str) -> bytes:
    encoded = value.encode()
    if _MARK in encoded:
        return encoded
    try:
        decoded = base64.b64decode("".join(value.split()), validate=True)
    except (binascii.Error, ValueError):
        return b""
    return decoded if _MARK in decoded else b""


def read_pem(key: str, value: str) -> bytes:
    """Return the PEM text of a value; of a file, its content now. key: names the setting in messages.

    Raises SettingsError with one line that does not show the value.
    """
    if inline := _inline(value):
        return inline
    try:
        with Path(value).open("rb") as file:
            content = file.read(_MAX_BYTES)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a path"
        raise SettingsError([f"{key}: neither PEM text nor a readable file: {reason}; correct it"]) from None
    if _MARK not in content:
        raise SettingsError([f"{key}: the file has no PEM text (-----BEGIN ...); name another file"])
    return content
