"""Reads a tree of settings from three sources: a TOML file, the environment and the command line.

`Reader` takes the sources in rising order of precedence, collects one line for each problem, and builds the tree at the
end. It knows no key by name: keys come from the tree's annotations (`realtime.config.schema`), and `Rule`s hold between
several keys of one table. It does no I/O.
"""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from msgspec import NODEFAULT, Struct

from realtime.config.schema import (
    Key,
    KeyPath,
    environment_variables,
    format_path,
    keys_of,
    value_keys,
    variable_name,
)
from realtime.config.values import DURATION, ValueRefused, format_duration, quote, quote_setting

_COMMAND_LINE = "command line"

Tree = TypeVar("Tree", bound=Struct)
Table = TypeVar("Table", bound=Struct)


@dataclass(frozen=True, slots=True)
class Rule(Generic[Table]):
    """A condition between several keys of one table, or of tables below it.

    keys: dotted, relative to the table; a violation is reported at the first. The reader skips a rule when the value of
    one of its keys is invalid. holds: a predicate of the table's Struct. message: the problem and its remedy; "{0}" in
    it stands for the value of the first key, "{1}" for that of the second.
    """

    keys: tuple[str, ...]
    holds: Callable[[Table], object]
    message: str


Rules = Mapping[type[Struct], Sequence[Rule[Any]]]


@dataclass(frozen=True, slots=True)
class _SourcedValue:
    """A value with a function that names its source: file and line, variable, or command line."""

    value: Any
    locate: Callable[[], str]


