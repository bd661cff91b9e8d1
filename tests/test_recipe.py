"""A recipe refuses what cannot run before anything runs."""

import re
import tomllib
from pathlib import Path

import pytest

import accord.cli
from accord.errors import RecipeError
from accord.recipe import ARMS, MAX_SEED, Prompts, Recipe, SiteConfig, load_recipe
from accord.toml import build, dump_toml

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "recipes").rglob("*.toml"))
INF = float("inf")
SITES = [{"name": "a", "checkpoint": "accord/idefics3"}, {"name": "b", "checkpoint": "accord/idefics3"}]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_and_survives_being_written(path):
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert build(Recipe, tomllib.loads(dump_toml(recipe))) == recipe


def test_the_demo_is_the_one_that_ships():
    assert (ROOT / "recipes" / "demo.toml").read_bytes() == accord.cli.DEMO.read_bytes()


def test_the_least_recipe():
    """A name and a site are enough: easy-VQA, the shipped policy, top-1 routing."""
    recipe = build(Recipe, {"name": "x", "sites": SITES[:1]})
    assert recipe == Recipe("x", (SiteConfig("a", "accord/idefics3"),))
    assert (recipe.questions[0].kind, recipe.routing.mode) == ("easy-vqa", "top1")


@pytest.mark.parametrize("arm", [*ARMS, "site a", "site b"])
def test_every_comparison_may_be_named(arm):
    assert build(Recipe, {"name": "x", "sites": SITES, "compare": [arm]}).compare == (arm,)


def site(**fields):
    return [{**SITES[0], **fields}]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sites": []}, "at least one [[sites]] table, got none"),
        ({"sites": SITES[:1] * 2}, "two sites have the same name in ['a', 'a']"),
        ({"sites": site(name="")}, "names a folder; got ''"),
        ({"sites": site(name="../a")}, "names a folder; got '../a'"),
        ({"sites": site(name="a b")}, "names a folder; got 'a b'"),
        ({"sites": [{"name": "a"}]}, "sites[0].checkpoint is missing"),
        ({"sites": site(lora={"rnk": 4})}, "sites[0].lora.rnk is not a setting; did you mean rank?"),
        ({"compare": ["site c"]}, "compare names 'site c'; it may name routed, routed-soft"),
        ({"compare": ["pooled"], "sites": site(name="pooled")}, "may not be called 'pooled'"),
        (
            {"compare": ["pooled"], "sites": site(preferences="pairs.jsonl", finetune=False)},
            "no site holds any; add finetune = false to [pooled]",
        ),
        ({"seed": -1}, f"seed must be between 0 and {MAX_SEED}, got -1"),
        ({"seed": MAX_SEED + 1}, f"got {MAX_SEED + 1}"),
        ({"threads": -1}, "threads must be 0 (torch's default) or more, got -1"),
        ({"questions": [{"kind": "folder"}]}, "a source of kind 'folder' needs a path"),
        ({"questions": [{"kind": "zip", "path": "x"}]}, 'must be one of "easy-vqa", "arithmetic", "folder", "hugg'),
        ({"evaluation": {"questions": -1}}, "[evaluation] questions must be at least 0, got -1"),
        ({"evaluation": {"gallery": -1}}, "[evaluation] gallery must be at least 0, got -1"),
        ({"routing": {"mode": "top2"}}, 'routing.mode must be one of "top1", "soft"'),
        ({"router": {"width": 10, "heads": 4}}, "width must be a multiple of heads, got 10 and 4"),
        ({"alignment": {"group_size": 1}}, "group_size must be at least 2"),
        ({"alignment": {"temperature": 0.0}}, "[alignment] temperature must be above 0, got 0.0; raise temperature"),
        ({"alignment": {"temperature": -1.0}}, "temperature must be at least 0, got -1.0"),
        ({"alignment": {"learning_rate": INF}}, "learning_rate must be finite, got inf; lower learning_rate"),
        ({"alignment": {"lora": {"rank": 0}}}, "[alignment.lora] rank must be at least 1, got 0; raise rank"),
        ({"router": {"learning_rate": INF}}, "[router] learning_rate must be finite, got inf"),
        ({"sites": site(finetune={"learning_rate": INF})}, "learning_rate must be finite, got inf"),
        ({"sites": site(reward_model={"learning_rate": INF})}, "learning_rate must be finite, got inf"),
        ({"sites": site(lora={"rank": -2})}, "rank must be at least 1, got -2"),
        ({"sites": site(lora={"alpha": 0})}, "alpha must be at least 1, got 0"),
        ({"sites": site(lora={"dropout": 1.0})}, "dropout must be below 1, got 1.0; lower dropout"),
        ({"sites": site(lora={"dropout": -0.1})}, "dropout must be at least 0, got -0.1"),
        ({"routing": {"deadline": 0.0}}, "[routing] deadline must be above 0, got 0.0; raise deadline"),
        ({"routing": {"deadline": -1.0}}, "deadline must be at least 0, got -1.0"),
        ({"routing": {"deadline": INF}}, "deadline must be finite, got inf"),
        ({"routing": {"quorum": 1.01}}, "quorum must be in [0, 1], got 1.01; correct routing.quorum"),
        ({"routing": {"quorum": -0.01}}, "quorum must be in [0, 1], got -0.01"),
        ({"pretrain": {"vision_steps": 0}}, "[pretrain] vision_steps must be at least 1, got 0"),
        ({"pretrain": {"vision_learning_rate": INF}}, "vision_learning_rate must be finite, got inf"),
        ({"aligment": {}}, "aligment is not a setting; did you mean alignment?"),
    ],
)
def test_what_is_refused(changes, said):
    with pytest.raises(RecipeError, match=re.escape(said)):
        build(Recipe, {"name": "x", "sites": SITES, **changes})


