"""Forms in the bodies of requests: URL-encoded ones, and those with files (multipart/form-data, RFC 7578)."""

from __future__ import annotations

from typing import TypeVar
from urllib.parse import parse_qsl

import msgspec
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from realtime.app.data_types import BAD_DATA
from realtime.errors import ClientError

Data = TypeVar("Data")

# Fields and files of one form, by default.
MAX_FIELDS = 1000


class File(msgspec.Struct, frozen=True):
    """A file of a form. name: as the peer named it; it may be a path. type: its content type, as the peer named it."""

    name: str
    type: str
    content: bytes


class Form(msgspec.Struct, frozen=True):
    """The fields and files of a form, as (name, value) in their order."""

    all_fields: list[tuple[str, str]]
    all_files: list[tuple[str, File]] = []

    @property
    def fields(self) -> dict[str, str]:
        """The last value of each field, by name."""
        return dict(self.all_fields)

    @property
    def files(self) -> dict[str, File]:
        """The last file of each name."""
        return dict(self.all_files)

    def convert(self, type: type[Data]) -> Data:
        """Return the last value of each field as an object of this type, such as a Struct; "3" may become an int.

        Raises ClientError 400 with the place of the mistake.
        """
        try:
            return msgspec.convert(self.fields, type, strict=False)
        except msgspec.ValidationError as error:
            raise ClientError(BAD_DATA, str(error)) from None


def parse_form(content_type: str, body: bytes, max_fields: int) -> Form:
    """Return the form in a body. max_fields: the most fields and files. Raises ClientError 400 with the reason."""
    kind, options = parse_options_header(content_type)
    try:
        if kind == b"application/x-www-form-urlencoded":
            text = body.decode()
            return Form(parse_qsl(text, keep_blank_values=True, errors="strict", max_num_fields=max_fields))
        if kind == b"multipart/form-data" and options.get(b"boundary"):
            return _MultipartReader(max_fields).read(options[b"boundary"], body)
    except UnicodeDecodeError:
        raise ClientError(BAD_DATA, "the form is not UTF-8") from None
    except ValueError as error:  # of both parsers
        raise ClientError(BAD_DATA, f"the form is malformed: {error}") from None
    raise ClientError(BAD_DATA, "the body is no form: its content type is another, or has no boundary")


class _MultipartReader:
    """Collects the parts of one body from the events of its parser."""

    def __init__(self, max_fields: int) -> None:
        self._form = Form([], [])
        self._left = max_fields
        self._has_ended = False
        self._headers: dict[bytes, bytes] = {}
        self._name = self._value = self._content = bytearray()

    def read(self, boundary: bytes, body: bytes) -> Form:
        parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin_part,
                "on_header_begin": self._begin_header,
                "on_header_field": lambda data, start, end: self._name.extend(data[start:end]),
                "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
                "on_header_end": self._end_header,
                "on_part_data": lambda data, start, end: self._content.extend(data[start:end]),
                "on_part_end": self._end_part,
                "on_end": self._end,
            },
        )
        parser.write(body)
        parser.finalize()
        if not self._has_ended:
            raise FormParserError("it has no end")
        return self._form

    def _begin_part(self) -> None:
        if not self._left:
            raise FormParserError("it has too many fields")
        self._left -= 1
        self._headers, self._content = {}, bytearray()

    def _begin_header(self) -> None:
        self._name, self._value = bytearray(), bytearray()

    def _end_header(self) -> None:
        self._headers[bytes(self._name).lower()] = bytes(self._value)

    def _end_part(self) -> None:
        kind, options = parse_options_header(self._headers.get(b"content-disposition", b"").decode("latin-1"))
        if kind != b"form-data" or b"name" not in options:
            raise FormParserError("a part has no name")
        name = options[b"name"].decode()
        if b"filename" in options:
            content_type = self._headers.get(b"content-type", b"").decode("latin-1")
            file = File(options[b"filename"].decode(), content_type, bytes(self._content))
            self._form.all_files.append((name, file))
        else:
            self._form.all_fields.append((name, self._content.decode()))

    def _end(self) -> None:
        self._has_ended = True