class Reader(Generic[Tree]):
    """Collects values and problems from several sources. A later source wins over an earlier one.

    problems: one line for each mistake, in the order of discovery.
    """

    def __init__(
        self, root: type[Tree], rules: Rules, explain_unknown_key: Callable[[str], str | None] = lambda key: None
    ) -> None:
        """rules: by table; the rules of a Struct hold for its subclasses too.

        explain_unknown_key: explains a key that is not in the tree but known to have a meaning elsewhere, by its dotted
        path ("[]" for any index); None for other keys.
        """
        self.problems: list[str] = []
        self._root = root
        self._rules = rules
        self._explain_unknown_key = explain_unknown_key
        self._values: dict[KeyPath, _SourcedValue] = {}
        self._lengths: dict[KeyPath, int] = {}  # of named lists
        self._invalid: set[KeyPath] = set()

    def add_file(self, tables: Mapping[str, Any], locate: Callable[[KeyPath], str]) -> None:
        """Add the values of a parsed file. locate: returns file name and line of a path in it."""
        self._add_table(self._root, tables, (), locate)

    def add_environment(self, environ: Mapping[str, str]) -> None:
        """Add the variables with known names. An empty variable counts as unset."""
        for path, key in value_keys(self._root):
            if text := environ.get(name := variable_name(path)):
                self._add_text(key, text, path, name)
        # Options of named entries: their variables are known only now, with the names of all entries.
        matches: dict[str, list[tuple[KeyPath, Key]]] = {}
        for name, path, key in environment_variables(self._root, self._entry_names()):
            if any(isinstance(part, int) for part in path) and environ.get(name):
                matches.setdefault(name, []).append((path, key))
        for name, found in matches.items():
            if len(found) > 1:
                paths = " and ".join(format_path(path) for path, _ in found)
                self.problems.append(f"{name}: matches {paths}; rename one of the entries")
            else:
                [(path, key)] = found
                self._add_text(key, environ[name], path, name)

    def add_options(self, options: Mapping[str, str]) -> None:
        """Add command-line options, by dotted key."""
        known = {format_path(path): (path, key) for path, key in value_keys(self._root)}
        for name, text in options.items():
            if name in known:
                path, key = known[name]
                self._add_text(key, text, path, _COMMAND_LINE)
            else:
                self._report_unknown(tuple(name.split(".")), _COMMAND_LINE)

    def build(self) -> Tree:
        """Build the tree and check its rules.

        Discard the tree if there are `problems`: keys with invalid values then have their defaults.
        """
        tree: Tree = self._build(self._root, ())
        return tree

    # Values of a file.

    def _add_table(
        self, table: type[Struct], values: Mapping[str, Any], path: KeyPath, locate: Callable[[KeyPath], str]
    ) -> None:
        known = keys_of(table)
        for name, value in values.items():
            here = (*path, name)
            key = known.get(name)
            if key is None:
                self._report_unknown(here, locate(here))
            elif key.table is None:
                self._add_value(key, key.value_type.from_file, value, here, functools.partial(locate, here))
            elif key.is_list:
                self._add_entries(key, value, here, locate)
            elif isinstance(value, dict):
                self._add_table(key.table, value, here, locate)
            else:
                self._report(here, locate(here), f"expected a table, got {quote(value)}; write [{format_path(here)}]")

    def _add_entries(self, key: Key, value: Any, path: KeyPath, locate: Callable[[KeyPath], str]) -> None:
        if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
            remedy = f"write [[{format_path(path)}]]"
            self._report(path, locate(path), f"expected a list of tables, got {quote(value)}; {remedy}")
            return
        assert key.table is not None
        for index, entry in enumerate(value, self._lengths.get(path, 0)):
            self._lengths[path] = index + 1
            here = (*path, index)
            self._add_table(key.table, entry, here, locate)
            if "name" not in entry:
                expected = keys_of(key.table)["name"].expected
                self._report((*here, "name"), locate(here), f"missing: expected {expected}; add it")
        self._check_unique_names(path)

    def _check_unique_names(self, path: KeyPath) -> None:
        seen: set[Any] = set()
        for index in range(self._lengths.get(path, 0)):
            here = (*path, index, "name")
            name = self._values.get(here)
            if name is None or here in self._invalid:
                continue
            if name.value in seen:
                self._report(here, name.locate(), f"{quote(name.value)} is used twice; rename or remove one of the two")
            seen.add(name.value)

    def _add_value(
        self, key: Key, read: Callable[[Any], Any], value: Any, path: KeyPath, locate: Callable[[], str]
    ) -> None:
        try:
            result = read(value)
        except ValueRefused as refused:
            self._report(path, locate(), str(refused))
            return
        except (ValueError, TypeError, OverflowError, RecursionError):
            pass
        else:
            if key.accepts(result):
                self._values[path] = _SourcedValue(result, locate)
                return
        got = "another value, not shown because it may be secret" if key.is_secret else quote(value)
        self._report(path, locate(), f"expected {key.expected}, got {got}; {_remedy(key, value)}")

    # Values of variables and options.

    def _add_text(self, key: Key, text: str, path: KeyPath, source: str) -> None:
        if key.is_list:
            self._add_list_text(key, text, path, source)
        else:
            self._add_value(key, key.value_type.from_text, text, path, lambda: source)

    def _add_list_text(self, key: Key, text: str, path: KeyPath, source: str) -> None:
        """Add a named list from one variable: a JSON array replaces the file's list, bare names extend it."""
        entries: Any = [{"name": name} for name in text.split(" ")]
        if text.lstrip().startswith("["):
            try:
                entries = json.loads(text)
            except (ValueError, RecursionError) as error:
                expected = "a JSON array of objects, or names separated by single spaces"
                self._report(path, source, f"expected {expected}: {error}")
                return
            self._values = {place: value for place, value in self._values.items() if place[: len(path)] != path}
            self._lengths[path] = 0
        self._add_entries(key, entries, path, lambda place: source)

    def _entry_names(self) -> dict[KeyPath, list[str]]:
        """Return the names of the entries of each named list; an entry without a valid name gets a placeholder."""
        return {
            path: [
                name.value if (name := self._values.get((*path, index, "name"))) else f"#{index}"
                for index in range(length)
            ]
            for path, length in self._lengths.items()
        }

    # Problems.

    def _report_unknown(self, path: KeyPath, source: str) -> None:
        plain = ".".join("[]" if isinstance(part, int) else part for part in path).replace(".[]", "[]")
        problem = self._explain_unknown_key(plain)
        if problem is None:
            closest = self._closest_key(path)
            remedy = f"did you mean {closest}? Correct or remove it" if closest else "remove it"
            problem = f"unknown key; {remedy}"
        self._report(path, source, problem)

    def _closest_key(self, path: KeyPath) -> str | None:
        """Return the known key that was probably meant: a similar name in the same table, else in another table."""
        *parents, name = path
        table: type[Struct] | None = self._root
        for part in parents:
            if isinstance(part, str) and table is not None:
                key = keys_of(table).get(part)
                table = key.table if key else None
        close = difflib.get_close_matches(str(name).lower(), keys_of(table) if table else (), 1)
        if close:
            return format_path((*parents, close[0]))
        elsewhere = {str(known[-1]): format_path(known) for known, _ in reversed(list(value_keys(self._root)))}
        close = difflib.get_close_matches(str(name).lower(), elsewhere, 1, 0.75)
        return elsewhere[close[0]] if close else None

    def _report(self, path: KeyPath, source: str, problem: str) -> None:
        self._invalid.add(path)
        self.problems.append(f"{source}: {format_path(path)}: {problem}")

    # The tree.

    def _build(self, table: type[Struct], path: KeyPath) -> Any:
        values: dict[str, Any] = {}
        for name, key in keys_of(table).items():
            here = (*path, name)
            if key.table is None:
                sourced = self._values.get(here)
                if sourced is not None or key.default is NODEFAULT:
                    values[name] = sourced.value if sourced else ""
            elif key.is_list:
                length = self._lengths.get(here, 0)
                values[name] = tuple(self._build(key.table, (*here, index)) for index in range(length))
            else:
                values[name] = self._build(key.table, here)
        built = table(**values)
        for ancestor in table.__mro__:
            for rule in self._rules.get(ancestor, ()):
                self._check_rule(rule, built, path)
        return built

    def _check_rule(self, rule: Rule[Any], built: Struct, path: KeyPath) -> None:
        places = [(*path, *key.split(".")) for key in rule.keys]
        if any(place in self._invalid for place in places) or rule.holds(built):
            return
        values = [functools.reduce(getattr, key.split("."), built) for key in rule.keys]
        problem = rule.message.format(*map(quote_setting, values))
        sourced = next((self._values[place] for place in places if place in self._values), None)
        self._report(places[0], sourced.locate() if sourced else "defaults", problem)


def _remedy(key: Key, value: Any) -> str:
    if key.value_type is DURATION and type(value) in (int, float) and key.accepts(float(value)):
        return f'write "{format_duration(float(value))}" if you mean seconds'
    if key.default is NODEFAULT:
        return "correct it"
    if key.is_secret or key.default in ("", (), {}):
        return "correct it, or remove it to use the default"
    return f"correct it, or remove it to use the default, {quote(key.value_type.to_file(key.default))}"
