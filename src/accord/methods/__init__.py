"""Every way to align the policy, by name: MoR, its relatives, and what they are measured against.

One file a family, each with the algorithm, its own configuration and its entries. A method of one's own is named as
`package.module:name` in a recipe, where `name` is a `Method`, or a function `(job, stage) -> (model, processor)`:

    from accord.methods.fusions import everyone
    from accord.methods.method import Method, by_reward

    LARGEST = Method(by_reward(lambda job: everyone(job, my_rule)), "the largest score", needs=frozenset({"sites"}))
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from importlib import import_module
from typing import Final

from accord.errors import RecipeError
from accord.federation.messages import ScoreRange
from accord.methods import (
    bounds,
    density,
    disco,
    fedavg_reward,
    fedbis,
    fedbiscuit,
    feddpo,
    feddrm,
    fedgrpo,
    fedit,
    fusions,
    gates,
    late,
    means,
    mor,
    objectives,
    robust,
    server_alone,
    shared_head,
    single,
    sketches,
)
from accord.methods.method import Method
from accord.recipe import Recipe

METHODS: Final[dict[str, Method]] = {
    **mor.METHODS,
    **feddrm.METHODS,
    **late.METHODS,
    **disco.METHODS,
    **objectives.METHODS,
    **gates.METHODS,
    **means.METHODS,
    **density.METHODS,
    **fedgrpo.METHODS,
    **fusions.METHODS,
    **robust.METHODS,
    **single.METHODS,
    **fedavg_reward.METHODS,
    **sketches.METHODS,
    **shared_head.METHODS,
    **fedit.METHODS,
    **feddpo.METHODS,
    **fedbis.METHODS,
    **fedbiscuit.METHODS,
    **server_alone.METHODS,
    **bounds.METHODS,
}
"""All methods but those of one site, `site <name>` and `local <name>`, and those of other packages."""


def is_foreign(name: str) -> bool:
    """Tell whether a name is that of another package's method, which `find_method` imports: `package.module:name`."""
    return ":" in name


def find_method(name: str, sites: Sequence[str]) -> Method:
    """Return the method of that name; one of another package is imported, which runs that package's code.

    Args:
        name: a name of the table, of one site's methods, or `package.module:name`.
        sites: the names of the recipe's sites.

    Raises:
        RecipeError: there is none.
    """
    if name in METHODS:
        return METHODS[name]
    family, _, site = name.partition(" ")
    if family in single.PER_SITE and site in sites:
        return single.PER_SITE[family](site)
    if is_foreign(name):
        return _imported(name)
    known = [*METHODS, *(f"{word} {site}" for word in single.PER_SITE for site in sites)]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    raise RecipeError(f"there is no method {name!r}; {hint}there are {', '.join(known)}, and package.module:function")


def _imported(name: str) -> Method:
    module, _, attribute = name.partition(":")
    try:
        found = getattr(import_module(module), attribute)
    except Exception as error:  # a module of somebody else's may fail in any way
        raise RecipeError(f"the method {name!r} cannot be imported: {error}; correct the name") from error
    if isinstance(found, Method):
        return found
    if not callable(found):
        raise RecipeError(f"{name!r} is a {type(found).__name__}; a method is a Method or a function (job, stage)")
    return Method(found, name, needs=frozenset({"sites", "router"}), asks=mor.asks)


def check_names(recipe: Recipe) -> Recipe:
    """Return the recipe, whose methods there are.

    Raises:
        RecipeError: there is no such method.
    """
    for name in (recipe.method, *recipe.compare, *recipe.tried):
        find_method(name, [site.name for site in recipe.sites])
    return recipe


def check_methods(recipe: Recipe, names: Sequence[str], *, elsewhere: bool = False) -> None:
    """Refuse a recipe by which methods cannot be done, before anything is trained.

    Args:
        recipe: with its methods' tables.
        names: the methods.
        elsewhere: whether the sites are other organisations'.

    Raises:
        RecipeError: names the method, what it lacks, and the remedy.
    """
    for name in names:
        method = find_method(name, [site.name for site in recipe.sites])
        method.check(recipe)
        if "answers" in method.needs and not any(site.answers for site in recipe.sites):
            raise RecipeError(
                f"the method {name!r} needs sites whose own models answer questions, and none does; add "
                f"answers = true to the [[sites]] tables, or leave {name!r} out"
            )
        if elsewhere and "sums" in method.needs and (silent := [site.name for site in recipe.sites if not site.sums]):
            raise RecipeError(
                f"the method {name!r} needs sums of every site's prompts, and none go from {', '.join(silent)} to "
                f"another organisation; add sums = true to the [[sites]] tables, or leave {name!r} out"
            )
        if elsewhere and "private" in method.needs:
            raise RecipeError(
                f"the method {name!r} needs the sites' private questions or pairs, which never leave other "
                f"organisations; run it in one process, without --engine flare, or leave {name!r} out"
            )
        if elsewhere and method.scores not in ("recipe", recipe.scores):
            raise RecipeError(
                f"the method {name!r} asks for {_form(method.scores)}, and other organisations' sites send them "
                f"standardised and as [scores] says; run it in one process, without --engine flare, or leave {name!r} "
                "out"
            )


def _form(scores: ScoreRange | str | None) -> str:
    if isinstance(scores, ScoreRange):
        return f"scores clipped to [{scores.low:g}, {scores.high:g}]"
    return "unclipped scores" if scores is None else f"{scores} scores"


def needed(recipe: Recipe, names: Sequence[str]) -> set[str]:
    """Return what the methods of these names need, all together."""
    sites = [site.name for site in recipe.sites]
    return {need for name in names for need in find_method(name, sites).needs}
