"""The laws of every method: what is asked about it elsewhere can be answered, and nothing has two names."""

import re
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import get_args

import pytest

from accord.errors import RecipeError
from accord.federation.engine import InProcessEngine
from accord.federation.messages import ScoreRange
from accord.methods import (
    METHODS,
    bounds,
    check_methods,
    check_names,
    density,
    disco,
    fedavg_reward,
    fedbis,
    fedbiscuit,
    feddpo,
    feddrm,
    fedgrpo,
    fedit,
    find_method,
    fusions,
    gates,
    late,
    means,
    mor,
    needed,
    objectives,
    robust,
    server_alone,
    shared_head,
    single,
    sketches,
)
from accord.methods.method import Method, Need, Role, Table, by_reward
from accord.pipeline import align_policy, execute
from accord.pipeline.bench import plan_grid
from accord.plan import describe
from accord.recipe import Recipe, SiteConfig
from accord.recipe_file import dump_recipe, method_tables
from accord.rewards.certificate import UNCOVERED
from accord.rewards.private import Privacy
from accord.stages.job import Job

FAMILIES = (
    *(mor, feddrm, late, disco, objectives, density, robust, gates, means, fedgrpo, fusions, single),
    *(fedavg_reward, sketches, shared_head, fedit, feddpo, fedbis, fedbiscuit, server_alone, bounds),
)
SITES = tuple(SiteConfig(name, "accord/idefics3", answers=True, sums=True) for name in "ab")
ALL = [*METHODS, "site a", "local b"]
every = pytest.mark.parametrize("name", ALL)


def method_of(name):
    return find_method(name, ("a", "b"))


def test_each_name_is_one_familys():
    """In the table are the families' methods and no others: none is overwritten by another of the same name."""
    names = [name for family in FAMILIES for name in family.METHODS]
    assert sorted(names) == sorted(set(names)) == sorted(METHODS)
    assert all(METHODS[name] is family.METHODS[name] for family in FAMILIES for name in family.METHODS)
    assert not any(name.partition(" ")[0] in single.PER_SITE or ":" in name for name in METHODS)


def test_every_file_of_methods_is_in_the_table():
    files = {path.stem for path in Path(mor.__file__).parent.glob("*.py")} - {"__init__", "method"}
    assert {family.__name__.rpartition(".")[2] for family in FAMILIES} == files


@every
def test_a_method_says_what_it_is(name):
    method = method_of(name)
    assert method.role in get_args(Role) and method.needs <= set(get_args(Need))
    assert method.about and "\n" not in method.about and len(method.about) <= 100 and method.about.isprintable()
    assert callable(method.align)


@every
def test_what_is_asked_of_a_recipe_is_answered(name):
    """Steps are above 0; what asks sites needs them, and asks no more than there are."""
    method, recipe = method_of(name), Recipe("x", SITES)
    assert method.steps(recipe) > 0
    assert 0 <= method.asks(recipe) <= len(SITES)
    assert not method.asks(recipe) or "sites" in method.needs
    assert "router" not in method.needs or "sites" in method.needs
    assert isinstance(method.training(recipe), str)
    assert not (method.training(recipe) and method.asks(recipe))  # GRPO, or local steps
    assert method.reward is None or method.asks(recipe)
    assert method.opened is None or "router" in method.needs


@every
def test_a_methods_tables_have_names_of_their_own_and_defaults(name):
    known = {field.name for field in fields(Recipe)}
    for table in method_of(name).tables:
        assert table.name not in known and re.fullmatch(r"[a-z_]+", table.name)
        assert is_dataclass(table.config) and table.of(Recipe("x", SITES)) == table.config()


def test_a_table_of_one_name_is_one_table():
    tables = {table.name: table for method in METHODS.values() for table in method.tables}
    assert method_tables([]) == tables
    assert all(tables[table.name] == table for method in METHODS.values() for table in method.tables)


