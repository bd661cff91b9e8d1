"""Name the first setting in which two recipes differ."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from accord.errors import RecipeError
from accord.toml import parse_toml

OF_NO_RESULT: Final = ("processes", "features")
"""Tables and settings of a recipe that change no byte of a result: a run goes on with other values of them."""

OF_WAITING: Final = ("routing.deadline", "routing.quorum")
"""For whom a run waits, and how long: what an operator changes where a site does not come back."""


def first_difference(old: str, new: str) -> str | None:
    """Name the first setting in which two recipes differ: not comments, layout, `OF_NO_RESULT` and `OF_WAITING`."""
    try:
        before, after = _settings(old), _settings(new)
    except RecipeError:
        return None if old == new else _first_line(old, new)
    for key in [*before, *(key for key in after if key not in before)]:
        if key not in after:
            return f"{key} was {before[key]} and is now left out"
        if key not in before:
            return f"{key} was left out and is now {after[key]}"
        if before[key] != after[key]:
            return f"{key} was {before[key]} and is now {after[key]}"
    return None


def _settings(text: str) -> dict[str, str]:
    found = parse_toml(text, where="the recipe")
    return {
        key: value
        for key, value in _flat({name: table for name, table in found.items() if name not in OF_NO_RESULT})
        if key not in OF_WAITING
    }


def _first_line(old: str, new: str) -> str:
    before, after = old.splitlines(), new.splitlines()
    same = next(
        (i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(before), len(after))
    )
    return f"line {same + 1} was {''.join(before[same : same + 1])!r} and is now {''.join(after[same : same + 1])!r}"


def _flat(value: object, place: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _flat(item, f"{place}.{key}" if place else key)
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        for index, item in enumerate(value):
            yield from _flat(item, f"{place}[{index}]")
    else:
        yield place, repr(value)