def test_a_recipe_may_start_from_another(tmp_path):
    """Tables are merged, lists replaced; a chain that comes back to itself is refused."""
    (tmp_path / "first.toml").write_text(
        'name = "first"\nseed = 3\n[[sites]]\nname = "a"\ncheckpoint = "accord/idefics3"\n'
        "[alignment]\nsteps = 7\nkl = 0.5\n"
    )
    (tmp_path / "second.toml").write_text(
        'base = "first.toml"\nname = "second"\n[alignment]\nsteps = 9\n[[sites]]\nname = "b"\n'
        'checkpoint = "accord/idefics3"\nflipped = 0.2\n'
    )
    recipe = load_recipe(tmp_path / "second.toml")
    assert (recipe.name, recipe.seed, recipe.alignment.steps, recipe.alignment.kl) == ("second", 3, 9, 0.5)
    assert [(site.name, site.flipped) for site in recipe.sites] == [("b", 0.2)]
    (tmp_path / "loop.toml").write_text('base = "loop.toml"\nname = "loop"\n')
    with pytest.raises(RecipeError, match=r"loop\.toml is its own base"):
        load_recipe(tmp_path / "loop.toml")
    (tmp_path / "wrong.toml").write_text('base = 3\nname = "wrong"\n')
    with pytest.raises(RecipeError, match="base must be the path of a recipe, got 3"):
        load_recipe(tmp_path / "wrong.toml")


def test_prompts_of_some_types_only(ask):
    chosen = Prompts(question_types=("colour",))
    assert chosen.wants(ask(0)) and not chosen.wants(ask(1, question_type="shape"))


def test_copies_of_a_site(tmp_path):
    file = tmp_path / "x.toml"
    file.write_text(
        'name = "x"\n[dealing]\nalpha = 0.1\n'
        '[[sites]]\nname = "a"\ncheckpoint = "accord/idefics3"\ncopies = 2\n'
        '[[sites]]\nname = "b"\ncheckpoint = "accord/llava-clip-llama"\n'
    )
    recipe = load_recipe(file)
    assert [(site.name, site.checkpoint) for site in recipe.sites] == [
        ("a-1", "accord/idefics3"),
        ("a-2", "accord/idefics3"),
        ("b", "accord/llava-clip-llama"),
    ]
    assert build(Recipe, tomllib.loads(dump_toml(recipe))) == recipe


@pytest.mark.parametrize("copies", ["0", "true", "2.5", '"two"'])
def test_copies_that_are_no_number(tmp_path, copies):
    file = tmp_path / "x.toml"
    file.write_text(f'name = "x"\n[[sites]]\nname = "a"\ncheckpoint = "accord/idefics3"\ncopies = {copies}\n')
    with pytest.raises(RecipeError, match="copies of site 'a' must be a whole number of at least 1"):
        load_recipe(file)


@pytest.mark.parametrize("own", [{"domains": ["d"]}, {"question_types": ["t"]}, {"fraction": 0.5}])
def test_a_site_does_not_say_what_it_holds_where_that_is_drawn(own):
    with pytest.raises(RecipeError, match="'b' says itself what it holds"):
        build(Recipe, {"name": "x", "dealing": {}, "sites": [SITES[0], {**SITES[1], **own}]})