@pytest.mark.parametrize("role", ["competes", "control", "chance", "bound", "ceiling"])
def test_every_role_is_somebodys(role):
    assert role in get_args(Role) and any(method.role == role for method in METHODS.values())


def test_there_is_one_ceiling_and_it_is_the_ground_truth():
    assert [name for name, method in METHODS.items() if method.role == "ceiling"] == ["ground-truth"]


@pytest.mark.parametrize(
    ("name", "needs"),
    [
        ("routed", {"sites", "router"}),
        ("mor", {"sites", "router"}),
        ("anchored", {"sites", "router"}),
        ("preference-gate", {"sites"}),
        ("average", {"sites"}),
        ("site a", {"sites"}),
        ("fedgrpo", {"sites", "answers"}),
        ("fedgrpo-answer", {"sites", "answers"}),
        ("fedgrpo-random", {"sites"}),
        ("fedit-fedavg", {"private"}),
        ("fedbis", {"private"}),
        ("server-alone", set()),
        ("ground-truth", set()),
    ],
)
def test_what_must_be_there_before(name, needs):
    assert method_of(name).needs == needs == needed(Recipe("x", SITES), [name])


def test_several_methods_need_what_each_of_them_needs():
    recipe = Recipe("x", SITES)
    assert needed(recipe, []) == set()
    assert needed(recipe, ["average", "ground-truth"]) == {"sites"}
    assert needed(recipe, ["fedgrpo", "routed"]) == {"sites", "router", "answers"}


def test_a_method_is_found_by_name():
    assert find_method("mor", ()) is METHODS["mor"]
    assert find_method("site b", ("a", "b")).about == "site b alone" and find_method("local a", "ab").needs == {
        "sites",
        "private",
    }


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("avrage", "there is no method 'avrage'; did you mean average?"),
        ("fedgrpo_reward", "did you mean fedgrpo-reward?"),
        ("site c", "there is no method 'site c'; did you mean site "),
        ("site", "there is no method 'site'"),
        ("qqq", "there is no method 'qqq'; there are routed, "),
        ("no_such_module:METHOD", "the method 'no_such_module:METHOD' cannot be imported: No module named"),
        ("accord.methods.mor:no_such", "cannot be imported: module 'accord.methods.mor' has no attribute 'no_such'"),
        (":x", "the method ':x' cannot be imported"),
        ("accord.methods.single:QUESTIONS", "'accord.methods.single:QUESTIONS' is a int; a method is a Method or a"),
    ],
)
def test_what_is_no_method_is_named(name, said):
    with pytest.raises(RecipeError, match=re.escape(said)):
        find_method(name, ("a", "b"))
    for wrong in (Recipe("x", SITES, method=name), Recipe("x", SITES, compare=("routed", name))):
        with pytest.raises(RecipeError, match=re.escape(said)):
            check_names(wrong)


def test_a_function_is_a_method_with_sites_and_a_router():
    found = find_method("accord.methods.single:random_site", ("a", "b"))
    assert found.align is single.random_site and found.needs == {"sites", "router"} and found.role == "competes"


@pytest.mark.parametrize("own", [None, 0.5])
def test_a_reward_becomes_a_method(job, monkeypatch, own):
    """It is aligned by GRPO under the stage's name, with the recipe's KL weight or the method's, all else the same."""
    seen = []
    monkeypatch.setattr("accord.methods.method.run_grpo", lambda *given, **more: seen.append((given, more)))
    change = {} if own is None else {"change": lambda settings: replace(settings, kl=own)}
    by_reward(lambda job: (job, "reward"), **change)(job, "compare mine")
    ((given, more),) = seen
    assert given == (job, "compare mine", (job, "reward")) and more["encoder"] is None
    kl = job.recipe.alignment.kl if own is None else own
    assert more["settings"].kl == kl and type(more["settings"]) is type(job.recipe.alignment)
    assert more["settings"] == job.recipe.alignment or own is not None


