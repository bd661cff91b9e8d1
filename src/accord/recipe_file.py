"""Read a recipe from its TOML file, and write it: strictly, with the tables of the methods that it names.

A method's own table, such as `[fedit]`, stands at the top of the file like any other. Which tables there are, and what
may be in them, the methods say; a recipe that names a method of another package may have that method's table, too.

To read a recipe imports nothing that it names: one that comes from elsewhere must not run code where no method is run,
as at a site. Until `import_methods` is called, a method of another package is a name, and its table is as TOML holds
it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from accord.errors import RecipeError
from accord.methods import METHODS, check_names, find_method, is_foreign
from accord.methods.method import Table
from accord.recipe import Recipe
from accord.toml import build, dump_toml, load_toml, parse_toml, unknown_key

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


MAX_SITES = 1000
"""Of a recipe, copies among them."""

MAX_BASES = 16
"""Recipes on which one may stand, one on another."""

PATHS = ("path", "preferences", "checkpoint", "judge", "ledger")
"""Settings, in any table, that may name a file or a folder."""


def load_recipe(path: Path | str) -> Recipe:
    """Read a recipe. `base = "other.toml"` in it starts from that recipe's settings: tables are merged, lists replaced.

    A relative path in it stands in the current folder, or else beside the file that names it.

    A site with `copies = 3` stands for three, called `<name>-1` to `<name>-3`. Methods of other packages are not
    imported; `import_methods` does that.

    Raises:
        RecipeError: the file is absent or wrong; the message names the place, the value and the remedy.
    """
    return recipe_of(_with_base(Path(path), ()))


def recipe_of(table: Mapping[str, object]) -> Recipe:
    """Make a recipe from a table as TOML holds it, without a `base`.

    Tables at the top that Accord does not know are kept as they are if a method of another package is named, and
    refused otherwise.

    Raises:
        RecipeError: as `load_recipe`.
    """
    sites = table.get("sites")
    if isinstance(sites, list):
        if (count := sum(map(_count, sites))) > MAX_SITES:
            raise RecipeError(
                f"a recipe has at most {MAX_SITES:,} sites, got {count:,} with their copies; lower copies"
            )
        table = {**table, "sites": [copy for site in sites for copy in _copies(site)]}
    kinds = method_tables([])
    known = {*kinds, *(field.name for field in fields(Recipe))}
    own = {key: value for key, value in table.items() if key in kinds}
    others = {key: value for key, value in table.items() if key not in known and isinstance(value, Mapping)}
    unread = others if _names_foreign(table) else {}
    rest = {key: value for key, value in table.items() if key not in own and key not in unread}
    recipe = build(Recipe, rest, also=[*kinds])
    for n, name in enumerate(recipe.uses):
        if not is_foreign(name):
            raise RecipeError(
                f"uses[{n}] names a method of another package, as package.module:name, got {name!r}; remove or correct "
                "it: Accord's own methods need no mention"
            )
    for name in (recipe.method, *recipe.compare):
        if not is_foreign(name):
            find_method(name, [site.name for site in recipe.sites])
    # The settings of its own method are written out, as all others are.
    tables = {} if is_foreign(recipe.method) else _defaults(recipe)
    return replace(recipe, tables={**tables, **{key: _settings(kinds[key], own[key]) for key in own}, **unread})


def import_methods(recipe: Recipe) -> Recipe:
    """Return a recipe with the tables of other packages' methods read, which imports the packages that it names.

    For what runs or plans methods, and for recipes whose packages are trusted as installed programs are.

    Raises:
        RecipeError: a method cannot be imported, or a table is unknown or wrong.
    """
    check_names(recipe)
    kinds = method_tables([recipe.method, *recipe.compare, *recipe.uses])
    tables = _defaults(recipe)
    for key, value in recipe.tables.items():
        if key not in kinds:
            known = [field.name for field in fields(Recipe) if field.name != "tables"]
            raise RecipeError(unknown_key(key, [*known, *kinds]))
        tables[key] = value if isinstance(value, kinds[key].config) else _settings(kinds[key], value)
    return replace(recipe, tables=tables)


def dump_recipe(recipe: Recipe) -> str:
    """Render a recipe as TOML from which `recipe_of` makes an equal one."""
    return dump_toml(recipe)


def renewed(text: str) -> str:
    """Return a recipe that an older Accord has written as this one would: what it did not know has its default.

    A text that is no recipe any more is returned as it is.
    """
    try:
        return dump_recipe(recipe_of(parse_toml(text, where="the run's recipe")))
    except RecipeError:
        return text


def method_tables(names: Sequence[str]) -> dict[str, Table[DataclassInstance]]:
    """Return the tables that a recipe may have for its methods: Accord's own, and those of `names` from other packages.

    Those are imported.

    Raises:
        RecipeError: a name cannot be imported, or a method's table has a name that means something else.
    """
    methods = [*METHODS.values(), *(find_method(name, ()) for name in names if is_foreign(name))]
    tables: dict[str, Table[DataclassInstance]] = {}
    for method in methods:
        for table in method.tables:
            if table.name in {field.name for field in fields(Recipe)} or tables.get(table.name, table) != table:
                raise RecipeError(f"a method's table is called [{table.name}], which means something else; rename it")
            tables[table.name] = table
    return tables


def _names_foreign(table: Mapping[str, object]) -> bool:
    lists = [each for each in (table.get("compare"), table.get("uses")) if isinstance(each, list | tuple)]
    named = [table.get("method"), *(name for each in lists for name in each)]
    return any(isinstance(name, str) and is_foreign(name) for name in named)


def _defaults(recipe: Recipe) -> dict[str, object]:
    """Return the tables of the recipe's own method, with their defaults."""
    method = find_method(recipe.method, [site.name for site in recipe.sites])
    return {table.name: table.config() for table in method.tables}


