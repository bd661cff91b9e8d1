"""A recipe refuses what cannot run before anything runs."""

import re

import pytest

from accord.errors import RecipeError
from accord.recipe import MAX_SEED, EncoderConfig, Prompts, Recipe, SiteConfig
from accord.toml import build

INF = float("inf")
SITES = [{"name": "a", "checkpoint": "accord/idefics3"}, {"name": "b", "checkpoint": "accord/idefics3"}]


def test_the_least_recipe():
    """A name and a site are enough: easy-VQA, the shipped policy, top-1 routing."""
    recipe = build(Recipe, {"name": "x", "sites": SITES[:1]})
    assert recipe == Recipe("x", (SiteConfig("a", "accord/idefics3"),))
    assert (recipe.questions[0].kind, recipe.routing.mode) == ("easy-vqa", "top1")
    assert (recipe.method, recipe.compare, recipe.encoder, recipe.tables) == ("routed", (), EncoderConfig(""), {})


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
        ({"seed": -1}, f"seed must be between 0 and {MAX_SEED}, got -1"),
        ({"seed": MAX_SEED + 1}, f"got {MAX_SEED + 1}"),
        ({"threads": -1}, "threads must be 0 (torch's default) or more, got -1"),
        ({"questions": [{"kind": "folder"}]}, "a source of kind 'folder' needs a path"),
        ({"questions": [{"kind": "zip", "path": "x"}]}, 'must be one of "easy-vqa", "arithmetic", "radiology'),
        (
            {"questions": [{"kind": "captions", "path": "x"}, {"kind": "easy-vqa"}]},
            "got 2 sources of questions and captions among them; keep one [[questions]] table",
        ),
        ({"sites": site(judgements={})}, 'judgements are of captions; add [[questions]] with kind = "captions"'),
        (
            {"sites": site(judgements={}, preferences="x"), "questions": [{"kind": "captions", "path": "x"}]},
            "site 'a' has preferences and judgements, and pairs are made of either; leave one out",
        ),
        ({"sites": site(judgements={"experts": [3]})}, "experts are some of 0, 1 and 2, got [3]"),
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
        ({"pretrain": {"instruction": {"learning_rate": INF}}}, "learning_rate must be finite, got inf"),
        ({"method": 3}, "method must be a text, got 3"),
        ({"encoder": {"checkpont": "x"}}, "encoder.checkpont is not a setting; did you mean checkpoint?"),
        ({"tables": {}}, "tables is not a setting"),
        ({"fedgrpo": {}}, "fedgrpo is not a setting"),
        ({"aligment": {}}, "aligment is not a setting; did you mean alignment?"),
    ],
)
def test_what_is_refused(changes, said):
    with pytest.raises(RecipeError, match=re.escape(said)):
        build(Recipe, {"name": "x", "sites": SITES, **changes})


def test_prompts_of_some_types_only(ask):
    chosen = Prompts(question_types=("colour",))
    assert chosen.wants(ask(0)) and not chosen.wants(ask(1, question_type="shape"))


@pytest.mark.parametrize("own", [{"domains": ["d"]}, {"question_types": ["t"]}, {"fraction": 0.5}])
def test_a_site_does_not_say_what_it_holds_where_that_is_drawn(own):
    with pytest.raises(RecipeError, match="'b' says itself what it holds"):
        build(Recipe, {"name": "x", "dealing": {}, "sites": [SITES[0], {**SITES[1], **own}]})