def test_a_table_of_another_type_is_refused():
    """Whoever makes a recipe in Python may put anything there; defaults in its place would be another experiment."""
    table = Table("fedit", fedit.FedITConfig)
    own = fedit.FedITConfig(mu=0.5)
    assert table.of(Recipe("x", SITES, tables={"fedit": own})) is own
    assert table.of(Recipe("x", SITES)) == fedit.FedITConfig()
    with pytest.raises(RecipeError, match=r"\[fedit\] must be a FedITConfig, got a dict; .*import_methods"):
        table.of(Recipe("x", SITES, tables={"fedit": {"mu": 0.5}}))


def test_a_method_asks_nothing_by_default():
    bare, recipe = Method(lambda job, stage: None), Recipe("x", SITES)
    assert (bare.role, bare.needs, bare.tables, bare.asks(recipe)) == ("competes", frozenset(), (), 0)
    assert bare.steps(recipe) == recipe.alignment.steps and bare.findings(None, "align", ("a", "b")) == {}


PRIVATE = ("pooled", "local a", "fedit-fedavg", "fedit-scaffold", "feddpo", "fedbis", "fedbiscuit", "fedavg-reward")
OTHER_SCORES = {
    "routed-unclipped": "unclipped scores",
    "routed-raw": "raw scores",
    "median": r"scores clipped to \[-2, 2\]",
    "minimum": r"scores clipped to \[-2, 2\]",
}


@pytest.mark.parametrize("name", PRIVATE)
def test_private_data_of_other_organisations_is_asked_for_by_no_method(name):
    recipe = Recipe("x", SITES)
    check_methods(recipe, [name])
    with pytest.raises(RecipeError, match=f"'{name}' needs the sites' private .* without --engine flare, or leave"):
        check_methods(recipe, ["routed", name], elsewhere=True)


@pytest.mark.parametrize("name", OTHER_SCORES)
def test_other_organisations_send_scores_in_one_form(name):
    recipe = Recipe("x", SITES)
    check_methods(recipe, [name])
    with pytest.raises(RecipeError, match=f"'{name}' asks for {OTHER_SCORES[name]}, and other organisations' sites"):
        check_methods(recipe, [name], elsewhere=True)


def test_a_form_that_is_the_recipes_is_sent():
    check_methods(Recipe("x", SITES, scores=None), ["routed-unclipped"], elsewhere=True)
    check_methods(Recipe("x", SITES, scores=ScoreRange(-2.0, 2.0)), ["median", "minimum"], elsewhere=True)


@every
def test_every_method_can_be_done_by_sites_that_hold_everything(name):
    """In one process; elsewhere all but those that need private data or another form of scores."""
    recipe, method = Recipe("x", SITES), method_of(name)
    check_methods(recipe, [name])
    if "private" not in method.needs and method.scores == "recipe":
        check_methods(recipe, [name], elsewhere=True)


@pytest.mark.parametrize(
    ("name", "site", "said"),
    [
        ("fedgrpo", {}, "site 'a' does not answer questions, .* add answers = true to it"),
        ("fedgrpo-answer", {}, "site 'a' does not answer questions"),
        ("pooled", {"preferences": "p.jsonl", "finetune": None}, r"'pooled' fine-tunes on .* \[pooled\]"),
        ("local b", {"preferences": "p.jsonl", "finetune": None}, "'local b' aligns on private questions of site b"),
        ("fedit-fedprox", {"preferences": "p.jsonl", "finetune": None}, "FedIT tunes the policy on the sites' private"),
    ],
)
def test_what_a_method_lacks_is_told_before_anything_is_trained(job, monkeypatch, tmp_path, name, site, said):
    """By a run, a plan and a grid alike."""
    sites = tuple(SiteConfig(each, "accord/idefics3", **site) for each in "ab")
    job.recipe = Recipe("x", sites, compare=(name,))
    monkeypatch.setattr(Job, "doing", lambda *_, **__: pytest.fail("a stage was begun"))
    with pytest.raises(RecipeError, match=said):
        execute(job)
    with pytest.raises(RecipeError, match=said):
        describe(job.recipe)
    file = tmp_path / "x.toml"
    file.write_text(dump_recipe(job.recipe))
    with pytest.raises(RecipeError, match=said):
        plan_grid([file], seeds=[0], out=tmp_path / "bench")