def _settings(table: Table[DataclassInstance], value: object) -> DataclassInstance:
    if not isinstance(value, Mapping):
        raise RecipeError(f"{table.name} must be a table, got {value!r}; write it as [{table.name}]")
    return build(table.config, value, table.name)


def _count(site: object) -> int:
    """Return how many sites a table of `sites` stands for."""
    if not isinstance(site, Mapping) or "copies" not in site:
        return 1
    count, name = site["copies"], site.get("name")
    if type(count) is not int or count < 1:
        raise RecipeError(f"copies of site {name!r} must be a whole number of at least 1, got {count!r}; correct it")
    return count


def _copies(site: object) -> list[object]:
    if not isinstance(site, Mapping) or "copies" not in site:
        return [site]
    own = {key: value for key, value in site.items() if key != "copies"}
    return [{**own, "name": f"{site.get('name')}-{number}"} for number in range(1, _count(site) + 1)]


def _with_base(path: Path, before: tuple[Path, ...]) -> dict[str, object]:
    if path.resolve() in before:
        raise RecipeError(f"recipe {path} is its own base, by way of {before[-1]}; remove one `base`")
    if len(before) > MAX_BASES:
        raise RecipeError(f"recipe {before[0]} stands on more than {MAX_BASES} others; merge some of them")
    table = load_toml(path)
    base = table.pop("base", None)
    table = _beside(table, path.parent)
    if base is None:
        return table
    if not isinstance(base, str):
        raise RecipeError(f"recipe {path}: base must be the path of a recipe, got {base!r}")
    return _merged(_with_base(path.parent / base, (*before, path.resolve())), table)


def _beside(table: Mapping[str, object], folder: Path) -> dict[str, object]:
    """Return the table with the paths that are beside the recipe, and not in the current folder, as absolute ones."""
    found: dict[str, object] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            found[key] = _beside(value, folder)
        elif isinstance(value, list):
            found[key] = [_beside(each, folder) if isinstance(each, Mapping) else each for each in value]
        elif key in PATHS and isinstance(value, str) and value:
            there = not Path(value).exists() and (folder / value).exists()
            found[key] = str((folder / value).resolve()) if there else value
        else:
            found[key] = value
    return found


def _merged(base: Mapping[str, object], over: Mapping[str, object]) -> dict[str, object]:
    merged = dict(base)
    for key, value in over.items():
        under = merged.get(key)
        both = isinstance(under, Mapping) and isinstance(value, Mapping)
        merged[key] = _merged(cast(Mapping[str, object], under), cast(Mapping[str, object], value)) if both else value
    return merged
