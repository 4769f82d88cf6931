"""Typed data: a handler with an annotation for `data` gets a value of that type.

A caller whose data have another type gets error 400. The types are those that msgspec converts to: Structs,
dataclasses, TypedDicts, NamedTuples, the built-in types with their parameters, and constraints by
`typing.Annotated[..., msgspec.Meta(...)]`.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec

from realtime.errors import ClientError, SettingsError

BAD_DATA = 400
"""The code of the error for data of another type: the first that is the application's, as HTTP has it."""

_UNTYPED = (inspect.Parameter.empty, Any, object, bytes, bytes | None)
"""Annotations that leave data as it is. The data of a client that speaks Protobuf are bytes."""


def data_converter(function: Callable[..., Any], position: int, subject: str) -> Callable[[Any], Any] | None:
    """Return the function that converts the argument at `position`; None if its annotation does not ask for that.

    subject: names the handler in errors. Raises SettingsError for an annotation that is no type of data.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some callables written in C have no signature
        return None
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    if position >= len(parameters) or parameters[position].kind in kinds:
        return None
    name, annotation = parameters[position].name, parameters[position].annotation
    kind = _resolve(function, name, annotation, subject)
    if kind in _UNTYPED:
        return None
    try:
        decoder = msgspec.json.Decoder(kind)
    except TypeError as error:
        raise SettingsError([f"{subject}: data can't be converted to the type of {name}: {error}"]) from None
    return partial(_convert, kind, decoder)


def _resolve(function: Callable[..., Any], name: str, annotation: Any, subject: str) -> Any:
    """Return the type of an annotation, which may be text (`from __future__ import annotations`)."""
    if not isinstance(annotation, str):
        return annotation

    def holder() -> None: ...

    holder.__annotations__ = {name: annotation}
    plain = inspect.unwrap(function)
    while isinstance(plain, partial):
        plain = plain.func
    method = plain if hasattr(plain, "__globals__") else type(plain).__call__
    names = getattr(method, "__globals__", {})
    try:
        return typing.get_type_hints(holder, names, include_extras=True)[name]
    except Exception as error:
        raise SettingsError([f"{subject}: the type of {name}, {annotation}, can't be resolved: {error}"]) from None


def _convert(kind: Any, decoder: msgspec.json.Decoder[Any], data: Any) -> Any:
    """Convert decoded JSON, or bytes that are JSON text. Raises ClientError 400 with the place of the mistake."""
    try:
        if isinstance(data, bytes):
            return decoder.decode(data)
        return msgspec.convert(data, kind, str_keys=True)
    except (msgspec.ValidationError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ClientError(BAD_DATA, str(error)) from None