def test_what_cannot_be_had_elsewhere_is_told_before_the_first_stage(job, monkeypatch):
    job.recipe, job.engine = Recipe("x", SITES, method="pooled"), InProcessEngine({})
    monkeypatch.setattr(Job, "doing", lambda *_, **__: pytest.fail("a stage was begun"))
    for begin in (execute, align_policy):
        with pytest.raises(RecipeError, match="'pooled' needs the sites' private"):
            begin(job)


def test_a_method_of_another_package_that_needs_answers_is_told_of_them(monkeypatch):
    monkeypatch.setitem(METHODS, "mine", Method(lambda job, stage: None, needs=frozenset({"sites", "answers"})))
    silent = tuple(SiteConfig(name, "accord/idefics3") for name in "ab")
    with pytest.raises(RecipeError, match=r"'mine' needs sites whose own models answer .* add answers = true"):
        check_methods(Recipe("x", silent), ["mine"])
    check_methods(Recipe("x", (silent[0], SITES[1])), ["mine"])


PRIVATE_SITE = SiteConfig("b", "accord/idefics3", answers=True, finetune=None, privacy=Privacy())
DOCS = Path(__file__).resolve().parents[2] / "docs"


def refused_where_private(name):
    """Tell whether a recipe with a private site is refused; whatever the method does without one is allowed."""
    try:
        method_of(name).check(Recipe("x", (SITES[0], PRIVATE_SITE)))
    except RecipeError as error:
        return f"site 'b' has privacy, and '{name}' " in str(error) and f"leave '{name}' out" in str(error)
    return False


def test_what_a_guarantee_would_not_hold_for_is_refused():
    refused = {"shared-head", "shared-head-rotated", "routed-gated", "fedavg-reward-near"}
    assert {name for name in METHODS if refused_where_private(name)} == refused
    with pytest.raises(RecipeError, match="'b' has privacy, and 'shared-head' judges by a head that is trained on its"):
        check_methods(Recipe("x", (SITES[0], PRIVATE_SITE)), ["routed", "shared-head"])


def test_every_method_that_gathers_sums_is_on_the_certificate_or_refused():
    """Sites are asked for them under the task "means", wherever a family's source says so; and both pages name it."""
    asking = re.compile(r'open_training\([^)]*\{"means":')
    families = [family for family in FAMILIES if asking.search(Path(family.__file__).read_text(encoding="utf-8"))]
    names = [name for family in families for name in family.METHODS]
    assert {"means", "density", "routed-gated"} <= set(names)
    certificate = re.findall(r"[\w-]+", UNCOVERED["gates"])
    assert [name for name in names if name not in certificate and not refused_where_private(name)] == []
    for page in ("privacy.md", "threat-model.md"):
        text = (DOCS / page).read_text(encoding="utf-8")
        assert [name for name in names if f"`{name}`" not in text] == []


def test_the_methods_that_keep_a_guarantee_train_nothing_at_the_sites():
    """Those that docs/privacy.md lists are all that need sites alone, but for the bound, FedGRPO and late routers."""
    text = (DOCS / "privacy.md").read_text(encoding="utf-8")
    (listed,) = re.findall(r"That is so by (.*?), where the recipe names no other", text, re.S)
    others = {*late.METHODS, *fedgrpo.METHODS, "oracle"}
    keep = {name for name in METHODS if method_of(name).needs == {"sites"} and name not in others}
    assert set(re.findall(r"`([^`]+)`", listed)) == keep | {"site <name>"} and method_of("site a").needs == {"sites"}


PAGE = DOCS / "methods.md"


def test_the_page_names_every_method():
    """Each once at least, as code."""
    text = PAGE.read_text(encoding="utf-8")
    assert [name for name in METHODS if f"`{name}`" not in text] == []
