"""Read a recipe from its TOML file, and write it: strictly, with the tables of the methods that it names.

A method's own table, such as `[fedit]`, stands at the top of the file like any other. Which tables there are, and what
may be in them, the methods say; a recipe that names a method of another package may have that method's table, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from accord.errors import RecipeError
from accord.methods import METHODS, check_names, find_method
from accord.methods.method import Table
from accord.recipe import Recipe
from accord.toml import build, dump_toml, load_toml

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def load_recipe(path: Path | str) -> Recipe:
    """Read a recipe. `base = "other.toml"` in it starts from that recipe's settings: tables are merged, lists replaced.

    A site with `copies = 3` stands for three, called `<name>-1` to `<name>-3`.

    Raises:
        RecipeError: the file is absent or wrong; the message names the place, the value and the remedy.
    """
    return recipe_of(_with_base(Path(path), ()))


def recipe_of(table: Mapping[str, object]) -> Recipe:
    """Make a recipe from a table as TOML holds it, without a `base`.

    Raises:
        RecipeError: as `load_recipe`.
    """
    sites = table.get("sites")
    if isinstance(sites, list):
        table = {**table, "sites": [copy for site in sites for copy in _copies(site)]}
    compared = table.get("compare", ())
    lists = [each for each in (compared, table.get("uses", ())) if isinstance(each, list | tuple)]
    named = [table.get("method", "routed"), *(name for each in lists for name in each)]
    kinds = method_tables([name for name in named if isinstance(name, str)])
    own = {key: value for key, value in table.items() if key in kinds}
    recipe = build(Recipe, {key: value for key, value in table.items() if key not in own}, also=[*kinds])
    # The settings of its own method are written out, as all others are.
    main = find_method(recipe.method, [site.name for site in recipe.sites])
    tables: dict[str, object] = {kind.name: kind.config() for kind in main.tables}
    for key, value in own.items():
        if not isinstance(value, Mapping):
            raise RecipeError(f"{key} must be a table, got {value!r}; write it as [{key}]")
        tables[key] = build(kinds[key].config, value, key)
    return check_names(replace(recipe, tables=tables))


def dump_recipe(recipe: Recipe) -> str:
    """Render a recipe as TOML from which `recipe_of` makes an equal one."""
    return dump_toml(recipe)


def method_tables(names: Sequence[str]) -> dict[str, Table[DataclassInstance]]:
    """Return the tables that a recipe may have for its methods: Accord's own, and those of `names` from other packages.

    Raises:
        RecipeError: a name cannot be imported, or a method's table has a name that means something else.
    """
    methods = [*METHODS.values(), *(find_method(name, ()) for name in names if ":" in name)]
    tables: dict[str, Table[DataclassInstance]] = {}
    for method in methods:
        for table in method.tables:
            if table.name in {field.name for field in fields(Recipe)} or tables.get(table.name, table) != table:
                raise RecipeError(f"a method's table is called [{table.name}], which means something else; rename it")
            tables[table.name] = table
    return tables


def _copies(site: object) -> list[object]:
    if not isinstance(site, Mapping) or "copies" not in site:
        return [site]
    own = {key: value for key, value in site.items() if key != "copies"}
    count, name = site["copies"], site.get("name")
    if type(count) is not int or count < 1:
        raise RecipeError(f"copies of site {name!r} must be a whole number of at least 1, got {count!r}; correct it")
    return [{**own, "name": f"{name}-{number}"} for number in range(1, count + 1)]


def _with_base(path: Path, before: tuple[Path, ...]) -> dict[str, object]:
    if path in before:
        raise RecipeError(f"recipe {path} is its own base, by way of {before[-1]}; remove one `base`")
    table = load_toml(path)
    base = table.pop("base", None)
    if base is None:
        return table
    if not isinstance(base, str):
        raise RecipeError(f"recipe {path}: base must be the path of a recipe, got {base!r}")
    return _merged(_with_base(path.parent / base, (*before, path)), table)


def _merged(base: Mapping[str, object], over: Mapping[str, object]) -> dict[str, object]:
    merged = dict(base)
    for key, value in over.items():
        under = merged.get(key)
        both = isinstance(under, Mapping) and isinstance(value, Mapping)
        merged[key] = _merged(cast(Mapping[str, object], under), cast(Mapping[str, object], value)) if both else value
    return merged
