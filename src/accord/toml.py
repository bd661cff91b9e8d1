"""Turn a recipe (TOML) into frozen dataclasses, strictly: every key is known, every value has its declared type.

A dataclass is the schema. Its fields may be bool, int, float, str, Path, Literal, another dataclass, a tuple, a dict
from names, a union, or Optional. TOML has no null: None is a key that is left out, or `false` where the default is
something (`finetune = false`). What a value may be beyond its type, the dataclass checks in `__post_init__`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import re
import tomllib
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import tomli_w

from accord.errors import RecipeError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")

TOP_LEVEL = "top level"
"""Metadata of a field whose tables stand at the top of the file beside its own; their owner reads them."""

CHOICE = "choice"
"""Metadata of a field that says what the others are settings of: with another choice they have other defaults."""

MAX_BYTES = 2**20
"""Of a TOML file."""

MAX_WHOLE = 2**63 - 1
"""The largest whole number, as TOML itself says; Python would take any."""

# The standard parser's time grows with the square of a key's parts: a megabyte of them takes hours.
_LONG_KEY = re.compile(r"""(?<![\w-])(?:(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+){32}""")


def load_toml(path: Path | str) -> dict[str, object]:
    """Read a TOML file, which may come from elsewhere: no file makes this hang, or take memory without a limit.

    Raises:
        RecipeError: the file is absent, too long, no ordinary file, unreadable or not TOML; the message gives the line.
    """
    try:
        if (
            not Path(path).is_file() and not Path(path).is_dir() and Path(path).exists()
        ):  # a device or a pipe has no end
            raise RecipeError(f"recipe {path} is no ordinary file; pass the path of a TOML file")
        with Path(path).open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise RecipeError(f"recipe {path} is longer than {MAX_BYTES:,} bytes; pass the path of a recipe")
        # Editors on Windows put a byte order mark before the text, which TOML does not allow.
        return parse_toml(content.decode("utf-8-sig"), where=f"recipe {path}")
    except FileNotFoundError as error:
        raise RecipeError(f"recipe {path} does not exist; check the path") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"recipe {path} is not UTF-8 text ({error}); save it as UTF-8") from error
    except OSError as error:
        raise RecipeError(f"recipe {path} cannot be read: {error}; pass a readable file") from error


def parse_toml(text: str, *, where: str) -> dict[str, object]:
    """Read TOML of at most `MAX_BYTES`; `where` it is from begins every message.

    Raises:
        RecipeError: it is not TOML, a key has too many parts, or it is nested too deep.
    """
    if long := _LONG_KEY.search(text):
        line = text.count("\n", 0, long.start()) + 1
        raise RecipeError(f"{where} has a key of more than 32 parts in line {line}; shorten it")
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise RecipeError(f"{where} has lists or tables too deep within each other; flatten them") from error
    except ValueError as error:  # TOMLDecodeError is one, and so is a number of too many digits
        raise RecipeError(f"{where} is not TOML: {error}; correct that line") from error


def build(
    cls: type[T], table: Mapping[str, object], where: str = "", *, also: Sequence[str] = (), default: T | None = None
) -> T:
    """Make a `cls` from a TOML table, and the dataclasses within it from the tables within.

    What a table within leaves out is as in the default of its field, unless it makes another choice (`CHOICE`).

    Args:
        cls: a dataclass.
        table: what `load_toml` returned, or a table of it.
        where: the dotted place of `table` in the recipe, for messages; empty at the top.
        also: further keys that are valid there, for messages.
        default: what the table leaves out; None for the defaults of `cls`.

    Raises:
        RecipeError: a key is unknown or missing, a value has the wrong type, or a dataclass refused its values.
    """
    hints = get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init and TOP_LEVEL not in field.metadata}
    for key in table:
        if key not in fields:
            raise RecipeError(unknown_key(key, [*fields, *also], where))
    choices = [name for name, field in fields.items() if CHOICE in field.metadata and name in table]
    if any(table[name] != getattr(default, name, None) for name in choices):
        default = None
    values: dict[str, object] = {}
    for name, field in fields.items():
        place = f"{where}.{name}" if where else name
        under = _default(field) if default is None else getattr(default, name)
        if name in table:
            values[name] = _convert(hints[name], table[name], place, under)
        elif under is dataclasses.MISSING:
            raise RecipeError(f"{place} is missing; add it, with a value that is {_expected(hints[name])}")
        else:
            values[name] = under
    try:
        return cls(**values)
    except (ValueError, RecipeError) as error:
        raise RecipeError(f"[{where}] {error}" if where else str(error)) from error


def dump_toml(obj: DataclassInstance) -> str:
    """Render a dataclass as TOML from which `build` makes an equal one."""
    return tomli_w.dumps(_table(obj))


def _default(field: dataclasses.Field[Any]) -> object:
    """Return a field's default, `dataclasses.MISSING` where it has none."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _convert(hint: object, value: object, place: str, default: object = None) -> object:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (types.UnionType, Union):
        members = [member for member in arguments if member is not type(None)]
        if value is False and len(members) < len(arguments) and bool not in members:
            return None
        if len(members) == 1:
            # The one member's own message is more exact than a message about the union.
            return _convert(members[0], value, place, default)
        for member in members:
            with contextlib.suppress(RecipeError):
                return _convert(member, value, place, default)
    elif origin is Literal:
        # Types are compared too, for True == 1.
        if any(value == choice and type(value) is type(choice) for choice in arguments):
            return value
    elif origin is tuple and isinstance(value, list | tuple):
        many = len(arguments) == 2 and arguments[1] is Ellipsis
        kinds = arguments[:1] * len(value) if many else arguments
        if len(kinds) == len(value):
            pairs = enumerate(zip(kinds, value, strict=True))
            return tuple(_convert(kind, item, f"{place}[{i}]") for i, (kind, item) in pairs)
    elif origin in (dict, Mapping) and isinstance(value, Mapping):
        return {key: _convert(arguments[1], item, f"{place}.{key}") for key, item in value.items()}
    elif isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if isinstance(value, Mapping):
            return build(hint, value, place, default=default if isinstance(default, hint) else None)
    elif isinstance(hint, type) and (scalar := _scalar(hint, value)) is not None:
        return scalar
    raise RecipeError(f"{place} must be {_expected(hint)}, got {_shown(value)}")


def _scalar(kind: type, value: object) -> object:
    """Return `value` as a `kind`, or None if it is not one."""
    if isinstance(value, int) and abs(value) > MAX_WHOLE:
        return None
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return None if math.isnan(value) else float(value)
    if kind is Path and isinstance(value, str | Path):
        return Path(value)
    if kind is object or (kind in (bool, int, str) and type(value) is kind):
        return value
    if kind not in (bool, int, float, str, Path):
        raise TypeError(f"a recipe cannot hold a {kind.__name__}; see the module's docstring for the types it can")
    return None


def _expected(hint: object) -> str:
    arguments = get_args(hint)
    origin = get_origin(hint)
    if origin in (types.UnionType, Union):
        return " or ".join(_expected(member) for member in arguments if member is not type(None))
    if origin is Literal:
        return f"one of {', '.join(_shown(choice) for choice in arguments)}"
    if origin is tuple:
        many = len(arguments) == 2 and arguments[1] is Ellipsis
        each = f"each {_expected(arguments[0])}" if many else ", ".join(_expected(member) for member in arguments)
        return f"a list ({each})"
    if origin in (dict, Mapping):
        return f"a table (each value {_expected(arguments[1])})"
    if dataclasses.is_dataclass(hint):
        return "a table"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", Path: "a path (text)"}
    return next((name for kind, name in names.items() if hint is kind), "a value")


def _shown(value: object) -> str:
    """Render a value as the recipe spells it, shortened."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return f"a table with {', '.join(map(str, value)) or 'nothing in it'}"
    text = f'"{value}"' if isinstance(value, str) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def unknown_key(key: str, names: Sequence[str], where: str = "") -> str:
    """Return what is said of a key that is none of `names`, with the nearest of them; `where` as in `build`."""
    place = f"{where}.{key}" if where else key
    near = difflib.get_close_matches(key.lower().replace("-", "_"), names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    valid = f"valid in [{where}]" if where else "valid at the top"
    return f"{place} is not a setting; {hint}{valid}: {', '.join(sorted(names)) or 'nothing'}"


def _table(obj: DataclassInstance) -> dict[str, object]:
    table: dict[str, object] = {}
    for field in dataclasses.fields(obj):
        value = getattr(obj, field.name)
        if TOP_LEVEL in field.metadata:
            table |= cast(dict[str, object], _toml(value))
        elif value is not None:
            table[field.name] = _toml(value)
        elif field.init and field.default is not None:
            table[field.name] = False
    return table


def _toml(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _table(value)
    if isinstance(value, Mapping):
        return {key: _toml(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_toml(item) for item in value]
    return str(value) if isinstance(value, Path) else value
