"""What is allowed in the settings but worth a look: warnings, never errors."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping

from realtime import centrifugo
from realtime.options import PREFIX, KeyPath, one_line, variable, variables
from realtime.settings import Settings

# The key, whether it is as it should be, and what to say if not.
_CAUTIONS: tuple[tuple[str, Callable[[Settings], bool], str], ...] = (
    (
        "client.insecure",
        lambda tree: not tree.client.insecure,
        "anybody may connect and do anything; for development only",
    ),
    ("http_api.insecure", lambda tree: not tree.http_api.insecure, "anybody may call the API; for development only"),
    (
        "client.allowed_origins",
        lambda tree: "*" not in tree.client.allowed_origins,
        "any web page may connect; name the origins that you serve",
    ),
    (
        "client.token.hmac_secret_key",
        lambda tree: not 0 < len(tree.client.token.hmac_secret_key.encode()) < 32,
        "is under 32 bytes and can be guessed; make a longer one (realtime gen-config does)",
    ),
    (
        "client.token.hmac_previous_secret_key",
        lambda tree: not 0 < len(tree.client.token.hmac_previous_secret_key.encode()) < 32,
        "is under 32 bytes and can be guessed; remove it as soon as the change of keys is over",
    ),
)


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
    foreign = {variable(tuple(key.split("."))): key for key in centrifugo.LATER | centrifugo.NEVER}
    for name in sorted(set(environ) - set(known)):
        if not name.startswith(PREFIX) or _KUBERNETES.match(name):
            continue
        parts = name.split("_")
        key = next((key for end in range(len(parts), 1, -1) if (key := foreign.get("_".join(parts[:end])))), None)
        near = difflib.get_close_matches(name, known, 1, 0.85)
        if key:
            yield f"{one_line(name)}: {centrifugo.explain(key)}"
        else:
            hint = f"; did you mean {near[0]}?" if near else ""
            yield f"{one_line(name)}: not a variable that realtime reads{hint}"
    others = sorted(name for name in environ if name.startswith("CENTRIFUGO_"))
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        yield f"{one_line(others[0])}{more}: CENTRIFUGO_ variables are not read; rename them to {PREFIX}..."
