"""The names of keys and channels on Redis."""

from __future__ import annotations


def hash_tag(name: str) -> bytes:
    """Return the part of all keys of `name` that a cluster derives their slot from.

    It ends at the first closing brace. The dot keeps it from being empty, which would make the whole key count.
    """
    return (b"." + name.encode()).partition(b"}")[0]


def key(prefix: str, kind: str, name: str) -> bytes:
    """Return the key of this kind for a channel, user or node. All keys of one name lie in one slot of a cluster."""
    return f"{prefix}.{kind}.{{.{name}}}".encode()
