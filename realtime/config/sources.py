"""Where settings come from: reads the file, the environment and the command line into one `Settings` tree.

In rising order of precedence: the defaults, the TOML file, the environment, the command line.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from realtime.config import centrifugo_keys, toml_lines
from realtime.config.pem import is_inline_pem, read_pem
from realtime.config.reader import Reader
from realtime.config.rules import RULES
from realtime.config.settings import RedisSettings, Settings
from realtime.config.values import escape_unprintable
from realtime.errors import SettingsError

MAX_FILE_BYTES = 1024 * 1024


class Sources(msgspec.Struct, frozen=True):
    """Where the settings of a server come from. config: the absolute path of its file; None without one. arguments,
    environ: as for `read`."""

    config: str | None = None
    arguments: dict[str, str] = {}
    environ: dict[str, str] = {}

    def read(self) -> Settings:
        """Return the settings as they are there now. Raises SettingsError with every problem, one line each."""
        return read(self.config, self.arguments, self.environ)


def parse(arguments: Mapping[str, str], file: tuple[str, str] | None, environ: Mapping[str, str]) -> Settings:
    """Return the settings of three sources. No I/O.

    arguments: command-line values by dotted key. file: its name, for messages, and its text; None for no file. environ:
    all environment variables. Only known ones are read; an empty one counts as unset.
    Raises SettingsError with every problem, one line each.
    """
    return _parse(arguments, file, environ, [])


def _parse(
    arguments: Mapping[str, str],
    file: tuple[str, str] | None,
    environ: Mapping[str, str],
    file_problems: Sequence[str],
) -> Settings:
    reader = Reader(Settings, RULES, centrifugo_keys.explain_key)
    if file is not None:
        try:
            reader.add_file(*toml_lines.parse_toml(*file))
        except SettingsError as error:
            file_problems = error.problems
    reader.add_environment(environ)
    reader.add_options(arguments)
    if file_problems:  # without the values of the file, a broken rule may only seem to be broken
        raise SettingsError([*file_problems, *reader.problems])
    settings = reader.build()
    if reader.problems:
        raise SettingsError(reader.problems)
    return settings


def read(config: str | None, arguments: Mapping[str, str], environ: Mapping[str, str]) -> Settings:
    """Read the file at `config` (None for no file) and return the settings of all three sources.

    Paths become absolute; they are relative to the file's folder, or to the working directory without a file. The
    files of certificates are only tried: who needs them reads them again.
    Raises SettingsError with every problem, one line each.
    """
    file, problems = None, []
    if config is not None:
        try:
            file = escape_unprintable(config), read_text(config)
        except SettingsError as error:
            problems = error.problems
    settings = _parse(arguments, file, environ, problems)
    replace = msgspec.structs.replace
    folder = Path(config).parent if config is not None else Path()
    if settings.engine.type == "redis":
        engine = replace(settings.engine, redis=_with_certificates(settings.engine.redis, folder))
        settings = replace(settings, engine=engine)
    engine = settings.engine
    if engine.memory.path:
        path = Path(os.path.abspath(folder / engine.memory.path))
        if not path.parent.is_dir():
            raise SettingsError([f"engine.memory.path: no folder at {path.parent}; correct the path, or make it"])
        settings = replace(settings, engine=replace(engine, memory=replace(engine.memory, path=str(path))))
    if not settings.app.module:
        return settings
    path = Path(os.path.abspath(folder / settings.app.path))
    if not path.is_dir():
        raise SettingsError([f"app.path: no folder at {path}; correct the path, or make the folder"])
    return replace(settings, app=replace(settings.app, path=str(path)))


def _with_certificates(redis: RedisSettings, folder: Path) -> RedisSettings:
    """Return settings with absolute paths of certificates and keys. Raises SettingsError for those that can't be read,
    one line each."""
    problems: list[str] = []
    tables = {}
    for table, tls in (("tls", redis.tls), ("sentinel_tls", redis.sentinel_tls)):
        paths = {}
        for key in ("server_ca_pem", "cert_pem", "key_pem"):
            if value := getattr(tls, key):
                try:
                    paths[key] = value if is_inline_pem(value) else os.path.abspath(folder / value)
                    read_pem(f"engine.redis.{table}.{key}", paths[key])
                except SettingsError as error:
                    problems += error.problems
        tables[table] = msgspec.structs.replace(tls, **paths)
    if problems:
        raise SettingsError(problems)
    return msgspec.structs.replace(redis, **tables)


def read_text(config: str) -> str:
    """Return the text of a configuration file. Raises SettingsError with one line that names the remedy."""
    name = escape_unprintable(config)
    try:
        with open(config, "rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        remedy = {
            FileNotFoundError: "name an existing file, or make one with realtime gen-config",
            IsADirectoryError: "name a file in this folder",
            PermissionError: "make it readable for the user that runs the server",
        }.get(type(error), "name a readable file")
        raise SettingsError([f"{name}: can't be read: {error.strerror}; {remedy}"]) from None
    if len(content) > MAX_FILE_BYTES:
        raise SettingsError([f"{name}: larger than 1 MiB, so probably not a configuration; check the file name"])
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise SettingsError([f"{name}:{line}: not UTF-8; save the file as UTF-8"]) from None
